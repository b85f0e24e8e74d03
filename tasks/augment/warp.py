"""Augmentation that interpolates: rotations and other affine maps, resizing, resized crops."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tasks.augment.windows import candidates, corner, exact, first_of, size_pair
from tasks.task import Draw, Pictures

# ---- affine maps


def affine(
    images: Tensor,
    angle: Tensor,
    translate: Tensor,
    scale: Tensor,
    shear: Tensor,
    interpolation: str = "nearest",
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Returns the pictures, each mapped about its centre by its own numbers.

    `angle` (B,) degrees clockwise, `translate` (B, 2) pixels right and down, `scale` (B,), `shear` (B, 2) degrees;
    `interpolation` is "nearest" or "bilinear". What came from outside is black, or `fill` (a number, or one a channel).
    """
    height, width = images.shape[-2:]
    # Sixteen bits would be too coarse for places.
    pixels = images if images.dtype == torch.float64 else images.float()
    half = torch.tensor([width / 2, height / 2], dtype=pixels.dtype, device=images.device)
    x = torch.arange(width, dtype=pixels.dtype, device=images.device) - (width - 1) / 2
    y = torch.arange(height, dtype=pixels.dtype, device=images.device) - (height - 1) / 2
    places = torch.stack(
        [x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x).expand(height, width)], -1
    )
    matrix = _inverse(angle, translate, scale, shear).to(pixels.dtype)  # (B, 2, 3)
    grid = places.view(1, -1, 3) @ (matrix.transpose(1, 2) / half)  # (B, H W, 2) in -1..1
    grid = grid.view(-1, height, width, 2)
    if fill is not None:  # one more channel tells what came from inside
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    out = functional.grid_sample(pixels, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    if fill is not None:
        out, inside = out[:, :-1], out[:, -1:]
        color = torch.as_tensor(fill, dtype=out.dtype, device=out.device).reshape(-1, 1, 1)
        out = torch.where(inside < 0.5, color, out) if interpolation == "nearest" else (out - color) * inside + color
    return (out if images.is_floating_point() else out.round_()).to(images.dtype)


def _inverse(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Returns (B, 2, 3) float64: where a pixel of the output comes from, both counted from the centre.

    The forward map is T(translate) R(angle) S(scale) SHy(shear y) SHx(shear x), as in torchvision.
    """
    turn, (across, down) = torch.deg2rad(exact(angle)), torch.deg2rad(exact(shear)).unbind(1)
    a, c = torch.cos(turn - down) / torch.cos(down), torch.sin(turn - down) / torch.cos(down)
    b, d = -a * torch.tan(across) - torch.sin(turn), torch.cos(turn) - c * torch.tan(across)
    linear = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / exact(scale).view(-1, 1, 1)
    return torch.cat([linear, -linear @ exact(translate)[:, :, None]], 2)


def rotate(
    images: Tensor, angle: Tensor, interpolation: str = "nearest", fill: float | Sequence[float] | None = None
) -> Tensor:
    """Returns the pictures turned about their centres by `angle` (B,) degrees anticlockwise, their size kept."""
    none = torch.zeros(len(images), 2, device=images.device)
    return affine(images, -angle, none, torch.ones_like(angle), none, interpolation, fill)


def random_rotation(
    images: Tensor,
    draw: Draw,
    degrees: float | tuple[float, float],
    interpolation: str = "nearest",
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Turns each picture by an angle uniform in `degrees`; one number d means -d..d."""
    return rotate(images, draw.uniform(*_either_way(degrees)), interpolation, fill)


def random_affine(
    images: Tensor,
    draw: Draw,
    degrees: float | tuple[float, float],
    translate: tuple[float, float] = (0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float | tuple[float, float] | tuple[float, float, float, float] = 0.0,
    interpolation: str = "nearest",
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Maps each picture by uniform numbers (torchvision's RandomAffine).

    `translate` holds the largest shifts, across and down, as shares of width and height; `shear` one or two ranges of
    degrees, along x and along y.
    """
    height, width = images.shape[-2:]
    angle = draw.uniform(*_either_way(degrees))
    shear = shear if isinstance(shear, tuple) else (-shear, shear)
    along_y = (shear[2], shear[3]) if len(shear) == 4 else (0.0, 0.0)
    shifts = [draw.uniform(-t * size, t * size).round() for t, size in zip(translate, (width, height), strict=True)]
    scales = draw.uniform(*scale)
    shears = [draw.uniform(shear[0], shear[1]), draw.uniform(*along_y)]
    return affine(images, angle, torch.stack(shifts, 1), scales, torch.stack(shears, 1), interpolation, fill)


def _either_way(degrees: float | tuple[float, float]) -> tuple[float, float]:
    return degrees if isinstance(degrees, tuple) else (-degrees, degrees)


# ---- sizes


def resized_size(height: int, width: int, size: int | Sequence[int], max_size: int | None = None) -> tuple[int, int]:
    """Returns the new (height, width): `size` itself, or, for one number, that of the shorter side.

    Then the longer side follows and is at most `max_size`.
    """
    if not isinstance(size, int):
        return size_pair(size)
    if max_size is not None and max_size <= size:
        raise ValueError(f"resize: max_size {max_size} must exceed the shorter side's size {size}")
    short, long = min(height, width), max(height, width)
    new_short, new_long = size, int(size * long / short)
    if max_size is not None and new_long > max_size:
        new_short, new_long = int(max_size * new_short / new_long), max_size
    return (new_long, new_short) if width <= height else (new_short, new_long)


def resize(
    images: Tensor,
    size: int | Sequence[int],
    max_size: int | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Returns (B, C, new height, new width): `size` is both, or the shorter side's.

    `interpolation` is "bilinear", smoothed first where it shrinks unless `antialias` is false, or "nearest".
    """
    height, width = images.shape[-2:]
    size = resized_size(height, width, size, max_size)
    if size == (height, width):
        return images.clone()
    if interpolation == "nearest":
        return functional.interpolate(images, size, mode="nearest")
    # The processor interpolates bytes directly, several times faster than through float32.
    direct = images.dtype in (torch.float32, torch.float64) or (
        images.dtype == torch.uint8 and images.device.type == "cpu"
    )
    pixels = images if direct else images.float()
    out = functional.interpolate(pixels, size, mode=interpolation, align_corners=False, antialias=antialias)
    if direct:
        return out
    return (out if images.is_floating_point() else out.round_()).to(images.dtype)


def resized_crop(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int | Sequence[int]
) -> Tensor:
    """Returns (B, C, *size): of each picture its own window, all (B,) int64, resized (bilinear, antialiased)."""
    rows, columns = size_pair(size)
    if images.device.type == "cpu":
        out = images.new_empty(len(images), images.shape[1], rows, columns)
        boxes = zip(*(number.tolist() for number in (top, left, height, width)), strict=True)
        for row, (t, le, h, w) in enumerate(boxes):
            out[row] = resize(images[row : row + 1, :, t : t + h, le : le + w], (rows, columns))[0]
        return out
    pixels = images if images.is_floating_point() else images.float()
    down = resize_weights(top, height, images.shape[-2], rows).to(pixels.dtype)[:, None]  # (B, 1, rows, H)
    across = resize_weights(left, width, images.shape[-1], columns).to(pixels.dtype)[:, None]
    out = down @ pixels @ across.transpose(-1, -2)
    return out if images.is_floating_point() else out.round_().to(images.dtype)


def resize_weights(first: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Returns (B, size, pixels): what each old pixel of a line gives to a new one, where first..first + length of it
    are resized to `size`. A triangle as wide as the new pixel, as torch's antialiased bilinear interpolation.

    On an accelerator two products with such matrices replace one small interpolation a row.
    """
    step = length.float().div(size).view(-1, 1, 1)  # old pixels in a new one
    reach = step.clamp(min=1.0)
    centres = (torch.arange(size, device=first.device).view(1, -1, 1) + 0.5) * step
    places = torch.arange(pixels, device=first.device).view(1, 1, -1) - first.view(-1, 1, 1)
    weights = (1 - (places + 0.5 - centres).abs() / reach).clamp(min=0)
    weights = weights * ((places >= 0) & (places < length.view(-1, 1, 1)))
    return weights / weights.sum(-1, keepdim=True)


def random_resized_crop(
    images: Tensor | Pictures,
    draw: Draw,
    size: int | Sequence[int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Returns (B, C, *size): a window of `scale` of the area and a width : height of `ratio`, resized.

    As torchvision's RandomResizedCrop: the first of ten candidates that fits, else the largest central window of
    an allowed ratio. `Pictures` are decoded in doing so, to uint8.
    """
    high, wide = _sizes(images)
    boxes = crop_boxes(draw, high, wide, scale, ratio)
    if isinstance(images, Pictures):
        return images.resized_crops(torch.stack(boxes, 1).cpu(), size_pair(size))
    return resized_crop(images, *boxes, size)


def central_resized_crop(images: Tensor | Pictures, size: int | Sequence[int], shorter: int) -> Tensor:
    """Returns (B, C, *size) from the middle of pictures whose shorter side is scaled to `shorter`, for evaluation.

    What torchvision's Resize(shorter) and CenterCrop(size) give, in one step: `Pictures` are decoded in doing so.
    """
    rows, columns = size_pair(size)
    high, wide = _sizes(images)
    scale = torch.minimum(high, wide).double() / shorter  # old pixels in a new one
    height, width = (torch.minimum((side * scale).round().long(), of) for side, of in ((rows, high), (columns, wide)))
    top, left = (high - height) // 2, (wide - width) // 2
    if isinstance(images, Pictures):
        return images.resized_crops(torch.stack([top, left, height, width], 1).cpu(), (rows, columns))
    return resized_crop(images, top, left, height, width, (rows, columns))


def _sizes(images: Tensor | Pictures) -> tuple[Tensor, Tensor]:
    """Heights and widths, each (B,) int64, where the pictures are."""
    if isinstance(images, Pictures):
        high, wide = torch.from_numpy(images.sizes).unbind(1)
        return high.to(images.device), wide.to(images.device)
    whole = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
    return whole[:, 0], whole[:, 1]


def crop_boxes(
    draw: Draw, high: Tensor | int, wide: Tensor | int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws top, left, height and width, each (B,) int64, of windows in pictures of high x wide, (B,) int64 or one."""
    high, wide = torch.as_tensor(high), torch.as_tensor(wide)
    width, height = candidates(draw, high * wide, scale, ratio)
    valid = (width > 0) & (width <= wide) & (height > 0) & (height <= high)
    height, width, found = first_of(height, width, valid)
    nearest = (wide.double() / high).clamp(min(ratio), max(ratio))
    height = height.where(found, torch.minimum(high, (wide / nearest).round().long()))
    width = width.where(found, torch.minimum(wide, (high * nearest).round().long()))
    top, left = corner(draw, high - height, wide - width)
    return top.where(found, (high - height) // 2), left.where(found, (wide - width) // 2), height, width
