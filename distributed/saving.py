"""The checkpoints of one training as all its ranks see them: rank 0 writes, and all know which ones stand."""

import contextlib
from pathlib import Path

from distributed.checkpoint import Writer
from distributed.learning import Learning


class Saving:
    """Saves what a training has learned; a context that ends when what is under way is written."""

    def __init__(self, learning: Learning, directory: Path) -> None:
        run = learning.run
        self.learning = learning
        self.newest = learning.state.step  # that a checkpoint was taken of; at the very beginning there is none to take
        self._pending = False  # whether one may be under way
        self._writer = (
            Writer(directory, run.name, run.checkpoint.keep, run.checkpoint.background)
            if learning.world.rank == 0
            else None
        )
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Saving":
        if self._writer:
            self._open.enter_context(self._writer)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[bad-argument-type]

    def save(self) -> None:
        """Takes a checkpoint of this step, unless there is one. A collective.

        Raises RunFailed where a loss is not finite. Weights are looked at by who writes them: the last good checkpoint
        stays the newest.
        """
        learning, state = self.learning, self.learning.state
        if self.newest == state.step:
            return
        self.newest, self._pending = state.step, True
        learning.model.share_buffers(learning.world)
        state.sums, state.units = learning.tally.over_ranks()
        learning.tally.refuse_odd(state.sums)
        state.averaged = learning.average.taken
        optimizer, numbers = learning.updater.state()
        if self._writer:
            tensors, live = learning.average.state(learning.model.tensors())
            told = {"loop": state.to_json(), "update": numbers}
            learned = learning.model.learned()
            self._writer.save(state.step, state.best_step, tensors, {**optimizer, **live}, told, learned)

    def settled(self, *, wait: bool) -> list[int]:
        """Returns the steps whose checkpoints have come to stand since it was last asked, the same on all ranks.

        A collective. Raises RunFailed where one could not be written.
        """
        if not self._pending:
            return []
        steps = self.learning.world.gather(self._writer.settled(wait) if self._writer else [])[0]
        self._pending = self.newest not in steps
        return steps
