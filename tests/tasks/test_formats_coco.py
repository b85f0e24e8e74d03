"""COCO JSON: what pycocotools reads from a file we read too; what is broken or hostile is named."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from PIL import Image as Pillow
from pycocotools import mask
from pycocotools.coco import COCO

from tasks.errors import BadRow, UserError
from tasks.fields import Boxes, ObjectMasks
from tasks.formats import coco, strict_json

HEIGHT, WIDTH = 24, 32
SQUARE = [2, 3, 10, 3, 10, 9.5, 2, 9.5]
TRIANGLE = [20, 10, 30, 10, 25, 20]
CROWD = np.zeros((HEIGHT, WIDTH), np.uint8)
CROWD[5:15, 4:20] = 1
CROWD[8:10, 6:9] = 0


def runs(plane):
    """The uncompressed runs of a mask, column by column, zeros first."""
    flat = plane.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def instances_file():
    """A file as COCO's own look: ids with holes, a crowd, an object of two parts, a picture without objects."""
    dog = {
        "id": 901,
        "image_id": 42,
        "category_id": 18,
        "bbox": [2, 3, 8, 6.5],
        "area": 52.0,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    }
    both = {
        "id": 902,
        "image_id": 42,
        "category_id": 90,
        "bbox": [2, 3, 28, 17],
        "area": 100.5,
        "iscrowd": 0,
        "segmentation": [SQUARE, TRIANGLE],
    }
    crowd = {"id": 903, "image_id": 9, "category_id": 18, "bbox": [4, 5, 16, 10], "area": 154, "iscrowd": 1,
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs(CROWD)}}  # fmt: skip
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": number, "file_name": f"{number:012}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
            for number in (42, 9, 7)
        ],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        ],
        "annotations": [dog, crowd, both],
    }


@pytest.fixture
def folder(tmp_path):
    for number in (42, 9, 7):
        Pillow.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{number:012}.jpg")
    return tmp_path


def written(folder, content):
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(kind, position=0, **values):
    content = instances_file()
    content[kind][position].update(values)
    return {kind: content.pop(kind)} | content


def without(kind, position, name):
    content = instances_file()
    del content[kind][position][name]
    return content


# ---- what is read


def test_objects_come_back_in_the_order_of_the_pictures(folder):
    listed = coco.instances(written(folder, instances_file()), folder)
    assert pickle.loads(pickle.dumps(listed)) == listed
    assert [reference.picture.name for reference in listed] == [
        "000000000042.jpg",
        "000000000009.jpg",
        "000000000007.jpg",
    ]
    first, second, third = map(coco.objects, listed)
    assert first["boxes"].dtype == np.float32 and first["boxes"].tolist() == [[2, 3, 10, 9.5], [2, 3, 30, 20]]
    assert first["labels"] == ["dog", "toothbrush"] and first["area"].tolist() == [52, 100.5]
    assert first["iscrowd"].tolist() == [False, False] and second["iscrowd"].tolist() == [True]
    assert third["boxes"].shape == (0, 4) and third["labels"] == third["masks"] == []
    assert Boxes().check(third["boxes"], {}).shape == (0, 4)
    assert ObjectMasks().check(first["masks"], {})["width"] == WIDTH


def test_masks_are_those_of_pycocotools(folder):
    content = instances_file()
    compressed = mask.encode(np.asfortranarray(CROWD))["counts"].decode()
    content["annotations"].append(
        {
            "id": 904,
            "image_id": 7,
            "category_id": 18,
            "bbox": [4, 5, 16, 10],
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed},
        }
    )
    path = written(folder, content)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(path))
    for reference in coco.instances(path, folder):
        number = int(reference.picture.stem)
        expected = [theirs.annToMask(one) for one in theirs.imgToAnns[number]]
        masks = coco.objects(reference)["masks"]
        assert all(one["size"] == [HEIGHT, WIDTH] and isinstance(one["counts"], bytes) for one in masks)
        np.testing.assert_array_equal([mask.decode(one) for one in masks], expected)
    np.testing.assert_array_equal(mask.decode(coco.objects(coco.instances(path, folder)[1])["masks"][0]), CROWD)


@given(
    numpy_st.arrays(np.uint8, numpy_st.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1))
)
def test_any_mask_comes_back_from_either_kind_of_runs(plane):
    height, width = plane.shape
    for counts in (runs(plane), mask.encode(np.asfortranarray(plane))["counts"].decode()):
        found = coco.rle({"size": [height, width], "counts": counts}, height, width, "here")
        np.testing.assert_array_equal(mask.decode(found), plane)


@given(
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12) | st.lists(st.integers(-3, 40), max_size=8)
)
def test_any_other_runs_are_a_bad_row_or_a_mask_of_the_right_size(counts):
    try:
        found = coco.rle({"size": [4, 5], "counts": counts}, 4, 5, "here")
    except BadRow as error:
        assert str(error).startswith("here: ")
    else:
        assert mask.decode(found).shape == (4, 5)


def test_only_the_named_categories_are_kept_and_every_picture(folder):
    listed = coco.instances(written(folder, instances_file()), folder, ["toothbrush"], masks=False)
    rows = list(map(coco.objects, listed))
    assert [row["labels"] for row in rows] == [["toothbrush"], [], []]
    assert all("masks" not in row for row in rows)


def test_key_points_come_with_their_visibility(folder):
    content = instances_file()
    for category in content["categories"]:
        category["keypoints"] = ["nose", "tail"]
    for one, points in zip(
        content["annotations"], ([5, 6, 2, 7, 8, 1], [0, 0, 0, 0, 0, 0], [9, 9, 0, 31.5, 24, 2]), strict=True
    ):
        one["keypoints"] = points
    path = written(folder, content)
    first, second, third = map(coco.objects, coco.instances(path, folder))
    assert first["keypoints"].dtype == np.float32
    assert first["keypoints"].tolist() == [[[5, 6, 2], [7, 8, 1]], [[0, 0, 0], [31.5, 24, 2]]]
    assert second["keypoints"].shape == (1, 2, 3) and third["keypoints"].shape == (0, 2, 3)
    for points, reason in (
        ([5, 6, 3, 7, 8, 1], "visibility"),
        ([50, 6, 2, 7, 8, 1], "outside"),
        ([5, 6, 2], "expected 6 finite"),
    ):
        content["annotations"][0]["keypoints"] = points
        with pytest.raises(BadRow, match=f"annotation 901: .*{reason}"):
            coco.objects(coco.instances(written(folder, content), folder)[0])


def test_captions_are_read_by_picture(folder):
    content = instances_file() | {
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "A dog [sitting. "},
            {"image_id": 42, "id": 2, "caption": "一只狗"},
            {"image_id": 9, "id": 3, "caption": "A brown dog."},
        ]
    }
    del content["categories"]
    assert [coco.texts(reference) for reference in coco.captions(written(folder, content), folder)] == [
        ["一只狗"],
        ["A dog [sitting.", "A brown dog."],
        [],
    ]
    for caption in (None, 7, " "):
        content["annotations"][0]["caption"] = caption
        with pytest.raises(BadRow, match="000000000009.jpg: expected a caption"):
            coco.texts(coco.captions(written(folder, content), folder)[1])


@pytest.mark.parametrize(
    "content",
    [
        changed("annotations", area="52.0"),
        without("annotations", 0, "area"),
        without("annotations", 0, "iscrowd"),
        changed("annotations", bbox=[2, 3, 8, "6.5"]),
        changed("annotations", bbox=[2.0, 3, 8, 6.5], extra={"x": [1]}),
    ],
    ids=["area as text", "no area", "no iscrowd", "number as text", "a key of one's own"],
)
def test_small_differences_are_normalised(folder, content):
    row = coco.objects(coco.instances(written(folder, content), folder)[0])
    assert row["boxes"][0].tolist() == [2, 3, 10, 9.5] and row["area"][0] == 52 and not row["iscrowd"][0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_file_may_be_in_any_encoding_of_json(folder, encoding):
    path = folder / "instances.json"
    path.write_text(json.dumps(changed("categories", name="狗"), ensure_ascii=False), encoding=encoding)
    assert coco.objects(coco.instances(path, folder)[0])["labels"][0] == "狗"


@pytest.mark.parametrize("annotations", [[], None], ids=["an empty list", "no list"])
def test_a_file_without_annotations_lists_its_pictures(folder, annotations):
    content = instances_file()
    del content["annotations"], content["categories"]
    content |= {} if annotations is None else {"annotations": annotations}
    rows = list(map(coco.objects, coco.instances(written(folder, content), folder)))
    assert [len(row["boxes"]) for row in rows] == [0, 0, 0]


def test_pictures_may_lie_in_folders_below(folder):
    (folder / "val").mkdir()
    (folder / "000000000042.jpg").rename(folder / "val" / "a.jpg")
    for name in ("val/a.jpg", "val\\a.jpg"):
        [first, *_] = coco.instances(written(folder, changed("images", file_name=name)), folder)
        assert first.picture == folder / "val" / "a.jpg" and coco.objects(first)["labels"]


def test_less_than_a_pixel_outside_is_clipped(folder):
    content = changed(
        "annotations", bbox=[-0.5, 3, 33, 21.9], segmentation=[[-0.5, 3, 32.5, 3, 32.5, 24.9, -0.5, 24.9]]
    )
    row = coco.objects(coco.instances(written(folder, content), folder)[0])
    assert row["boxes"][0].tolist() == [0, 3, 32, 24]
    assert mask.toBbox(row["masks"][0]).tolist() == [0, 3, 32, 21]


# ---- what stops everything

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "line 1, column 1"),
        (json.dumps(instances_file())[:-30], "line 1, column"),
        ('{\n"images": [],\n}', "line 3, column 1"),
        ("[]", "is no COCO file: expected an object, got a list"),
        ('{"images": [NaN]}', "holds NaN"),
        ('{"images": [-Infinity]}', "holds -Infinity"),
        (f'{{"images": {DEEP}}}', "nested deeper than 32"),
        (f'{{"info": {DEEP[:100_000]}', "nested deeper than 32"),
        ('{"info": %s}' % ("9" * 5000), "integer of 5000 digits, 9999999999"),
        ('{"images": [{"id": 1, "id": 2}]}', "key 'id' stands twice"),
        (changed("images", file_name="\ud83d.jpg"), "can't encode character"),
        ({"annotations": []}, "holds no images"),
        ({"images": {}}, "expected a list as 'images'"),
        ({"images": ["a.jpg"]}, r"images\[0\]: expected an object, got a.jpg"),
        (changed("images", 1, id=42), r"images\[1\]: a second picture has the id 42"),
        (changed("images", id=None), r"images\[0\]: expected a number or text as 'id'"),
        (changed("images", id=[1]), r"images\[0\]: expected a number or text as 'id'"),
        (changed("images", height="24"), r"images\[0\]: expected height and width in pixels, got '24'"),
        (without("images", 0, "width"), r"images\[0\]: expected height and width"),
        (changed("images", height=0), r"images\[0\]: expected height and width"),
        (without("images", 0, "file_name"), r"images\[0\]: expected text as 'file_name'"),
        (changed("images", 2, file_name="/etc/passwd"), r"images\[2\]: '/etc/passwd' leads out"),
        (changed("images", file_name="../../secret.jpg"), "leads out"),
        (changed("images", file_name="a/../../secret.jpg"), "leads out"),
        (changed("images", file_name="..\\secret.jpg"), "leads out"),
        (changed("images", file_name="C:\\secret.jpg"), "leads out"),
        (changed("annotations", 1, category_id=19), r"annotations\[1\]: unknown category 19"),
        (changed("annotations", 1, category_id={}), r"annotations\[1\]: expected a number or text as 'category_id'"),
        (changed("categories", 1, id=18), r"categories\[1\]: a second category has the id 18"),
        (changed("categories", 1, name="dog"), r"categories\[1\]: a second category has .* the name 'dog'"),
        (changed("categories", name=7), r"categories\[0\]: expected text as 'name'"),
        (changed("categories", keypoints=7), r"categories\[0\]: expected a list of names as 'keypoints'"),
    ],
    ids=["empty", "truncated", "comma", "a list", "NaN", "infinity", "nesting", "nesting without end", "long integer",
         "doubled key", "half a character", "no images", "images no list", "image no object", "doubled image", "no id", "id a list",
         "height as text", "no width", "no height", "no name", "absolute", "traversal", "hidden traversal",
         "traversal of Windows", "drive of Windows", "unknown category", "category an object", "doubled category",
         "doubled name", "name a number", "key points a number"],
)  # fmt: skip
def test_a_doubtful_file_is_refused_with_its_place(folder, content, reason):
    path = written(folder, content)
    with pytest.raises(UserError, match=reason) as caught:
        coco.instances(path, folder)
    assert str(path) in caught.value.message and caught.value.hint


def test_brackets_within_text_are_no_nesting(folder):
    content = changed("categories", name='a \\" [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[ {{{{{{ "')
    assert len(coco.instances(written(folder, content), folder)) == 3


def test_an_unknown_category_to_keep_is_refused(folder):
    with pytest.raises(UserError, match="(?s)has no category 'dgo'.*did you mean 'dog'"):
        coco.instances(written(folder, instances_file()), folder, ["toothbrush", "dgo"])


def test_what_is_no_file_is_not_utf_8_or_too_large_is_refused(folder, monkeypatch):
    for path in (folder / "none.json", folder):
        with pytest.raises(UserError, match="no such file"):
            coco.instances(path, folder)
    path = folder / "instances.json"
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match="is not utf-8: invalid start byte at byte 12"):
        coco.captions(path, folder)
    with pytest.raises(UserError, match="has over 10 bytes"):
        strict_json.read(path, 10)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))  # fmt: skip
def test_ordinary_json_is_read_as_python_reads_it(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    assert strict_json.read(path) == value


# ---- what sets a picture aside

LONG = [coordinate for _ in range(20_000) for coordinate in (0, 0, WIDTH, HEIGHT)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bbox": [2, 3, -8, 6]}, "its box has no area"),
        ({"bbox": [2, 3, 8, 0]}, "its box has no area"),
        ({"bbox": [2, 3, 8]}, "bbox: expected 4 finite numbers"),
        ({"bbox": [2, 3, 8, "1e999"]}, "bbox: expected 4 finite numbers"),
        ({"bbox": [2, 3, 8, None]}, "bbox: expected 4 finite numbers"),
        ({"bbox": {"x": 2}}, "bbox: expected numbers"),
        ({"bbox": [2, 3, 8, [6]]}, "bbox: expected numbers"),
        ({"bbox": [-1, 3, 8, 6]}, r"\(-1, 3\) lies outside the picture of 32 x 24"),
        ({"bbox": [1e300, 3, 8, 6]}, "lies outside"),
        ({"area": "large"}, "area: expected numbers, got large"),
        ({"area": -1}, "its area is -1"),
        ({"iscrowd": 2}, "expected 0 or 1 as iscrowd, got 2"),
        ({"iscrowd": []}, "expected 0 or 1 as iscrowd"),
        ({"segmentation": None}, "expected polygons or an RLE"),
        ({"segmentation": []}, "expected polygons or an RLE"),
        ({"segmentation": "polygon"}, "expected polygons or an RLE"),
        ({"segmentation": SQUARE}, "polygon: expected finite numbers"),
        ({"segmentation": [SQUARE, SQUARE[:-1]]}, "a polygon has 7 coordinates"),
        ({"segmentation": [SQUARE[:4]]}, "a polygon has 4 coordinates"),
        ({"segmentation": [[]]}, "a polygon has 0 coordinates"),
        ({"segmentation": [[1e9 if number == 10 else number for number in SQUARE]]}, r"\(1e\+09, 3\) lies outside"),
        ({"segmentation": [["a", *SQUARE[1:]]]}, "polygon: expected numbers"),
        ({"segmentation": [LONG]}, "outline of over 1000000 pixels"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "expected polygons or an RLE"),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": runs(CROWD)}}, r"its RLE is of size \[32, 24\], its picture of \[24, 32\]"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [*runs(CROWD), 1]}}, "do not add up to 24 x 32"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [2**62, 2**62, HEIGHT * WIDTH]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0.5, HEIGHT * WIDTH - 0.5]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": []}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": ""}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": {}}}, "RLE: expected numbers"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PPP"}}, "truncated"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PPPPPPPPPPPPPPPP0"}}, "is no compressed RLE"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "狗"}}, "is no compressed RLE"),
    ],
    ids=["negative box", "flat box", "three numbers", "infinity", "null", "object", "ragged", "outside", "far outside",
         "area a word", "negative area", "crowd of 2", "crowd a list", "no polygons", "empty polygons", "text",
         "a flat polygon", "odd polygon", "two points", "no points", "polygon outside", "word in a polygon",
         "endless polygon", "no runs", "RLE of another size", "a run too many", "negative run", "overflowing runs",
         "half a pixel", "no run", "no text", "runs an object", "truncated text", "endless number", "no RLE"],
)  # fmt: skip
def test_a_broken_annotation_sets_its_picture_aside_and_no_other(folder, values, reason):
    first, second, third = coco.instances(written(folder, changed("annotations", **values)), folder)
    with pytest.raises(BadRow, match=reason) as caught:
        coco.objects(first)
    assert str(caught.value).startswith("000000000042.jpg, annotation 901")
    assert coco.objects(second)["labels"] == ["dog"] and coco.objects(third)["labels"] == []


def test_a_number_beyond_all_floats_sets_its_picture_aside(folder):
    text = json.dumps(instances_file()).replace("52.0", "1e999")
    with pytest.raises(BadRow, match="annotation 901: area: expected finite numbers, got inf"):
        coco.objects(coco.instances(written(folder, text), folder)[0])


def test_annotations_without_a_picture_are_set_aside_and_counted(folder):
    path = written(folder, changed("annotations", 1, image_id=10))
    *listed, stray = coco.instances(path, folder)
    assert [len(coco.objects(reference)["labels"]) for reference in listed] == [2, 0, 0]
    with pytest.raises(BadRow, match="instances.json: picture 10 has 1 annotations but no entry in images"):
        coco.objects(stray)


def test_a_picture_must_be_there_and_as_large_as_declared(folder):
    listed = coco.instances(written(folder, instances_file()), folder)
    Pillow.new("RGB", (HEIGHT, WIDTH)).save(listed[0].picture)
    listed[1].picture.write_bytes(b"<html>")
    listed[2].picture.unlink()
    for reference, reason in zip(
        listed, ("has 32 x 24 pixels, its annotation says 24 x 32", "is no picture", "no such picture"), strict=True
    ):
        for read in (coco.objects, coco.texts):
            with pytest.raises(BadRow, match=f"{reference.picture.name}: {reason}"):
                read(reference)


@pytest.mark.parametrize("name", ["a" * 5000 + ".jpg", "a\0.jpg", "."], ids=["long", "NUL", "folder"])
def test_a_name_that_no_file_can_have_sets_its_picture_aside(folder, name):
    [first, *_] = coco.instances(written(folder, changed("images", file_name=name)), folder)
    with pytest.raises(BadRow, match="no such picture"):
        coco.objects(first)
