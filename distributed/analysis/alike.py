"""Which rows are nearly the same: hashes of 64 bits that differ in few of them, and the means to look closer."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tasks.columns import Pictures
from tasks.errors import BadRow

# Means of 2 x 2 of a thumbnail are the 8 x 9 shades whose differences along each line make 64 bits.
THUMBNAIL = (16, 18)  # height, width
BLANK = 1.0  # standard deviation of shades 0..255 below which a picture shows nothing
STEP = 256  # pictures, or rows of a comparison, at a time
LARGEST_STEP = 4_000_000  # pixels of pictures at a time
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64 (Steele et al. 2014)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Shrinks pictures of one size, (N, channels, height, width) uint8, to grey ones (N, 16, 18) float32."""
    step = max(1, LARGEST_STEP // max(1, images[:1].size))
    parts = [np.empty((0, *THUMBNAIL), np.float32)]
    for start in range(0, len(images), step):
        grey = torch.from_numpy(images[start : start + step].mean(1, dtype=np.float32)[:, None])
        parts.append(functional.interpolate(grey, THUMBNAIL, mode="bilinear", antialias=True)[:, 0].numpy())
    return np.concatenate(parts)


def thumbnails_of_any_size(pictures: Pictures) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes and shrinks pictures to (N, 16, 18) float32; returns why which ones cannot be read, and are all NaN."""
    out, broken = np.full((len(pictures), *THUMBNAIL), np.nan, np.float32), {}
    for start in range(0, len(pictures), STEP):
        rows = range(start, min(start + STEP, len(pictures)))
        try:
            out[start : rows.stop] = _shrunk(pictures, rows)
        except (BadRow, ValueError):  # one of them: which?
            for row in rows:
                try:
                    out[row] = _shrunk(pictures, range(row, row + 1))[0]
                except (BadRow, ValueError) as error:
                    broken[row] = str(error)
        # The decoder of JPEG fills up with grey what is missing at the end.
        for row in rows:
            if row not in broken and _is_cut_off(pictures.data[row]):
                broken[row], out[row] = "its JPEG data end too early", np.nan
    return out, broken


def _shrunk(pictures: Pictures, rows: range) -> np.ndarray:
    part = replace(pictures, data=pictures.data[rows.start : rows.stop], sizes=pictures.sizes[rows.start : rows.stop])
    return part.resized(THUMBNAIL).numpy().mean(1, dtype=np.float32)


def _is_cut_off(data: Any) -> bool:
    is_jpeg = data.ndim == 1 and bytes(data[:2]) == b"\xff\xd8"
    # Its end is looked for in the second half: some cameras append data of their own.
    return is_jpeg and b"\xff\xd9" not in bytes(data[len(data) // 2 :])


def difference_hashes(thumbs: np.ndarray) -> np.ndarray:
    """Returns (N,) uint64: each bit says whether the shade to the right of another is lighter (Krawetz 2013)."""
    shades = thumbs.reshape(len(thumbs), 8, 2, 9, 2).mean((2, 4))
    bits = (shades[:, :, 1:] > shades[:, :, :-1]).reshape(len(thumbs), 64)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def alike_pictures(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether pairs of thumbnails, (M, 16, 18) each, differ no more than another copy of the same would: (M,) bool.

    Both are brought to one brightness and contrast. Another JPEG or another size of a photograph then differs by under
    0.01, the most alike of two different pictures in the bundled sets by 0.047 (fashion, 2026-11, torch 2.14).
    """
    spread = np.minimum(first.std((1, 2)), second.std((1, 2)))
    difference = np.abs(_standardised(first) - _standardised(second)).mean((1, 2))
    return (spread > BLANK) & (difference <= 0.03)


def _standardised(thumbs: np.ndarray) -> np.ndarray:
    mean, std = thumbs.mean((1, 2), keepdims=True), thumbs.std((1, 2), keepdims=True)
    return (thumbs - mean) / np.maximum(std, BLANK)


def windows(values: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes every run of `width` numbers within each row; returns them one after another, and how many each row has.

    `values` are the rows' numbers one after another, `lengths` (N,) theirs.
    """
    counts = np.maximum(lengths - width + 1, 0)
    # Position of each run's first number: its row's start, plus how far into the row it stands.
    shift = (np.cumsum(lengths) - lengths) - (np.cumsum(counts) - counts)
    first = shift.repeat(counts) + np.arange(counts.sum())
    numbers, hashes = values.astype(np.uint64), np.zeros(len(first), np.uint64)
    for place in range(width):
        hashes = (hashes ^ numbers[first + place]) * _MIXER
        hashes ^= hashes >> np.uint64(31)
    return hashes, counts


def similarity_hashes(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns (N,) uint64: each bit is that of most of a row's windows (SimHash, Charikar 2002)."""
    ends, out = np.cumsum(counts), np.zeros(len(counts), np.uint64)
    for start in range(0, len(counts), STEP):
        rows = slice(start, start + STEP)
        filled = np.flatnonzero(counts[rows])
        if len(filled):
            begin = ends[rows] - counts[rows]
            part = np.ascontiguousarray(hashes[begin[0] : ends[rows][-1]])
            bits = np.unpackbits(part.view(np.uint8).reshape(-1, 8), axis=1)
            ones = np.add.reduceat(bits, begin[filled] - begin[0], axis=0, dtype=np.int32)
            most = np.packbits(2 * ones > counts[rows][filled, None], axis=1)
            out[start + filled] = most.view(np.uint64)[:, 0]
    return out


def shared(first: np.ndarray, second: np.ndarray) -> float:
    """Returns which part of two rows' windows both have (Jaccard)."""
    both = len(np.intersect1d(first, second))
    either = len(np.unique(first)) + len(np.unique(second)) - both
    return both / either if either else 0.0


def close_pairs(first: np.ndarray, second: np.ndarray, most_bits: int, most_each: int = 8) -> np.ndarray:
    """Returns which hashes differ in at most `most_bits` bits, for each of `second` the nearest few of `first`.

    (M, 2) int64: positions in `first` and in `second`.
    """
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(second) if len(first) else 0, STEP):
        bits = np.bitwise_count(second[start : start + STEP, None] ^ first[None])
        if len(first) > most_each:
            nearest = np.argpartition(bits, most_each, axis=1)[:, :most_each]
        else:
            nearest = np.broadcast_to(np.arange(len(first)), bits.shape)
        here, place = np.nonzero(np.take_along_axis(bits, nearest, axis=1) <= most_bits)
        found.append(np.stack([nearest[here, place], here + start], axis=1))
    return np.concatenate(found)
