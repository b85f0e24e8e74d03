"""Augmentation: each operation is torchvision's, row by row, and what is drawn has torchvision's distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from tasks import augment
from tasks.augment import color, scenes, warp, windows
from tasks.augment.scenes import Scenes
from tasks.formats import pictures as formats
from tasks.task import Draw, Pictures

B = 8


def pictures(dtype=torch.uint8, channels=3, height=16, width=16, rows=B):
    whole = torch.randint(0, 256, (rows, channels, height, width), generator=torch.Generator().manual_seed(0))
    return whole.to(torch.uint8) if dtype == torch.uint8 else (whole / 255).to(dtype)


def draws(rows=B, seed=0):
    return Draw(seed, 0, np.arange(rows))


def rows_of(operation, images, *numbers):
    """What torchvision makes of each row with its own numbers."""
    lists = [number.tolist() for number in numbers]
    return torch.stack([operation(image, *row) for image, *row in zip(images, *lists, strict=True)])


def distance(sample, other):
    """The Kolmogorov-Smirnov distance of two samples."""
    sample, other = np.sort(sample), np.sort(other)
    places = np.concatenate([sample, other])
    below = [np.searchsorted(s, places, side="right") / len(s) for s in (sample, other)]
    return np.abs(below[0] - below[1]).max()


# ---- every function

TARGETS = torch.eye(5)[torch.arange(B) % 5]
PARTNER = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])

DRAWING = {  # name -> f(images, draw); a row's result depends on the row alone
    "random_crop": lambda x, d: augment.random_crop(x, d, 16),
    "random_crop, smaller": lambda x, d: augment.random_crop(x, d, (9, 12), padding=2, padding_mode="reflect"),
    "random_crop, unpadded": lambda x, d: augment.random_crop(x, d, (7, 13), padding=0),
    "random_horizontal_flip": lambda x, d: augment.random_horizontal_flip(x, d),
    "random_vertical_flip": lambda x, d: augment.random_vertical_flip(x, d),
    "random_rotation": lambda x, d: augment.random_rotation(x, d, 30),
    "random_affine": lambda x, d: augment.random_affine(x, d, 9, (0.1, 0.2), (0.8, 1.2), 5, "bilinear", 0.5),
    "random_resized_crop": lambda x, d: augment.random_resized_crop(x, d, (12, 20)),
    "color_jitter": lambda x, d: augment.color_jitter(x, d, 0.4, 0.4, 0.4, 0.1),
    "photometric_distort": lambda x, d: augment.photometric_distort(x, d),
    "random_grayscale": lambda x, d: augment.random_grayscale(x, d, 0.5),
    "random_gaussian_blur": lambda x, d: augment.random_gaussian_blur(x, d, 5, p=0.5),
    "random_erasing": lambda x, d: augment.random_erasing(x, d, value=[0.25, 0.5, 1]),
    "cutout": lambda x, d: augment.cutout(x, d, 6),
}
FIXED = {  # name -> f(images)
    "center_crop": lambda x: augment.center_crop(x, 11),
    "resize": lambda x: augment.resize(x, (10, 20)),
    "resize to the same": lambda x: augment.resize(x, 16),
    "grayscale": lambda x: augment.grayscale(x),
    "normalize": lambda x: augment.normalize(x, [0.5] * 3, [0.25] * 3),
}


def mixed(kind):
    def mix(images, draw):
        targets = TARGETS[: len(images)]
        if kind == "cutmix":
            return augment.cutmix(images, targets, draw)[0]
        return augment.mixup(augment.normalize(images, [0.5] * 3, [0.25] * 3), targets, draw)[0]

    return mix


EVERY = (
    DRAWING | {name: lambda x, d, f=f: f(x) for name, f in FIXED.items()} | {k: mixed(k) for k in ("mixup", "cutmix")}
)


@pytest.mark.parametrize("name", DRAWING)
def test_what_a_row_meets_depends_on_the_row_alone(name):
    images, order = pictures(), torch.tensor([5, 2, 7])
    whole = DRAWING[name](images, draws())
    assert torch.equal(DRAWING[name](images[order], Draw(0, 0, order.numpy())), whole[order])
    assert not torch.equal(DRAWING[name](images, draws(seed=1)), whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_the_input_stays_as_it_is_and_the_output_shares_nothing_with_it(name, dtype):
    images = pictures(dtype)
    before = images.clone()
    out = EVERY[name](images, draws())
    assert out.dtype == (torch.float32 if name in ("normalize", "mixup") and dtype == torch.uint8 else dtype)
    assert out.is_contiguous() and out.isfinite().all()
    out.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", EVERY)
def test_the_memory_layout_makes_no_difference(name):
    images = pictures()
    strided = torch.zeros(B, 3, 16, 32, dtype=torch.uint8)[..., ::2].copy_(images)
    behind = torch.cat([images[:1], images])[1:]
    for other in (images.contiguous(memory_format=torch.channels_last), strided, behind):
        assert torch.equal(EVERY[name](other, draws()), EVERY[name](images, draws()))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_may_have_one_row_or_none(name, rows):
    out = EVERY[name](pictures(rows=rows), draws(rows))
    assert len(out) == rows
    assert rows == 0 or name in ("mixup", "cutmix") or torch.equal(out, EVERY[name](pictures(), draws())[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", EVERY)
def test_an_accelerator_gives_the_same_but_for_rounding(name):
    images = pictures(torch.float32)
    there = EVERY[name](images.cuda(), Draw(0, 0, np.arange(B), "cuda")).cpu()
    assert torch.allclose(there, EVERY[name](images, draws()), atol=1e-4)


# ---- crops and flips: bit for bit


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "padding", "mode", "fill"),
    [
        ((3, 16, 16), (16, 16), 4, "constant", 0),
        ((1, 28, 28), (28, 28), 2, "constant", 0),
        ((3, 16, 16), (16, 16), 4, "constant", 0.5),
        ((3, 16, 16), (16, 16), 4, "reflect", 0),
        ((3, 16, 16), (16, 16), 4, "edge", 0),
        ((3, 5, 7), (5, 7), 6, "constant", 0),
        ((2, 12, 9), (8, 8), 0, "constant", 0),
        ((3, 12, 9), (14, 5), 3, "constant", 0),
        ((1, 1, 1), (1, 1), 1, "constant", 0),
    ],
)
def test_crop_is_torchvisions_pad_and_crop(dtype, shape, size, padding, mode, fill):
    images = pictures(dtype, *shape)
    draw = draws()
    top, left = (draw.integers(0, n + 2 * padding - s + 1) for n, s in zip(shape[1:], size, strict=True))
    top[:4], left[:4] = torch.tensor([0, 0, shape[1] + 2 * padding - size[0], 0]), torch.tensor([0, 1, 0, 0])

    def padded(image, t, le):
        return reference.crop(reference.pad(image, [padding], fill, mode), t, le, *size)

    last = torch.tensor([shape[1] + 2 * padding - size[0], shape[2] + 2 * padding - size[1]])
    for t, le in ((top, left), (last[0] - top, last[1] - left), (top.flip(0), left.flip(0))):
        expected = rows_of(padded, images.float(), t, le).to(dtype)
        assert torch.equal(augment.crop(images, t, le, *size, padding, mode, fill), expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_crop_of_any_batch_is_what_slicing_gives(data):
    batch, channels, height, width = (data.draw(st.integers(1, top)) for top in (4, 3, 9, 9))
    padding = data.draw(st.integers(0, 5))
    size = [data.draw(st.integers(1, n + 2 * padding)) if data.draw(st.booleans()) else n for n in (height, width)]
    top, left = (
        torch.tensor([data.draw(st.integers(0, n + 2 * padding - s)) for _ in range(batch)])
        for n, s in zip((height, width), size, strict=True)
    )
    images = pictures(torch.uint8, channels, height, width, batch)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    expected = [
        padded[row, :, t : t + size[0], le : le + size[1]] for row, (t, le) in enumerate(zip(top, left, strict=True))
    ]
    assert np.array_equal(augment.crop(images, top, left, *size, padding).numpy(), np.stack(expected))


def test_a_random_crop_takes_every_window_equally_often():
    corners = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(9000, 1, 3, 3)
    out = augment.random_crop(corners, draws(9000), 1, padding=0).flatten()
    assert out.unique().tolist() == list(range(1, 10))
    assert (out.long().bincount()[1:] - 1000).abs().max() < 120  # four standard deviations
    padded = augment.random_crop(corners, draws(9000), 3, padding=1)
    assert abs((padded[:, 0, 0, 0] == 0).float().mean() - 5 / 9) < 0.02


def test_a_window_outside_of_the_picture_is_refused():
    at = torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"top holds -1\.\.0, expected 0\.\.8"):
        augment.crop(pictures(), at - (torch.arange(B) == 2).long(), at, 16, 16, padding=4)
    with pytest.raises(ValueError, match=r"left holds 9\.\.9, expected 0\.\.8"):
        augment.crop(pictures(), at, at + 9, 16, 16, padding=4)
    with pytest.raises(ValueError, match="a window of 25x25 does not fit into 24x24"):
        augment.random_crop(pictures(), draws(), 25)
    with pytest.raises(ValueError, match="padding_mode 'mirror': there are constant, reflect, edge"):
        augment.random_crop(pictures(), draws(), 16, padding_mode="mirror")


@pytest.mark.parametrize("size", [16, 11, (7, 12), (12, 13), (20, 9), 21])
def test_center_crop_is_torchvisions(size):
    images = pictures(height=15)
    assert torch.equal(augment.center_crop(images, size), reference.center_crop(images, size))


@pytest.mark.parametrize("inplace", [False, True])
def test_flips_are_torchvisions(inplace):
    flipped = torch.tensor([True, False] * (B // 2))
    for ours, theirs in (
        (augment.horizontal_flip, reference.horizontal_flip),
        (augment.vertical_flip, reference.vertical_flip),
    ):
        images = pictures(height=5, width=7)
        expected = torch.where(flipped[:, None, None, None], theirs(images), images)
        out = ours(images, flipped, inplace=inplace)
        assert torch.equal(out, expected) and (out is images) == inplace


def test_each_picture_is_flipped_with_its_probability():
    images = torch.tensor([[[[1, 2]]]], dtype=torch.uint8).expand(4000, 1, 1, 2)
    assert abs((augment.random_horizontal_flip(images, draws(4000), 0.3)[:, 0, 0, 0] == 2).float().mean() - 0.3) < 0.03
    assert torch.equal(augment.random_horizontal_flip(images, draws(4000), 0), images)
    upright = images.transpose(2, 3)
    assert torch.equal(augment.random_vertical_flip(upright, draws(4000), 1), upright.flip(2))


# ---- rectangles


def test_erase_is_torchvisions():
    top, left = torch.tensor([0, 3, 15, 8, 2, 0, 5, 1]), torch.tensor([5, 0, 15, 8, 1, 0, 2, 2])
    height, width = torch.tensor([4, 1, 1, 0, 9, 16, 3, 2]), torch.tensor([2, 6, 1, 5, 9, 16, 0, 4])
    for images, value in ((pictures(), 7), (pictures(torch.float32), [0.0, 0.5, -1.0])):
        fill = torch.tensor(value, dtype=images.dtype).view(-1, 1, 1)
        expected = rows_of(lambda image, *box: reference.erase(image, *box, fill), images, top, left, height, width)  # noqa: B023
        assert torch.equal(augment.erase(images, top, left, height, width, value), expected)


def test_erased_rectangles_have_torchvisions_sizes_and_lie_anywhere():
    count = 3000
    images = torch.ones(count, 1, 20, 30)
    out = augment.random_erasing(images, draws(count), p=1)[:, 0] == 0
    areas = out.sum((1, 2)).numpy()
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1)
    params = [theirs.make_params([images[0]]) for _ in range(count)]
    assert distance(areas, [p["h"] * p["w"] for p in params]) < 0.05  # 1 in 1,000 for equal distributions
    heights = out.any(2).sum(1).numpy()
    assert distance(heights, [p["h"] for p in params]) < 0.05
    touches = lambda edge: edge.any(1).float().mean().item()  # noqa: E731
    assert (
        abs(touches(out[:, 0]) - touches(out[:, -1])) < 0.03
        and abs(touches(out[:, :, 0]) - touches(out[:, :, -1])) < 0.03
    )
    assert (augment.random_erasing(torch.ones(9, 1, 4, 4), draws(9), 1, (1, 1), (1, 1)) == 1).all()  # no room to move
    tall = augment.random_erasing(images, draws(count), 1, ratio=(2, 3))[:, 0] == 0
    assert (tall.any(2).sum(1) >= tall.any(1).sum(1)).all()
    left_alone = augment.random_erasing(images, draws(count), p=0.4)[:, 0].flatten(1).all(1).float().mean()
    assert abs(left_alone - 0.6) < 0.03


def test_cutout_erases_one_square_that_the_edges_may_cut():
    out = augment.cutout(torch.ones(500, 1, 16, 16), draws(500), 6)[:, 0] == 0
    height, width = out.any(2).sum(1), out.any(1).sum(1)
    assert torch.equal(out.sum((1, 2)), height * width)
    assert height.min() == width.min() == 3 and height.max() == width.max() == 6


# ---- what interpolates


@pytest.mark.parametrize("fill", [None, 0.5, [0.25, 0.5, 1.0]], ids=["none", "number", "channels"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_affine_and_rotate_are_torchvisions(dtype, interpolation, fill):
    images, draw = pictures(dtype, height=20, width=14), draws()
    angle, scale = draw.uniform(-180, 180), draw.uniform(0.6, 1.5)
    translate = torch.stack([draw.integers(-4, 5), draw.integers(-4, 5)], 1)
    shear = torch.stack([draw.uniform(-20, 20), draw.uniform(-20, 20)], 1)
    mode = {"interpolation": v2.InterpolationMode(interpolation), "fill": fill}
    pairs = [
        (
            augment.affine(images, angle, translate, scale, shear, interpolation, fill),
            rows_of(lambda image, *n: reference.affine(image, *n, **mode), images, angle, translate, scale, shear),
        ),
        (
            augment.rotate(images, angle, interpolation, fill),
            rows_of(lambda image, a: reference.rotate(image, a, **mode), images, angle),
        ),
    ]
    for ours, theirs in pairs:
        off = (ours.double() - theirs.double()).abs()
        if interpolation == "nearest":  # a place half-way between two pixels may fall to either
            assert (off > 0).double().mean() < 0.002
        else:
            assert off.max() <= (1 if dtype == torch.uint8 else 1e-5)


def test_random_angles_shifts_scales_and_shears_keep_to_their_ranges(monkeypatch):
    seen = {}
    monkeypatch.setattr(warp, "affine", lambda images, *numbers: seen.update(numbers=numbers) or images)
    images = pictures(height=20, width=10, rows=2000)
    augment.random_affine(images, draws(2000), 30, (0.2, 0.1), (0.5, 2.0), (-5, 5, 10, 20), "bilinear", 1)
    angle, translate, scale, shear, interpolation, fill = seen["numbers"]
    bounds = zip((angle, *translate.T, scale, *shear.T), (-30, -2, -2, 0.5, -5, 10), (30, 2, 2, 2, 5, 20), strict=True)
    for numbers, low, high in bounds:
        assert low <= numbers.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < numbers.max() <= high
        assert abs(numbers.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert translate.unique().tolist() == [-2, -1, 0, 1, 2] and (interpolation, fill) == ("bilinear", 1)
    augment.random_affine(images, draws(2000), (5, 6))
    angle, translate, scale, shear, *_ = seen["numbers"]
    assert angle.min() >= 5 and angle.max() <= 6 and (scale == 1).all() and not translate.any() and not shear.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (10, {}), (24, {}), ((10, 30), {}), (16, {}), (20, {"max_size": 22}),
        ((9, 9), {"antialias": False}), ((9, 21), {"interpolation": "nearest"}),
    ],
)  # fmt: skip
def test_resize_is_torchvisions(dtype, size, options):
    images = pictures(dtype, height=16, width=20)
    theirs = options | {"interpolation": v2.InterpolationMode(options.get("interpolation", "bilinear"))}
    assert torch.equal(augment.resize(images, size, **options), reference.resize(images, size, **theirs))


def test_a_longest_side_below_the_shorter_is_refused():
    with pytest.raises(ValueError, match="max_size 10 must exceed the shorter side's size 10"):
        augment.resize(pictures(), 10, max_size=10)


BOXES = [
    torch.tensor(n)
    for n in (
        [0, 3, 10, 0, 2, 5, 0, 1],
        [0, 0, 9, 6, 1, 5, 3, 0],
        [16, 5, 1, 12, 14, 6, 2, 15],
        [20, 20, 1, 7, 19, 12, 17, 2],
    )
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_resized_crop_is_torchvisions(dtype):
    images = pictures(dtype, height=16, width=20)
    expected = rows_of(lambda image, *box: reference.resized_crop(image, *box, size=[9, 24]), images, *BOXES)
    assert torch.equal(augment.resized_crop(images, *BOXES, (9, 24)), expected)


def test_resized_crops_are_products_with_weights():
    images = pictures(torch.float32, height=16, width=20)
    top, left, height, width = BOXES
    down, across = warp.resize_weights(top, height, 16, 9), warp.resize_weights(left, width, 20, 24)
    out = down[:, None] @ images @ across[:, None].transpose(-1, -2)
    assert torch.allclose(out, augment.resized_crop(images, *BOXES, (9, 24)), atol=1e-5)


@pytest.mark.parametrize(("high", "wide"), [(32, 32), (20, 45)])
def test_resized_crops_have_torchvisions_boxes(high, wide):
    count = 3000
    top, left, height, width = warp.crop_boxes(draws(count), high, wide, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= high).all() and (left + width <= wide).all()
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(1)
    image = torch.zeros(1, high, wide)
    params = [theirs.make_params([image]) for _ in range(count)]
    ours = {"top": top, "left": left, "height": height, "width": width}
    for name, numbers in ours.items():
        assert distance(numbers.numpy(), [p[name] for p in params]) < 0.05, name  # 1 in 1,000 for equal distributions


def test_a_resized_crop_is_as_wide_for_its_height_as_the_ratio_says():
    _, _, height, width = warp.crop_boxes(draws(500), 60, 60, (0.1, 0.3), (2.0, 3.0))
    assert ((width + 1) / (height - 1) > 2).all() and ((width - 1) / (height + 1) < 3).all()


@pytest.mark.parametrize(
    ("high", "wide", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (10, 10, (0, 0, 10, 10))]
)
def test_where_no_candidate_fits_the_central_window_is_taken(high, wide, box):
    found = warp.crop_boxes(draws(5), high, wide, (2.0, 3.0), (3 / 4, 4 / 3))
    assert {tuple(row) for row in torch.stack(found, 1).tolist()} == {box}


# ---- colours

FACTORS = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.2, 1.9, 0.5, 3.0])
HUES = torch.tensor([-0.5, -0.2, 0.0, 0.03, 0.1, 0.25, 0.4, 0.5])
ADJUSTED = {"brightness": FACTORS, "contrast": FACTORS, "saturation": FACTORS, "hue": HUES}


def apart(ours, theirs):  # in 1/255: torchvision cuts to whole numbers, so the last bit of a float may show as one
    scale = 1 if ours.dtype == torch.uint8 else 255
    return (ours.double() - theirs.double()).abs().max() * scale


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ADJUSTED)
def test_each_adjustment_is_torchvisions(name, channels, dtype):
    images = pictures(dtype, channels)
    images[0, :, 0, :3] = torch.tensor([0, 255, 128]).to(dtype)[:, None].T if dtype == torch.uint8 else 0.5  # greys
    theirs = rows_of(getattr(reference, f"adjust_{name}"), images, ADJUSTED[name])
    assert apart(getattr(augment, f"adjust_{name}")(images, ADJUSTED[name]), theirs) <= (
        1 if dtype == torch.uint8 else 1e-2
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_jitter_adjusts_each_row_in_its_own_order(dtype):
    images, order = (
        pictures(dtype),
        torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(n)) for n in range(B)]),
    )
    factors = [FACTORS.clamp(0.5, 1.5), FACTORS.flip(0).clamp(0.5, 1.5), None, HUES]

    def theirs(image, turns, brightness, contrast, hue):
        for number in turns:
            image = (
                lambda x: reference.adjust_brightness(x, brightness),
                lambda x: reference.adjust_contrast(x, contrast),
                lambda x: x,
                lambda x: reference.adjust_hue(x, hue),
            )[number](image)
        return image

    expected = rows_of(theirs, images, order, factors[0], factors[1], factors[3])
    off = apart(augment.jitter(images, order, factors), expected)
    assert off <= (6 if dtype == torch.uint8 else 1e-2)  # a one in a dark pixel may turn its hue


def test_color_jitter_draws_every_order_and_keeps_to_its_ranges(monkeypatch):
    seen = {}
    monkeypatch.setattr(color, "jitter", lambda images, order, factors: seen.update(order=order, factors=factors))
    augment.color_jitter(pictures(), draws(2400), 0.4, (0.9, 1.5), 2.0, 0.1)
    assert len(seen["order"].unique(dim=0)) == 24
    assert seen["order"].unique(dim=0, return_counts=True)[1].sub(100).abs().max() < 40
    for factor, low, high in zip(seen["factors"], (0.6, 0.9, 0, -0.1), (1.4, 1.5, 3, 0.1), strict=True):
        assert (
            low <= factor.min() and factor.max() <= high and abs(factor.mean() - (low + high) / 2) < 0.03 * (high - low)
        )
    augment.color_jitter(pictures(), draws(), saturation=0.1)
    assert [factor is None for factor in seen["factors"]] == [True, True, False, True]
    with pytest.raises(ValueError, match=r"hue must lie in -0\.5\.\.0\.5, got 0\.6"):
        augment.color_jitter(pictures(), draws(), hue=0.6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_distort_is_torchvisions_photometric_distort(dtype):
    images, before = pictures(dtype), torch.tensor([True, False] * (B // 2))
    permutation = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(n)) for n in range(B)])
    names = [f"{name}_factor" for name in ("brightness", "contrast", "saturation", "hue")] + ["contrast_before"]

    def theirs(image, *numbers):
        params = dict(zip([*names, "channel_permutation"], numbers, strict=True))
        return v2.RandomPhotometricDistort().transform(image, params)

    factors = (FACTORS.clamp(0.8, 1.2), FACTORS.flip(0).clamp(0.5, 1.5), FACTORS.roll(3).clamp(0.5, 1.5), HUES / 10)
    expected = rows_of(theirs, images, *factors, before, permutation)
    off = apart(augment.distort(images, *factors, before, permutation), expected)
    assert off <= (6 if dtype == torch.uint8 else 1e-2)
    neutral = (torch.ones(B), torch.ones(B), torch.ones(B), torch.zeros(B), before, torch.arange(3).expand(B, 3))
    assert apart(augment.distort(images, *neutral), images) <= (0 if dtype == torch.uint8 else 1e-3)


def test_pictures_of_different_sizes_are_distorted_like_a_batch():
    images = pictures()
    whole = augment.photometric_distort(images, draws())
    cut = [image[:, : 4 + row] for row, image in enumerate(images)]
    out = augment.photometric_distort(cut, draws(), contrast=(1.0, 1.0))
    assert [tuple(image.shape) for image in out] == [(3, 4 + row, 16) for row in range(B)]
    assert all(
        torch.equal(a, b) for a, b in zip(augment.photometric_distort(list(images), draws()), whole, strict=True)
    )


def test_photometric_distort_does_each_operation_with_its_probability(monkeypatch):
    seen = {}
    monkeypatch.setattr(color, "distort", lambda images, *numbers: seen.update(numbers=numbers))
    augment.photometric_distort(pictures(), draws(4000), p=0.3)
    *factors, before, permutation = seen["numbers"]
    for factor, neutral in zip(factors, (1, 1, 1, 0), strict=True):
        assert abs((factor != neutral).float().mean() - 0.3) < 0.03
    assert abs(before.float().mean() - 0.5) < 0.03
    moved = (permutation != torch.arange(3)).any(1)
    assert abs(moved.float().mean() - 0.3 * 5 / 6) < 0.03 and len(permutation[moved].unique(dim=0)) == 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_is_torchvisions(channels, dtype):
    images = pictures(dtype, channels)
    for outputs in (1, 3):
        assert torch.equal(augment.grayscale(images, outputs), reference.rgb_to_grayscale(images, outputs))
    some = augment.random_grayscale(images, draws(), 0.5)
    assert some.shape == images.shape
    assert torch.equal(augment.random_grayscale(images, draws(), 1), reference.rgb_to_grayscale(images, channels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_gaussian_blur_is_torchvisions(dtype):
    images, sigma = pictures(dtype), torch.linspace(0.1, 3, B)
    expected = rows_of(lambda image, s: reference.gaussian_blur(image, [7, 7], [s, s]), images, sigma)
    assert apart(augment.gaussian_blur(images, 7, sigma), expected) <= (1 if dtype == torch.uint8 else 1e-3)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        augment.gaussian_blur(images, 4, sigma)


def test_normalize_is_torchvisions():
    mean, std = [0.49, 0.48, 0.45], [0.2, 0.25, 0.3]
    images = pictures()
    expected = reference.normalize(reference.to_dtype(images, torch.float32, scale=True), mean, std)
    assert torch.allclose(augment.normalize(images, mean, std), expected, atol=2e-6)
    assert torch.allclose(augment.normalize(images / 255, mean, std), expected, atol=2e-6)
    with pytest.raises(ValueError, match="std must be above 0"):
        augment.normalize(images, mean, [0.2, 0.0, 0.3])


# ---- mixing


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_beta_has_its_distribution(alpha):
    ours = augment.beta(draws(200_000), alpha).numpy()
    assert np.isfinite(ours).all() and ours.min() >= 0 and ours.max() <= 1
    assert distance(ours, np.random.default_rng(0).beta(alpha, alpha, 200_000)) < 0.0062  # 1 in 1,000 if equal
    assert abs(ours.mean() - 0.5) < 0.004 and abs(ours.var() * 4 * (2 * alpha + 1) - 1) < 0.012


def test_beta_needs_an_alpha_above_0():
    with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
        augment.mixup(pictures(torch.float32), TARGETS, draws(), alpha=0)


def test_mix_is_torchvisions_mixup():
    images = pictures(torch.float32)
    params = {"lam": 0.3, "labels": TARGETS, "batch_size": B}
    before = torch.arange(B).roll(1)
    share = torch.full((B,), 0.3)
    assert torch.allclose(augment.mix(images, share, before), v2.MixUp().transform(images, params))
    assert torch.allclose(augment.mix(TARGETS, share, before), v2.MixUp().transform(TARGETS, params))


def test_mixup_mixes_pictures_and_targets_alike_and_each_row_with_its_partner():
    images = torch.arange(B, dtype=torch.float32).view(B, 1, 1, 1).expand(B, 1, 2, 2)
    ramp = torch.eye(B)
    for partner, given_partner in ((torch.arange(B).roll(1), None), (PARTNER, PARTNER)):
        mixed, targets = augment.mixup(images, ramp, draws(), 1.0, given_partner)
        share = targets.gather(1, torch.arange(B)[:, None])[:, 0]
        assert torch.equal(share, augment.beta(draws(), 1.0).float())
        assert torch.allclose(targets.gather(1, partner[:, None])[:, 0], 1 - share)
        assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(B, dtype=torch.float32), atol=1e-5)


def test_whole_numbers_are_not_mixed():
    with pytest.raises(ValueError, match="expected floating values, got torch.uint8"):
        augment.mixup(pictures(), TARGETS, draws())
    with pytest.raises(ValueError, match="expected floating values, got torch.int64"):
        augment.cutmix(pictures(), torch.arange(B), draws())


def test_paste_partner_is_torchvisions_cutmix():
    images = pictures()
    params = {"box": (2, 3, 9, 15), "lam_adjusted": 1 - 7 * 12 / 256, "labels": TARGETS, "batch_size": B}
    box = (torch.full((B,), number) for number in (3, 2, 12, 7))
    pasted, targets = augment.paste_partner(images, TARGETS, torch.arange(B).roll(1), *box)
    assert torch.equal(pasted, v2.CutMix().transform(images, params))
    assert torch.allclose(targets, v2.CutMix().transform(TARGETS, params))


def test_cutmix_pastes_rectangles_of_torchvisions_sizes():
    count = 3000
    images = torch.arange(count).view(count, 1, 1, 1).expand(count, 1, 20, 30).to(torch.int32)
    _, targets = out = augment.cutmix(images, torch.eye(2)[torch.arange(count) % 2], draws(count), 1.0)
    pasted = out[0] != images
    assert torch.equal(out[0][pasted], images.roll(1, 0)[pasted])
    share = 1 - pasted.flatten(1).float().mean(1)
    assert torch.allclose(targets[::2, 0], share[::2]) and torch.allclose(targets[1::2, 1], share[1::2])
    torch.manual_seed(0)
    theirs = v2.CutMix(alpha=1.0)
    shares = [theirs.make_params([tv_tensors.Image(torch.zeros(1, 20, 30))])["lam_adjusted"] for _ in range(count)]
    assert distance(share.numpy().round(4), np.round(shares, 4)) < 0.05  # 1 in 1,000 for equal distributions


# ---- scenes


def made(rows=6, masks=True, seed=0):
    generator = np.random.default_rng(seed)
    images, boxes, labels, covers = [], [], [], []
    for row in range(rows):
        height, width, count = 20 + row % 7 * 3, 40 - row % 5 * 3, row % 4
        images.append(torch.from_numpy(generator.integers(0, 256, (3, height, width), np.uint8)))
        corners = generator.uniform(0, 0.7, (count, 2))
        sizes = generator.uniform(0.1, 0.3, (count, 2))
        four = np.concatenate([corners, corners + sizes], 1) * [width, height, width, height]
        boxes.append(torch.from_numpy(four).float())
        labels.append(torch.from_numpy(generator.integers(0, 9, count)))
        covers.append(torch.from_numpy(generator.random((count, height, width)) < 0.3))
    return Scenes(images, boxes, labels, covers if masks else None)


def theirs(scenes, operation):
    """What torchvision makes of the pictures, boxes and masks: `operation(tv_tensor, row)`."""
    for row, scene in enumerate(scenes.rows()):
        image = operation(tv_tensors.Image(scene.image), row)
        boxes = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=scene.size)
        yield (
            torch.as_tensor(image),
            torch.as_tensor(operation(boxes, row)),
            operation(tv_tensors.Mask(scene.masks), row),
        )


def sound(scenes):
    """Whether columns agree and every box lies, with an area, in its picture."""
    for scene in scenes.rows():
        height, width = scene.size
        assert len(scene.boxes) == len(scene.labels) and (scene.masks is None or len(scene.masks) == len(scene.boxes))
        assert scene.masks is None or scene.masks.shape[-2:] == scene.image.shape[-2:]
        assert (scene.boxes[:, :2] >= 0).all() and (scene.boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
    return True


def same(ours, expected):
    for scene, (image, boxes, masks) in zip(ours.rows(), expected, strict=True):
        assert torch.equal(scene.image, image) and torch.equal(scene.masks, masks.to(scene.masks.dtype))
        assert torch.allclose(scene.boxes, boxes, atol=1e-4)
    return True


def test_flipped_scenes_are_torchvisions():
    batch, flipped = made(), torch.tensor([True, False, True, True, False, True])
    expected = theirs(batch, lambda part, row: reference.horizontal_flip(part) if flipped[row] else part)
    assert same(scenes.horizontal_flip(batch, flipped), expected)
    back = scenes.horizontal_flip(scenes.horizontal_flip(batch, flipped), flipped)
    assert all(torch.equal(a, b) for a, b in zip(back.images, batch.images, strict=True))


def test_cropped_scenes_are_torchvisions_without_the_boxes_that_are_gone():
    batch = made()
    top, left, height, width = (
        [2, 0, 5, 9, 3, 8],
        [1, 7, 0, 10, 4, 2],
        [9, 20, 12, 15, 20, 20],
        [30, 9, 33, 20, 20, 20],
    )
    window = list(zip(top, left, height, width, strict=True))
    expected = []
    for image, boxes, masks in theirs(batch, lambda part, row: reference.crop(part, *window[row])):
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        expected.append((image, boxes[kept], masks[kept]))
    ours = scenes.crop(batch, top, left, height, width)
    assert same(ours, expected) and sound(ours)
    assert 0 < sum(map(len, ours.boxes)) < sum(map(len, batch.boxes))


def test_objects_of_which_too_little_is_left_are_dropped():
    boxes = torch.tensor([[0.0, 0, 4, 4], [3, 0, 7, 4], [5, 0, 9, 4], [6, 2, 8, 8], [8, 8, 10, 10]])
    batch = Scenes([torch.zeros(1, 10, 10)], [boxes], [torch.arange(5)], [torch.ones(5, 10, 10)])
    window = [torch.tensor([n]) for n in (0, 0, 10, 6)]  # leaves all, 3/4, 1/4, none, none
    for options, kept in (
        ({}, [0, 1, 2]), ({"min_visible": 0.25}, [0, 1, 2]), ({"min_visible": 0.3}, [0, 1]),
        ({"center_inside": True}, [0, 1]), ({"min_visible": 1.0}, [0]),
    ):  # fmt: skip
        ours = scenes.crop(batch, *window, **options)
        assert ours.labels[0].tolist() == kept and len(ours.masks[0]) == len(kept)
    with pytest.raises(ValueError, match="the window of 10x6 at 0, 5 is not inside a picture of 10x10"):
        scenes.crop(batch, [0], [5], [10], [6])


def test_resized_scenes_are_torchvisions():
    batch, sizes = made(), [(10, 11), (23, 38), (50, 60), (17, 20), (40, 9), (35, 30)]
    expected = theirs(batch, lambda part, row: reference.resize(part, sizes[row]))
    assert same(scenes.resize(batch, sizes), expected)
    expected = theirs(batch, lambda part, row: reference.resize(part, [25], max_size=30))
    assert same(scenes.resize_shorter(batch, 25, 30), expected)


def test_scale_jitter_is_torchvisions():
    batch = made()
    scales = draws(6).uniform(0.1, 2.0).tolist()
    sizes = []
    for scene, scale in zip(batch.rows(), scales, strict=True):
        fit = min(30 / scene.size[0], 50 / scene.size[1]) * scale
        sizes.append((int(scene.size[0] * fit), int(scene.size[1] * fit)))
    ours = scenes.scale_jitter(batch, draws(6), (30, 50))
    assert [scene.size for scene in ours.rows()] == sizes and sound(ours)


@pytest.mark.parametrize("seed", range(3))
def test_an_iou_crop_leaves_whole_scenes_or_windows_with_a_centre_inside(seed):
    batch = made(40, seed=seed)
    ours = scenes.random_iou_crop(batch, draws(40, seed))
    assert sound(ours)
    cut = 0
    for before, after in zip(batch.rows(), ours.rows(), strict=True):
        if after.size == before.size and torch.equal(after.image, before.image):
            continue
        cut += 1
        assert len(after.boxes) >= 1 and 0.5 <= after.size[1] / after.size[0] <= 2
        assert all(0.29 * whole - 1 <= part <= whole for part, whole in zip(after.size, before.size, strict=True))
    assert 15 <= cut <= 30  # three quarters have boxes, and one option in seven leaves a scene whole


@pytest.mark.parametrize("overlap", [0.3, 0.5])
def test_an_iou_crop_meets_its_overlap(overlap):
    batch = Scenes(
        [torch.zeros(1, 60, 60)] * 30, [torch.tensor([[10.0, 10, 45, 45], [0, 0, 5, 5]])] * 30, [torch.arange(2)] * 30
    )
    ours = scenes.random_iou_crop(batch, draws(30), sampler_options=[overlap])
    for scene in ours.rows():
        assert scene.labels[0] == 0
        inside, window = scenes.box_areas(scene.boxes[:1]), scene.size[0] * scene.size[1]
        assert inside / (35 * 35 + window - inside) >= overlap
    impossible = scenes.random_iou_crop(
        batch._replace(boxes=[torch.tensor([[1.0, 1, 2, 2], [0, 0, 1, 1]])] * 30),
        draws(30),
        sampler_options=[0.9],
        trials=1,
    )
    assert all(scene.size == (60, 60) for scene in impossible.rows())


def test_a_mosaic_shows_four_scenes_round_its_centre():
    sizes = [(6, 8), (5, 20), (30, 4), (7, 9)]
    images = [torch.full((1, *size), float(row + 1)) for row, size in enumerate(sizes)]
    whole = [torch.tensor([[0.0, 0, width, height]]) for height, width in sizes]
    batch = Scenes(images, whole, [torch.tensor([row]) for row in range(4)], [torch.ones(1, *size) for size in sizes])
    ours = scenes.mosaic(batch, [[0, 1, 2, 3]], [[10, 12]], (20, 24), fill=9)
    canvas = torch.full((1, 20, 24), 9.0)
    canvas[:, 4:10, 4:12], canvas[:, 5:10, 12:24], canvas[:, 10:20, 8:12], canvas[:, 10:17, 12:21] = 1, 2, 3, 4
    assert torch.equal(ours.images[0], canvas) and ours.labels[0].tolist() == [0, 1, 2, 3]
    assert ours.boxes[0].tolist() == [[4, 4, 12, 10], [12, 5, 24, 10], [8, 10, 12, 20], [12, 10, 21, 17]]
    for number, cover in enumerate(ours.masks[0]):
        assert torch.equal(cover == 1, canvas[0] == number + 1)
    assert scenes.mosaic(batch, [[0, 1, 2, 3]], [[10, 12]], (20, 24), min_visible=0.5).labels[0].tolist() == [0, 1, 3]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda s, d: scenes.random_horizontal_flip(s, d),
        lambda s, d: scenes.random_crop(s, d, (18, 25), min_visible=0.2),
        lambda s, d: scenes.random_iou_crop(s, d),
        lambda s, d: scenes.scale_jitter(s, d, (30, 50), (0.5, 1.5)),
        lambda s, d: scenes.resize_shorter(s, 12, 20),
        lambda s, d: scenes.random_mosaic(s, d, (32, 48)),
        lambda s, d: s._replace(images=augment.photometric_distort(s.images, d)),
    ],
    ids=["flip", "crop", "iou crop", "scale", "shorter", "mosaic", "colours"],
)
def test_changed_scenes_are_sound_and_follow_their_rows(change, masks):
    batch = made(masks=masks)
    before = [image.clone() for image in batch.images]
    ours = change(batch, draws(6))
    assert sound(ours) and len(ours.images) == 6 and (ours.masks is not None) == masks
    again = change(batch, Draw(0, 0, np.arange(6)))
    assert all(torch.equal(a, b) for a, b in zip(ours.images + ours.boxes, again.images + again.boxes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(batch.images, before, strict=True))


def test_a_random_crop_of_scenes_may_lie_anywhere():
    picture = torch.arange(6.0).expand(1, 6, 6) + 10 * torch.arange(6.0)[:, None]
    batch = Scenes([picture] * 400, [torch.zeros(0, 4)] * 400, [torch.zeros(0, dtype=torch.int64)] * 400)
    corners = torch.stack([image[0, 0, 0] for image in scenes.random_crop(batch, draws(400), (5, 9)).images])
    assert corners.unique().tolist() == [0, 10] and 160 < (corners == 0).sum() < 240


def test_the_centre_of_a_random_mosaic_lies_in_the_middle_half(monkeypatch):
    seen = {}
    monkeypatch.setattr(scenes, "mosaic", lambda *numbers: seen.update(numbers=numbers))
    scenes.random_mosaic(made(3), draws(500), (40, 100))
    _, partners, centers, *_ = seen["numbers"]
    assert partners.tolist() == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    assert centers.amin(0).tolist() == [10, 25] and centers.amax(0).tolist() == [29, 74]


def test_a_scene_meets_its_fate_in_any_batch():
    batch, order = made(), [4, 1]
    some = Scenes(*([column[row] for row in order] for column in batch))
    for change in (scenes.random_iou_crop, lambda s, d: scenes.random_crop(s, d, 18)):
        whole, part = change(batch, draws(6)), change(some, Draw(0, 0, np.array(order)))
        assert all(torch.equal(part.images[at], whole.images[row]) for at, row in enumerate(order))


def test_scenes_may_be_one_tensor_of_pictures():
    images = pictures(rows=2)
    batch = Scenes(
        images,
        [torch.zeros(0, 4), torch.tensor([[1.0, 2, 3, 4]])],
        [torch.zeros(0, dtype=torch.int64), torch.tensor([1])],
    )
    ours = scenes.horizontal_flip(batch, torch.tensor([False, True]))
    assert torch.equal(torch.stack(ours.images), torch.stack([images[0], images[1].flip(-1)]))
    assert ours.boxes[1].tolist() == [[13, 2, 15, 4]] and ours.masks is None


def test_a_size_is_one_number_or_two():
    assert windows.size_pair(3) == (3, 3) and windows.size_pair([4, 5]) == (4, 5)
    assert math.isclose(scenes.box_areas(torch.tensor([[0.0, 0, 2, 3]])).item(), 6)


# ---- pictures of any size, decoded in being cropped


def encoded_of(sizes: list[tuple[int, int]]) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    small = [torch.rand((1, 3, 2, 3), generator=generator) for _ in sizes]
    smooth = [
        functional.interpolate(one, size, mode="bicubic").clamp(0, 1)[0] for one, size in zip(small, sizes, strict=True)
    ]
    pixels = [(255 * one).byte().permute(1, 2, 0).contiguous().numpy() for one in smooth]
    return Pictures([formats.jpeg(one)["bytes"] for one in pixels], np.array(sizes))


SIZES = [(160, 240), (180, 100), (124, 124), (400, 300)]


def test_a_resized_crop_of_encoded_pictures_is_that_of_the_decoded_ones():
    encoded = encoded_of(SIZES)
    high, wide = (torch.tensor(side) for side in zip(*SIZES, strict=True))
    boxes = warp.crop_boxes(draws(4), high, wide, (0.3, 1.0), (3 / 4, 4 / 3))
    found = augment.random_resized_crop(encoded, draws(4), 24, scale=(0.3, 1.0))
    assert found.shape == (4, 3, 24, 24)
    for row, (picture, box) in enumerate(zip(encoded.decoded(), torch.stack(boxes, 1).tolist(), strict=True)):
        want = reference.resized_crop(picture, *box, [24, 24], antialias=True)
        assert (found[row].int() - want.int()).abs().float().mean() < 2, "a smaller decoding is nearly the same"


def test_the_middle_of_pictures_is_what_resize_and_center_crop_give():
    encoded = encoded_of(SIZES)
    found = augment.central_resized_crop(encoded, 24, shorter=28)
    for row, picture in enumerate(encoded.decoded()):
        want = reference.center_crop(reference.resize(picture, [28], antialias=True), [24, 24])
        assert (found[row].int() - want.int()).abs().float().mean() < 4, "the window is rounded otherwise"
        same = augment.central_resized_crop(picture[None], 24, shorter=28)[0]
        assert (found[row].int() - same.int()).abs().float().mean() < 2
