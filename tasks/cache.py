"""Where tasks keep what they fetched or worked out once: the user's own cache, which no other user can write to."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """Returns the folder `name` of the user's cache, which may not exist yet (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whipray" / name
