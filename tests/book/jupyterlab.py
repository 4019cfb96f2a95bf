"""A JupyterLab of its own for the tests, with nobody's settings, and a browser's way through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from book.screenshots import until

SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is rendered, seen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def server(root: Path, folder: Path) -> Iterator[str]:
    """Address of a server of the notebooks under ``root``; what it writes down is in ``folder``."""
    for name, settings in SETTINGS.items():
        file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    names = "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"
    own = {name: str(folder / name) for name in names} | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    options = "--no-browser", "--allow-root", "--ServerApp.port=0", "--IdentityProvider.token=", "--expose-app-in-browser"
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={root}"]
    environment = {k: v for k, v in os.environ.items() if k != "SOGRID_BOOK"} | own
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = folder / "JUPYTER_RUNTIME_DIR"
            until(lambda: process.poll() is not None or list(found.glob("jpserver-*.json")), 60)
            (state,) = found.glob("jpserver-*.json")
            address = json.loads(state.read_text())["url"]
            until(lambda: urlopen(f"{address}api/status").status == 200, 60)
            yield address
        finally:
            process.terminate()
            process.wait(30)
