"""What a column of a batch is where its rows are no tensor of one shape: sequences, pictures of any size, masks."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ragged:
    """A column whose rows differ in length: the rows one after another, and their lengths."""

    values: Tensor  # (sum of lengths, ...)
    lengths: Tensor  # (B,) int64
    filled: Tensor | None = field(default=None, compare=False, repr=False)  # (B, longest), where it is there already

    def padded(self, fill: float = 0) -> Tensor:
        """Returns the rows as one tensor (B, longest, ...), short ones filled up."""
        if self.filled is not None and fill == 0:
            return self.filled.clone()
        batch, longest = len(self.lengths), int(self.lengths.max()) if len(self.lengths) else 0
        out = self.values.new_full((batch, max(longest, 1), *self.values.shape[1:]), fill)
        positions = torch.arange(out.shape[1], device=self.values.device)
        out[positions[None] < self.lengths[:, None]] = self.values
        return out

    def split(self) -> list[Tensor]:
        """Returns the rows as a list of B tensors (length, ...)."""
        return list(self.values.split(self.lengths.tolist()))

    def to(self, *args: Any, **kwargs: Any) -> "Ragged":
        return Ragged(self.values.to(*args, **kwargs), self.lengths.to(*args, **kwargs))


@dataclass(frozen=True)
class Pictures:
    """A column of B pictures of any size, JPEG or PNG or bare pixels, which are decoded as the task wants them.

    Decoding runs in as many threads as torch may use in this process; what comes out lies on `device`.
    """

    data: Sequence[Any]  # B buffers of bytes; or arrays (height, width, channels) uint8, decoded already
    sizes: np.ndarray  # (B, 2) int64: height, width in pixels
    channels: int = 3
    nearest: bool = False  # values are classes, not shades: never a mean of two
    device: torch.device = field(default=CPU, compare=False)

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device) -> "Pictures":
        return replace(self, device=device)

    def decoded(self) -> list[Tensor]:
        """Returns the pictures as a list of B tensors (channels, height, width) uint8."""

        def one(row: int) -> Tensor:
            return torch.from_numpy(self._pixels(row).transpose(2, 0, 1).copy())

        return [picture.to(self.device, non_blocking=True) for picture in _threaded(one, len(self))]

    def resized_crops(self, boxes: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
        """Cuts a box out of every picture and scales it to `size`; boxes (B, 4): top, left, height, width in pixels.

        Returns (B, channels, *size) uint8 in channels-last order of memory: bilinear with antialias, as torchvision
        does it. A JPEG that is to become less than a quarter as large is decoded at a half, a quarter or an eighth of
        its size, which its blocks of cosines give for free (ITU T.81; libjpeg).
        """
        boxes = np.asarray(boxes, np.int64)
        out = torch.empty((len(self), self.channels, *size), dtype=torch.uint8, memory_format=torch.channels_last)

        def one(row: int) -> None:
            top, left, height, width = boxes[row].tolist()
            # Twice as large as wanted at least: the box is rounded to whole pixels of what is decoded.
            shrunk = 1 if self.nearest else _power_of_two(min(height / size[0], width / size[1]) / 2)
            pixels = self._pixels(row, shrunk)
            scale_y, scale_x = pixels.shape[0] / self.sizes[row, 0], pixels.shape[1] / self.sizes[row, 1]
            first_y, first_x = round(top * scale_y), round(left * scale_x)
            last_y = max(first_y + 1, round((top + height) * scale_y))
            last_x = max(first_x + 1, round((left + width) * scale_x))
            # A copy, because mapped memory is not writable. The batch of one begins as numpy's, whose stride torch
            # takes for channels-last; of `tensor[None]` it takes the contrary, and resizing costs 335 us, not 130.
            crop = torch.from_numpy(pixels[None, first_y:last_y, first_x:last_x].copy()).permute(0, 3, 1, 2)
            out[row : row + 1] = _resized(crop, size, self.nearest)

        _threaded(one, len(self))
        return out.to(self.device, non_blocking=True)

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Scales whole pictures to one size, without regard to their proportions; returns (B, channels, *size)."""
        return self.resized_crops(np.concatenate([np.zeros_like(self.sizes), self.sizes], axis=1), size)

    def _pixels(self, row: int, shrunk: int = 1) -> np.ndarray:
        from tasks.formats import pictures

        data = self.data[row]
        is_decoded = isinstance(data, np.ndarray) and data.ndim == 3
        return data if is_decoded else pictures.decode(data, self.channels, shrunk)


def _power_of_two(ratio: float) -> int:
    """The largest of 1, 2, 4, 8 that does not exceed `ratio`."""
    return 1 << max(0, min(3, math.floor(math.log2(max(ratio, 1)))))


def _resized(crop: Tensor, size: tuple[int, int], nearest: bool) -> Tensor:
    if crop.shape[2:] == size:
        return crop
    if nearest:
        return functional.interpolate(crop, size, mode="nearest-exact")
    return functional.interpolate(crop, size, mode="bilinear", antialias=True)


class Mask(NamedTuple):
    """The masks of one row's objects, run-length encoded as COCO does it."""

    height: int
    width: int
    counts: list[bytes]  # one for each object


@dataclass(frozen=True)
class Masks:
    """A column of B rows, each with any number of masks, one for each of its objects."""

    rows: list[Mask]
    device: torch.device = field(default=CPU, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Masks":
        return replace(self, device=device)

    def decoded(self) -> list[Tensor]:
        """Returns a list of B tensors (objects, height, width) uint8, 1 inside."""
        from pycocotools import mask

        def one(row: int) -> Tensor:
            height, width, counts = self.rows[row]
            if not counts:
                return torch.zeros((0, height, width), dtype=torch.uint8)
            planes: Any = mask.decode([{"size": [height, width], "counts": one} for one in counts])  # type: ignore
            return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))

        return [planes.to(self.device, non_blocking=True) for planes in _threaded(one, len(self))]


# ---- threads


def _threaded(call: Callable[[int], Any], count: int) -> list[Any]:
    """Returns `call(0) ... call(count - 1)`, worked out by the threads that torch may use."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return [call(row) for row in range(count)]
    return list(_pool(os.getpid(), torch.get_num_threads()).map(call, range(count)))


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")
