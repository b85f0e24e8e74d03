"""Rows of one's own as a store, without a task: what a plain PyTorch loop needs of this engine (docs/engine.md)."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distributed.data import convert, parts, schema, shards
from distributed.data.store import FORMAT, Store
from tasks.errors import BadRow, UserError
from tasks.fields import Field, Learner, check_parsed, check_row


def write(path: Path, fields: Mapping[str, Field], splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Store:
    """Publishes rows as a store at `path`, whole or not at all, and opens it.

    The rows of "train" (or of the first split, where there is none) are gone through twice: first for the facts, such
    as the classes. Raises UserError naming split and row for a value that its field cannot hold.
    """
    teaching = splits.get("train", next(iter(splits.values())))
    if iter(teaching) is teaching:
        raise UserError("the training rows can be gone through only once", "give a list, or an object with __iter__")
    learners = {name: field.learner() for name, field in fields.items()}
    taught = {name: learner for name, learner in learners.items() if type(learner) is not Learner}
    for number, row in enumerate(teaching, start=1):
        with _named("train", number):
            for name, value in check_parsed(row, {name: fields[name] for name in taught}, whole=True).items():
                if name in taught:
                    taught[name].add(value)
    facts = {name: learner.facts() for name, learner in learners.items()}
    entries: dict[str, Any] = {}
    manifest = {
        "format": FORMAT, "facts": facts, "splits": entries, "skipped": {"rows": 0, "first": []},
        "fields": {name: schema.field_to_json(field) for name, field in fields.items()},
        "duplicates": {"rows": 0, "test_in_train": 0},
    }  # fmt: skip
    with convert.exclusively(path), shards.publishing(path, manifest) as folder:
        writer = shards.Shards(folder, schema.schema(fields))
        for name, rows in splits.items():
            numbered = enumerate(rows, start=1)
            while chunk := list(itertools.islice(numbered, parts.CHUNK)):
                checked = []
                for number, row in chunk:
                    with _named(name, number):
                        checked.append(check_row(row, fields, facts))
                batch = schema.batch_of(checked, fields, [f"row {number}" for number, _ in chunk])
                told = {"groups": [(name, "")], "skipped": []}
                writer.take(shards.batches_as_file(schema.schema(fields), [batch], told))
        entries |= writer.finish()
        shards.seal(folder, entries)
    return Store(path, fields)


@contextlib.contextmanager
def _named(split: str, number: int) -> Iterator[None]:
    try:
        yield
    except BadRow as error:
        raise UserError(f"row {number} of {split}: {error}", "mend the row, or leave it out") from error
