"""The notebook of the documentation runs from its first cell to its last; so do classes that are typed into one."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from PIL import Image

HOME = Path(__file__).parents[2]
QUICKSTART = HOME / "docs" / "quickstart.ipynb"
# In a process of its own: nbclient leaves sockets to the garbage collector. Those of the kernel are files.
EXECUTE = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

path, sockets = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
kernel = AsyncKernelManager(transport="ipc", ip=sockets, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
NotebookClient(notebook, km=kernel, timeout=120).execute()
nbformat.write(notebook, path)
"""
Notebook = nbformat.NotebookNode


def environment(folder: Path) -> dict[str, str]:
    """Where our package is, and nothing of the user's but what matplotlib knows of the machine's fonts."""
    names = {"XDG_CACHE_HOME": "cache", "IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "jupyter"}
    folders = {name: str(folder / below) for name, below in names.items()}
    own = {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": matplotlib.get_configdir()}
    return {**os.environ, **folders, **own}


@pytest.fixture
def execute(tmp_path: Path) -> Callable[[Notebook], Notebook]:
    """Executes a notebook in a kernel of this interpreter, in an empty folder; raises AssertionError where it fails."""

    def run(notebook: Notebook) -> Notebook:
        nbformat.write(notebook, tmp_path / "notebook.ipynb")
        with tempfile.TemporaryDirectory(prefix="whipray-") as sockets:  # their names must be short
            told = subprocess.run(
                [sys.executable, "-c", EXECUTE, str(tmp_path / "notebook.ipynb"), f"{sockets}/kernel"],
                cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
                env=environment(tmp_path),
            )  # fmt: skip
        assert told.returncode == 0, told.stderr
        return nbformat.read(tmp_path / "notebook.ipynb", as_version=4)

    return run


def said(cell: Notebook) -> str:
    """What a cell printed and returned, as text."""
    return "".join(one.get("text") or one.get("data", {}).get("text/plain", "") for one in cell["outputs"])


def code(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_quickstart_runs_from_its_first_cell_to_its_last(execute, tmp_path):
    cells = code(execute(nbformat.read(QUICKSTART, as_version=4)))
    train, curve, predicted, network, disc, sweep, picture, better, loaded = cells
    assert "epoch 5/5" in said(train) and "<run digits/" in said(train)
    streams = [one for cell in cells for one in cell["outputs"] if one["output_type"] == "stream"]
    assert all(one["name"] == "stdout" for one in streams), "nobody warns of anything"
    for shown in (curve, picture):
        assert any("image/png" in one.get("data", {}) for one in shown["outputs"])
    assert "'label': '1'" in said(predicted)
    assert "Sequential(" in said(network)
    assert re.findall("'inside': '(yes|no)'", said(disc)) == ["yes", "no"]
    assert "[4/4] trial" in said(sweep) and "task.width" in said(sweep)
    assert not any("\x1b" in said(cell) for cell in (train, disc, sweep)), "lines, and no bars"
    assert "accuracy" in said(better) and "accuracy" in said(loaded)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "notebook.Disc"]


def test_the_quickstart_is_kept_without_outputs():
    for cell in code(nbformat.read(QUICKSTART, as_version=4)):
        assert cell["outputs"] == [] and cell["execution_count"] is None


TYPED = """
from torch import nn
from tasks.task import Label, Task, Vector

class Typed(Task):
    fields = {"x": Vector(1), "big": Label(names=("no", "yes"))}

    def examples(self, source):
        return [n / 200 for n in range(200)]

    def row(self, x):
        return {"x": [x], "big": "yes" if is_big(x) else "no"}

    def build(self, facts, load):
        return nn.Linear(1, 2)
"""
TRAIN = (
    "whipray.train(Typed, {'log.tensorboard': False, 'resources.gpu': 0}, epochs=1, name='a')\n"
    "len([path for path in Path('cache/whipray/stores/notebook.Typed').iterdir() if path.is_dir()])"
)


def notebook(*cells: str) -> Notebook:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def test_a_typed_reader_that_changed_is_noticed_and_nothing_else_is(execute):
    first = "import whipray\nfrom pathlib import Path\ndef is_big(x):\n    return x > 0.5"
    # That the network changed does not matter to the data, nor does a cell that has nothing to do with them.
    redefined = TYPED.replace("nn.Linear(1, 2)", "nn.Sequential(nn.Linear(1, 2))")
    changed = "%pwd\ndef is_big(x):\n    return x > 0.25"
    cells = code(execute(notebook(first, TYPED, TRAIN, "x = 1", redefined, TRAIN, TYPED)))
    assert said(cells[2]).endswith("1") and "finished already" in said(cells[5]) and said(cells[5]).endswith("1")
    with pytest.raises(AssertionError, match="the code that reads them, changed since this run began"):
        execute(notebook(first, TYPED, changed, TRAIN))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("whipray.train(Typed, workers=2)", "defined in this notebook: other processes cannot import it"),
        ("whipray.tune(Typed, workers=2)", "%%writefile my_task.py"),
    ],
)
def test_several_processes_cannot_train_a_typed_class(execute, call, told):
    with pytest.raises(AssertionError, match=told):
        execute(notebook("import whipray", TYPED, call))


def test_a_class_whose_code_nobody_remembers_is_refused(tmp_path):
    told = subprocess.run(
        [sys.executable, "-"], input=f"import whipray\n{TYPED}\nwhipray.train(Typed)", text=True, timeout=120,
        cwd=tmp_path, capture_output=True, env=environment(tmp_path), check=False,
    )  # fmt: skip
    assert told.stderr.splitlines()[-2:] == [
        "tasks.errors.UserError: Typed: its code is in no file, so that a change in how it reads would go unseen",
        "put the class into a file: FILE.py:Class",
    ]


def test_every_line_of_the_page_about_python_runs(tmp_path):
    page = (HOME / "docs" / "python.md").read_text()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "picture.png")
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    told = subprocess.run(
        [sys.executable, "-W", "error", "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**environment(tmp_path), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stderr == "" and (tmp_path / "curve.png").exists()
    assert told.stdout.splitlines()[-2:] == ["unknown setting 'optimizer.rl' (Python)", "did you mean 'optimizer.lr'?"]
