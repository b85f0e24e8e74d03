"""whipray from Python: the functions that `import whipray` gives, which do what the verbs of the command do.

Everything wrong is raised as on the command line it is printed: UserError for what the caller can put right, RunFailed
for a training that cannot go on. What is given by name wins over `settings`, and these over files.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from distributed import catalogue, config, saved
from distributed.cli.options import FLAGS, fresh_name, stores_folder
from distributed.cli.output import OUT, counted
from distributed.config import Given, Givens
from distributed.data.split import SPLITS
from distributed.hosts import sweeps
from distributed.record import read
from distributed.run import Run, directory_of, resolve
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from tasks.task import Task

PYTHON = "Python"  # origin of what is given here
Figures = dict[str, float | None]  # None: not finite
ELSEWHERE = "save it with %%writefile my_task.py at the top of its cell, and give 'my_task.py:{}' as the task"


@dataclass(frozen=True)
class Trained:
    """A run on the disk, finished or not: what it has recorded, and what its checkpoints say."""

    path: Path
    runs: Path  # folder of all runs, where the names of others are looked up
    stores: Path

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run by its dotted name."""
        return dict(self._found().run.values)

    @property
    def metrics(self) -> dict[str, Figures]:
        """The figures of the best checkpoint, of validation and of test; raises UserError while it is unfinished."""
        told = saved.summary(self.path)
        if told is None:
            raise UserError(f"{self.path}: this run is not finished", f"train it again with name='{self.path.name}'")
        return told["metrics"]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, in the order of the steps; `kind` is train or validation.

        `pandas.DataFrame(run.history)` and `pyarrow.Table.from_pylist(run.history)` are tables of it.
        """
        path = self.path / saved.METRICS
        return read(path) if path.exists() else []

    def evaluate(self, split: Literal["train", "validation", "test"] = "test", checkpoint: str = "best") -> Figures:
        """Returns the figures of a split; `checkpoint` is best, last or a step.

        Raises UserError where the data are no longer those that the run learned from.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'", did_you_mean(split, SPLITS))
        from distributed.analysis import evaluate
        from distributed.hosts import job

        found = self._found()
        store = job.prepare(found.run, self.stores)
        return evaluate.evaluate(found, store, split, str(checkpoint)).metrics

    def predict(
        self, what: str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]], checkpoint: str = "best"
    ) -> list[dict[str, Any]]:
        """Returns what the run says about files, or about rows: one dict a row, classes by name.

        A file's predictions say "file" and "row"; rows are given as `Task.row` returns them, without targets. Raises
        UserError naming the file or the row that cannot be read.
        """
        from distributed.analysis import predict

        given: list[Any] = [what] if isinstance(what, (str, Path, Mapping)) else list(what)
        if all(isinstance(one, Mapping) for one in given):
            return list(predict.predict_rows(self._found(), given, str(checkpoint)))
        if not all(isinstance(one, (str, Path)) for one in given):
            raise UserError("expected files, or rows as dicts", "such as 'a.png', or [{'image': pixels}]")
        return list(predict.predict(self._found(), map(Path, given), str(checkpoint)))

    def model(self, checkpoint: str = "best") -> "nn.Module":
        """Returns the network, frozen and in evaluation mode, on the first device that the run may use.

        It takes what the task's `transform` makes of a batch.
        """
        from distributed import model
        from distributed.analysis.evaluate import device_of
        from distributed.world import World

        run = self._found().run
        return model.read(str(self.path), run.runs, World(device=device_of(run)), str(checkpoint))[0]

    def _found(self) -> saved.Saved:
        return saved.find(str(self.path), self.runs)

    def __repr__(self) -> str:
        told = saved.summary(self.path)
        figures = "not finished" if told is None else f"metrics={told['metrics']}"
        return f"<run {self.path.parent.name}/{self.path.name}: {figures}>"


@dataclass(frozen=True)
class Tuned:
    """A sweep that is finished."""

    path: Path
    trials: list[dict[str, Any]]  # best first: trial, settings, state, value, epoch, metrics, seconds, error ...
    best: Trained | None  # the winner's run; None where no trial came to a figure, and in a sweep that sums up
    settings: dict[str, Any]  # the winner's, as `train` takes them; empty without a winner
    metrics: dict[str, Figures]  # the winner's, of validation and of test; empty without a winner
    summary: dict[str, Any]  # of a space with a summary, such as folds: mean and spread by figure

    def __repr__(self) -> str:
        return f"<sweep {self.path.parent.name}/{self.path.name}: {len(self.trials)} trials, best {self.settings}>"


def train(
    task: "str | type[Task]", settings: Mapping[str, Any] | None = None, *, epochs: int | None = None,
    workers: int | str | None = None, seed: int | None = None, name: str | None = None,
    config: str | Path | Sequence[str | Path] = (), runs: str | Path = "runs", stores: str | Path | None = None,
    address: str | None = None, on_error: Literal["skip", "stop"] = "skip", show: bool = True,
) -> Trained:  # fmt: skip
    """Trains a task and returns the run, as `whipray train` does; a `name` given again goes on with that run.

    `task` is a name of `whipray tasks`, FILE.py:Class, module:Class, or a class itself. One worker trains in this
    process; several train in processes of their own, by Ray unless `resources.host` is local. `stores` may be a URI.

    Raises UserError for whatever is wrong with what is given, RunFailed for a training that cannot go on, whatever the
    task's own code raises, and KeyboardInterrupt when it was interrupted: then a checkpoint is saved first.
    """
    _refuse_while_loading()
    from distributed.cli.progress import Lines, Preparing
    from distributed.hosts.starting import started

    reference = _reference(task)
    given = _givens(settings, config, epochs=epochs, workers=workers, seed=seed)
    run = resolve(reference, given, Path(runs))
    _refuse_typed(reference, run, address)
    directory = directory_of(run.runs, run, name or fresh_name())
    kept = stores_folder(_place(stores))
    with _quiet(not show), started(
        run, directory, kept, Preparing(), address=address, on_error=on_error, forks=False
    ) as one:  # fmt: skip
        if one.finished:
            OUT.say(f"{directory} is finished already; give another name, or more epochs")
            return Trained(directory, run.runs, kept)
        OUT.say(f"{catalogue.folder_name(run.name)}: {counted(run.train.epochs, 'epoch')}, run {directory}")
        with Lines(one.job) as lines:
            interrupted = one.train(lines)
    if interrupted or saved.summary(directory) is None:  # by this process's user, or through `whipray stop`
        _raise_interrupt(directory)
    return Trained(directory, run.runs, kept)


def load(run: str | Path, *, runs: str | Path = "runs", stores: str | Path | None = None) -> Trained:
    """Returns a run that is there: its path, TASK/NAME, a unique NAME, or `last`.

    Raises UserError with the nearest name where there is none, and where its task cannot be found.
    """
    found = saved.find(str(run), Path(runs))
    return Trained(found.directory, found.run.runs, stores_folder(_place(stores)))


def tune(
    task: "str | type[Task]", space: str | Path | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None, *, trials: int | None = None,
    search: Literal["tpe", "random", "grid"] | None = None, scheduler: Literal["asha", "none"] | None = None,
    epochs: int | None = None, workers: int | str | None = None, seed: int | None = None, name: str | None = None,
    config: str | Path | Sequence[str | Path] = (), runs: str | Path = "runs", stores: str | Path | None = None,
    address: str | None = None, show: bool = True,
) -> Tuned:  # fmt: skip
    """Searches for the settings with which a task trains best, as `whipray tune` does.

    `space` is a file or a name in search_spaces/, or plain data as such a file holds them; by default the task's own.
    Trials are trained one after another in this process, by Ray where `workers`, `address` or `resources.host` ask for
    it. Raises as `train` does.
    """
    _refuse_while_loading()
    from distributed.cli.progress import Preparing
    from distributed.cli.tune import Lines
    from distributed.hosts import local_tune

    reference = _reference(task)
    given = _givens(settings, config, epochs=epochs, workers=workers, seed=seed)
    flags = {"count": trials, "search": search, "scheduler": scheduler}
    given |= {f"trials.{key}": Given(value, PYTHON) for key, value in flags.items() if value is not None}
    wanted, given = sweeps.trials(given)
    searched = sweeps.space(reference, str(space) if isinstance(space, Path) else space)
    sweeps.check_names(searched, given)
    given, searched = sweeps.pin(given, searched, PYTHON)
    kept = stores_folder(_place(stores))
    setup = sweeps.setup(reference, given, searched, Path(runs), kept, name or fresh_name())
    run = sweeps.resolve(setup, searched, given)
    _refuse_typed(reference, run, address)
    if run.resources.on_ray or address:
        from distributed.hosts import ray_tune as host

        host.connect(run, address)
    else:
        host = local_tune
        host.check(run)
    with _quiet(not show):
        with Preparing() as progress:
            store = sweeps.prepare(setup, searched, run, progress)
        with warnings.catch_warnings():
            # tqdm, which optuna imports, misses widgets in a notebook; nobody here draws its bars.
            warnings.filterwarnings("ignore", "IProgress not found")
            opened = sweeps.opened(setup, searched, wanted, run, store)
        with contextlib.closing(opened) as sweep:
            interrupted = False
            if not sweep.finished:
                OUT.say(f"{catalogue.folder_name(reference)}: {sweep.total} trials, sweep {setup.directory}")
                with Lines(sweep) as lines:
                    interrupted = host.tune(sweep, setup, run, lines)
            if interrupted and not sweep.finished:
                _raise_interrupt(setup.directory)
            best = sweeps.write(setup, sweep)
            return Tuned(
                setup.directory, [row.plain() for row in sweep.ranked()],
                Trained(setup.folder(best.trial), setup.runs, kept) if best else None,
                {**{name: one.value for name, one in setup.given.items()}, **best.settings} if best else {},
                {"validation": best.metrics, "test": sweeps.test(setup, best.trial)} if best else {},
                sweep.summary() if searched.summary else {},
            )  # fmt: skip


# ---- what is given, as settings


def _reference(task: "str | type[Task]") -> str:
    if isinstance(task, str):
        return task
    from tasks.task import Task

    if not (isinstance(task, type) and issubclass(task, Task)):
        hint = "a name of `whipray tasks`, FILE.py:Class, or a class that derives from tasks.task.Task"
        raise UserError(f"expected a task, got {task!r}", hint)
    return catalogue.reference_of(task)


def _givens(
    settings: Mapping[str, Any] | None, files: str | Path | Sequence[str | Path], **named: int | str | None
) -> Givens:
    given: Givens = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        given |= config.from_yaml(Path(file))
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"expected settings as a dict, got {settings!r}", "such as {'optimizer.lr': 0.01}")
    told = {**(settings or {}), **{FLAGS[key]: value for key, value in named.items() if value is not None}}
    return given | {
        str(key): Given(str(value) if isinstance(value, Path) else value, PYTHON) for key, value in told.items()
    }


def _place(stores: str | Path | None) -> Path | None:
    return None if stores is None else Path(stores)


def _refuse_while_loading() -> None:
    if catalogue.loading:
        raise UserError(f"{catalogue.loading[-1]}: trains while it is imported, to find a task in it",
                        'put what the script does below: if __name__ == "__main__":')  # fmt: skip


def _refuse_typed(reference: str, run: Run, address: str | None) -> None:
    """A class that was typed into a notebook is known to this process and to no other."""
    where, _, name = reference.partition(":")
    if where == catalogue.TYPED and (run.resources.workers > 1 or run.resources.on_ray or address):
        raise UserError(f"{name} was defined in this notebook: other processes cannot import it",
                        ELSEWHERE.format(name))  # fmt: skip


# ---- what is said meanwhile


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    before = OUT.silent, OUT.json
    OUT.silent, OUT.json = OUT.silent or wanted, False
    try:
        yield
    finally:
        OUT.silent, OUT.json = before


def _raise_interrupt(directory: Path) -> NoReturn:
    raise KeyboardInterrupt(f"stopped after a checkpoint; the same call with name='{directory.name}' goes on")
