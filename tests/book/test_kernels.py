"""A forked kernel is one of its own, dies and is interrupted as any other, and ends with its server."""

import asyncio
import json
import sys
from types import SimpleNamespace

import nbformat
import pytest
from book.screenshots import until
from jupyter_client.manager import start_new_kernel
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from lab import kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


def run(folder, *codes, **options):
    """What the last cell prints."""
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    resources = {"metadata": {"path": str(folder)}}
    done = NotebookClient(nbformat.v4.new_notebook(cells=cells), resources=resources, **options).execute()
    return "".join(output.text for output in done.cells[-1].outputs)


def test_a_kernel_has_its_own_folder_environment_and_session(quick_kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("SOGRID_TRIED", "ö 1")
    code = """
    import json, os, sys
    imported = [name for name in sys.modules if name.startswith(("sogrid", "lab."))]
    own = [os.getcwd(), os.environ["SOGRID_TRIED"], os.getsid(0) == os.getpid(), "torch" in sys.modules]
    print(json.dumps([*own, "" in sys.path, imported]))
    """
    assert json.loads(run(tmp_path, code)) == [str(tmp_path), "ö 1", True, True, True, []]


def test_a_kernel_that_dies_is_missed(quick_kernels, tmp_path):
    with pytest.raises(DeadKernelError):
        run(tmp_path, "import os; os._exit(3)")


def test_a_kernel_is_interrupted(quick_kernels, tmp_path):
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        run(tmp_path, "while True: pass", timeout=1, interrupt_on_timeout=True)


def test_a_kernel_may_end_while_it_is_being_ended(quick_kernels):
    """As one does that is slow to shut down."""
    manager, client = start_new_kernel()
    client.stop_channels()
    process = manager.provisioner.process
    assert process.poll() is None
    process.kill()
    until(lambda: process.poll() is not None)
    asyncio.run(manager.provisioner.terminate())
    asyncio.run(manager.provisioner.kill())
    manager.cleanup_resources()


def test_kernels_start_as_ever_after_the_block(monkeypatch):
    closed = []
    monkeypatch.setattr(kernels, "Server", lambda: SimpleNamespace(close=lambda: closed.append(True)))
    monkeypatch.setattr(kernels.Fork, "server", None, raising=False)
    provisioners = KernelProvisionerFactory.instance().provisioners
    before = provisioners[kernels.NAME]
    with kernels.warm():
        assert provisioners[kernels.NAME].load() is kernels.Fork
    assert provisioners[kernels.NAME] == before
    assert closed == [True]
