"""Stores of reduced or decoded pictures: made once from their parent, shared, and true to it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from distributed.data import convert, derive
from distributed.data.derive import Wanted, derived
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.task import Boxes, ClassMap, Label, Picture, Task, Vector


def photo(number: int, height: int, width: int, kind: str = "JPEG") -> bytes:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin((x * a + y * b) / 23 + number) for a, b in ((1, 2), (2, 1), (1, -1))]
    written = io.BytesIO()
    Pillow.fromarray(np.stack(waves, 2).astype(np.uint8)).save(written, kind, quality=92)
    return written.getvalue()


class Photos(Task):
    fields = {"photo": Picture(), "classes": ClassMap(), "label": Label(classes=2)}

    def examples(self, source):
        return range(100)

    def row(self, reference):
        size = (40 + reference % 7, 60 + reference % 5)
        kind = "PNG" if reference % 4 == 0 else "JPEG"
        return {"photo": photo(reference, *size, kind), "classes": np.full(size, reference % 3), "label": reference % 2}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return convert.prepare(Photos(), "photos", Data(), tmp_path_factory.mktemp("stores"))


def columns(path, split="train"):
    rows = Store(path).rows(split)
    return rows.take(np.arange(len(rows)))


def test_a_decoded_store_holds_the_very_pixels(parent):
    before, after = columns(parent), columns(derived(parent, Wanted(True, None), workers=1))
    for name in ("photo", "classes"):
        for one, other in zip(before[name].decoded(), after[name].decoded(), strict=True):
            assert torch.equal(one, other)
    assert before["label"].tolist() == after["label"].tolist()
    assert all(one.ndim == 3 for one in after["photo"].data)


def test_a_reduced_store_holds_smaller_pictures_of_the_same_content(parent):
    after = columns(derived(parent, Wanted(False, 20), workers=1))
    assert after["photo"].sizes.min(1).max() == 20
    before = columns(parent)
    for one, other in zip(before["photo"].resized((20, 30)), after["photo"].resized((20, 30)), strict=True):
        assert (one.float() - other.float()).abs().mean() < 6
    classes = {int(value) for one in after["classes"].decoded() for value in one.unique()}
    assert classes <= {0, 1, 2}, "classes are never mixed"


def test_a_derived_store_is_made_once_and_lies_beside_its_parent(parent, monkeypatch):
    first, other = (derived(parent, Wanted(True, side), workers=1) for side in (24, 25))
    monkeypatch.setattr(derive, "remade", None)
    assert derived(parent, Wanted(True, 24), workers=1) == first
    assert first.parent == parent.parent
    assert other != first
    assert Store(first).manifest["derived"]["short_side"] == 24


def test_what_has_no_pictures_or_would_no_longer_fit_is_refused(tmp_path, parent):
    class Plain(Task):
        fields = {"vector": Vector(1), "label": Label(classes=2)}

        def examples(self, source):
            return [{"vector": [i], "label": i % 2} for i in range(60)]

    class Boxed(Photos):
        fields = {"photo": Picture(), "boxes": Boxes()}

        def row(self, reference):
            return {"photo": photo(reference, 40, 60), "boxes": [[1, 1, 9, 9]]}

    with pytest.raises(UserError, match="data.pictures=decoded: the data hold no pictures"):
        derived(convert.prepare(Plain(), "plain", Data(), tmp_path), Wanted(True, None))
    boxed = convert.prepare(Boxed(), "boxed", Data(), tmp_path)
    with pytest.raises(UserError, match="'boxes' would no longer fit"):
        derived(boxed, Wanted(False, 20))
    assert len(columns(derived(boxed, Wanted(True, None), workers=1))["boxes"][1])
