"""Tables: what is normalised, what is refused with its line, and which cells are numbers."""

import codecs
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import BadRow, UserError
from tasks.formats import table


def written(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXPECTED = [(2, {"label": "1", "text": "好，很好"}), (3, {"label": "0", "text": "=cmd()"})]
PLAIN = 'label,text\n1,"好，很好"\n0,=cmd()\n'


@pytest.mark.parametrize(
    ("content", "name", "options"),
    [
        (PLAIN.encode(), "a.csv", {}),
        (PLAIN.encode("utf-8-sig"), "a.csv", {"encoding": "gb18030"}),
        (PLAIN.encode("utf-16"), "a.csv", {}),
        (b"\xfe\xff" + PLAIN.encode("utf-16-be"), "a.csv", {}),
        (PLAIN.encode("gb18030"), "a.csv", {"encoding": "gb18030"}),
        (PLAIN.replace("\n", "\r\n").encode(), "a.csv", {}),
        (PLAIN.replace("\n", "\r\n", 1).encode(), "a.csv", {}),
        (PLAIN.replace("\n", "\r").encode(), "a.csv", {}),
        (PLAIN.rstrip("\n").encode(), "a.csv", {}),
        (PLAIN.replace(",", "\t").encode(), "a.tsv", {}),
        (PLAIN.replace(",", ";").encode(), "a.csv", {"delimiter": ";"}),
        (PLAIN.replace(",", "\t").encode(), "a.csv", {"delimiter": "\\t"}),
        (gzip.compress(PLAIN.encode()), "a.csv.gz", {}),
        (gzip.compress(PLAIN.replace(",", "\t").encode()), "a.tsv.gz", {}),
    ],
    ids=["plain", "utf-8 mark", "utf-16 le", "utf-16 be", "gb18030", "crlf", "mixed line ends", "cr",
         "no last line end", "tsv", "semicolon",
         "tab named", "gzip", "tsv gzip"],
)  # fmt: skip
def test_one_table_is_read_however_it_was_saved(tmp_path, content, name, options):
    assert list(table.records(written(tmp_path, content, name), ["label"], **options)) == EXPECTED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"a,b\n", "holds no rows"),
        (b"a,b\n1,\xff2\n", r"line 2: is not utf-8: byte 0xff at column 3"),
        (b"\xef\xbb\xbfa,b\n1,\xff2\n", r"line 2: is not utf-8: byte 0xff at column 3"),
        (b"a,b\n1,2\n1,\x002\n", "line 3: holds a NUL"),
        ("a,b\n1,2\n".encode("utf-16-le"), "line 1: holds a NUL"),
        (codecs.BOM_UTF16_LE + "a,b\n1,\ud800\n".encode("utf-16-le", "surrogatepass"), "is not utf-16-le"),
        ("a,b\n1,2\n".encode("utf-32"), "line 1: holds a NUL"),
        (b"a,b\n1,2\n3\n", "line 3: expected 2 cells, got 1"),
        (b"a,b\n1,2,3\n", "line 2: expected 2 cells, got 3"),
        (b'a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        (b'a,b\n1,"2"3\n', "line 2: ',' expected after '\"'"),
        (b"a,b\n1," + b"x" * 131_073, "line 2: field larger"),
        (b"a,a\n1,2\n", "two columns are called 'a'"),
        (b"a,c\n1,2\n", "no column 'b'; the first line names a, c"),
        (b"0.5,2\n1,2\n", "first line holds numbers"),
    ],
    ids=["empty", "no rows", "encoding", "encoding after a mark", "NUL", "utf-16 without a mark",
         "half a surrogate pair", "utf-32", "too few cells", "too many cells",
         "unclosed quote", "text after a quote", "huge cell", "doubled name", "absent column", "no names"],
)  # fmt: skip
def test_a_broken_table_is_refused_with_its_line(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        list(table.records(path, ["a", "b"]))
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "content",
    [gzip.compress(PLAIN.encode())[:-9], PLAIN.encode(), b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff"],
    ids=["truncated", "not packed", "broken data"],
)
def test_a_broken_gzip_file_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="cannot be read"):
        table.text(written(tmp_path, content, "a.csv.gz"))


def test_a_gzip_bomb_is_left_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="unpacks to over 1000 bytes"):
        table.text(written(tmp_path, gzip.compress(bytes(10_000_000)), "a.csv.gz"))


def test_what_is_no_file_or_no_encoding_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        table.text(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a folder"):
        table.text(tmp_path)
    with pytest.raises(UserError, match="unknown encoding 'utf-9'"):
        table.text(written(tmp_path, "a"), "utf-9")
    with pytest.raises(UserError, match="has 2 characters"):
        list(table.rows(written(tmp_path, "a"), delimiter=";;"))


def test_a_quote_may_be_an_ordinary_character(tmp_path):
    path = written(tmp_path, 'label\ttext\n1\t"so\n0\ta "b" c\n', "a.tsv")
    assert [cells["text"] for _, cells in table.records(path, [], quotes=False)] == ['"so', 'a "b" c']


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_as_it_was_written(value):
    assert table.number(f" {value!r} ", "here") == value


@pytest.mark.parametrize("cell", ["", " ", "NA", "n/a", "NaN", "null", "None", "?", "inf", "-Infinity", "1e999"])
def test_a_missing_or_infinite_number_is_a_bad_row(cell):
    with pytest.raises(BadRow, match="t.csv, line 3"):
        table.number(cell, "t.csv, line 3")


@pytest.mark.parametrize(
    ("cell", "hint"), [("1,5", "decimal point"), ("=1+1", "numbers"), ("north", "numbers"), ("1_000", "numbers")]
)
def test_text_in_a_column_of_numbers_is_refused(cell, hint):
    with pytest.raises(UserError, match="t.csv, line 3, column 2: expected a number") as caught:
        table.numbers(["1", cell], "t.csv, line 3")
    assert hint in caught.value.hint
