"""The command finds our package `distributed`, whatever else is called so."""

import os
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parents[2]


def _whipray(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys, whipray; sys.argv = ['whipray', *sys.argv[1:]]; whipray.main()"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(HOME)!r}); {code}", *words],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env={**os.environ, **environment},
    )  # fmt: skip


def test_another_package_called_distributed_does_not_get_in_the_way(tmp_path):
    theirs = tmp_path / "theirs" / "distributed"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("raise RuntimeError('Dask was imported')")
    told = _whipray(tmp_path, "tasks", PYTHONPATH=str(theirs.parent))
    assert told.returncode == 0, told.stderr
    assert "digits" in told.stdout


def test_where_the_other_one_was_imported_first_the_command_says_so_in_one_line(tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "distributed").mkdir(parents=True)
    (theirs / "distributed" / "__init__.py").write_text("")
    (theirs / "sitecustomize.py").write_text("import distributed")
    told = _whipray(tmp_path, "tasks", PYTHONPATH=str(theirs))
    assert told.returncode == 1
    assert len(told.stderr.splitlines()) == 1
    assert "not that of whipray" in told.stderr


def test_importing_distributed_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import distributed; print(sorted(set(sys.modules) - before))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOME)
    assert told.stdout.strip() == "['distributed']"
