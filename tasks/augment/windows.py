"""Augmentation that copies pixels: crops, flips, rectangles erased or pasted. Every dtype, bit for bit.

The figures in comments are microseconds for 128 pictures of 3x32x32 uint8 on one core of an EPYC 9004 (Nov 2026).
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks.task import Draw

LARGE = 1 << 14  # numbers of a picture from which on it pays to take one at a time
PADDING_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}  # torchvision's name -> torch's
MAX_TABLE = 2**20  # bytes of masks that are kept for one shape: they stay in the processor's cache


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of a size given as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def exact(numbers: Tensor) -> Tensor:
    """Returns the numbers in float64, where their device knows it: Apple's does not."""
    return numbers.float() if numbers.device.type == "mps" else numbers.double()


# ---- crops


def crop(
    images: Tensor,
    top: Tensor,
    left: Tensor,
    height: int,
    width: int,
    padding: int = 0,
    padding_mode: str = "constant",
    fill: float = 0,
) -> Tensor:
    """Returns (B, C, height, width): of each picture, padded on all sides, the window at its own corner.

    `top`, `left` (B,) int64 count from the corner of the padded picture. `padding_mode`: "constant" with `fill`,
    "reflect" or "edge". Raises ValueError for a window that is not inside.
    """
    rows, columns = images.shape[-2] + 2 * padding - height, images.shape[-1] + 2 * padding - width
    for name, corner, last in (("top", top, rows), ("left", left, columns)):
        if len(corner) and not 0 <= int(corner.min()) <= int(corner.max()) <= last:
            raise ValueError(f"crop: {name} holds {corner.min()}..{corner.max()}, expected 0..{last}")
    return _crop(images, top, left, height, width, padding, padding_mode, fill)


def random_crop(
    images: Tensor,
    draw: Draw,
    size: int | Sequence[int],
    padding: int = 4,
    padding_mode: str = "constant",
    fill: float = 0,
) -> Tensor:
    """Returns (B, C, *size): a window anywhere in each padded picture (torchvision's RandomCrop)."""
    height, width = size_pair(size)
    rows, columns = images.shape[-2] + 2 * padding - height, images.shape[-1] + 2 * padding - width
    if rows < 0 or columns < 0:
        raise ValueError(
            f"random_crop: a window of {height}x{width} does not fit into {rows + height}x{columns + width}"
        )
    top, left = draw.integers(0, rows + 1), draw.integers(0, columns + 1)
    return _crop(images, top, left, height, width, padding, padding_mode, fill)


def center_crop(images: Tensor, size: int | Sequence[int]) -> Tensor:
    """Returns (B, C, *size) from the middle; what a picture lacks is filled with zeros on both sides."""
    height, width = size_pair(size)
    down, across = max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)
    padded = functional.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))
    # Python's round, to the even neighbour, is what torchvision takes.
    top, left = round((padded.shape[-2] - height) / 2), round((padded.shape[-1] - width) / 2)
    return padded[..., top : top + height, left : left + width].clone(memory_format=torch.contiguous_format)


def _crop(
    images: Tensor, top: Tensor, left: Tensor, height: int, width: int, padding: int, padding_mode: str, fill: float
) -> Tensor:
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode '{padding_mode}': there are {', '.join(PADDING_MODES)}")
    table = (2 * padding + 1) ** 2 * height * width * images.element_size()
    black = padding_mode == "constant" and fill == 0 and images.shape[-2:] == (height, width)
    near = 0 < padding < min(height, width) and table <= MAX_TABLE
    if black and near and len(images) and images.device.type == "cpu":
        return _shifted(images, top, left, padding)
    if padding:
        value = fill if padding_mode == "constant" else None
        images = functional.pad(images, (padding,) * 4, PADDING_MODES[padding_mode], value)
    # All windows of the batch overlap in one view: the corner's offset is the window's number.
    images = images.contiguous()
    batch, channels, high, wide = images.shape
    last = (batch - 1) * channels * high * wide + (high - height) * wide + wide - width
    views = images.as_strided(
        (max(last + 1, 0), channels, height, width), (1, high * wide, wide, 1), images.storage_offset()
    )
    first = torch.arange(batch, device=images.device).mul_(channels * high * wide)
    return views.index_select(0, first + top * wide + left)


def _shifted(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """A crop of the picture's own size is one copy of the whole picture from a shifted place, 17 us; what came in over
    the edges, from neighbouring lines and pictures, is masked out afterwards, 40 us. Padding and cutting line by line
    takes 105. Numbers one a row are numpy's here: on so few it is three times as fast as torch.
    """
    batch, channels, height, _ = images.shape
    octets = images.contiguous().view(torch.uint8)
    pixel, line = images.element_size(), octets.shape[-1]
    picture = channels * height * line
    end = (batch - 1) * picture
    offsets, masks = _shifts(height, line, padding, pixel)
    shift = top.numpy() * (2 * padding + 1) + left.numpy()
    starts = offsets[shift]
    starts += np.arange(0, end + 1, picture)
    before, after = int(starts[0]), int(starts[-1]) - end
    starts[0] = max(before, 0)
    starts[-1] = min(starts[-1], end)
    out = octets.as_strided((end + 1, picture), (1, 1), octets.storage_offset())
    out = out.index_select(0, torch.from_numpy(starts))
    if before < 0:  # the first and the last picture have no neighbour to be shifted into
        out[0, -before:] = octets[0].view(-1)[:before]
    if after > 0:
        out[-1, :-after] = octets[-1].view(-1)[after:]
    out.view(batch, channels, -1).bitwise_and_(masks.index_select(0, torch.from_numpy(shift))[:, None])
    return out.view(octets.shape).view(images.dtype)


@functools.lru_cache(maxsize=8)
def _shifts(height: int, line: int, padding: int, pixel: int) -> tuple[np.ndarray, Tensor]:
    """Returns, for each of the (2 padding + 1)^2 shifts, how many bytes it is, and (height * line) uint8 that are
    255 at the bytes which it leaves inside the picture.
    """
    steps = torch.arange(-padding, padding + 1)
    rows = torch.arange(height) + steps[:, None]
    columns = torch.arange(line).div(pixel, rounding_mode="floor") + steps[:, None]
    down, across = (rows >= 0) & (rows < height), (columns >= 0) & (columns < line // pixel)
    inside = down[:, None, :, None] & across[None, :, None, :]
    offsets = (steps[:, None] * line + steps * pixel).flatten()
    return offsets.numpy(), inside.to(torch.uint8).mul_(255).view(len(offsets), -1)


# ---- flips


def horizontal_flip(images: Tensor, flipped: Tensor, inplace: bool = False) -> Tensor:
    """Returns the pictures, those where `flipped` (B,) bool is true mirrored left to right."""
    return _flip(images, flipped, -1, inplace)


def vertical_flip(images: Tensor, flipped: Tensor, inplace: bool = False) -> Tensor:
    """Returns the pictures, those where `flipped` (B,) bool is true upside down."""
    return _flip(images, flipped, -2, inplace)


def random_horizontal_flip(images: Tensor, draw: Draw, p: float = 0.5, inplace: bool = False) -> Tensor:
    """Mirrors each picture left to right with probability `p`; `inplace` saves a copy of what is no longer needed."""
    return _flip(images, draw.chance(p), -1, inplace)


def random_vertical_flip(images: Tensor, draw: Draw, p: float = 0.5, inplace: bool = False) -> Tensor:
    """Turns each picture upside down with probability `p`; `inplace` saves a copy of what is no longer needed."""
    return _flip(images, draw.chance(p), -2, inplace)


def _flip(images: Tensor, flipped: Tensor, dim: int, inplace: bool) -> Tensor:
    if images.device.type != "cpu":  # counting the flipped ones would wait for the device
        out = torch.where(flipped[:, None, None, None], images.flip(dim), images)
        return images.copy_(out) if inplace else out
    rows = torch.from_numpy(flipped.numpy().nonzero()[0])
    out = images if inplace else images.clone(memory_format=torch.contiguous_format)
    if out[:1].numel() > LARGE or not out.is_contiguous():
        # One by one: 64 of 3x224x224 take 0.6 ms instead of 8 in channels-last order, else 0.35 instead of 0.67.
        for row in rows.tolist():
            out[row].copy_(out[row].flip(dim))
        return out
    put_rows(out, rows, out.index_select(0, rows).flip(dim))
    return out


def put_rows(images: Tensor, rows: Tensor, block: Tensor) -> None:
    """Writes `block` over the given rows of `images`, in place."""
    if images.device.type == "cpu":
        _as_numpy(images)[rows.numpy()] = _as_numpy(block)  # 8 us; torch's images[rows] = block 123, index_copy_ 165
    else:
        images[rows] = block


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array; bfloat16, which numpy does not know, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ---- rectangles


def paste(images: Tensor, source: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Returns the pictures with the pixels of `source` (B, C, H, W) inside each row's rectangle, all (B,) int64."""
    if images.device.type != "cpu":
        y = torch.arange(images.shape[-2], device=images.device)[:, None]
        x = torch.arange(images.shape[-1], device=images.device)
        t, le, h, w = (number[:, None, None] for number in (top, left, height, width))
        inside = (y >= t) & (y < t + h) & (x >= le) & (x < le + w)
        return torch.where(inside[:, None], source, images)
    # A loop over slices costs 1 us a rectangle; torch.where over the whole batch 365 us, more with larger pictures.
    out = images.clone(memory_format=torch.contiguous_format)
    pixels, pasted = _as_numpy(out), _as_numpy(source)
    corners = (number.tolist() for number in (top, left, height, width))
    for row, (t, le, h, w) in enumerate(zip(*corners, strict=True)):
        if h and w:
            pixels[row, :, t : t + h, le : le + w] = pasted[row, :, t : t + h, le : le + w]
    return out


def erase(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, value: float | Sequence[float] = 0.0
) -> Tensor:
    """Returns the pictures with each row's rectangle, all (B,) int64, set to `value`, one number or one a channel."""
    channels = torch.as_tensor(value, device=images.device).to(images.dtype).reshape(-1, 1, 1)
    return paste(images, channels.expand(images.shape), top, left, height, width)


def random_erasing(
    images: Tensor,
    draw: Draw,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | Sequence[float] = 0.0,
) -> Tensor:
    """Erases a rectangle of `scale` of the area and a height : width of `ratio` with probability `p` (Zhong et al.).

    As in torchvision the first of ten candidates that fits is taken, and none if none does.
    """
    high, wide = images.shape[-2:]
    chosen = draw.chance(p)
    height, width = candidates(draw, high * wide, scale, ratio)
    height, width, found = first_of(height, width, (height < high) & (width < wide))
    found &= chosen
    height, width = height * found, width * found
    return erase(images, *corner(draw, high - height, wide - width), height, width, value)


def cutout(images: Tensor, draw: Draw, size: int, value: float | Sequence[float] = 0.0) -> Tensor:
    """Erases a square of `size` around a pixel anywhere in each picture, cut off at its edges (DeVries and Taylor)."""
    high, wide = images.shape[-2:]
    top, left = draw.integers(0, high) - size // 2, draw.integers(0, wide) - size // 2
    bottom, right = (top + size).clamp(max=high), (left + size).clamp(max=wide)
    top, left = top.clamp(min=0), left.clamp(min=0)
    return erase(images, top, left, bottom - top, right - left, value)


# ---- drawing rectangles


def candidates(
    draw: Draw, area: Tensor | int, scale: tuple[float, float], ratio: tuple[float, float], count: int = 10
) -> tuple[Tensor, Tensor]:
    """Draws (count, B) heights and widths: the area uniform in `scale` of `area`, height : width log-uniform."""
    areas = exact(torch.stack([draw.uniform(*scale) for _ in range(count)])) * area
    low, high = np.log(ratio[0]), np.log(ratio[1])
    ratios = exact(torch.stack([draw.uniform(low, high) for _ in range(count)])).exp()
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def first_of(height: Tensor, width: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first valid one of the candidates (count, B) of each row, and (B,) whether there was one."""
    first = valid.long().argmax(0, keepdim=True)
    return height.gather(0, first)[0], width.gather(0, first)[0], valid.any(0)


def corner(draw: Draw, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Draws top in 0..rows and left in 0..columns, each (B,) int64 with its own bounds."""
    top = (exact(draw.uniform()) * (rows + 1)).long()
    left = (exact(draw.uniform()) * (columns + 1)).long()
    return top, left
