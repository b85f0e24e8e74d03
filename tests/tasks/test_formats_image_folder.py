"""Folders of pictures: which pictures are listed with which class, split and group, and what is not followed."""

import os
import pickle
import socket
from pathlib import Path

import pytest

from tasks.errors import BadRow, UserError
from tasks.formats import image_folder
from tasks.formats.image_folder import Listed


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def seen(folder, found):
    """Path from the folder, class and split of each picture."""
    return [(str(Path(one.path).relative_to(folder)), one.label, one.split) for one in found]


def test_a_folder_is_a_class(tmp_path):
    fill(tmp_path, "dog/2.JPG", "cat/b.png", "cat/a.png", "cat/deeper/c.webp")
    found = image_folder.read(tmp_path)
    assert seen(tmp_path, found) == [
        ("cat/a.png", "cat", None),
        ("cat/b.png", "cat", None),
        ("cat/deeper/c.webp", "cat", None),
        ("dog/2.JPG", "dog", None),
    ]
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
def test_train_val_and_test_are_splits(tmp_path, validation):
    fill(tmp_path, "train/cat/1.png", "train/dog/1.png", f"{validation}/cat/2.png", "test/dog/3.png")
    assert sorted(seen(tmp_path, image_folder.read(tmp_path))) == sorted(
        [
            ("train/cat/1.png", "cat", "train"),
            ("train/dog/1.png", "dog", "train"),
            (f"{validation}/cat/2.png", "cat", "validation"),
            ("test/dog/3.png", "dog", "test"),
        ]
    )


@pytest.mark.parametrize("above", ["flowers", "a/b", "train"])
def test_the_folder_may_lie_in_another_one(tmp_path, above):
    fill(tmp_path, f"{above}/cat/1.png", f"{above}/dog/1.png")
    found = image_folder.read(tmp_path)
    assert seen(tmp_path / above, found) == [("cat/1.png", "cat", None), ("dog/1.png", "dog", None)]


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, "train/1.png", "car/1.png")
    assert [one.label for one in image_folder.read(tmp_path)] == ["car", "train"]


def test_a_relative_folder_gives_absolute_paths(tmp_path, monkeypatch):
    fill(tmp_path, "set/cat/1.png", "set/dog/1.png")
    monkeypatch.chdir(tmp_path)
    assert image_folder.read(Path("set")) == image_folder.read(tmp_path / "set")


def test_what_is_left_out_is_counted_by_its_reason(tmp_path, caplog):
    fill(
        tmp_path, "cat/1.png", "dog/1.png", "dog/.hidden.png", ".DS_Store", "cat/.ipynb_checkpoints/1.png", ".git/x.png"
    )
    fill(tmp_path, "__MACOSX/cat/1.png", "cat/Thumbs.db", "dog/desktop.ini", "cat/notes.txt", "cat/png", "cover.png")
    assert seen(tmp_path, image_folder.read(tmp_path)) == [("cat/1.png", "cat", None), ("dog/1.png", "dog", None)]
    [record] = caplog.records
    assert record.name == "whipray" and record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{tmp_path}: left out 4 hidden (such as '.DS_Store'); 1 in no class folder (such as 'cover.png'); "
        "3 of the operating system (such as '__MACOSX'); 2 that are no pictures by their names (such as 'cat/notes.txt')"
    )


def test_nothing_is_told_where_nothing_is_left_out(tmp_path, caplog):
    image_folder.read(fill(tmp_path, "cat/1.png", "dog/1.png"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "holds no class folders"),
        (["1.png", "2.png"], "holds no class folders"),
        (["cat/1.png"], "has one class only, 'cat'"),
        (["train/cat/1.png", "test/cat/2.png"], "has one class only, 'cat'"),
        (["cat/1.png", "dog/readme.txt"], "class folder 'dog' holds no pictures"),
        (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/.x"], "'test/dog' holds no pictures"),
        (["cat/1.png", "Cat/1.png"], "two classes are called 'cat' and 'Cat'"),
        (["train/cat/1.png", "train/dog/1.png", "test/Dog/1.png"], "two classes are called 'dog' and 'Dog'"),
        (["stra\u00dfe/1.png", "STRASSE/1.png"], "two classes are called"),
        (["a b/1.png", "a\nb/1.png"], "two classes are called 'a b' and 'a b'"),
        (["caf\u00e9/1.png", "cafe\u0301/1.png"], "two classes are called"),
        (["train/cat/1.png", "train/dog/1.png", "test/cow/1.png"], "'cow' is in test and not in train"),
        (["train/cat/1.png", "train/dog/1.png", "val/cow/1.png"], "'cow' is in val and not in train"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "test: holds no class folders"),
        (["train/1.png", "test/1.png"], "test: holds no class folders"),
        (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "labels/1.png"], "beside train, test there is 'labels'|"
                                                                                   "beside test, train there is 'labels'"),
        (["val/cat/1.png", "val/dog/1.png", "test/cat/1.png"], "expected are train|its splits are"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "its splits are train, val, valid"),
    ],
    ids=["empty", "pictures only", "one class", "one class in splits", "empty class", "empty class in test",
         "case", "case in splits", "sharp s", "line end", "composed letters", "test alone", "validation alone",
         "test without classes", "splits without classes", "splits and classes", "no train", "two validations"],
)  # fmt: skip
def test_classes_that_cannot_be_learned_are_refused(tmp_path, names, reason):
    with pytest.raises(UserError, match=reason) as caught:
        image_folder.read(fill(tmp_path, *names))
    assert str(tmp_path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("name", ["<script>", "猫", "-rf", "%s", "a b"])
def test_a_class_is_called_what_it_is_called(tmp_path, caplog, name):
    found = image_folder.read(fill(tmp_path, f"{name}/1.png", "dog/1.png"))
    assert {one.label for one in found} == {name, "dog"} and not caplog.records


@pytest.mark.parametrize(
    ("name", "label"), [("a\nb", "a b"), ("a\x1b[31mb", "a [31mb"), (" a ", "a"), ("cafe\u0301", "caf\u00e9")]
)
def test_a_class_name_becomes_one_line_and_that_is_told(tmp_path, caplog, name, label):
    found = image_folder.read(fill(tmp_path, f"{name}/1.png", "dog/1\n2.png"))
    assert {one.label for one in found} == {label, "dog"} and all(Path(one.path).exists() for one in found)
    [record] = caplog.records
    assert f"is read as the class {label!r}" in record.getMessage() and record.getMessage().isprintable()


@pytest.mark.parametrize("name", [b"cat/\xff.png", b"c\xfft/1.png"], ids=["of a picture", "of a class"])
def test_a_name_that_is_not_utf_8_makes_a_bad_row(tmp_path, name):
    fill(tmp_path, "dog/1.png")
    fill(tmp_path, os.fsdecode(name))
    good, bad = sorted(image_folder.read(tmp_path, group="(.*)/"), key=lambda one: one.label, reverse=True)
    assert image_folder.path_of(good) == tmp_path / "dog" / "1.png"
    with pytest.raises(BadRow, match=r"\\udcff.*not UTF-8"):
        image_folder.path_of(bad)
    assert bad.group.encode()


def test_links_within_the_folder_are_followed(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog" / "2.png").symlink_to(tmp_path / "cat" / "1.png")
    assert [label for _, label, _ in seen(tmp_path, image_folder.read(tmp_path))] == ["cat", "dog", "dog"]


def test_the_folder_itself_may_be_a_link(tmp_path):
    fill(tmp_path / "real", "cat/1.png", "dog/1.png")
    (tmp_path / "link").symlink_to("real")
    assert len(image_folder.read(tmp_path / "link")) == 2


def link(target):
    return lambda path: path.symlink_to(target)


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (link("../../outside"), "is a link out of the folder"),
        (link("../../outside/secret.png"), "is a link out of the folder"),
        (link("/"), "is a link out of the folder"),
        (link("../.."), "is a link out of the folder"),
        (link(".."), "leads to a folder that was listed before"),
        (link("."), "leads to a folder that was listed before"),
        (link("../dog"), "leads to a folder that was listed before"),
        (link("x.png"), "is a link that leads nowhere"),
        (link("none.png"), "is a link that leads nowhere"),
        (os.mkfifo, "is a pipe"),
        (listen, "is a pipe, a socket or a device"),
    ],
    ids=["folder outside", "file outside", "root", "parent", "folder above", "itself", "other class", "link to itself",
         "to nothing", "pipe", "socket"],
)  # fmt: skip
def test_what_is_not_followed_is_refused(tmp_path, monkeypatch, make, reason):
    fill(tmp_path, "set/cat/1.png", "set/dog/1.png", "outside/secret.png")
    monkeypatch.chdir(tmp_path / "set" / "cat")  # a socket's path must be short
    make(Path("x.png"))
    with pytest.raises(UserError, match=reason) as caught:
        image_folder.read(tmp_path / "set")
    assert str(tmp_path / "set") in caught.value.message and caught.value.hint


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    with pytest.raises(UserError, match="none: cannot be listed: No such file"):
        image_folder.read(tmp_path / "none")
    fill(tmp_path, "file")
    with pytest.raises(UserError, match="file: cannot be listed: Not a directory"):
        image_folder.read(tmp_path / "file")


def test_folders_of_any_depth_are_listed(tmp_path, monkeypatch):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    monkeypatch.chdir(tmp_path / "cat")
    for _ in range(1200):
        Path("d").mkdir()
        os.chdir("d")
    try:
        assert len(image_folder.read(tmp_path)) == 2
    finally:
        for _ in range(1200):  # pytest itself could not clear it away
            os.chdir("..")
            Path("d").rmdir()


@pytest.mark.parametrize(
    ("group", "groups"),
    [
        (r"p\d+", ["p1", "p1", "p2"]),
        (r"/(p\d+)_", ["p1", "p1", "p2"]),
        (r"(cat|dog)/(?P<group>p\d+)", ["p1", "p1", "p2"]),
        (lambda path: path.split("/")[-1][:2], ["p1", "p1", "p2"]),
        (None, [None] * 3),
    ],
    ids=["whole match", "first group", "named group", "function", "none"],
)
def test_a_group_is_found_in_the_path(tmp_path, group, groups):
    fill(tmp_path, "cat/p1_1.png", "cat/p1_2.png", "dog/p2_1.png")
    assert [one.group for one in image_folder.read(tmp_path, group)] == groups


@pytest.mark.parametrize(("group", "reason"), [(r"p\d+", "dog/x.png: the pattern"), ("(", "no regular expression")])
def test_a_pattern_that_finds_no_group_is_refused(tmp_path, group, reason):
    with pytest.raises(UserError, match=reason):
        image_folder.read(fill(tmp_path, "cat/p1.png", "dog/x.png"), group)


def test_names_in_one_flat_folder_tell_the_class(tmp_path, caplog):
    fill(tmp_path, "great_pyrenees_2.jpg", "Bengal_1.jpg", "Bengal_10.png", "cover.jpg", "xmls/a_1.png", "list.txt")
    assert image_folder.flat(tmp_path) == [
        Listed(str(tmp_path / "Bengal_1.jpg"), "Bengal"),
        Listed(str(tmp_path / "Bengal_10.png"), "Bengal"),
        Listed(str(tmp_path / "great_pyrenees_2.jpg"), "great_pyrenees"),
    ]
    assert "1 in deeper folders (such as 'xmls/a_1.png')" in caplog.text
    assert "1 whose names do not match '(?P<label>.+)_\\d+' (such as 'cover.jpg')" in caplog.text


def test_the_pattern_of_a_flat_folder_and_its_groups_can_be_given(tmp_path):
    fill(tmp_path, "cat.7.p1.png", "dog.8.p2.png")
    found = image_folder.flat(tmp_path, r"(?P<label>\w+)\.\d+\..*", group=r"p\d")
    assert [(one.label, one.group) for one in found] == [("cat", "p1"), ("dog", "p2")]


@pytest.mark.parametrize(
    ("names", "pattern", "reason"),
    [
        (["cat.png"], r"(?P<label>.+)_\d+", "no picture has a name that matches"),
        (["cat_1.png"], r"(?P<label>.+)_\d+", "one class only, 'cat'"),
        (["cat_1.png", "Cat_1.png"], r"(?P<label>.+)_\d+", "two classes are called"),
        (["cat_1.png"], r"(.+)_\d+", "has no group 'label'"),
        (["cat_1.png"], r"(?P<label>", "is no regular expression"),
    ],
)
def test_a_flat_folder_that_cannot_be_learned_from_is_refused(tmp_path, names, pattern, reason):
    with pytest.raises(UserError, match=reason) as caught:
        image_folder.flat(fill(tmp_path, *names), pattern)
    assert caught.value.hint
