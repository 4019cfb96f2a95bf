"""A JupyterLab of its own for the tests, with nobody's settings, and a browser's way through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
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
    options = (
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--IdentityProvider.token=",
        "--expose-app-in-browser",
    )
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={root}"]
    environment = {k: v for k, v in os.environ.items() if k != "SOGRID_BOOK"} | own
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = folder / "JUPYTER_RUNTIME_DIR"
            until(lambda: process.poll() is not None or list(found.glob("jpserver-*.json")), 60)
            (state,) = found.glob("jpserver-*.json")
            address = json.loads(state.read_text())["url"]
            until(lambda: answers(f"{address}api/status"), 60)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def answers(address: str) -> bool:
    """Whether there is a server already."""
    try:
        return urlopen(address).status == 200
    except URLError:
        return False


def enter(driver, address: str) -> None:
    """Open JupyterLab, in a window that has the focus: without it no notebook is the current one."""
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    driver.get(f"{address}lab")
    until(lambda: driver.execute_script("return Boolean(window.jupyterapp)"), 60)
    driver.execute_async_script("jupyterapp.restored.then(() => arguments[0]())")


def open_page(driver, path: str, kernel: bool = False) -> None:
    """Open a notebook, with a kernel or without, and wait until its text is shown and typeset."""
    driver.execute_async_script(
        """
        const [path, shouldStart, done] = arguments;
        const kernelPreference = { shouldStart, canStart: shouldStart, autoStartDefault: shouldStart };
        const ready = async (panel) => {
          await panel.context.ready;
          await panel.revealed;
          if (shouldStart) await panel.sessionContext.ready;
          const texts = panel.content.widgets.filter((cell) => cell.model.type === "markdown");
          const shown = (cell) => {
            const output = cell.node.querySelector(".jp-MarkdownOutput");
            return output?.children.length && !output.innerText.includes("$");
          };
          const patience = performance.now() + 10000;
          const poll = () => {
            if (texts.every(shown) || performance.now() > patience) done(texts.length);
            else setTimeout(poll, 20);
          };
          poll();
        };
        jupyterapp.commands.execute("docmanager:open", { path, kernelPreference }).then(ready);
        """,
        path,
        kernel,
    )


def close(driver) -> None:
    """Close the notebook that is open, without saving it."""
    driver.execute_script("jupyterapp.shell.currentWidget.dispose()")


def current(driver) -> dict:
    """Path of the notebook that is open, and what of its text is on the screen."""
    return driver.execute_script(
        """
        const panel = jupyterapp.shell.currentWidget;
        const { top, bottom } = panel.content.node.getBoundingClientRect();
        const seen = (node) => {
          const box = node.getBoundingClientRect();
          return box.bottom > top && box.top < bottom;
        };
        const blocks = [...panel.node.querySelectorAll(".jp-MarkdownOutput > *")];
        return { path: panel.context.path, text: blocks.filter(seen).map((b) => b.innerText).join("\\n") };
        """
    )


def run_all(driver) -> list[str]:
    """Run every cell, and give the errors."""
    return driver.execute_async_script(
        """
        const done = arguments[0];
        const errors = () => jupyterapp.shell.currentWidget.content.widgets
          .flatMap((cell) => cell.model.outputs?.toJSON() ?? [])
          .filter((output) => output.output_type === "error" || output.name === "stderr")
          .map((output) => output.evalue ?? output.text);
        jupyterapp.commands.execute("notebook:run-all-cells").then(() => done(errors()));
        """
    )


def drawn(driver) -> list[str]:
    """What every figure of the notebook shows, as paths, when they no longer change."""
    return driver.execute_async_script(
        """
        const done = arguments[0];
        const panel = jupyterapp.shell.currentWidget.node;
        const lines = () => [...panel.querySelectorAll(".js-plotly-plot path[d]")].map(
          (line) => line.getAttribute("d") + line.getAttribute("style") + line.getAttribute("transform")
        );
        const poll = (before) => setTimeout(() => {
          const now = lines();
          if (now.join() === before.join()) done(now);
          else poll(now);
        }, 500);
        poll(lines());
        """
    )
