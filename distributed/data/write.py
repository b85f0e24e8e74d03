"""Rows of one's own as a store, without a task: what a plain PyTorch loop needs of this engine (docs/engine.md)."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distributed.data import convert, schema
from distributed.data.store import FORMAT, Store
from tasks.errors import BadRow, UserError
from tasks.fields import Facts, Field, check_row


def write(path: Path, fields: Mapping[str, Field], splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Store:
    """Publishes rows as a store at `path`, whole or not at all, and opens it.

    The rows of "train" (or of the first split, where there is none) are gone through twice: first for the facts, such
    as the classes. Raises UserError naming split and row for a value that its field cannot hold.
    """
    teaching = splits.get("train", next(iter(splits.values())))
    if iter(teaching) is teaching:
        raise UserError("the training rows can be gone through only once", "give a list, or an object with __iter__")
    facts = {name: field.facts(row[name] for row in teaching) for name, field in fields.items()}
    shards: dict[str, Any] = {}
    manifest = {
        "format": FORMAT, "facts": facts, "splits": shards, "skipped": {"rows": 0, "first": []},
        "fields": {name: schema.field_to_json(field) for name, field in fields.items()},
        "duplicates": {"rows": 0, "test_in_train": 0},
    }  # fmt: skip
    with convert.exclusively(path), convert.publishing(path, manifest) as folder:
        writer = convert.Shards(folder, schema.schema(fields))
        for name, rows in splits.items():
            numbered = enumerate(rows, start=1)
            while chunk := list(itertools.islice(numbered, convert.CHUNK)):
                checked = [_checked(name, number, row, fields, facts) for number, row in chunk]
                batch = schema.batch_of(checked, fields, [f"row {number}" for number, _ in chunk])
                told = {"groups": [(name, "")], "skipped": []}
                writer.take(convert.batches_as_file(schema.schema(fields), [batch], told))
        shards |= writer.finish()
        convert.seal(folder, shards)
    return Store(path, fields)


def _checked(
    split: str, number: int, row: Mapping[str, Any], fields: Mapping[str, Field], facts: Facts
) -> dict[str, Any]:
    try:
        return check_row(row, fields, facts)
    except BadRow as error:
        raise UserError(f"row {number} of {split}: {error}", "mend the row, or leave it out") from error
