"""`whipray data`: prepare a task's data, check them, and look at them."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed import catalogue
from distributed.cli import options
from distributed.cli.output import OUT, counted
from tasks.errors import UserError, did_you_mean

app = typer.Typer(help="Prepare, check and look at data.", rich_markup_mode=None)
Target = Annotated[
    str, typer.Argument(metavar="STORE|TASK", help="Folder of a store, or a task whose data are prepared.")
]


@app.command()
def prepare(
    task: options.TaskName,
    settings: options.Words = None,
    config: options.Config = None,
    stores: options.Stores = None,
    on_error: options.OnError = "skip",
    address: Annotated[str | None, typer.Option(help="Ray cluster whose cores read and encode the rows.")] = None,
) -> None:
    """Turn a task's raw data into a store.

    Training does it too, when it finds none.
    """
    given = options.check(task, options.collect(settings, config))

    from distributed.analysis.stores import describe
    from distributed.cli.progress import Preparing
    from distributed.hosts import job
    from distributed.run import resolve

    began = time.monotonic()
    run, mapper = resolve(task, given), None
    if address is not None:
        from distributed.hosts import ray_tasks

        mapper = ray_tasks.mapper(run, address)
    folder = options.stores_folder(stores)
    with Preparing() as progress:
        store = job.prepare(run, folder, on_error=on_error, progress=progress, mapper=mapper)
    told = describe(store, samples=0)
    rows = {name: split["rows"] for name, split in told["splits"].items()}
    size = sum(split["bytes"] for split in told["splits"].values())
    seconds = round(time.monotonic() - began, 3)
    OUT.say(f"{', '.join(f'{name} {count:,}' for name, count in rows.items())} rows, {_size(size)}, {seconds:.1f} s")
    OUT.say(
        f"store: {store}\nnext: whipray data show {store} | " + " ".join(["whipray train", task, *(settings or [])])
    )
    OUT.result(
        {
            "store": str(store),
            "task": task,
            "rows": rows,
            "bytes": size,
            "skipped": told["skipped"]["rows"],
            "seconds": seconds,
        }
    )


@app.command()
def verify(
    target: Target, settings: options.Words = None, config: options.Config = None, stores: options.Stores = None
) -> None:
    """Check every shard of a store.

    Its checksum, and its Arrow content in full.
    """
    path = _store(target, settings, config, stores)

    from distributed.analysis import stores as analysis

    told = analysis.verify(path)
    OUT.say(f"{path}: whole; {told['shards']} shards, {told['rows']:,} rows, {_size(told['bytes'])}")
    OUT.result(told)


@app.command()
def show(
    target: Target,
    settings: options.Words = None,
    config: options.Config = None,
    stores: options.Stores = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a contact sheet too: rows of every class, and the doubtful."),
    ] = None,
) -> None:
    """Show what a store holds, and what in it looks doubtful.

    Fields, rows, classes, sizes, facts, rows set aside, and a few rows; then warnings: too few rows, imbalance,
    duplicates across splits, broken or blank pictures, columns that say nothing or give the label away, bad boxes and
    masks, suspicious labels.
    """
    path = _store(target, settings, config, stores)

    from dataclasses import asdict

    from distributed.analysis import doubts as analysis
    from distributed.analysis.stores import describe
    from distributed.data.store import Store

    told = describe(path, samples)
    store = Store(path)
    doubts, looked_at = analysis.look(store)
    told |= {"doubts": [asdict(one) for one in doubts], "looked_at": looked_at}
    _print(told)
    if html is not None:
        from distributed.analysis import sheet

        rows = sheet.write(html, told, store, doubts)
        OUT.say(f"{html}: a contact sheet of {counted(rows, 'row')}")
    OUT.result(told)


def _store(target: str, settings: list[str] | None, config: list[Path] | None, stores: Path | None) -> Path:
    """Returns the store that is meant: a folder, or where the data of a task lie prepared."""
    folder = Path(target)
    if (folder / "manifest.json").exists():
        if settings or config:
            raise UserError(
                f"{target} is a store: settings do not change it", "give settings with the name of a task only"
            )
        return folder.absolute()
    if ":" not in target and target not in catalogue.listed():
        if folder.is_dir():
            raise UserError(
                f"{target}: is no store, it has no manifest.json", "name the folder that holds the manifest"
            )
        near = did_you_mean(target, catalogue.listed())
        raise UserError(f"'{target}' is neither a task nor the folder of a store", near)
    given = options.check(target, options.collect(settings, config))

    from distributed.data import remote
    from distributed.run import resolve

    run = resolve(target, given)
    path = remote.locate(run.task, catalogue.folder_name(run.name), run.data, options.stores_folder(stores))
    if not path.exists():
        words = " ".join([target, *(settings or [])])
        raise UserError(
            f"{path}: the data of {target} are not prepared with these settings", f"whipray data prepare {words}"
        )
    return path


def _print(told: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    OUT.say(f"store: {told['store']}")
    fields = Table("field", "kind", "facts")
    for name, kind in told["fields"].items():
        facts = told["facts"].get(name) or {}
        fields.add_row(
            Text(name, "bold"), Text(kind), Text("; ".join(f"{key}: {_shown(value)}" for key, value in facts.items()))
        )
    OUT.table(fields)
    splits = Table("split", "rows", "size", "rows a class")
    for name, split in told["splits"].items():
        balance = "; ".join(
            ", ".join(f"{label} {count:,}" for label, count in counts.items()) for counts in split["classes"].values()
        )
        splits.add_row(Text(name, "bold"), f"{split['rows']:,}", _size(split["bytes"]), Text(_harmless(balance)))
    OUT.table(splits)
    _print_sizes(told["splits"])
    if told["samples"]:
        names = list(told["samples"][0])
        rows = Table(*names, title="the first rows of train")
        for row in told["samples"]:
            rows.add_row(*(Text(_shown(row[name])) for name in names))
        OUT.table(rows)
    skipped, duplicates = told["skipped"], told["duplicates"]
    twice = f"{duplicates['rows']:,} duplicates, {duplicates['test_in_train']:,} of test also in train"
    OUT.say(f"{skipped['rows']:,} rows set aside, {twice}")
    for one in skipped["first"][:10]:
        OUT.say(_harmless(f"  {one['where']}: {one['reason']}"))
    _print_doubts(told)


def _print_sizes(splits: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    sizes = Table("field", "split", "sizes")
    for split, facts in splits.items():
        for name, one in facts["sizes"].items():
            words = ", ".join(f"{what} {_counted(size)}" for what, size in one.items() if what != "of")
            sizes.add_row(Text(name, "bold"), Text(split), Text(f"{one['of']}: {words}"))
    if sizes.rows:
        OUT.table(sizes)


def _counted(size: Any) -> str:
    return f"{size:,}" if isinstance(size, int) else str(size)


def _print_doubts(told: dict[str, Any]) -> None:
    for name, seen in told["looked_at"].items():
        rows = told["splits"][name]["rows"]
        if seen < rows:
            OUT.say(f"{seen:,} of {rows:,} rows of {name}, drawn evenly, were looked at for what follows")
    for one in told["doubts"]:
        OUT.say(f"WARNING: {one['kind']} ({one['split']}): {_harmless(one['message'])}")
    if not told["doubts"]:
        OUT.say("nothing doubtful was found")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else _harmless(str(value))


def _harmless(text: str) -> str:
    """Text from the data as a terminal may have it: without signs that steer it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
