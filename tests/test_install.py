"""What is installed: the wheel, which needs torch alone, and the extras, which requirements.txt repeats."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

from sogrid.extras import MissingExtraError, need

ROOT = Path(__file__).resolve().parents[1]
DATA = "experiments/digits/*.gz", "experiments/thesis/*.json"

SMOKE = """
import pkgutil

import sogrid
import torch
from sogrid import ACP, KFAC, CrossEntropyAtLogits, MLP

for module in pkgutil.walk_packages(sogrid.__path__, "sogrid."):
    if not module.name.startswith(("sogrid.__main__", "sogrid.experiments")):
        __import__(module.name)
assert all(name not in sys.modules for name in ("numpy", "tqdm", "optuna")), "more than torch"
loss, x, y = CrossEntropyAtLogits("mean"), torch.rand(8, 5), torch.arange(8) % 3
for make in (
    lambda model: ACP(model, lr=0.1, damping=0.1),
    lambda model: KFAC(model, lr=0.1, damping=0.1, loss=loss),
):
    model = MLP([5, 4, 3])
    optimizer, losses = make(model), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
try:
    import sogrid.experiments.search
except ImportError as error:
    assert str(error).startswith("sogrid.experiments needs numpy, optuna, scipy, "), error
    assert str(error).endswith(': pip install "sogrid[experiments]"'), error
else:
    raise AssertionError("an extra was not missed")
from sogrid.cli import main

assert main(["reproduce", "fig6_2"]) == 1
print(metadata.version("sogrid"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is under version control, so that no leftover of another build is in it."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    copytree(ROOT / "sogrid", source / "sogrid", ignore=ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", out, source], check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = ROOT / "sogrid"
    expected = {p for pattern in ("*.py", *DATA) for p in package.rglob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA"))
    assert names == {p.relative_to(ROOT).as_posix() for p in expected}
    needed = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert needed == ["torch"]


def test_with_torch_alone_the_wheel_imports_and_steps(wheel, tmp_path):
    """In a process that sees nothing but the wheel's content, torch, and what torch requires."""
    clean, others = tmp_path / "clean", tmp_path / "torch"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(clean)
    link_with_requirements("torch", others)
    assert not {"numpy", "optuna", "lab", "tests"} & set(os.listdir(others))
    code = f"import sys\nfrom importlib import metadata\nsys.path[:0] = {[str(clean), str(others)]}\n{SMOKE}"
    command = [sys.executable, "-I", "-S", "-W", "ignore:Failed to initialize NumPy", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [project("pyproject.toml")["version"]]
    assert done.stderr.startswith("sogrid: sogrid.experiments needs numpy, optuna")
    assert done.stderr.count("\n") == 1


def link_with_requirements(name: str, folder: Path) -> None:
    """Links to the modules of a distribution, and of those that it requires here, in a folder."""
    folder.mkdir(exist_ok=True)
    here = distribution(name)
    for part in {file.parts[0] for file in here.files if file.parts[0] not in ("..", "__pycache__")}:
        if not (folder / part).exists():
            (folder / part).symlink_to(here.locate_file(part))
    for required in map(Requirement, here.requires or ()):
        if required.marker is None or required.marker.evaluate({"extra": ""}):
            link_with_requirements(required.name, folder)


def project(file: str) -> dict:
    return tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["project"]


def by_name(lines) -> dict[str, Requirement]:
    return {found.name.lower(): found for found in map(Requirement, lines)}


def test_the_one_list_is_that_of_the_extras():
    """Every requirement of the extras but ``bench`` is in requirements.txt, and the other way round."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    listed = by_name(filter(None, lines))
    ours = project("pyproject.toml")
    extras = {key: by_name(of) for key, of in ours["optional-dependencies"].items() if key != "bench"}
    extras["core"] = by_name(ours["dependencies"])
    wanted = {name: found for of in extras.values() for name, found in of.items() if name != "sogrid"}
    assert set(listed) == set(wanted)
    for name, required in wanted.items():
        assert listed[name].extras == required.extras
        pins = [s.version for s in listed[name].specifier if s.operator == "=="]
        if pins:
            assert required.specifier.contains(pins[0]), name
        else:
            assert listed[name].specifier == required.specifier, name


def test_the_book_has_the_version_of_the_package():
    ours, book = project("pyproject.toml"), project("book/pyproject.toml")
    assert book["version"] == ours["version"]
    assert book["dependencies"] == [f"sogrid[book]=={ours['version']}"]


def test_what_is_missing_is_named_with_its_extra():
    need("somebody", "test", "sys", "pytest")
    with pytest.raises(MissingExtraError, match=r'^somebody needs nobody, none: .*"sogrid\[test\]"$'):
        need("somebody", "test", "sys", "nobody", "none")
