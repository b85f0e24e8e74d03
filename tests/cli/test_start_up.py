"""What can be answered at once is answered before torch or Ray is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
SCRIPT = """
import sys
from distributed.cli.main import run
code = run(sys.argv[1:])
print(code, sorted({"torch", "ray", "pyarrow", "pandas", "optuna"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["tasks"], 0),
        (["tasks", "--json"], 0),
        (["tran", "digits"], 2),
        (["train", "diggits"], 2),
        (["train", "digits", "optimizer.rl=1"], 2),
        (["train", "digits", "optimizer.name=adm"], 2),
        (["data", "verify", "hosing"], 2),
        (["runs"], 0),
    ],
)
def test_neither_torch_nor_ray_is_imported_for_a_quick_answer(words, code, tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(HOME), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert answer.stdout.splitlines()[-1] == f"{code} []", answer.stderr


def test_the_command_takes_its_own_package_and_no_other(tmp_path):
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    answer = subprocess.run(
        [sys.executable, str(HOME / "whipray.py"), "tasks"], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert answer.returncode == 0 and "digits" in answer.stdout, answer.stderr
