"""The command `whipray`: makes sure that OUR package `distributed` is imported, then hands over.

Dask has a package of that name too, and an editable install would lose to it.
"""

import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent


def main() -> None:
    if str(HOME) in sys.path:
        sys.path.remove(str(HOME))
    sys.path.insert(0, str(HOME))
    # Workers of Ray look for the package the same way.
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(HOME)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME), *others])
    import distributed

    found = Path(distributed.__file__ or "").resolve().parent
    if found != HOME / "distributed":
        sys.exit(f"whipray: the package 'distributed' is {found}, not that of whipray; is Dask imported at start-up?")
    from distributed.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
