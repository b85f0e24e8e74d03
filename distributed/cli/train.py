"""`whipray train`: one training of one task."""

from pathlib import Path
from typing import Any

from distributed import catalogue
from distributed.cli import options, switches
from distributed.cli.output import FAILED, INTERRUPTED, OK, OUT, counted


def train(
    task: options.TaskName,
    settings: options.Words = None,
    workers: options.Workers = None,
    epochs: options.Epochs = None,
    seed: options.Seed = None,
    name: options.Name = None,
    config: options.Config = None,
    runs: options.Runs = options.RUNS,
    stores: options.Stores = None,
    no_ray: options.NoRay = False,
    address: options.Address = None,
    on_error: options.OnError = "skip",
    fast: options.Fast = False,
    overfit: options.Overfit = None,
    profile: options.Profile = False,
) -> int:
    """Train a task.

    Its data are prepared, checkpoints are kept, and the best of them is judged in the end.
    """
    given = options.check(
        task, options.collect(settings, config, workers=workers, epochs=epochs, seed=seed, overfit=overfit),
        no_ray=no_ray,
    )  # fmt: skip
    given = switches.applied(task, given, runs, fast=fast, profile=profile)

    from distributed.run import directory_of, resolve

    run = resolve(task, given, runs)
    name = name or options.fresh_name()
    directory = directory_of(runs.absolute(), run, f"fast-{name}" if fast else name)
    return start(run, directory, options.stores_folder(stores), address, on_error, rehearsed=fast)


def start(
    run: Any, directory: Path, stores: Path, address: str | None, on_error: options.SkipOrStop, *,
    rehearsed: bool = False,
) -> int:  # fmt: skip
    """Trains a resolved run in its directory on the host that its settings name; prints how it ended.

    One that is rehearsed is stopped at the first chance, and goes on from its checkpoint.
    """
    from distributed import saved
    from distributed.cli.progress import Lines, Preparing
    from distributed.hosts import job
    from distributed.hosts.starting import started

    with started(run, directory, stores, Preparing(), address=address, on_error=on_error) as one:
        if one.finished:
            OUT.say(f"{directory} is finished already; give another --name, or more --epochs")
            return _tell(directory)
        OUT.say(f"{catalogue.folder_name(run.name)}: {counted(run.train.epochs, 'epoch')}, run {directory}")
        with Lines(one.job) as lines:
            if rehearsed:
                saved.ask_to_stop(directory)
                one.train(lines)
                job.begin(one.job)
            interrupted = one.train(lines)
        if interrupted:
            OUT.say(f"stopped; the same command with --name {directory.name} goes on")
            return INTERRUPTED
        shown = switches.exported(one.job) if rehearsed else {}
    return _tell(directory, run, shown)


def _tell(directory: Path, run: Any = None, shown: dict[str, Any] | None = None) -> int:
    from distributed import saved
    from distributed.cli.progress import show_summary

    summary = saved.summary(directory)
    if summary is None:
        OUT.error(f"{directory}: the run did not finish", "start it again with the same --name to go on")
        return FAILED
    show_summary(summary)
    told = (shown or {}) | (switches.tell(run, directory) if run else {})
    run = f"{catalogue.folder_name(summary['task'])}/{directory.name}"
    OUT.say(
        f"run: {directory}\n"
        f"next: whipray predict {run} FILE | whipray evaluate {run} | tensorboard --logdir {directory}"
    )
    OUT.result(
        {key: summary[key] for key in ("run", "task", "epochs", "steps", "metrics", "seconds", "samples_per_second")}
        | told
    )
    return OK
