"""House prices: regression on a table of numbers. Any CSV file with a target column goes through the same task."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import nn

from tasks.formats import table
from tasks.networks import small
from tasks.task import BadRow, Example, Facts, Field, Load, Number, Source, Task, UserError, Vector

BUNDLED = Path(__file__).parent / "bundled" / "boston_housing.csv"
# The columns of the original `housing.data`, which has no line that names them.
BOSTON = ("crim", "zn", "indus", "chas", "nox", "rm", "age", "dis", "rad", "tax", "ptratio", "b", "lstat", "medv")


@dataclass(frozen=True, kw_only=True)
class Table(Source):
    """A table of numbers whose first line names the columns, or the original `housing.data`."""

    target: str = "medv"  # name of the column to predict
    columns: Annotated[int, Ge(1)] = 13  # columns besides the target, those to leave out included
    drop: tuple[str, ...] = ()  # names of columns to leave out; b: see THIRD_PARTY.md for why
    delimiter: str = ""  # character between the cells; empty: a tab in .tsv files, else a comma
    encoding: str = "utf-8"  # of the file; a byte order mark decides over it


class Housing(Task):
    """House prices in Boston: 13 numbers about a district -> the median price, in 1,000 dollars of 1970.

    Harrison and Rubinfeld, 1978; bundled, with a reservation about its column `b` in THIRD_PARTY.md, which
    task.source.drop=b leaves out. RMSE on the test rows, mean of data.split_seed=0..4: 2.7 (1.9 to 3.9 each); least
    squares on the same rows 4.3, the mean price alone 8.9. The network scales its inputs and its output itself, so that
    prices come out of it, and the loss is their squared error.
    """

    source: Table = Table()
    hidden: Annotated[int, Ge(1)] = 100  # units of the hidden layer

    recipe = {
        "train.epochs": 200, "data.batch_size": 32, "optimizer.name": "adam", "optimizer.lr": 1e-2,
        "schedule.name": "onecycle",
    }  # fmt: skip

    @property
    def fields(self) -> Mapping[str, Field]:  # type: ignore[override]
        """Depends on the source: another table has another number of columns."""
        return {"features": Vector(max(self.source.columns - len(self.source.drop), 1)), "price": Number(target=True)}

    def files(self) -> list[Path]:
        return [Path(self.source.path or BUNDLED)]

    def examples(self, source: Source) -> Iterable[Example]:
        columns, target, drop = self.source.columns, self.source.target, self.source.drop
        if target in drop or columns <= len(drop):
            raise UserError(f"task.source.drop={','.join(drop)} leaves nothing to learn", "leave out fewer columns")
        path = self.files()[0]
        for line, cells in self._records(path, needed=(target, *drop)):
            if len(cells) != columns + 1:
                raise UserError(
                    f"{path}: {len(cells) - 1} columns besides the target '{target}', expected {columns}",
                    f"if this is the right table, set task.source.columns={len(cells) - 1}",
                )
            yield Example((line, cells))

    def row(self, reference: tuple[int, dict[str, str]]) -> dict[str, Any]:
        return self._parse(self.files()[0], *reference)

    def facts(self, rows: Iterable[Mapping[str, Any]]) -> Facts:
        """Besides the scales the names of the features, in their order."""
        rows = list(rows)
        facts = super().facts(rows)
        return {**facts, "features": {**facts["features"], "names": list(rows[0]["names"])}} if rows else facts

    def encode(self, row: dict[str, Any], facts: Facts) -> dict[str, Any]:
        """Puts the features into the order of the training rows, so that a table to predict may have another one."""
        row = dict(row)
        values = dict(zip(row.pop("names"), row["features"], strict=True))
        missing = [name for name in facts["features"]["names"] if name not in values]
        if missing:
            raise BadRow(f"no column '{missing[0]}', which the training rows had")
        return {**row, "features": [values[name] for name in facts["features"]["names"]]}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        features, price = facts["features"], facts["price"]
        return nn.Sequential(
            small.Standardise(features["mean"], features["std"]),
            small.mlp(len(features["names"]), [self.hidden], 1),
            small.Unstandardise(price["mean"], price["std"]),
        )

    def inputs(self, path: Path) -> Iterable[dict[str, Any]]:
        """Reads a table like that of the training, with or without the target's column, in any order of columns."""
        for line, cells in self._records(path, needed=()):
            cells.pop(self.source.target, None)
            try:
                yield self._parse(path, line, cells)
            except BadRow as error:
                raise UserError(str(error), "a row to predict must be complete") from error

    def _records(self, path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields (line number, cells by column); 13 or 14 numbers between blanks are the original `housing.data`."""
        delimiter, encoding = self.source.delimiter, self.source.encoding
        lines = [(line, cells.split()) for line, cells in enumerate(table.text(path, encoding).splitlines(), 1)]
        lines = [(line, cells) for line, cells in lines if cells]
        width = len(lines[0][1]) if lines else 0
        if width not in (len(BOSTON) - 1, len(BOSTON)) or not all(map(table.is_number, lines[0][1])):
            yield from table.records(path, needed, delimiter=delimiter, encoding=encoding)
            return
        for line, cells in lines:
            if len(cells) != width:
                raise UserError(f"{path}, line {line}: expected {width} numbers, got {len(cells)}", "mend the line")
            yield line, dict(zip(BOSTON, cells, strict=False))  # the target is the last one, and may be absent

    def _parse(self, path: Path, line: int, cells: dict[str, str]) -> dict[str, Any]:
        used = {name: cell for name, cell in cells.items() if name not in self.source.drop}
        values = {name: table.number(cell, f"{path}, line {line}, column '{name}'") for name, cell in used.items()}
        price = values.pop(self.source.target, None)
        row = {"names": list(values), "features": list(values.values())}
        return row if price is None else {**row, "price": price}
