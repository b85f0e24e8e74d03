"""Rows that cannot be read: set aside, counted, refused above a threshold, and nothing is learned from them."""

import pytest

from distributed.data import convert
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.errors import UserError
from tasks.task import BadRow, Boxes, Example, Image, Label, Number, Task, Text, Tokens, Vector
from tests.counted import Counted


class Broken(Task):
    fields = {"vector": Vector(1), "label": Label(classes=2)}

    def examples(self, source):
        return range(60)

    def row(self, reference):
        if reference in (3, 30):
            raise BadRow("is torn")
        return {"vector": [reference], "label": reference % 2}


def test_broken_rows_are_counted_and_refused_above_the_threshold(tmp_path, caplog):
    with pytest.raises(UserError, match=r"2 of 60 rows are broken; the first: row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(), tmp_path)
    assert not list(tmp_path.glob("x/*[!k]")), "nothing may be published"
    path = convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path)
    assert Store(path, dict(Broken.fields)).manifest["skipped"]["rows"] == 2
    assert "2 of 60 rows set aside" in caplog.text


def test_what_was_set_aside_before_is_held_to_what_is_allowed_now(tmp_path):
    convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path)
    with pytest.raises(UserError, match="2 of 60 rows are broken"):
        convert.prepare(Broken(), "x", Data(max_bad=0), tmp_path)
    with pytest.raises(UserError, match=r"row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(max_bad=0.1), tmp_path, on_error="stop")


def test_the_first_broken_row_stops_where_that_is_asked(tmp_path):
    with pytest.raises(UserError, match=r"row 4 \(3\): is torn"):
        convert.prepare(Broken(), "x", Data(max_bad=1), tmp_path, on_error="stop")


VALUES = [
    (Image(1, 2, 2), [[1, 2]], "expected shape"),
    (Image(1, 1, 1), [[[300]]], "expected values of 0..255"),
    (Image(1, 1, 1), [[[0.7]]], "expected whole numbers, got 0.7"),
    (Label(classes=2), 0.5, "expected whole numbers"),
    (Vector(2), [1, float("nan")], "NaN"),
    (Vector(2), "ab", "expected numbers"),
    (Number(), None, "is missing"),
    (Label(classes=2), 2, "outside 0..1"),
    (Label(classes=2), -1, "outside 0..1"),
    (Label(names=("cat", "dog")), "dgo", "did you mean 'dog'"),
    (Boxes(), [[5, 5, 1, 9]], "has no area"),
    (Tokens(), [[1, 2]], "expected shape"),
    (Tokens(), [[1], [1, 2]], "no array of numbers"),
    (Text(), 5, "expected text"),
    (Text(), "\ud800", "no text that UTF-8 can hold"),
    (Vector(2), [1, 2, 3], "expected shape"),
    (Vector(1), [1e39], "holds a number that float32 cannot"),
    (Image(1, 1, 1), None, "is missing"),
    (Label(), None, "is missing"),
    (Label(), float("nan"), "NaN"),
    (Label(), -1, "below 0"),
    (Label(), [1], "expected shape"),
    (Label(classes=2), "2", "unknown class '2'"),
    (Boxes(), 7, "expected shape"),
]


@pytest.mark.parametrize(("field", "value", "words"), VALUES, ids=lambda v: str(v)[:30])
def test_a_value_that_its_field_cannot_hold_is_a_bad_row(tmp_path, field, value, words):
    class One(Task):
        fields = {"x": field}

        def examples(self, source):
            return [{"x": value}] * 30

    with pytest.raises(UserError) as raised:
        convert.prepare(One(), "x", Data(), tmp_path)
    assert words in raised.value.message
    assert "'x'" in raised.value.message


GOOD = [
    (Vector(1), [1.0], {"mean": [1.0], "std": [1.0]}),
    (Number(), 1.0, {"mean": 1.0, "std": 1.0}),
    (Image(1, 1, 1), [[[255]]], {"mean": [1.0], "std": [1.0]}),
    (Label(), "cat", {"classes": ["cat"], "counts": 1}),
    (Label(), 0, {"classes": ["0"], "counts": 1}),
]


@pytest.mark.parametrize("own_encode", [False, True])
@pytest.mark.parametrize("bad", [None, float("nan"), [[1.0, 2.0], [3.0]], {}, "missing"], ids=str)
@pytest.mark.parametrize(("field", "good", "facts"), GOOD, ids=lambda v: str(v)[:30])
def test_nothing_is_learned_from_a_row_that_is_set_aside(tmp_path, field, good, facts, bad, own_encode):
    class Torn(Task):
        fields = {"x": field, "n": Number()}

        def examples(self, source):
            names = ("train", "validation", "test")
            yield from (Example({"x": good, "n": 0, **more}, names[i % 3]) for i in range(60))
            row = {"x": bad, "n": 9, **more}  # its n is whole, and must not be learned from either
            if bad == "missing":
                row = {"x": good, "n": None, **more} if own_encode else {"n": 9}
            yield Example(row, "train")

    more = {"more": {}} if own_encode else {}
    if own_encode:
        Torn.encode = lambda self, row, facts: {"x": row["x"], "n": row["n"]}
    with pytest.raises(UserError, match="row 61: '[xn]'"):
        convert.prepare(Torn(), "x", Data(max_bad=0), tmp_path)
    store = Store(convert.prepare(Torn(), "x", Data(max_bad=0.1), tmp_path), dict(Torn.fields))
    learned = dict(store.facts)
    assert store.manifest["skipped"]["rows"] == 1
    assert learned["n"] == {"mean": 0.0, "std": 1.0}
    assert learned["x"] == {**facts, **({"counts": [20]} if isinstance(field, Label) else {})}


@pytest.mark.parametrize("method", ["row", "facts", "encode"])
def test_an_error_of_a_tasks_own_says_in_which_method_it_arose(tmp_path, method):
    def fail(self, *values):
        return {}["x"]

    failing = type("Failing", (Counted,), {method: fail})
    with pytest.raises(KeyError) as raised:
        convert.prepare(failing(), "x", Data(), tmp_path)
    assert raised.value.__notes__[0].startswith(f"in Failing.{method}")


def test_facts_that_are_no_json_are_said_to_be_the_tasks(tmp_path):
    class Odd(Counted):
        def facts(self, rows):
            return {"vector": {"mean": float("nan")}}

    with pytest.raises(ValueError, match="JSON") as raised:
        convert.prepare(Odd(), "x", Data(), tmp_path)
    assert raised.value.__notes__ == ["in Odd.facts"]


def test_a_row_that_encode_refuses_is_named_by_its_number_in_the_source(tmp_path):
    class Refusing(Counted):
        def encode(self, row, facts):
            if row["vector"] == [41]:
                raise BadRow("is torn")
            return row

    with pytest.raises(UserError, match="row 42: is torn"):
        convert.prepare(Refusing(), "x", Data(), tmp_path)


def test_a_source_without_rows_is_refused(tmp_path):
    class Empty(Counted):
        def examples(self, source):
            return []

    with pytest.raises(UserError, match="holds no rows"):
        convert.prepare(Empty(), "x", Data(), tmp_path)


def test_a_column_that_is_not_declared_is_refused_with_the_nearest_name(tmp_path):
    class Stray(Counted):
        def encode(self, row, facts):
            return {"vectr": row["vector"], "label": 0}

    with pytest.raises(UserError, match="holds 'vectr', which the task does not declare"):
        convert.prepare(Stray(), "x", Data(), tmp_path)
