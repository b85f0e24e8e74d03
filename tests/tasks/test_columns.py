"""Columns whose rows are no tensor of one shape: padded, cut out, scaled, decoded."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from pycocotools import mask
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2 import functional

from tasks.columns import Mask, Masks, Pictures, Ragged

GREY = 1  # channels


@pytest.fixture(params=[1, 2], autouse=True, ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def waves(number: int, height: int, width: int) -> np.ndarray:
    """A picture whose finest waves are of twenty pixels: what a quarter of the size still shows."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 100 * np.sin((x * a + y * b) / 7 + number) for a, b in ((1, 2), (2, 1), (1, -1))]
    return np.stack(planes, 2).round().astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    written = io.BytesIO()
    Pillow.fromarray(pixels).save(written, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return written.getvalue()


def pictures(kind: str, sizes: list[tuple[int, int]]) -> Pictures:
    """A column of waves: JPEGs, PNGs, or bare pixels that cannot be written to, as mapped ones cannot."""
    made = [waves(number, *size) for number, size in enumerate(sizes)]
    data = made if kind == "pixels" else [np.frombuffer(encoded(one, kind), np.uint8) for one in made]
    for one in data:
        one.flags.writeable = False
    return Pictures(data, np.array(sizes))


# ---- sequences


def ragged(rows: list[list[int]]) -> Ragged:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int32)
    return Ragged(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


@given(st.lists(st.lists(st.integers(-5, 5), max_size=6), min_size=1, max_size=8), st.integers(-1, 1))
def test_a_ragged_column_is_padded_as_torch_pads_its_rows(rows, fill):
    column = ragged(rows)
    want = pad_sequence([torch.tensor(row, dtype=torch.int32) for row in rows], True, fill)
    assert column.padded(fill).tolist() == (want.tolist() if want.shape[1] else [[fill]] * len(rows))
    assert [row.tolist() for row in column.split()] == rows


def test_rows_of_rows_are_padded_with_rows():
    boxes = Ragged(torch.arange(12.0).view(3, 4), torch.tensor([1, 0, 2]))
    assert boxes.padded().shape == (3, 2, 4)
    assert boxes.padded(-1)[1].tolist() == [[-1] * 4] * 2
    assert boxes.padded()[2].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_batch_without_rows_is_padded_to_a_batch_without_rows():
    assert ragged([]).padded().shape == (0, 1)


def test_what_is_filled_up_already_is_a_copy_that_may_be_changed():
    column = ragged([[1, 2], [3]])
    ready = Ragged(column.values, column.lengths, column.padded())
    ready.padded().zero_()
    assert ready.padded().tolist() == [[1, 2], [3, 0]]
    assert ready.padded(9).tolist() == [[1, 2], [3, 9]]


def test_a_ragged_column_goes_where_it_is_told_with_its_lengths():
    moved = ragged([[1], [2, 3]]).to("meta")
    assert moved.values.device.type == moved.lengths.device.type == "meta"


# ---- pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "pixels"])
def test_decoded_pictures_are_those_that_pillow_reads(kind):
    column = pictures(kind, [(30, 41), (17, 20), (64, 5)])
    for one, data, number in zip(column.decoded(), column.data, range(3), strict=True):
        want = waves(number, *column.sizes[number])
        if kind == "JPEG":
            want = np.asarray(Pillow.open(io.BytesIO(data)))
        assert one.dtype == torch.uint8
        assert one.tolist() == want.transpose(2, 0, 1).tolist()
        one.zero_()  # ours to change


@settings(max_examples=30)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "pixels"]))
def test_a_resized_crop_is_torchvisions(data, kind):
    sizes = data.draw(st.lists(st.tuples(st.integers(20, 60), st.integers(20, 60)), min_size=1, max_size=3))
    size = data.draw(st.tuples(st.integers(16, 40), st.integers(16, 40)))
    boxes = []
    for height, width in sizes:
        h, w = data.draw(st.integers(1, min(height, 2 * size[0] - 1))), data.draw(st.integers(1, width))
        boxes.append((data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w))
    column = pictures(kind, sizes)
    made = column.resized_crops(np.array(boxes), size)
    assert made.shape == (len(sizes), 3, *size) and made.dtype == torch.uint8
    assert made.is_contiguous(memory_format=torch.channels_last)
    for one, whole, box in zip(made, column.decoded(), boxes, strict=True):
        want = functional.resized_crop(whole, *box, list(size), antialias=True)
        assert (one.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("shrunk", [2, 4])
def test_a_jpeg_decoded_at_a_fraction_of_its_size_gives_nearly_the_same_crop(monkeypatch, shrunk):
    from tasks.formats import pictures as files

    asked = []
    decode = files.decode
    monkeypatch.setattr(files, "decode", lambda data, channels, at: asked.append(at) or decode(data, channels, at))
    column = pictures("JPEG", [(160, 200), (171, 203)])
    size = (64 // shrunk, 72 // shrunk)  # of what is decoded, the half is kept
    box = (16, 24, 128, 144)
    made = column.resized_crops(torch.tensor([box] * 2), size)
    assert asked == [shrunk] * 2
    for one, data in zip(made, column.data, strict=True):
        whole = torch.from_numpy(decode(data, 3).transpose(2, 0, 1).copy())
        want = functional.resized_crop(whole, *box, list(size), antialias=True)
        assert (one.int() - want.int()).abs().float().mean() < 5, "of 200 shades between dark and bright"


def test_a_whole_picture_is_resized_without_regard_to_its_proportions():
    column = pictures("PNG", [(30, 60), (50, 20)])
    for one, whole in zip(column.resized((24, 24)), column.decoded(), strict=True):
        assert (one.int() - functional.resize(whole, [24, 24], antialias=True).int()).abs().max() <= 1


def test_a_crop_of_the_wanted_size_is_the_very_pixels():
    column = pictures("pixels", [(20, 30)])
    assert torch.equal(column.resized_crops(np.array([[3, 5, 8, 9]]), (8, 9))[0], column.decoded()[0][:, 3:11, 5:14])


@pytest.mark.parametrize("size", [(5, 7), (40, 64), (12, 90)])
def test_classes_are_never_mixed_when_their_map_is_scaled(size):
    classes = np.random.default_rng(0).choice([0, 7, 255], (20, 32)).astype(np.uint8)
    column = Pictures([encoded(classes, "PNG")], np.array([[20, 32]]), GREY, nearest=True)
    made = column.resized(size)
    whole = torch.from_numpy(classes)[None]
    want = functional.resize(whole, list(size), interpolation=functional.InterpolationMode.NEAREST_EXACT)
    assert torch.equal(made[0], want)
    assert set(made.unique().tolist()) <= {0, 7, 255}


def test_a_grey_jpeg_is_decoded_with_as_many_channels_as_are_wanted():
    data, sizes = [encoded(waves(0, 20, 30)[..., 0], "JPEG")], np.array([[20, 30]])
    colour, grey = Pictures(data, sizes).decoded()[0], Pictures(data, sizes, GREY).decoded()[0]
    assert grey.shape == (1, 20, 30)
    assert torch.equal(colour, grey.expand(3, 20, 30))


def test_many_pictures_come_in_their_order():
    column = pictures("PNG", [(10 + number, 12) for number in range(20)])
    assert [one.shape[1] for one in column.decoded()] == [10 + number for number in range(20)]
    made = column.resized((8, 8))
    for number in range(20):
        alone = Pictures(column.data[number : number + 1], column.sizes[number : number + 1]).resized((8, 8))
        assert torch.equal(made[number], alone[0])


def test_a_batch_without_pictures_is_a_batch_without_pictures():
    column = Pictures([], np.zeros((0, 2), np.int64))
    assert column.decoded() == []
    assert column.resized((4, 6)).shape == (0, 3, 4, 6)


# ---- masks


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 2**16))
def test_masks_are_decoded_as_pycocotools_does(counts, seed):
    random = np.random.default_rng(seed)
    planes = [random.integers(0, 2, (9, 5 + row, count), np.uint8) for row, count in enumerate(counts)]
    rows = [
        Mask(9, 5 + row, [one["counts"] for one in mask.encode(np.asfortranarray(of))] if of.shape[2] else [])
        for row, of in enumerate(planes)
    ]
    for made, want in zip(Masks(rows).decoded(), planes, strict=True):
        assert made.dtype == torch.uint8
        assert made.numpy().tolist() == want.transpose(2, 0, 1).tolist()
        assert made.shape == (want.shape[2], *want.shape[:2])
