"""What is said of a training whose numbers are not finite any more. No torch here."""

from typing import NamedTuple

from tasks.errors import RunFailed

ADVICE = "a smaller optimizer.lr or train.clip_norm=1 often helps"
SHOWN = 8  # rows that a message names


class Odd(NamedTuple):
    """A loss that is not finite, and where it arose."""

    step: int
    micro_batch: int
    rank: int
    loss: str
    value: float
    rows: list[int]  # of the training split

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows[:SHOWN])) + (" ..." if len(self.rows) > SHOWN else "")
        return f"the loss '{self.loss}' is {self.value} at step {self.step} on rank {self.rank} (training rows {rows})"


def failure(words: str, where: Odd | int) -> RunFailed:
    """Returns the end of a training that cannot go on; it carries `step`, and where known `rank` and `rows`."""
    error = RunFailed(f"{words}: {ADVICE}")
    error.__dict__.update(where._asdict() if isinstance(where, Odd) else {"step": where})
    return error
