"""Handwritten digits, bundled: the task that the tour begins with."""

from collections.abc import Iterable
from pathlib import Path

from tasks.formats import table
from tasks.glyphs import Glyphs
from tasks.task import Example, Image, Label, Source

BUNDLED = Path(__file__).parent / "bundled" / "digits.csv.gz"


class Digits(Glyphs):
    """Handwritten digits: an 8x8 grey picture -> one of 10 classes.

    The rows are the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI), as
    scikit-learn ships it. What correct training reaches on an 80/20 split: CNN 98.9 %, MLP 97.5 %.
    """

    fields = {"image": Image(1, 8, 8), "label": Label(classes=10)}
    recipe = {
        "train.epochs": 20, "data.batch_size": 64, "optimizer.name": "adam", "optimizer.lr": 3e-3,
        "schedule.name": "onecycle", "precision.channels_last": True,  # a third quicker
    }  # fmt: skip

    def files(self) -> list[Path]:
        return [Path(self.source.path or BUNDLED)]

    def examples(self, source: Source) -> Iterable[Example]:
        return map(Example, table.rows(Path(source.path or BUNDLED), columns=65))

    def row(self, reference: tuple[int, list[str]]) -> dict:
        line, cells = reference
        *pixels, label = table.numbers(cells, f"{self.source.path or BUNDLED}, line {line}")
        # Ink is counted 0..16 in each 4x4 block of the original bitmap; 15 steps of grey fill a byte.
        return {
            "image": [[[int(min(p * 16, 255)) for p in pixels[i : i + 8]] for i in range(0, 64, 8)]],
            "label": label,
        }
