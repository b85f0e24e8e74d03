"""labelme JSON: every kind of shape becomes a box, an outline and a mask; what is broken is named."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from pycocotools import mask

from tasks.errors import BadRow, UserError
from tasks.fields import Boxes, ClassMap, ObjectMasks, Picture
from tasks.formats import labelme

HEIGHT, WIDTH = 60, 80


def encoded(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def shape(kind="polygon", points=((10, 10), (30, 10), (30, 20), (10, 20)), label="cat", **more):
    return {"label": label, "points": [list(point) for point in points], "group_id": None, "description": "",
            "shape_type": kind, "flags": {}, "mask": None} | more  # fmt: skip


def written(folder, *shapes, **changes):
    """Writes a file as labelme 5 does, and the picture beside it."""
    Pillow.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.jpg")
    content = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": "a.jpg", "imageData": None,
               "imageHeight": HEIGHT, "imageWidth": WIDTH} | changes  # fmt: skip
    path = folder / "a.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def pixels(x1, y1, x2, y2):
    plane = np.zeros((HEIGHT, WIDTH), np.uint8)
    plane[y1:y2, x1:x2] = 1
    return plane


# ---- what is read


def test_a_file_gives_its_picture_and_objects(tmp_path):
    other = shape(points=((40, 5), (70, 5), (55.5, 50)), label="dog")
    row = labelme.objects(written(tmp_path, shape(), other, flags={"night": True, "rain": False}))
    assert row["picture"] == tmp_path / "a.jpg" and (row["height"], row["width"]) == (HEIGHT, WIDTH)
    assert row["labels"] == ["cat", "dog"] and row["groups"] == [None, None]
    assert row["boxes"].dtype == np.float32 and row["boxes"].tolist() == [[10, 10, 30, 20], [40, 5, 70, 50]]
    assert row["polygons"][1][0].tolist() == [[40, 5], [70, 5], [55.5, 50]]
    assert np.array_equal(mask.decode(row["masks"][0]), pixels(10, 10, 30, 20))
    assert int(mask.area(row["masks"][1])) == pytest.approx(30 * 45 / 2, rel=0.05)
    assert row["flags"] == {"night": True, "rain": False}
    assert ObjectMasks().check(row["masks"], {})["width"] == WIDTH and len(Boxes().check(row["boxes"], {})) == 2
    assert Picture(3).check(row["picture"], {})["width"] == WIDTH


@pytest.mark.parametrize(
    ("drawn", "box", "area"),
    [
        (shape("rectangle", [(30, 20), (10, 10)]), [10, 10, 30, 20], 200),
        (shape("circle", [(40, 30), (40, 40)]), [30, 20, 50, 40], 314),
        (shape("circle", [(5, 30), (5, 40)]), [0, 20, 15, 40], 314 / 2 + 5 * 20 - 10),
        (shape("line", [(10, 30), (50, 30)]), [10, 25, 50, 35], 400),
        (shape("line", [(20, 10), (20, 50)]), [15, 10, 25, 50], 400),
        (shape("linestrip", [(10, 30), (50, 30), (50, 55)]), [10, 25, 55, 55], 400 + 250 - 25),
        (shape("point", [(40, 30)]), [35, 25, 45, 35], 79),
        (shape("point", [(0, 0)]), [0, 0, 5, 5], 79 / 4),
    ],
    ids=[
        "rectangle from any corner",
        "circle",
        "circle cut off",
        "line",
        "upright line",
        "strip",
        "point",
        "point in a corner",
    ],
)
def test_every_kind_of_shape_has_a_box_and_a_mask(tmp_path, drawn, box, area):
    row = labelme.objects(written(tmp_path, drawn))
    np.testing.assert_allclose(row["boxes"], [box], atol=0.05)
    assert int(mask.area(row["masks"][0])) == pytest.approx(area, rel=0.06)
    x, y, w, h = mask.toBbox(row["masks"][0])
    np.testing.assert_allclose([x, y, x + w, y + h], box, atol=1)


@given(st.lists(st.tuples(st.integers(0, WIDTH), st.integers(0, HEIGHT)), min_size=2, max_size=2))
def test_a_rectangle_covers_what_lies_between_its_corners(tmp_path_factory, corners):
    (x1, x2), (y1, y2) = (sorted(values) for values in zip(*corners, strict=True))
    path = written(tmp_path_factory.getbasetemp(), shape("rectangle", corners))
    if x1 == x2 or y1 == y2:
        with pytest.raises(BadRow, match="its box has no area"):
            labelme.objects(path)
    else:
        row = labelme.objects(path)
        assert row["boxes"].tolist() == [[x1, y1, x2, y2]]
        assert np.array_equal(mask.decode(row["masks"][0]), pixels(x1, y1, x2, y2))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_mask_is_pasted_between_its_points(tmp_path, mode):
    part = np.zeros((4, 6), np.uint8)
    part[1:, 2:] = 255
    drawn = shape("mask", [(10, 20), (15, 23)], mask=encoded(Pillow.fromarray(part).convert(mode)))
    row = labelme.objects(written(tmp_path, drawn))
    assert row["boxes"].tolist() == [[10, 20, 16, 24]] and row["polygons"] == [[]]
    assert np.array_equal(mask.decode(row["masks"][0]), pixels(12, 21, 16, 24))


def test_shapes_of_one_label_and_group_are_one_object(tmp_path):
    left, right = (
        shape("rectangle", [(5, 10), (20, 20)], group_id=1),
        shape("rectangle", [(40, 12), (50, 30)], group_id=1),
    )
    others = (
        shape("rectangle", [(5, 40), (9, 50)], group_id=2),
        shape("rectangle", [(60, 40), (69, 50)], "dog", group_id=1),
    )
    row = labelme.objects(written(tmp_path, left, others[0], right, others[1]))
    assert row["labels"] == ["cat", "cat", "dog"] and row["groups"] == [1, 2, 1]
    assert row["boxes"].tolist() == [[5, 10, 50, 30], [5, 40, 9, 50], [60, 40, 69, 50]]
    assert np.array_equal(mask.decode(row["masks"][0]), pixels(5, 10, 20, 20) | pixels(40, 12, 50, 30))
    assert [len(polygons) for polygons in row["polygons"]] == [2, 1, 1]


def test_a_map_of_classes_has_later_shapes_on_top(tmp_path):
    shapes = (
        shape("rectangle", [(5, 5), (30, 30)]),
        shape("rectangle", [(10, 10), (20, 20)], "dog"),
        shape("rectangle", [(12, 12), (14, 14)], "_background_"),
        shape("rectangle", [(60, 5), (70, 30)], "__ignore__"),
    )
    row = labelme.objects(written(tmp_path, *shapes))
    expected = pixels(5, 5, 30, 30)
    expected[10:20, 10:20], expected[12:14, 12:14], expected[5:30, 60:70] = 2, 0, 255
    found = labelme.class_map(row, ["cat", "dog"])
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert ClassMap().check(found, {})["height"] == HEIGHT
    with pytest.raises(UserError, match="(?s)unknown label 'cat'.*did you mean 'cats'"):
        labelme.class_map(row, ["cats", "dog"])


@pytest.mark.parametrize("shapes", [[], None, ...], ids=["an empty list", "null", "no list"])
def test_a_picture_without_shapes_has_no_objects(tmp_path, shapes):
    row = labelme.objects(written(tmp_path, shapes=shapes))
    assert row["boxes"].shape == (0, 4) and row["labels"] == row["masks"] == row["polygons"] == []
    assert not labelme.class_map(row, []).any()


def test_an_embedded_picture_is_taken_before_the_path(tmp_path):
    data = encoded(Pillow.new("RGB", (WIDTH, HEIGHT), "red"))
    row = labelme.objects(written(tmp_path, shape(), imageData=data, imagePath="..\\elsewhere\\b.jpg"))
    assert row["picture"] == base64.b64decode(data)
    assert Picture(3).check(row["picture"], {})["height"] == HEIGHT


@pytest.mark.parametrize(
    "changes",
    [
        {"imageHeight": None, "imageWidth": ...},
        {"version": ..., "flags": ...},
        {"shapes": [{"label": "cat", "points": shape()["points"]}]},
    ],
    ids=["no size", "no flags", "no shape_type"],
)
def test_what_old_versions_left_out_is_made_up_for(tmp_path, changes):
    row = labelme.objects(written(tmp_path, **{"shapes": [shape()], **changes}))
    assert row["boxes"].tolist() == [[10, 10, 30, 20]] and (row["height"], row["width"]) == (HEIGHT, WIDTH)


def test_less_than_a_pixel_outside_is_clipped(tmp_path):
    row = labelme.objects(written(tmp_path, shape("rectangle", [(-0.9, 10), (80.5, 60.9)])))
    assert row["boxes"].tolist() == [[0, 10, WIDTH, HEIGHT]]


def test_a_folder_lists_its_annotations_by_name(tmp_path):
    for name in ("b.json", "a.json", "deeper/c.json", ".hidden.json", "a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert labelme.examples(tmp_path) == [tmp_path / name for name in ("a.json", "b.json", "deeper/c.json")]
    for folder in (tmp_path / "none", tmp_path / "a.jpg"):
        with pytest.raises(UserError, match="holds no .json files"):
            labelme.examples(folder)


# ---- what is set aside


@pytest.mark.parametrize(
    ("drawn", "reason"),
    [
        (shape("ellipse"), "unknown shape_type 'ellipse'"),
        (shape("poligon"), "unknown shape_type 'poligon'; did you mean 'polygon'"),
        (shape(["polygon"]), "unknown shape_type"),
        (shape("polygon", [(1, 1), (5, 5)]), "a polygon has 2 points, expected 3"),
        (shape("polygon", []), "a polygon has 0 points"),
        (shape("rectangle", [(1, 1)]), "a rectangle has 1 points, expected 2"),
        (shape("circle", [(1, 1), (5, 5), (6, 6)]), "a circle has 3 points, expected 2"),
        (shape("line", [(1, 1)]), "a line has 1 points, expected 2"),
        (shape("point", [(1, 1), (2, 2)]), "a point has 2 points, expected 1"),
        (shape("rectangle", [(10, 10), (81, 20)]), r"\(81, 20\) lies outside the picture of 80 x 60"),
        (shape("polygon", [(10, -1), (20, 5), (3, 4)]), r"\(10, -1\) lies outside"),
        (shape("circle", [(1, 1), (1e12, 1)]), "lies outside"),
        (shape("polygon", [(5, 5), (9, 5), (20, 5)]), "its box has no area"),
        (shape("circle", [(5, 5), (5, 5)]), "its box has no area"),
        (shape("line", [(5, 5), (5, 5)]), "its box has no area"),
        (shape("polygon", [(1, 1, 1), (5, 5, 5), (9, 1, 1)]), r"expected points \[\[x, y\], ...\]"),
        (shape("polygon", [(1, 1), (5,), (9, 1)]), r"expected points"),
        (shape("polygon", [(1, "left"), (5, 5), (9, 1)]), "expected points"),
        (shape("polygon", [(1, None), (5, 5), (9, 1)]), "expected points .* of finite numbers"),
        (shape(points=[(0, 0), (WIDTH, HEIGHT), (0, HEIGHT)] * 4000), "outline of over 1000000 pixels"),
        ({"points": []}, "has no label"),
        ("polygon", "has no label"),
        (shape(group_id=[1]), "expected a number as group_id"),
        (shape("mask", [(1, 1), (4, 4)], mask="!"), "is not base64"),
        (shape("mask", [(1, 1), (4, 4)]), "is not base64"),
        (shape("mask", [(1, 1), (4, 4)], mask=base64.b64encode(b"<html>").decode()), "mask: is no picture"),
        (shape("mask", [(1, 1), (4, 4)], mask=encoded(Pillow.new("L", (9, 9)))), r"mask of \(9, 9\) pixels does not fit"),
        (shape("mask", [(9, 9), (4, 4)], mask=encoded(Pillow.new("L", (9, 9)))), "does not fit"),
    ],
    ids=["unknown kind", "misspelt kind", "kind a list", "two points", "no points", "one corner", "three for a circle",
         "half a line", "two for a point", "right of it", "above it", "far outside", "flat polygon", "no radius",
         "no length", "three coordinates", "ragged", "word", "null", "endless outline", "no label", "no object",
         "group a list", "mask no base64", "no mask", "mask no picture", "mask too large", "mask backwards"],
)  # fmt: skip
def test_a_broken_shape_sets_its_picture_aside(tmp_path, drawn, reason):
    path = written(tmp_path, shape(), drawn)
    with pytest.raises(BadRow, match=reason) as caught:
        labelme.objects(path)
    assert str(caught.value).startswith(f"{path}, shapes[1]")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"imageData": "not base64"}, "imageData: is not base64"),
        ({"imageData": 7}, "imageData: is not base64"),
        ({"imageData": base64.b64encode(b"<html>").decode()}, "imageData: is no picture"),
        ({"imageData": encoded(Pillow.new("L", (5, 5)))}, "imageData: has 5 x 5 pixels, imageHeight says 60"),
        ({"imagePath": "b.jpg"}, "b.jpg: no such picture"),
        ({"imagePath": ...}, "has neither imagePath nor imageData"),
        ({"imagePath": 7}, "has neither imagePath nor imageData"),
        ({"imageWidth": 81}, "a.jpg: has 60 x 80 pixels, imageWidth says 81"),
        ({"imageHeight": "60 px"}, "a.jpg: has 60 x 80 pixels, imageHeight says 60 px"),
        ({"shapes": {"a": 1}}, "expected a list as 'shapes'"),
        ({"flags": ["night"]}, "an object as 'flags'"),
    ],
    ids=["no base64", "a number", "no picture", "embedded size", "absent picture", "no picture named", "path a number",
         "width differs", "height a word", "shapes an object", "flags a list"],
)  # fmt: skip
def test_a_picture_that_does_not_fit_is_set_aside(tmp_path, changes, reason):
    path = written(tmp_path, shape(), **changes)
    with pytest.raises(BadRow, match=reason) as caught:
        labelme.objects(path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "line 1, column 1"),
        ('{"shapes": [', "line 1, column 13"),
        ("[]", "is no labelme file"),
        ('{"shapes": [NaN]}', "holds NaN"),
        ('{"shapes": %s}' % ("[" * 100_000), "nested deeper"),
        ('{"shapes": [], "shapes": [1]}', "key 'shapes' stands twice"),
    ],
    ids=["empty", "truncated", "a list", "NaN", "nesting", "doubled key"],
)
def test_a_broken_file_is_set_aside_since_it_is_one_row(tmp_path, content, reason):
    path = written(tmp_path)
    path.write_text(content)
    with pytest.raises(BadRow, match=reason) as caught:
        labelme.objects(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg"])
def test_a_path_that_leads_out_stops_everything(tmp_path, name):
    path = written(tmp_path, shape(), imagePath=name)
    with pytest.raises(UserError, match="a.json, imagePath: .* leads out") as caught:
        labelme.objects(path)
    assert caught.value.hint
