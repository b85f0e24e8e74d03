"""PASCAL VOC: image sets, objects and maps come back as they were written; what is broken or hostile is named."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from pycocotools import mask

from tasks.errors import BadRow, UserError
from tasks.fields import Boxes, ClassMap, ObjectMasks, Picture
from tasks.formats import voc

HEIGHT, WIDTH = 20, 30
BOX = "<xmin>3</xmin><ymin>5</ymin><xmax>12</xmax><ymax>20</ymax>"
DOG = f"<object><name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult><bndbox>{BOX}</bndbox></object>"
PERSON = """<object><name>person</name><difficult>1</difficult><occluded>1</occluded>
    <bndbox><xmax>30</xmax><xmin>1</xmin><ymax>20</ymax><ymin>1.5</ymin></bndbox>
    <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part></object>"""
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def annotation(objects=DOG, size=SIZE, filename="000005.jpg"):
    return f"<annotation><folder>VOC2007</folder><filename>{filename}</filename>{size}<segmented>0</segmented>{objects}</annotation>"


def written(tmp_path, content):
    path = tmp_path / "000005.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def palette_png(path, indices):
    image = Pillow.fromarray(np.asarray(indices, np.uint8))
    image.putpalette([(index * 37 + colour * 91) % 256 for index in range(256) for colour in range(3)])
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return path


def devkit(tmp_path):
    """Writes VOCdevkit with two pictures a year, of which the first is for training."""
    for year in (2007, 2012):
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        for name in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation", "JPEGImages"):
            (folder / name).mkdir(parents=True)
        for number in (1, 2):
            Pillow.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages" / f"{year}_00000{number}.jpg")
            (folder / "Annotations" / f"{year}_00000{number}.xml").write_text(annotation())
        for kind in ("Main", "Segmentation"):
            (folder / "ImageSets" / kind / "train.txt").write_text(f"{year}_000001\n")
            (folder / "ImageSets" / kind / "trainval.txt").write_text(f"{year}_000001\r\n{year}_000002 \n\n")
        (folder / "ImageSets" / "Main" / "dog_train.txt").write_text(f"{year}_000001  1\n{year}_000002 -1\n")
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("2007_000002\n")
    return tmp_path / "VOCdevkit"


# ---- image sets


@pytest.mark.parametrize(
    ("image_set", "years", "expected"),
    [
        ("trainval", (2007,), ["2007_000001", "2007_000002"]),
        ("train", (2012, 2007), ["2012_000001", "2007_000001"]),
        ("train", (), ["2007_000001", "2012_000001"]),
        ("test", (), ["2007_000002"]),
    ],
    ids=["one year", "a union in the order wanted", "every year", "every year that has it"],
)
def test_an_image_set_lists_its_pictures(tmp_path, image_set, years, expected):
    listed = voc.examples(devkit(tmp_path), image_set, years)
    assert [files.picture.stem for files in listed] == [files.annotation.stem for files in listed] == expected
    assert all(files.picture.is_file() and files.annotation.is_file() for files in listed)
    assert pickle.loads(pickle.dumps(listed)) == listed


def test_the_folder_of_one_year_may_be_named_itself(tmp_path):
    [files] = voc.examples(devkit(tmp_path) / "VOC2012", "train", kind="Segmentation")
    assert files.class_map == tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2012_000001.png"
    assert files.object_map == tmp_path / "VOCdevkit/VOC2012/SegmentationObject/2012_000001.png"


def test_a_picture_is_found_by_its_name_whatever_its_format(tmp_path):
    folder = devkit(tmp_path) / "VOC2007"
    (folder / "JPEGImages/2007_000001.jpg").rename(folder / "JPEGImages/2007_000001.PNG")
    [files] = voc.examples(folder, "train")
    assert files.picture.name == "2007_000001.PNG"


@pytest.mark.parametrize(
    ("image_set", "years", "reason"),
    [
        ("trian", (2007,), "no such image set.*\n.*did you mean 'train'"),
        ("test", (2007, 2012), "VOC2012.*no such image set"),
        ("train", (2008,), "VOC2008.*no such image set"),
        ("val", (), "holds no VOC folder with the image set ImageSets/Main/val.txt"),
        ("dog_train", (2007,), "line 1: expected the name of a picture, got '2007_000001  1'"),
    ],
    ids=["misspelt", "one year has it", "absent year", "no year has it", "list of one class"],
)
def test_an_absent_image_set_is_refused(tmp_path, image_set, years, reason):
    with pytest.raises(UserError, match=f"(?s){reason}"):
        voc.examples(devkit(tmp_path), image_set, years)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n", "is empty"),
        (b"a\n../../secret\n", "line 2: expected the name of a picture, got '../../secret'"),
        (b"..\\secret\n", "line 1: expected the name"),
        (b"..\n", "line 1: expected the name"),
        (b"a\nb\na\n", "line 3: names a a second time"),
        (b"a\n\xff\n", "line 2: is not utf-8"),
    ],
    ids=["empty", "traversal", "traversal of Windows", "parent", "twice", "encoding"],
)
def test_a_broken_image_set_is_refused_with_its_line(tmp_path, content, reason):
    root = devkit(tmp_path)
    (root / "VOC2007/ImageSets/Main/train.txt").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        voc.examples(root, "train", [2007])
    assert "train.txt" in caught.value.message and caught.value.hint


def test_a_folder_without_pictures_is_refused(tmp_path):
    folder = devkit(tmp_path) / "VOC2007"
    (folder / "JPEGImages").rename(folder / "Images")
    with pytest.raises(UserError, match="JPEGImages: no such folder"):
        voc.examples(folder, "train")


# ---- objects


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_objects_come_back_counted_from_zero(tmp_path, encoding):
    row = voc.objects(written(tmp_path, annotation(DOG + PERSON).encode(encoding)))
    assert row["boxes"].dtype == np.float32
    assert row["boxes"].tolist() == [[2, 4, 12, 20], [0, 0.5, 30, 20]]
    assert row["labels"] == ["dog", "person"] and row["pose"] == ["Left", "Unspecified"]
    assert row["truncated"].tolist() == [True, False]
    assert row["difficult"].tolist() == row["occluded"].tolist() == [False, True]
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH)


def test_a_picture_without_objects_has_no_boxes(tmp_path):
    row = voc.objects(written(tmp_path, annotation("")))
    assert row["boxes"].shape == (0, 4) and row["labels"] == [] and row["difficult"].shape == (0,)
    assert Boxes().check(row["boxes"], {}).shape == (0, 4)


@given(
    st.tuples(st.integers(1, WIDTH), st.integers(1, WIDTH)), st.tuples(st.integers(1, HEIGHT), st.integers(1, HEIGHT))
)
def test_every_box_covers_the_pixels_it_names(tmp_path_factory, columns, rows):
    (x1, x2), (y1, y2) = sorted(columns), sorted(rows)
    box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    path = written(tmp_path_factory.getbasetemp(), annotation(DOG.replace(BOX, box)))
    if x1 == x2 or y1 == y2:
        with pytest.raises(BadRow, match="without area"):
            voc.objects(path)
    else:
        [[left, top, right, bottom]] = voc.objects(path)["boxes"]
        assert (right - left) * (bottom - top) == (x2 - x1 + 1) * (y2 - y1 + 1)


def test_other_classes_are_taken_where_they_are_named_or_none_are(tmp_path):
    path = written(tmp_path, annotation(DOG.replace("dog", "螺丝")))
    assert voc.objects(path, ["螺丝"])["labels"] == voc.objects(path, ())["labels"] == ["螺丝"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (annotation(DOG.replace(f"<bndbox>{BOX}</bndbox>", "")), r"object 1 \(dog\) has no xmin"),
        (annotation(DOG.replace("<ymax>20</ymax>", "")), r"object 1 \(dog\) has no ymax"),
        (annotation(DOG.replace("<xmin>3<", "<xmin>13<")), r"box without area: x 13..12"),
        (annotation(DOG.replace("<xmin>3<", "<xmin>12<")), r"box without area: x 12..12"),
        (annotation(DOG.replace("<xmax>12<", "<xmax>31<")), r"\(31, 20\) lies outside the picture of 30 x 20"),
        (annotation(DOG.replace("<xmin>3<", "<xmin>0<")), r"\(-1, 4\) lies outside"),
        (annotation(DOG.replace("<xmin>3<", "<xmin>NaN<")), "has NaN as xmin, expected a finite"),
        (annotation(DOG.replace("<xmax>12<", "<xmax>inf<")), "has inf as xmax, expected a finite"),
        (annotation(DOG.replace("<xmin>3<", "<xmin>three<")), "has 'three' as xmin, expected a number"),
        (annotation(DOG.replace("<name>dog</name>", "")), "object 1 has no name"),
        (annotation(DOG.replace("<difficult>0<", "<difficult>maybe<")), "expected 0 or 1 as difficult, got 'maybe'"),
        (annotation(size=""), "size has no height"),
        ("<annotations/>", "is no annotation of VOC"),
        (annotation()[:-20], "no XML that can be read"),
        (b"", "no XML that can be read"),
        (b"<annotation>\xff</annotation>", "no XML that can be read"),
        (b"<?xml version='1.0' encoding='gb2312'?>" + annotation().encode(), "no XML that can be read"),
        (b"<?xml version='1.0' encoding='klingon'?>" + annotation().encode(), "no XML that can be read"),
    ],
    ids=["no box", "half a box", "xmin over xmax", "no width", "right of it", "left of it", "NaN", "infinity", "text",
         "no name", "no mark", "no size", "another file", "truncated", "empty", "encoding", "codec of many bytes",
         "unknown codec"],
)  # fmt: skip
def test_a_broken_annotation_is_set_aside(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(BadRow, match=reason) as caught:
        voc.objects(path)
    assert str(path) in str(caught.value)


def test_less_than_a_pixel_outside_is_clipped(tmp_path):
    row = voc.objects(
        written(tmp_path, annotation(DOG.replace("<xmin>3<", "<xmin>0.25<").replace("<xmax>12<", "<xmax>30.5<")))
    )
    assert row["boxes"].tolist() == [[0, 4, 30, 20]]


LAUGHS = """<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS + annotation(filename="&c;"), "declares a DTD"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + annotation(filename="&x;"), "declares a DTD"),
        ('<!DOCTYPE annotation SYSTEM "voc.dtd">' + annotation(), "declares a DTD"),
        (annotation("<a>" * 100_000 + "</a>" * 100_000), "nested deeper than 32"),
        (annotation(DOG.replace("dog", "dgo")), "(?s)object 1 is of the unknown class 'dgo'\ndid you mean 'dog'"),
        (annotation(filename="../../secret.jpg"), "'../../secret.jpg' leads out"),
        (annotation(filename="/etc/passwd"), "'/etc/passwd' leads out"),
        (annotation(filename="..\\secret.jpg"), "leads out"),
    ],
    ids=[
        "billion laughs",
        "external entity",
        "DTD",
        "nesting",
        "class",
        "traversal",
        "absolute",
        "traversal of Windows",
    ],
)
def test_a_hostile_annotation_or_an_unknown_class_stops_everything(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        voc.objects(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_a_huge_annotation_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(voc, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="has over 100 bytes"):
        voc.objects(written(tmp_path, annotation()))


def test_an_absent_annotation_is_set_aside(tmp_path):
    with pytest.raises(BadRow, match="000005.xml: cannot be read: No such file"):
        voc.objects(tmp_path / "000005.xml")


def test_a_picture_must_be_there_and_as_large_as_declared(tmp_path):
    path, picture = written(tmp_path, annotation()), tmp_path / "000005.jpg"
    with pytest.raises(BadRow, match="000005.jpg: no such picture"):
        voc.objects(path, picture=picture)
    picture.write_bytes(b"<html>")
    with pytest.raises(BadRow, match="000005.jpg: is no picture"):
        voc.objects(path, picture=picture)
    Pillow.new("RGB", (HEIGHT, WIDTH)).save(picture)
    with pytest.raises(BadRow, match="000005.jpg: has 30 x 20 pixels, its annotation says 20 x 30"):
        voc.objects(path, picture=picture)
    turned = Pillow.Exif()
    turned[0x0112] = 6  # by 90 degrees: upright it is as declared
    Pillow.new("RGB", (HEIGHT, WIDTH)).save(picture, exif=turned)
    assert voc.objects(path, picture=picture)["labels"] == ["dog"]
    stored = Picture(3).check(picture, {})
    assert (stored["height"], stored["width"]) == (HEIGHT, WIDTH)


# ---- maps


CLASS_MAP = np.zeros((HEIGHT, WIDTH), np.uint8)
CLASS_MAP[2:8, 3:10], CLASS_MAP[2:8, 10:15], CLASS_MAP[10:18, 20:28] = 12, 12, 15
OBJECT_MAP = np.zeros((HEIGHT, WIDTH), np.uint8)
OBJECT_MAP[2:8, 3:10], OBJECT_MAP[2:8, 10:15], OBJECT_MAP[10:18, 20:28] = 1, 2, 3
CLASS_MAP[8], OBJECT_MAP[8] = 255, 255


def segmented(tmp_path, classes=CLASS_MAP, objects=OBJECT_MAP, size=(WIDTH, HEIGHT)):
    [files] = voc.examples(devkit(tmp_path), "train", [2012], "Segmentation")
    palette_png(files.class_map, classes)
    palette_png(files.object_map, objects)
    Pillow.new("RGB", size).save(files.picture)
    return files


def test_a_palette_gives_its_indices_and_not_its_colours(tmp_path):
    path = palette_png(tmp_path / "a.png", CLASS_MAP)
    found = voc.class_map(path)
    assert found.dtype == np.uint8 and np.array_equal(found, CLASS_MAP)
    assert np.array_equal(np.asarray(Pillow.open(path)), CLASS_MAP)


def test_segments_are_classes_of_pixels_and_masks_of_objects(tmp_path):
    row = voc.segments(segmented(tmp_path))
    assert np.array_equal(row["class_map"], CLASS_MAP)
    assert row["labels"] == ["dog", "dog", "person"]
    assert row["boxes"].dtype == np.float32
    assert row["boxes"].tolist() == [[3, 2, 10, 8], [10, 2, 15, 8], [20, 10, 28, 18]]
    for number, one in enumerate(row["masks"], 1):
        assert np.array_equal(mask.decode(one), number == OBJECT_MAP)
    assert ObjectMasks().check(row["masks"], {})["height"] == HEIGHT
    assert ClassMap().check(row["class_map"], {})["width"] == WIDTH


def test_a_map_of_background_has_no_objects(tmp_path):
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    row = voc.segments(segmented(tmp_path, empty, empty))
    assert row["masks"] == row["labels"] == [] and row["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"classes": np.where(CLASS_MAP == 15, 21, CLASS_MAP)}, "holds the class 21, expected 0..20 or 255"),
        ({"objects": OBJECT_MAP[:-1]}, r"is of size \(19, 30\), the map of classes of size \(20, 30\)"),
        ({"classes": np.where(CLASS_MAP == 15, 0, CLASS_MAP)}, "object 3 has no class in 2012_000001.png"),
        ({"size": (HEIGHT, WIDTH)}, "has 30 x 20 pixels"),
    ],
    ids=["unknown class", "sizes differ", "object of background", "another picture"],
)
def test_maps_that_do_not_belong_together_are_set_aside(tmp_path, changed, reason):
    with pytest.raises(BadRow, match=reason):
        voc.segments(segmented(tmp_path, **changed))


def test_colours_are_no_classes(tmp_path):
    Pillow.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    with pytest.raises(BadRow, match="a.png: is a PNG of mode RGB"):
        voc.class_map(tmp_path / "a.png")
    with pytest.raises(BadRow, match="b.png: cannot be read"):
        voc.class_map(tmp_path / "b.png")
