"""COCO JSON: the objects of pictures (boxes, classes, masks, key points), or their captions.

A file is listed whole, without opening a picture; each picture's annotations are parsed one by one, later and perhaps
in another process. Masks are run-length encoded by pycocotools (cocodataset.org, "Data format").
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from tasks.errors import BadRow, UserError, did_you_mean
from tasks.formats import pictures, strict_json

MAX_OUTSIDE = 1  # pixels that a point may lie outside its picture, exclusive: rounding, mended by clipping
MAX_OUTLINE = 1_000_000  # pixels around one polygon: pycocotools takes 40 bytes for each of them
KEPT = ("id", "bbox", "area", "iscrowd")  # of an annotation; and the segmentation and the key points where wanted
HINT = "see cocodataset.org, 'Data format'; write the file anew with the program that made it"

Rle = Any  # {"size": [height, width], "counts": bytes}; pycocotools has a type of its own, which is private


class Annotated(NamedTuple):
    """A reference to one picture, with what the file says of it, not yet parsed."""

    picture: Path
    height: int  # pixels
    width: int
    said: list[Any]  # annotations with the names of their categories; or captions
    masks: bool = False  # whether objects have masks
    points: int = 0  # key points an object
    fault: str = ""  # why this row cannot be read


def instances(path: Path, folder: Path, categories: Sequence[str] = (), *, masks: bool = True) -> list[Annotated]:
    """Lists every picture of an instances or person_keypoints file, those without objects too.

    Only objects of the named categories are kept, of all where there are none. `folder` holds the pictures. Objects
    have key points where all kept categories have the same number of them. Raises UserError for what makes the file
    doubtful.
    """
    content = _read(path)
    known = _categories(path, content)
    names = [category["name"] for category in known.values()]
    for name in categories:
        if name not in names:
            raise UserError(f"{path}: has no category '{name}'", did_you_mean(name, names) or "check the categories")
    kept = {number: one for number, one in known.items() if not categories or one["name"] in categories}
    points = {len(one.get("keypoints") or ()) for one in kept.values()}
    wanted = (*KEPT, *(["segmentation"] if masks else []), *(["keypoints"] if points != {0} else []))
    said = defaultdict(list)
    for place, one in _entries(path, content, "annotations"):
        category, picture = _key(one, "category_id", place), _key(one, "image_id", place)
        if category not in known:
            raise UserError(f"{place}: unknown category {category!r}", "give each category an entry in 'categories'")
        if category in kept:
            said[picture].append(
                {"category": kept[category]["name"], **{key: one[key] for key in wanted if key in one}}
            )
    return _pictures(path, folder, content, said, masks=masks, points=points.pop() if len(points) == 1 else 0)


def captions(path: Path, folder: Path) -> list[Annotated]:
    """Lists every picture of a captions file; `folder` holds the pictures. Raises UserError like `instances`."""
    content = _read(path)
    said = defaultdict(list)
    for place, one in _entries(path, content, "annotations"):
        said[_key(one, "image_id", place)].append(one.get("caption"))
    return _pictures(path, folder, content, said)


def objects(reference: Annotated) -> dict[str, Any]:
    """Parses the objects of one picture of `instances`, in the order of the file.

    Returns "boxes" (objects, 4) float32 x1 y1 x2 y2 in pixels, "labels" as a list of names, "iscrowd" (objects,) bool,
    "area" (objects,) float64 in square pixels; with masks "masks", a list of compressed RLE dicts; with key points
    "keypoints" (objects, points, 3) float32: x, y and 0 absent, 1 hidden or 2 visible. Raises BadRow for a picture that
    is absent or of another size than the file says, and for an annotation that makes no sense.
    """
    _check_picture(reference)
    height, width, points = reference.height, reference.width, reference.points
    boxes, areas, crowds, masks, keypoints = [], [], [], [], []
    for one in reference.said:
        place = f"{reference.picture.name}, annotation {one.get('id')}"
        x, y, w, h = corner_and_size = _numbers(one.get("bbox"), (4,), f"{place}: bbox")
        if min(w, h) <= 0:
            raise BadRow(f"{place}: its box has no area: {corner_and_size.tolist()}")
        boxes.append(box([[x, y], [x + w, y + h]], height, width, place))
        areas.append(_numbers(one.get("area", w * h), (), f"{place}: area"))
        if areas[-1] < 0:
            raise BadRow(f"{place}: its area is {areas[-1]}")
        crowds.append(one.get("iscrowd", 0))
        if crowds[-1] not in (0, 1):
            raise BadRow(f"{place}: expected 0 or 1 as iscrowd, got {str(crowds[-1])[:40]}")
        if reference.masks:
            masks.append(rle(one.get("segmentation"), height, width, place))
        if points:
            keypoints.append(_keypoints(one.get("keypoints"), points, height, width, place))
    row = {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": [one["category"] for one in reference.said],
        "iscrowd": np.array(crowds, bool),
        "area": np.array(areas, np.float64),
    }
    if reference.masks:
        row["masks"] = masks
    if points:
        row["keypoints"] = np.array(keypoints, np.float32).reshape(-1, points, 3)
    return row


def texts(reference: Annotated) -> list[str]:
    """Returns the captions of one picture of `captions`; raises BadRow for one that is no text, or like `objects`."""
    _check_picture(reference)
    for caption in reference.said:
        if not isinstance(caption, str) or not caption.strip():
            raise BadRow(f"{reference.picture.name}: expected a caption, got {str(caption)[:40]!r}")
    return [caption.strip() for caption in reference.said]


# ---- what formats of annotations share


def beneath(folder: Path, name: str, place: str) -> Path:
    """Returns the path of a file that is named relative to `folder`; raises UserError for a name that leads out."""
    parts = PureWindowsPath(name)  # which knows slashes of both kinds
    if parts.anchor or ".." in parts.parts:
        raise UserError(
            f"{place}: {name[:80]!r} leads out of the folder of the pictures",
            f"name pictures relative to {folder}, without '..'",
        )
    return folder.joinpath(*parts.parts)


def check_size(picture: Path | bytes, height: int, width: int, place: str) -> None:
    """Raises BadRow unless the picture, upright as its EXIF data say, is there and has this size in pixels."""
    found = upright_size(picture, place)
    if found != (height, width):
        raise BadRow(f"{place}: has {found[0]} x {found[1]} pixels, its annotation says {height} x {width}")


def upright_size(picture: Path | bytes, place: str) -> tuple[int, int]:
    """Returns height and width of a picture when it is turned as its EXIF data say; raises BadRow without one."""
    if isinstance(picture, Path) and not _is_file(picture):
        raise BadRow(f"{place}: no such picture")
    try:
        with pictures._opened(BytesIO(picture) if isinstance(picture, bytes) else picture, load=False) as image:
            turned = image.getexif().get(pictures.ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except BadRow as error:
        raise BadRow(f"{place}: {error}") from error


def inside(points: Any, height: int, width: int, place: str) -> np.ndarray:
    """Returns points (..., 2) x y as float64, clipped to their picture; raises BadRow for 1 pixel outside or more."""
    points = np.asarray(points, np.float64)
    clipped = points.clip(0, [width, height])
    far = np.abs(points - clipped).max(-1) >= MAX_OUTSIDE
    if far.any():
        x, y = points[far][0]
        raise BadRow(f"{place}: the point ({x:g}, {y:g}) lies outside the picture of {width} x {height} pixels")
    return clipped


def box(corners: Any, height: int, width: int, place: str) -> np.ndarray:
    """Returns two corners as one box, float32 (4,) x1 y1 x2 y2; raises BadRow like `inside`, or without an area."""
    found = inside(corners, height, width, place).reshape(4).astype(np.float32)
    if (found[2:] <= found[:2]).any():
        raise BadRow(f"{place}: its box has no area: {found.tolist()}")
    return found


def rle(segmentation: Any, height: int, width: int, place: str) -> Rle:
    """Returns polygons [[x, y, x, y, ...], ...] or an RLE, compressed or not, as one compressed RLE.

    Raises BadRow for a polygon of fewer than three points, or one outside its picture, and for an RLE of another size.
    """
    from pycocotools import mask

    if isinstance(segmentation, list) and segmentation:
        return drawn([_polygon(one, height, width, place) for one in segmentation], height, width, place)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise BadRow(f"{place}: expected polygons or an RLE as segmentation, got {str(segmentation)[:40]}")
    if segmentation["size"] != [height, width]:
        size = str(segmentation["size"])[:40]
        raise BadRow(f"{place}: its RLE is of size {size}, its picture of [{height}, {width}]")
    counts = segmentation["counts"]
    runs = np.asarray(_runs(counts, place) if isinstance(counts, str) else _numbers(counts, (-1,), f"{place}: RLE"))
    # pycocotools believes what it is told, and would read and write beyond its memory.
    if (runs < 0).any() or runs.sum() != height * width or (runs != np.floor(runs)).any():
        raise BadRow(f"{place}: the runs of its RLE do not add up to {height} x {width} pixels")
    return mask.frPyObjects({"size": [height, width], "counts": runs.astype(int).tolist()}, height, width)


def drawn(outlines: Sequence[np.ndarray], height: int, width: int, place: str) -> Rle:
    """Returns polygons (points, 2) x y, of three points or more, as one mask; raises BadRow for an endless outline."""
    from pycocotools import mask

    if max(np.abs(np.diff(one, axis=0, append=one[:1])).sum() for one in outlines) > MAX_OUTLINE:
        raise BadRow(f"{place}: a polygon has an outline of over {MAX_OUTLINE} pixels")
    lists: Any = [one.reshape(-1).tolist() for one in outlines]
    return mask.merge(mask.frPyObjects(lists, height, width))


# ---- parts of an annotation


def _polygon(value: Any, height: int, width: int, place: str) -> np.ndarray:
    coordinates = _numbers(value, (-1,), f"{place}: polygon")
    if len(coordinates) % 2 or len(coordinates) < 6:
        raise BadRow(f"{place}: a polygon has {len(coordinates)} coordinates, expected x and y of at least 3 points")
    return inside(coordinates.reshape(-1, 2), height, width, place)


def _keypoints(value: Any, points: int, height: int, width: int, place: str) -> np.ndarray:
    found = _numbers(value, (3 * points,), f"{place}: keypoints").reshape(points, 3)
    if not np.isin(found[:, 2], (0, 1, 2)).all():
        raise BadRow(f"{place}: the visibility of a key point must be 0, 1 or 2")
    labelled = found[:, 2] > 0
    found[~labelled] = 0
    found[labelled, :2] = inside(found[labelled, :2], height, width, place)
    return found


def _runs(text: str, place: str) -> list[int]:
    """Decodes COCO's compressed counts: 5 bits a character, low ones first, differences from the fourth run on."""
    runs, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise BadRow(f"{place}: {text[:40]!r} is no compressed RLE")
        value, shift = value | (bits & 31) << shift, shift + 5
        if bits & 32:
            continue
        value -= (bits >> 4 & 1) << shift  # the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise BadRow(f"{place}: the compressed RLE {text[:40]!r} is truncated")
    return runs


def _numbers(value: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """Returns finite numbers, or texts that are such, as float64 of a shape in which -1 is any length."""
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{place}: expected numbers, got {str(value)[:40]}") from error
    fits = found.shape == shape or (found.ndim == 1 and shape == (-1,))
    if not fits or not np.isfinite(found).all():
        expected = f"{shape[0]} finite numbers" if shape and shape[0] > 0 else "finite numbers"
        raise BadRow(f"{place}: expected {expected}, got {str(value)[:80]}")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _check_picture(reference: Annotated) -> None:
    if reference.fault:
        raise BadRow(reference.fault)
    check_size(reference.picture, reference.height, reference.width, str(reference.picture))


# ---- parts of a file


def _read(path: Path) -> dict[str, Any]:
    content = strict_json.read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no COCO file: expected an object, got a {type(content).__name__}", HINT)
    return content


def _entries(path: Path, content: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = content.get(name, [])
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list as '{name}', got a {type(entries).__name__}", HINT)
    for position, one in enumerate(entries):
        place = f"{path}, {name}[{position}]"
        if not isinstance(one, dict):
            raise UserError(f"{place}: expected an object, got {str(one)[:40]}", HINT)
        yield place, one


def _key(one: Mapping[str, Any], name: str, place: str) -> int | str:
    value = one.get(name)
    if not isinstance(value, (int, str)):
        raise UserError(f"{place}: expected a number or text as '{name}', got {str(value)[:40]}", HINT)
    return value


def _categories(path: Path, content: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    known, names = {}, set()
    for place, one in _entries(path, content, "categories"):
        number, name = _key(one, "id", place), one.get("name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{place}: expected text as 'name', got {str(name)[:40]}", HINT)
        if not isinstance(one.get("keypoints"), list | None):
            raise UserError(f"{place}: expected a list of names as 'keypoints'", HINT)
        if number in known or name in names:
            raise UserError(f"{place}: a second category has the id {number!r} or the name {name!r}", HINT)
        known[number] = one
        names.add(name)
    return known


def _pictures(
    path: Path, folder: Path, content: Mapping[str, Any], said: dict[int | str, list[Any]], **wanted: Any
) -> list[Annotated]:
    found: dict[int | str, Annotated] = {}
    for place, one in _entries(path, content, "images"):
        number, name = _key(one, "id", place), one.get("file_name")
        if number in found:
            raise UserError(f"{place}: a second picture has the id {number!r}", "give each picture its own id")
        if not isinstance(name, str) or not name:
            raise UserError(f"{place}: expected text as 'file_name', got {str(name)[:40]}", HINT)
        height, width = one.get("height"), one.get("width")
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            raise UserError(f"{place}: expected height and width in pixels, got {height!r:.40} and {width!r:.40}", HINT)
        found[number] = Annotated(beneath(folder, name, place), height, width, said.pop(number, []), **wanted)
    if not found:
        raise UserError(f"{path}: holds no images", HINT)
    strays = [
        Annotated(
            folder, 0, 0, [], fault=f"{path}: picture {number!r} has {len(stray)} annotations but no entry in images"
        )
        for number, stray in said.items()
    ]
    return [*found.values(), *strays]
