"""labelme JSON: one file a picture, with outlines drawn by hand (github.com/wkentaro/labelme).

Shapes that share a label and a group are one object. Lines and points get the width that labelme draws them with.
"""

import base64
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import BadRow, UserError, did_you_mean
from tasks.formats import coco, pictures, strict_json

MAX_BYTES = 512 << 20  # of one file, which may hold its picture
POINTS = {"polygon": 3, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "point": 1, "mask": 2}  # at least
OPEN = ("polygon", "linestrip")  # may have more points
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels: labelme/utils/shape.py, shape_to_mask
CORNERS = 64  # of a circle, which is then 0.2 % too small
BACKGROUND, IGNORED = "_background_", "__ignore__"  # labels of 0 and 255, as labelme's own converters have it


def examples(folder: Path) -> list[Path]:
    """Lists the annotation files below a folder by name; raises UserError where there are none."""
    found = sorted(file for file in folder.rglob("*.json") if not file.name.startswith("."))
    if not found:
        raise UserError(f"{folder}: holds no .json files", "name the folder where labelme saved its annotations")
    return found


def objects(path: Path) -> dict[str, Any]:
    """Parses one annotation file.

    Returns "picture" as a path or, where it is embedded, as bytes; "height" and "width" in pixels; "boxes" (objects, 4)
    float32 x1 y1 x2 y2; "labels" as a list of names; "polygons", for each object a list of float64 arrays (points, 2)
    x y; "masks" as a list of RLE dicts; "groups", for each object its number or None; "flags" as {name: bool} of the
    picture. Raises BadRow for a broken file; UserError for a path that leads out of its folder.
    """
    try:
        content = strict_json.read(path, MAX_BYTES)
    except UserError as error:  # one file is one row
        raise BadRow(error.message) from error
    if not isinstance(content, dict):
        raise BadRow(f"{path}: is no labelme file: expected an object, got a {type(content).__name__}")
    picture, height, width = _picture(path, content)
    shapes, flags = content.get("shapes") or [], content.get("flags") or {}
    if not isinstance(shapes, list) or not isinstance(flags, dict):
        raise BadRow(f"{path}: expected a list as 'shapes' and an object as 'flags'")
    found: dict[Any, list[tuple[np.ndarray, list[np.ndarray], coco.Rle]]] = {}
    for number, shape in enumerate(shapes):
        place = f"{path}, shapes[{number}]"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise BadRow(f"{place}: has no label")
        group = shape.get("group_id")
        if not isinstance(group, int | None):
            raise BadRow(f"{place}: expected a number as group_id, got {str(group)[:40]}")
        key = (shape["label"], group, number if group is None else None)
        found.setdefault(key, []).append(_shape(shape, height, width, f"{place} ({shape['label'][:40]})"))
    return {
        "picture": picture,
        "height": height,
        "width": width,
        "boxes": np.array([_around([box for box, _, _ in parts]) for parts in found.values()], np.float32).reshape(
            -1, 4
        ),
        "labels": [label for label, _, _ in found],
        "polygons": [[outline for _, outlines, _ in parts for outline in outlines] for parts in found.values()],
        "masks": [_merged([mask for _, _, mask in parts]) for parts in found.values()],
        "groups": [group for _, group, _ in found],
        "flags": {name: bool(value) for name, value in flags.items()},
    }


def class_map(row: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    """Draws what `objects` returns, later ones on top: (height, width) uint8, 0 background, 1.. the `classes`.

    What is labelled `__ignore__` is 255, void. Raises UserError for a label that is none of `classes`.
    """
    from pycocotools import mask

    numbers = {BACKGROUND: 0, IGNORED: 255} | {name: number for number, name in enumerate(classes, 1)}
    drawn = np.zeros((row["height"], row["width"]), np.uint8)
    for label, one in zip(row["labels"], row["masks"], strict=True):
        if label not in numbers:
            raise UserError(f"unknown label {label[:40]!r}", did_you_mean(label, classes) or "name it as a class")
        drawn[mask.decode(one) > 0] = numbers[label]
    return drawn


# ---- the picture


def _picture(path: Path, content: dict[str, Any]) -> tuple[Path | bytes, int, int]:
    """Returns the picture, embedded or beside the file, and its height and width, which must be as declared."""
    name, embedded = content.get("imagePath"), content.get("imageData")
    if embedded is not None:
        picture, place = _embedded(embedded, f"{path}, imageData"), f"{path}, imageData"
    elif isinstance(name, str) and name:
        picture = coco.beneath(path.parent, name, f"{path}, imagePath")
        place = str(picture)
    else:
        raise BadRow(f"{path}: has neither imagePath nor imageData")
    height, width = coco.upright_size(picture, place)
    for side, found in (("imageHeight", height), ("imageWidth", width)):
        if content.get(side) not in (None, found):  # old versions write null
            raise BadRow(f"{place}: has {height} x {width} pixels, {side} says {str(content[side])[:40]}")
    return picture, height, width


def _embedded(text: Any, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{place}: is not base64: {error}") from error


# ---- shapes


def _shape(shape: dict[str, Any], height: int, width: int, place: str) -> tuple[np.ndarray, list[np.ndarray], coco.Rle]:
    """Returns one shape's box (4,), outlines [(points, 2), ...] and mask."""
    kind = shape.get("shape_type", "polygon")  # which the first versions did not write
    if not isinstance(kind, str) or kind not in POINTS:
        raise BadRow(f"{place}: unknown shape_type {str(kind)[:40]!r}; {did_you_mean(str(kind), POINTS)}")
    points = _points(shape.get("points"), place)
    if len(points) < POINTS[kind] or (len(points) > POINTS[kind] and kind not in OPEN):
        raise BadRow(f"{place}: a {kind} has {len(points)} points, expected {POINTS[kind]}")
    points = coco.inside(points, height, width, place)
    if kind == "mask":
        mask, box = _pasted(shape.get("mask"), points, height, width, place)
        return box, [], mask
    outlines = _outlines(kind, points)
    corners = [np.min([one.min(0) for one in outlines], 0), np.max([one.max(0) for one in outlines], 0)]
    box = coco.box(np.clip(corners, 0, [width, height]), height, width, place)
    return box, outlines, coco.drawn(outlines, height, width, place)


def _points(value: Any, place: str) -> np.ndarray:
    try:
        points = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{place}: expected points [[x, y], ...], got {str(value)[:40]}") from error
    points = points if points.size else points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise BadRow(f"{place}: expected points [[x, y], ...] of finite numbers, got {str(value)[:80]}")
    return points


def _outlines(kind: str, points: np.ndarray) -> list[np.ndarray]:
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points
        return [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])]
    if kind == "circle":
        return [_circle(points[0], float(np.hypot(*(points[1] - points[0]))))]
    if kind == "point":
        return [_circle(points[0], POINT_RADIUS)]
    if kind in ("line", "linestrip"):
        return [_stroke(start, end) for start, end in itertools.pairwise(points)]
    return [points]


def _circle(centre: np.ndarray, radius: float) -> np.ndarray:
    angles = np.arange(CORNERS) * (2 * np.pi / CORNERS)
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _stroke(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - start
    length = np.hypot(*along)
    across = np.array([-along[1], along[0]]) * (LINE_WIDTH / 2 / length) if length else np.zeros(2)
    return np.array([start + across, end + across, end - across, start - across])


def _pasted(text: Any, points: np.ndarray, height: int, width: int, place: str) -> tuple[coco.Rle, np.ndarray]:
    """Returns the mask of a picture that labelme cut out between two pixels, both within, and its box."""
    from pycocotools import mask

    (x1, y1), (x2, y2) = points.astype(int)
    try:
        part = pictures.decode(pictures.class_map(_embedded(text, place))["bytes"], 1)[:, :, 0]
    except BadRow as error:
        raise BadRow(f"{place}: mask: {error}") from error
    whole = np.zeros((height, width), np.uint8, order="F")
    if whole[y1 : y2 + 1, x1 : x2 + 1].shape != part.shape:
        raise BadRow(f"{place}: its mask of {part.shape} pixels does not fit between its points")
    whole[y1 : y2 + 1, x1 : x2 + 1] = part > 0
    return mask.encode(whole), np.array([x1, y1, x2 + 1, y2 + 1], np.float32)


def _around(boxes: list[np.ndarray]) -> np.ndarray:
    both = np.array(boxes)
    return np.concatenate([both[:, :2].min(0), both[:, 2:].max(0)])


def _merged(masks: list[coco.Rle]) -> coco.Rle:
    from pycocotools import mask

    return mask.merge(masks) if len(masks) > 1 else masks[0]
