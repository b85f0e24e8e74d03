"""The errors that are meant for people: no torch here, so that a typo is answered at once."""

import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """Something that the user can put right: shown as one message without a traceback, exit code 2.

    `message` says what is wrong and where; `hint` what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both, so that the error survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RunFailed(Exception):
    """Training cannot go on for a reason that lies in the training itself, such as a loss that is not finite."""


class BadRow(Exception):
    """One row of the raw data is broken; the row is set aside and counted, up to `data.max_bad`."""


def place_of(error: BaseException) -> str:
    """Returns where an error arose, in code that is no library's: "my_task.py:33 in loss"; "" where that is nowhere.

    An error that came from another process carries its place with it, as `place`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    here = f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else ""
    return getattr(error, "place", here)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns "did you mean 'x'?" for the nearest valid name, else the list of what there is, else ""."""
    valid = sorted(set(valid))
    lowered = {candidate.lower(): candidate for candidate in valid}
    near = get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{lowered[near[0]]}'?"
    started = [candidate for candidate in valid if name and candidate.lower().startswith(name.lower())]
    if len(started) == 1 or len(valid) == 1:
        return f"did you mean '{(started or valid)[0]}'?"
    return f"there are: {', '.join(valid)}" if 0 < len(valid) <= 30 else ""
