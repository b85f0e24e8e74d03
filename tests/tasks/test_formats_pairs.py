"""Pairs of sentences: the layouts in which corpora come, and what makes a line or a whole corpus doubtful."""

import gzip
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import BadRow, UserError
from tasks.formats import pairs
from tasks.formats.pairs import Pair

MANYTHINGS = (
    "Go.\tVa !\tCC-BY 2.0 (France) Attribution: tatoeba.org #2877272 (CM) & #1158250 (Wittydev)\n"
    "Hi.\tSalut\u202f!\tCC-BY 2.0 (France) Attribution: tatoeba.org #538123 (CM) & #509819 (Aiji)\n"
)
EXPECTED = [Pair(1, "Go.", "Va !"), Pair(2, "Hi.", "Salut\u202f!")]


def written(folder, content, name="fra.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "name", "options"),
    [
        (MANYTHINGS, "fra.txt", {}),
        (MANYTHINGS.rstrip("\n"), "fra.txt", {}),
        (MANYTHINGS.replace("\n", "\r\n"), "fra.txt", {}),
        (MANYTHINGS.replace("\n", "\r\n", 1), "fra.txt", {}),
        (MANYTHINGS.replace("\n", "\r"), "fra.txt", {}),
        (MANYTHINGS + "\n \n", "fra.txt", {}),
        (MANYTHINGS.encode("utf-8-sig"), "fra.txt", {}),
        (MANYTHINGS.encode("utf-16"), "fra.txt", {}),
        (MANYTHINGS.encode("gb18030"), "fra.txt", {"encoding": "gb18030"}),
        (gzip.compress(MANYTHINGS.encode()), "fra.txt.gz", {}),
        ("1276\tGo.\t1158250\tVa !\n538123\tHi.\t509819\tSalut\u202f!\n", "pairs.tsv", {"columns": (2, 4)}),
        ("Va !\tGo.\nSalut\u202f!\tHi.\n", "eng.txt", {"columns": (2, 1)}),
    ],
    ids=["manythings", "no last line end", "crlf", "mixed line ends", "cr", "empty lines", "utf-8 mark", "utf-16",
         "gb18030", "gzip", "tatoeba", "the other direction"],
)  # fmt: skip
def test_one_corpus_is_read_however_it_was_saved(tmp_path, content, name, options):
    assert list(pairs.tabbed(written(tmp_path, content, name), **options)) == EXPECTED


def test_a_quote_is_a_character_like_any_other(tmp_path):
    path = written(tmp_path, '"Go!" he said.\t« Va ! » dit-il.\n"\t"\n')
    assert [pair[1:] for pair in pairs.tabbed(path)] == [('"Go!" he said.', "« Va ! » dit-il."), ('"', '"')]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no pairs"),
        (b"\n\n", "holds no pairs"),
        (b"Go.\tVa !\n\nHi. Salut !\n", "line 3: expected at least 2 columns, got 1"),
        (b"Go.\tVa \xff\n", "line 1: is not utf-8: byte 0xff"),
        (b"Go.\tVa !\nHi.\tSal\0ut\n", "line 2: holds a NUL"),
    ],
    ids=["empty", "only empty lines", "no tab", "encoding", "NUL"],
)
def test_a_broken_corpus_is_refused_with_its_line(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        list(pairs.tabbed(path))
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("columns", [(1, 1), (0, 1), (2, -1)])
def test_columns_that_are_no_pair_are_refused(tmp_path, columns):
    with pytest.raises(UserError, match="are no pair"):
        list(pairs.tabbed(written(tmp_path, MANYTHINGS), columns=columns))


def test_two_files_are_aligned_by_their_lines(tmp_path):
    source, target = written(tmp_path, "Go.\n\nHi.\n", "train.en"), written(tmp_path, "Va !\r\n\r\nSalut !", "train.fr")
    assert list(pairs.aligned(source, target)) == [(1, "Go.", "Va !"), (2, "", ""), (3, "Hi.", "Salut !")]


@given(st.lists(st.tuples(*[st.text(st.characters(exclude_characters="\r\n\0\ufeff", codec="utf-8"))] * 2), min_size=1))
def test_no_character_inside_a_sentence_shifts_the_lines(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("corpus")
    for side in (0, 1):
        written(folder, "".join(f"{pair[side]}\n" for pair in sentences), f"side{side}")
    found = pairs.aligned(folder / "side0", folder / "side1")
    assert [pair[1:] for pair in found] == [(source.strip(), target.strip()) for source, target in sentences]


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [("a\nb\n", "a\n", "has 2 lines, .*has 1"), ("a\n", "a\n\n", "has 1 lines, .*has 2"), ("", "", "holds no lines")],
)
def test_files_that_cannot_be_aligned_are_refused(tmp_path, source, target, reason):
    with pytest.raises(UserError, match=reason) as caught:
        list(pairs.aligned(written(tmp_path, source, "a.en"), written(tmp_path, target, "a.fr")))
    assert str(tmp_path / "a.en") in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("\tVa !", "line 2: the source is empty"),
        ("Go.\t ", "line 2: the target is empty"),
        ("Go.\tVa\x07 !", r"line 2: the target holds the control character U\+0007"),
        ("Go\x85.\tVa !", r"line 2: the source holds the control character U\+0085"),
        ("Go.\rHi.\tVa !", r"line 2: the source holds the control character U\+000D"),
    ],
    ids=["no source", "no target", "bell", "next line", "carriage return inside"],
)
def test_a_line_that_cannot_be_learned_is_a_bad_row(tmp_path, line, reason):
    path = written(tmp_path, f"Hi.\tSalut !\n{line}\n")
    good, bad = pairs.tabbed(path)
    assert pairs.checked(good, path) == good
    with pytest.raises(BadRow, match=reason) as caught:
        pairs.checked(pickle.loads(pickle.dumps(bad)), path)
    assert str(path) in str(caught.value)
