"""Augmentation of colours, and the last step before a network: normalize.

A picture of 0..255 is cut back to whole numbers after every operation, as torchvision does.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tasks.augment.windows import put_rows
from tasks.task import Draw

Range = float | tuple[float, float]  # of a factor: (low, high), or how far it may be from what changes nothing
CACHED = 1 << 19  # numbers that a core's cache holds
RGB_TO_GRAY = (0.2989, 0.587, 0.114)  # torchvision's rounding of ITU-R BT.601


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns (x - mean) / std, one number a channel; uint8 is scaled to 0..1 first and becomes float32."""
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"normalize: std must be above 0, got {list(std)}")
    scale = 1.0 if images.is_floating_point() else 255.0
    dtype = images.dtype if images.is_floating_point() else torch.float32
    shift = _per_channel(tuple(scale * m for m in mean), dtype, images.device)
    factor = _per_channel(tuple(1 / (scale * s) for s in std), dtype, images.device)
    if images.device.type != "cpu":
        out = images.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return out.sub_(shift).mul_(factor)
    # A few pictures at a time, while they are in the cache: 64 of 3x224x224 take half as long.
    out = torch.empty(images.shape, dtype=dtype)
    pictures = max(1, CACHED // max(1, images[0].numel())) if len(images) else 1
    for to, part in zip(out.split(pictures), images.split(pictures), strict=True):
        to.copy_(part).sub_(shift).mul_(factor)
    return out


@functools.lru_cache(maxsize=64)
def _per_channel(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device).view(-1, 1, 1)


# ---- one operation, one factor a row


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies each picture by its factor (B,)."""
    return _cut(images * _column(factor, images), images)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Moves each picture away from its mean grey (factor > 1, (B,)) or towards it."""
    return _blend(images, _gray(images).mean((-3, -2, -1), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Moves each pixel away from its grey (factor > 1, (B,)) or towards it; grey pictures stay as they are."""
    return _blend(images, _gray(images), factor) if images.shape[1] == 3 else images.clone()


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turns the colours of each picture by `factor` (B,) of the colour circle, in -0.5..0.5."""
    if images.shape[1] == 1:
        return images.clone()
    pixels = images if images.is_floating_point() else images.float().div_(255)
    red, green, blue = pixels.unbind(1)
    # Weights of 0 and 1 instead of torch.where, pairwise instead of amax(1): five times as fast on a processor.
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    if_red = (high == red).to(pixels.dtype)
    if_green = (high == green).to(pixels.dtype) * (1 - if_red)
    if_blue = 1 - if_red - if_green
    hue = (green - blue).mul_(if_red).addcmul_(blue - red, if_green).addcmul_(red - green, if_blue)
    hue.div_(6 * chroma.clamp(min=1e-12))  # grey has no hue; its chroma of 0 keeps it grey
    hue.add_(if_green, alpha=1 / 3).add_(if_blue, alpha=2 / 3).add_(factor.view(-1, 1, 1))  # in turns of the circle
    # On HSV's way back each channel is the same trapezium over the circle, a third of a turn apart.
    thirds = torch.tensor([1 / 2, 1 / 6, -1 / 6], dtype=pixels.dtype, device=images.device).view(3, 1, 1)
    place = hue[:, None] + thirds
    away = (place - place.round()).abs_()
    turned = high[:, None] - away.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None])
    # torchvision's way from 0..1 to whole numbers, which gives each of the 256 an equal share.
    return turned if images.is_floating_point() else _bytes(turned.mul_(256 - 1e-3))


def grayscale(images: Tensor, num_output_channels: int = 1) -> Tensor:
    """Returns (B, num_output_channels, H, W), one or three equal channels."""
    if images.shape[1] == 1:
        return images.repeat(1, num_output_channels, 1, 1)
    return _gray(images).to(images.dtype).repeat(1, num_output_channels, 1, 1)


def gaussian_blur(images: Tensor, kernel_size: int, sigma: Tensor) -> Tensor:
    """Blurs each picture with its own sigma (B,) pixels; `kernel_size` is odd, edges are reflected."""
    if kernel_size % 2 == 0:
        raise ValueError(f"gaussian_blur: kernel_size must be odd, got {kernel_size}")
    batch, channels, _, width = images.shape
    pixels = images if images.is_floating_point() else images.float()
    places = torch.arange(kernel_size, device=images.device) - kernel_size // 2
    kernel = torch.softmax(-0.5 * (places / sigma[:, None]) ** 2, 1).to(pixels.dtype)
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # (B C, 1, kernel_size)
    padded = functional.pad(pixels, (kernel_size // 2,) * 4, "reflect").view(
        1, batch * channels, -1, width + kernel_size - 1
    )
    across = functional.conv2d(padded, kernel[:, :, None, :], groups=batch * channels)
    blurred = functional.conv2d(across, kernel[:, :, :, None], groups=batch * channels).view(images.shape)
    return blurred if images.is_floating_point() else blurred.round_().to(images.dtype)


def _gray(images: Tensor) -> Tensor:  # (B, 1, H, W) floating; of whole numbers whole again
    if images.shape[1] == 1:
        return images if images.is_floating_point() else images.float()
    red, green, blue = (images[:, channel : channel + 1] for channel in range(3))
    gray = red.mul(RGB_TO_GRAY[0]).add_(green, alpha=RGB_TO_GRAY[1]).add_(blue, alpha=RGB_TO_GRAY[2])
    return gray if images.is_floating_point() else gray.floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    weight = _column(factor, images)
    return _cut((images * weight).add_(other * (1 - weight)), images)


def _column(factor: Tensor, images: Tensor) -> Tensor:
    return factor.to(images.dtype if images.is_floating_point() else factor.dtype).view(-1, 1, 1, 1)


def _cut(values: Tensor, images: Tensor) -> Tensor:
    return values.clamp_(0, 1) if images.is_floating_point() else _bytes(values.clamp_(0, 255))


def _bytes(values: Tensor) -> Tensor:
    return values.to(torch.int16).to(torch.uint8)  # torch's direct way from float32 takes five times as long


# ---- several together


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def jitter(images: Tensor, order: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Adjusts brightness, contrast, saturation and hue of each picture by its `factors` (B,), in its own order.

    `order` (B, 4) int64 numbers the four in that sequence; one without factors is left out.
    """
    out = images.clone(memory_format=torch.contiguous_format)
    for turn in order.unbind(1):
        for number, (adjust, factor) in enumerate(zip(ADJUSTMENTS, factors, strict=True)):
            rows = (turn == number).nonzero().squeeze(1)
            if factor is not None and len(rows):
                put_rows(out, rows, adjust(out.index_select(0, rows), factor.index_select(0, rows)))
    return out


def color_jitter(
    images: Tensor, draw: Draw, brightness: Range = 0, contrast: Range = 0, saturation: Range = 0, hue: Range = 0
) -> Tensor:
    """Adjusts brightness, contrast, saturation and hue by random factors in random order (torchvision's ColorJitter).

    A single number x is the range 1-x..1+x, for hue -x..x; 0 leaves that one out.
    """
    bounds = [_bounds(r, 1.0) for r in (brightness, contrast, saturation)] + [_bounds(hue, 0.0)]
    if bounds[3] and not -0.5 <= bounds[3][0] <= bounds[3][1] <= 0.5:
        raise ValueError(f"color_jitter: hue must lie in -0.5..0.5, got {hue}")
    order = torch.stack([draw.uniform() for _ in ADJUSTMENTS], 1).argsort(1)
    return jitter(images, order, [draw.uniform(*bound) if bound else None for bound in bounds])


def _bounds(wanted: Range, neutral: float) -> tuple[float, float] | None:
    if isinstance(wanted, tuple):
        return wanted
    low = neutral - wanted
    return (max(low, 0.0) if neutral else low, neutral + wanted) if wanted else None


def random_grayscale(images: Tensor, draw: Draw, p: float = 0.1) -> Tensor:
    """Takes the colour from each picture with probability `p`; the number of channels stays."""
    return _some(images, draw.chance(p), lambda block, rows: grayscale(block, images.shape[1]))


def random_gaussian_blur(
    images: Tensor, draw: Draw, kernel_size: int, sigma: tuple[float, float] = (0.1, 2.0), p: float = 1.0
) -> Tensor:
    """Blurs each picture with probability `p`, with a sigma uniform in the given range of pixels."""
    chosen, sigmas = draw.chance(p), draw.uniform(*sigma)
    return _some(images, chosen, lambda block, rows: gaussian_blur(block, kernel_size, sigmas.index_select(0, rows)))


def _some(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    out = images.clone(memory_format=torch.contiguous_format)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        put_rows(out, rows, change(images.index_select(0, rows), rows))
    return out


def distort(
    images: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    contrast_before: Tensor,
    permutation: Tensor,
) -> Tensor:
    """Adjusts each picture by its factors (B,), contrast early or late by `contrast_before` (B,) bool, and
    shuffles its channels by `permutation` (B, C) int64. Factors of 1, 1, 1 and 0 change nothing.
    """
    out = adjust_brightness(images, brightness)
    out = adjust_contrast(out, contrast.where(contrast_before, torch.ones_like(contrast)))
    out = adjust_hue(adjust_saturation(out, saturation), hue)
    out = adjust_contrast(out, torch.ones_like(contrast).where(contrast_before, contrast))
    return out.take_along_dim(permutation[:, :, None, None], 1)


def photometric_distort(
    images: Tensor | list[Tensor],
    draw: Draw,
    brightness: tuple[float, float] = (0.875, 1.125),
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: tuple[float, float] = (-0.05, 0.05),
    p: float = 0.5,
) -> Tensor | list[Tensor]:
    """Distorts each picture as SSD does, each operation with probability `p` (torchvision's RandomPhotometricDistort).

    `images` may be a list of pictures (C, H, W) of different sizes; then it returns one.
    """
    channels = images[0].shape[0] if len(images) else 0
    factors = []
    for bounds, neutral in ((brightness, 1.0), (contrast, 1.0), (saturation, 1.0), (hue, 0.0)):
        factor = draw.uniform(*bounds)
        factors.append(factor.where(draw.chance(p), torch.full_like(factor, neutral)))
    contrast_before, shuffled = draw.chance(0.5), draw.chance(p)
    permutation = torch.stack([draw.uniform() for _ in range(channels)] or [draw.uniform()], 1).argsort(1)
    unmoved = torch.arange(permutation.shape[1], device=permutation.device)
    permutation = permutation.where(shuffled[:, None], unmoved)
    numbers = (*factors, contrast_before, permutation)
    if isinstance(images, Tensor):
        return distort(images, *numbers)
    rows = zip(images, *(number.split(1) for number in numbers), strict=True)
    return [distort(image[None], *row)[0] for image, *row in rows]
