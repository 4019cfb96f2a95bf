# Everything a reader or a developer does here; `make` alone prints this list.
# Works with POSIX sh and with make 3.81 or newer (the one of macOS).

PYTHON = python3.11 python3 python3.14 python3.13 python3.12
FIG = fig
PROFILE = smoke

VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.sogrid-installed
PEERS = $(VENV)/peers
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
LAB = _build/lab/book/index.ipynb
NOTEBOOKS = find book -name '*.ipynb' ! -path '*/.ipynb_checkpoints/*'

.PHONY: help install book book-fresh pdf test test-browser test-all claims lint format lab experiments bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Make .venv and install everything into it (the other targets do this for you)

$(STAMP): requirements.txt pyproject.toml book/pyproject.toml
	@for python in $(PYTHON); do \
	  test -x $(BIN)/python && break; \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
	  echo "making $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV); \
	done; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "sogrid needs Python 3.11 or newer, and none of these is: $(PYTHON)." >&2; \
	  echo "Install one, or name yours: make PYTHON=/path/to/python (and remove an old $(VENV))." >&2; \
	  exit 1; \
	}
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e . -e book
	@touch $(STAMP)

book: $(STAMP) ## Build the book into _build/html; a warning is an error
	$(BIN)/jupyter-book build . -W -n --keep-going

book-fresh: ## Build the book from nothing: every page is executed
	rm -rf _build
	$(MAKE) book

pdf: book ## Print the book into _build/book.pdf: it needs Chromium
	cd tests && ../$(BIN)/python -m book.pdf ../_build/book.pdf

test: $(STAMP) ## Run all tests but those in a browser
	$(PYTEST) -m "not browser"

test-browser: $(STAMP) ## Run the tests in a browser: they need Chromium, most of them `make book`, or are skipped
	$(PYTEST) -m browser tests/book || test $$? -eq 5

test-all: ## Run all tests, and build the book for those of its pages
	$(MAKE) test
	$(MAKE) book
	$(MAKE) test-browser

claims: $(STAMP) ## Run the tests of the thesis's claims and write what they measure into the book's ledger
	$(BIN)/python -m pytest -q --ledger book/results/claims.json tests/test_thesis_claims*.py

lint: $(STAMP) ## Check code, notebooks, spelling, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(NOTEBOOKS) -exec $(BIN)/nbstripout --verify {} +
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMP) ## Format code and notebooks, and strip outputs
	$(NOTEBOOKS) -exec $(BIN)/nbstripout {} +
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(STAMP) ## Open the book in JupyterLab: each page a notebook to run (builds the book if it is not there)
	@test -e $(LAB) || $(MAKE) book
	$(BIN)/jupyter lab $(LAB)

experiments: $(STAMP) ## Run the figures' templates, into out/PROFILE: FIG=fig6_2 (default: all) PROFILE=smoke, laptop, long or thesis
	@mkdir -p out/$(PROFILE)
	@for benchmark in mnist_autoencoder cifar10_classifier; do \
	  test "$(PROFILE)" != smoke || $(BIN)/python -m sogrid search "$$benchmark" --quiet --out out/smoke > out/smoke/search.log || exit 1; \
	done
	@for template in book/experiments/$(FIG)*.ipynb; do \
	  test -e "$$template" || { echo "no template in book/experiments begins with $(FIG)" >&2; exit 1; }; \
	  $(BIN)/papermill "$$template" "out/$(PROFILE)/$$(basename "$$template")" \
	    -p profile "$(PROFILE)" -p out "out/$(PROFILE)" || exit 1; \
	done

$(PEERS): pyproject.toml
	@mkdir -p $(PEERS)
	@$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["bench"], sep="\n")' | while read -r package; do \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PEERS) "$$package" \
	    || echo "$$package cannot be installed: what needs it will be skipped" >&2; \
	done
	@touch $(PEERS)

bench: $(STAMP) $(PEERS) ## Measure what an update costs, ours beside torch's and other libraries', into out/bench.json
	PYTHONPATH=$(PEERS) $(BIN)/python -m lab bench

clean: ## Remove what was built (not .venv)
	rm -rf _build out .pytest_cache .ruff_cache
