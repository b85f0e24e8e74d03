"""Lists of words: every usual layout, labels with spaces, and paths that must stay inside."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import BadRow, UserError
from tasks.formats import ocr
from tasks.formats.ocr import Word


def listed(folder, content, name="gt.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        'img/word_1.png\tJOINT\nimg/word_2.png\t"Genaxis" Theatre\n',
        'img/word_1.png JOINT\nimg/word_2.png "Genaxis" Theatre\n',
        'img/word_1.png, "JOINT"\nimg/word_2.png, "\\"Genaxis\\" Theatre"\n',
        '\ufeffimg/word_1.png, "JOINT"\r\nimg/word_2.png, "\\"Genaxis\\" Theatre"\r\n',
        'img/word_1.png\tJOINT\r\nimg/word_2.png "Genaxis" Theatre',
    ],
    ids=["tab", "space", "ICDAR", "ICDAR with a mark and crlf", "mixed"],
)
def test_a_list_is_read_in_every_usual_layout(tmp_path, content):
    path = listed(tmp_path, content)
    assert list(ocr.words(path)) == [
        Word("img/word_1.png", "JOINT", 1), Word("img/word_2.png", '"Genaxis" Theatre', 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("my scan.JPG two words", "my scan.JPG", "two words"),
        ("a.png b.png", "a.png", "b.png"),
        ("a.png.jpg x", "a.png.jpg", "x"),
        ("no_suffix\t你好", "no_suffix", "你好"),
        ('a.png, "back\\\\slash, comma"', "a.png", "back\\slash, comma"),
        ("a.png", "a.png", ""),
        ("a.png\t", "a.png", ""),
        ('a.png, ""', "a.png", ""),
    ],
)
def test_a_line_is_a_path_and_the_rest_of_it_the_label(tmp_path, line, path, label):
    assert list(ocr.words(listed(tmp_path, f"\n{line}\n"))) == [Word(path, label, 2)]


@given(label=st.text(st.characters(exclude_categories=("Cc", "Cs", "Z"), exclude_characters="\ufeff"), min_size=1))
def test_every_label_without_spaces_comes_back_from_every_layout(tmp_path_factory, label):
    escaped = label.replace("\\", "\\\\").replace('"', '\\"')
    path = listed(tmp_path_factory.mktemp("words"), f'1.png\t{label}\n2.png {label}\n3.png, "{escaped}"\n')
    assert [word.label for word in ocr.words(path)] == [label] * 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "lists no pictures"),
        (b" \n\n", "lists no pictures"),
        (b"a.png\tx\nnothing to see\n", "line 2: expected the path of a picture"),
        (b"../a.png\tx\n", r"line 1: the path '../a.png' is not one inside"),
        (b"b/../../a.png x\n", "is not one inside"),
        (b"/etc/a.png\tx\n", "is not one inside"),
        (b"C:\\a.png\tx\n", "is not one inside"),
        (b"b\\..\\..\\a.png\tx\n", "is not one inside"),
        (b'../a.png, "x"\n', "is not one inside"),
        (b"\xff.png\tx\n", "line 1: is not utf-8"),
        (b"a.png\t\0\n", "line 1: holds a NUL"),
    ],
    ids=["empty", "only empty lines", "no picture", "parent", "parent inside", "absolute", "drive", "backslashes",
         "ICDAR parent", "encoding", "NUL"],
)  # fmt: skip
def test_a_broken_list_is_refused_with_its_line(tmp_path, content, reason):
    path = listed(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        list(ocr.words(path))
    assert str(path) in caught.value.message and caught.value.hint


def test_a_folder_stands_for_the_list_in_it(tmp_path):
    with pytest.raises(UserError, match=r"holds no gt\.txt or labels\.txt"):
        list(ocr.words(tmp_path))
    listed(tmp_path, "a.png\tlabels\n", "labels.txt")
    assert [word.label for word in ocr.words(tmp_path)] == ["labels"]
    listed(tmp_path, "a.png\tgt\n")
    assert [word.label for word in ocr.words(tmp_path)] == ["gt"]


def test_a_word_is_read_where_its_list_lies(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(b"a picture")
    listed(tmp_path, "img/a.png two words\n")
    [word] = ocr.words(tmp_path)
    for given_path in (tmp_path, tmp_path / "gt.txt"):
        path, label = ocr.read(given_path, pickle.loads(pickle.dumps(word)))
        assert (path.read_bytes(), label) == (b"a picture", "two words")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("b.png\tx", "line 2: no such picture: b.png"),
        ("folder.png\tx", "line 2: no such picture: folder.png"),
        ("loop.png\tx", "line 2: no such picture: loop.png"),
        (f"{'a' * 300}.png\tx", "line 2: a* cannot be read: File name too long"),
        ("a.png\t ", "line 2: the label of a.png is empty"),
        ('a.png, ""', "line 2: the label of a.png is empty"),
        ("a.png\tx\ty", r"line 2: the label of a.png holds the control character U\+0009"),
        ("a.png\tx\x1b[2J", r"line 2: the label of a.png holds the control character U\+001B"),
    ],
    ids=["absent", "a folder", "a loop of links", "a long name", "no label", "empty quotes", "tab", "escape"],
)
def test_a_word_that_cannot_be_learned_is_a_bad_row(tmp_path, line, reason):
    (tmp_path / "a.png").write_bytes(b"a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    path = listed(tmp_path, f"a.png\tx\n{line}\n")
    _, word = ocr.words(path)
    with pytest.raises(BadRow, match=reason) as caught:
        ocr.read(path, word)
    assert str(path) in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/a.png").symlink_to("../secret.png")
    path = listed(tmp_path / "list", "a.png\tx\n")
    [word] = ocr.words(path)
    with pytest.raises(UserError, match=r"line 1: a\.png is a link out of"):
        ocr.read(path, word)
