"""Augmentation of pictures of any sizes together with the boxes and masks of their objects.

`Scenes` holds a batch as columns; every function returns a new one. Boxes stay within their picture, and objects
of which nothing is left are dropped with their labels and masks. Colours need nothing of their own:
`scenes._replace(images=augment.photometric_distort(scenes.images, draw))`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks.augment import warp, windows
from tasks.task import Draw


class Scene(NamedTuple):
    """One picture and its objects."""

    image: Tensor  # (C, H, W)
    boxes: Tensor  # (N, 4) x1 y1 x2 y2 in pixels, floating
    labels: Tensor  # (N,) int64
    masks: Tensor | None = None  # (N, H, W) bool or uint8

    @property
    def size(self) -> tuple[int, int]:  # height, width
        return self.image.shape[-2], self.image.shape[-1]

    def only(self, kept: Tensor) -> "Scene":
        """Returns the scene with those objects for which `kept` (N,) bool is true."""
        masks = None if self.masks is None else self.masks[kept]
        return Scene(self.image, self.boxes[kept], self.labels[kept], masks)


class Scenes(NamedTuple):
    """A batch of scenes by columns: lists of B, as `Task.transform` gets them, or one tensor of pictures."""

    images: list[Tensor] | Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: list[Tensor] | None = None

    def rows(self) -> list[Scene]:
        masks = [None] * len(self.boxes) if self.masks is None else self.masks
        return [Scene(*row) for row in zip(self.images, self.boxes, self.labels, masks, strict=True)]


def _columns(rows: Iterable[Scene], like: Scenes) -> Scenes:
    rows = list(rows)
    masks = [row.masks for row in rows if row.masks is not None]
    return Scenes(
        [row.image for row in rows],
        [row.boxes for row in rows],
        [row.labels for row in rows],
        None if like.masks is None else masks,
    )


def _each(scenes: Scenes, change: Callable[..., Scene], *numbers: Iterable) -> Scenes:
    """Applies `change(scene, number, ...)` with each row's own numbers."""
    lists = (number.tolist() if isinstance(number, Tensor) else number for number in numbers)
    return _columns((change(*row) for row in zip(scenes.rows(), *lists, strict=True)), scenes)


# ---- boxes


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns the boxes (N, 4) with what lies outside of the picture cut off."""
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], -1).flatten(1)


def box_areas(boxes: Tensor) -> Tensor:
    """Returns (N,): the areas in pixels, 0 for a box without inside."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def centers_inside(boxes: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Returns (N,) bool: whose centre lies within the window."""
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
    return (left < x) & (x < left + width) & (top < y) & (y < top + height)


# ---- flips and crops


def horizontal_flip(scenes: Scenes, flipped: Tensor) -> Scenes:
    """Mirrors left to right where `flipped` (B,) bool is true."""

    def flip(scene: Scene, flipped: bool) -> Scene:
        if not flipped:
            return scene
        x1, y1, x2, y2 = scene.boxes.unbind(1)
        boxes = torch.stack([scene.size[1] - x2, y1, scene.size[1] - x1, y2], 1)
        masks = None if scene.masks is None else scene.masks.flip(-1)
        return Scene(scene.image.flip(-1), boxes, scene.labels, masks)

    return _each(scenes, flip, flipped)


def random_horizontal_flip(scenes: Scenes, draw: Draw, p: float = 0.5) -> Scenes:
    """Mirrors each scene left to right with probability `p`."""
    return horizontal_flip(scenes, draw.chance(p))


def crop(
    scenes: Scenes,
    top: Iterable[int] | Tensor,
    left: Iterable[int] | Tensor,
    height: Iterable[int] | Tensor,
    width: Iterable[int] | Tensor,
    center_inside: bool = False,
    min_visible: float = 0.0,
) -> Scenes:
    """Cuts each scene to its own window, B whole numbers each, which must lie within the picture.

    Objects stay of which at least the share `min_visible` of the box, and anything at all, is left, and with
    `center_inside` those only whose centre is.
    """

    def cut(scene: Scene, *window: int) -> Scene:
        return _cut(scene, *window, center_inside=center_inside, min_visible=min_visible)

    return _each(scenes, cut, top, left, height, width)


def _cut(
    scene: Scene, top: int, left: int, height: int, width: int, *, center_inside: bool, min_visible: float = 0.0
) -> Scene:
    if top < 0 or left < 0 or top + height > scene.size[0] or left + width > scene.size[1]:
        raise ValueError(
            f"crop: the window of {height}x{width} at {top}, {left} is not inside a picture of "
            f"{scene.size[0]}x{scene.size[1]}"
        )
    if center_inside:
        scene = scene.only(centers_inside(scene.boxes, top, left, height, width))
    window = (..., slice(top, top + height), slice(left, left + width))
    return _clipped(
        Scene(
            scene.image[window].clone(),
            scene.boxes - scene.boxes.new_tensor([left, top, left, top]),
            scene.labels,
            None if scene.masks is None else scene.masks[window].clone(),
        ),
        min_visible,
    )


def _clipped(scene: Scene, min_visible: float) -> Scene:
    """Cuts boxes off at the picture's edges; drops those of which nothing, or too small a share, is left."""
    boxes = clip_boxes(scene.boxes, *scene.size)
    left, whole = box_areas(boxes), box_areas(scene.boxes)
    return scene._replace(boxes=boxes).only((left > 0) & (left >= min_visible * whole))


def random_crop(
    scenes: Scenes, draw: Draw, size: int | Sequence[int], center_inside: bool = True, min_visible: float = 0.0
) -> Scenes:
    """Cuts each scene to a window of `size`, or less where the picture is smaller, anywhere in it; see `crop`."""
    height, width = windows.size_pair(size)

    def cut(scene: Scene, down: float, across: float) -> Scene:
        high, wide = min(height, scene.size[0]), min(width, scene.size[1])
        top, left = int(down * (scene.size[0] - high + 1)), int(across * (scene.size[1] - wide + 1))
        return _cut(scene, top, left, high, wide, center_inside=center_inside, min_visible=min_visible)

    return _each(scenes, cut, draw.uniform(), draw.uniform())


def random_iou_crop(
    scenes: Scenes,
    draw: Draw,
    min_scale: float = 0.3,
    max_scale: float = 1.0,
    min_aspect_ratio: float = 0.5,
    max_aspect_ratio: float = 2.0,
    sampler_options: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    trials: int = 40,
) -> Scenes:
    """Cuts each scene to a random window that overlaps one of its boxes enough (SSD; torchvision's RandomIoUCrop).

    How much, as intersection over union, is drawn from `sampler_options` anew after so many `trials`; 1 leaves the
    scene whole, as does a scene without boxes. Objects stay whose centre lies in the window.
    """

    def cut(scene: Scene, seed: int) -> Scene:
        # How many numbers it takes is open, so each row has a generator of its own.
        random = np.random.default_rng(seed)
        for _ in range(100 if len(scene.boxes) else 0):  # an option that no window meets must not hold us for ever
            overlap = random.choice(sampler_options)
            if overlap >= 1:
                return scene
            for _ in range(trials):
                height, width = (int(side * random.uniform(min_scale, max_scale)) for side in scene.size)
                if not (height and width and min_aspect_ratio <= width / height <= max_aspect_ratio):
                    continue
                top = int((scene.size[0] - height) * random.random())
                left = int((scene.size[1] - width) * random.random())
                boxes = scene.boxes[centers_inside(scene.boxes, top, left, height, width)]
                if len(boxes) and _overlaps(boxes, top, left, height, width).max() >= overlap:
                    return _cut(scene, top, left, height, width, center_inside=True)
        return scene

    return _each(scenes, cut, draw.integers(0, 2**53))


def _overlaps(boxes: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Returns (N,): intersection over union of each box with the window."""
    inside = box_areas(clip_boxes(boxes - boxes.new_tensor([left, top, left, top]), height, width))
    return inside / (box_areas(boxes) + height * width - inside)


# ---- sizes


def resize(scenes: Scenes, sizes: Iterable[tuple[int, int]]) -> Scenes:
    """Resizes each scene to its own (height, width): pictures bilinear and antialiased, masks to the nearest pixel."""

    def change(scene: Scene, size: tuple[int, int]) -> Scene:
        down, across = size[0] / scene.size[0], size[1] / scene.size[1]
        masks = scene.masks
        if masks is not None:
            pixels = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
            masks = warp.resize(pixels[:, None], size, interpolation="nearest")[:, 0].view(masks.dtype)
        boxes = scene.boxes * scene.boxes.new_tensor([across, down, across, down])
        return Scene(warp.resize(scene.image[None], size)[0], boxes, scene.labels, masks)

    return _each(scenes, change, sizes)


def resize_shorter(scenes: Scenes, size: int, max_size: int | None = None) -> Scenes:
    """Resizes each scene's shorter side to `size` pixels, or fewer where the longer would exceed `max_size`."""
    return resize(scenes, [warp.resized_size(*scene.size, size, max_size) for scene in scenes.rows()])


def scale_jitter(
    scenes: Scenes, draw: Draw, target_size: tuple[int, int], scale_range: tuple[float, float] = (0.1, 2.0)
) -> Scenes:
    """Resizes each scene to what fits into `target_size` (height, width), times a uniform number of `scale_range`."""
    sizes = []
    for scene, scale in zip(scenes.rows(), draw.uniform(*scale_range).tolist(), strict=True):
        scale *= min(target_size[0] / scene.size[0], target_size[1] / scene.size[1])
        height, width = scene.size
        sizes.append((max(1, int(height * scale)), max(1, int(width * scale))))
    return resize(scenes, sizes)


# ---- mosaic


def mosaic(
    scenes: Scenes,
    partners: Iterable[Sequence[int]] | Tensor,
    centers: Iterable[Sequence[int]] | Tensor,
    size: int | Sequence[int],
    fill: float = 114,
    min_visible: float = 0.0,
) -> Scenes:
    """Puts four scenes together round a centre, on a canvas of `size` (Bochkovskiy et al., YOLOv4).

    `partners` (B, 4): the rows at top left, top right, bottom left and bottom right; each one touches the centre with
    a corner and is cut off at the canvas. `centers` (B, 2): y, x in pixels. Where no picture is, the canvas is `fill`.
    Objects stay as in `crop`.
    """
    height, width = windows.size_pair(size)
    rows = scenes.rows()

    def compose(four: Sequence[int], center: Sequence[int]) -> Scene:
        y, x = center
        parts = []
        for quadrant, (image, boxes, labels, masks) in enumerate(rows[number] for number in four):
            top = y if quadrant >= 2 else y - image.shape[-2]
            left = x if quadrant % 2 else x - image.shape[-1]
            # Negative ones cut off.
            around = (left, width - left - image.shape[-1], top, height - top - image.shape[-2])
            image = functional.pad(image, around, value=fill)
            boxes = boxes + boxes.new_tensor([left, top, left, top])
            masks = None if masks is None else functional.pad(masks, around)
            parts.append(_clipped(Scene(image, boxes, labels, masks), min_visible))
        images = [part.image for part in parts]
        upper = torch.cat([images[0][:, :y, :x], images[1][:, :y, x:]], 2)
        lower = torch.cat([images[2][:, y:, :x], images[3][:, y:, x:]], 2)
        masks = [part.masks for part in parts if part.masks is not None]
        return Scene(
            torch.cat([upper, lower], 1),
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat(masks) if masks else None,
        )

    partners, centers = (n.tolist() if isinstance(n, Tensor) else n for n in (partners, centers))
    return _columns((compose(*row) for row in zip(partners, centers, strict=True)), scenes)


def random_mosaic(
    scenes: Scenes,
    draw: Draw,
    size: int | Sequence[int],
    partners: Iterable[Sequence[int]] | Tensor | None = None,
    fill: float = 114,
    min_visible: float = 0.0,
) -> Scenes:
    """Puts each scene together with three others round a centre in the middle half of the canvas; see `mosaic`.

    Who they are, `partners` (B, 4), belongs to the plan of the global batch; by default the three rows that follow.
    """
    centers = torch.stack([(draw.uniform(0.25, 0.75) * side).long() for side in windows.size_pair(size)], 1)
    batch = len(scenes.boxes)
    if partners is None:
        partners = (torch.arange(batch)[:, None] + torch.arange(4)) % batch
    return mosaic(scenes, partners, centers, size, fill, min_visible)
