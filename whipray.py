"""whipray, as a command and as a module: makes sure that OUR package `distributed` is imported, then hands over.

Dask has a package of that name too, and an editable install would lose to it. docs/python.md is about the module:

    import whipray
    run = whipray.train("digits", {"optimizer.lr": 0.01}, epochs=5)
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed.api import Trained, Tuned, load, train, tune
    from tasks.errors import RunFailed, UserError

__all__ = ["RunFailed", "Trained", "Tuned", "UserError", "load", "train", "tune"]
HOME = Path(__file__).resolve().parent


def __getattr__(name: str) -> Any:
    """Imports what Python users ask for when they ask: the command is to answer at once."""
    if name not in __all__:
        raise AttributeError(f"module 'whipray' has no attribute '{name}'")
    found = find_ours()
    if found:
        raise ImportError(found)
    if name in ("RunFailed", "UserError"):
        from tasks import errors as module
    else:
        from distributed import api as module
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)


def find_ours() -> str:
    """Puts our folder first on the path; returns why our packages are not found all the same, "" where they are."""
    if str(HOME) in sys.path:
        sys.path.remove(str(HOME))
    sys.path.insert(0, str(HOME))
    # Workers of Ray look for the package the same way.
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(HOME)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME), *others])
    import distributed

    found = Path(distributed.__file__ or "").resolve().parent
    if found == HOME / "distributed":
        return ""
    return f"whipray: the package 'distributed' is {found}, not that of whipray; is Dask imported at start-up?"


def main() -> None:
    problem = find_ours()
    if problem:
        sys.exit(problem)
    from distributed.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
