"""What a field accepts, what it refuses, and what the training rows teach about it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from tasks.errors import BadRow, UserError, did_you_mean
from tasks.fields import Boxes, Field, Image, Label, Labels, Number, Text, Tokens, Vector, check_parsed, check_row


@pytest.mark.parametrize(
    ("field", "value", "dtype", "shape"),
    [
        (Image(1, 2, 3), [[[0, 1, 2], [3, 4, 255]]], np.uint8, (1, 2, 3)),
        (Image(1, 1, 2), np.array([[[7.0, 8.0]]]), np.uint8, (1, 1, 2)),
        (Vector(2), (1, 2.5), np.float32, (2,)),
        (Number(), True, np.float32, ()),
        (Label(classes=3), 2, np.int64, ()),
        (Label(names=("no", "yes")), "yes", np.int64, ()),
        (Tokens(), [], np.int32, (0,)),
        (Tokens(), [5, 6], np.int32, (2,)),
        (Labels(), [], np.int64, (0,)),
        (Boxes(), [], np.float32, (0, 4)),
        (Boxes(), [[0, 0, 2, 3]], np.float32, (1, 4)),
    ],
)
def test_a_good_value_gets_the_declared_type_and_shape(field, value, dtype, shape):
    checked = field.check(value, field.facts([value]))
    assert (np.asarray(checked).dtype, np.shape(checked)) == (np.dtype(dtype), shape)
    np.testing.assert_array_equal(
        checked, np.reshape(1 if value == "yes" else value, shape) if len(shape) < 3 else value
    )


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (Image(1, 2, 2), np.zeros((1, 2, 3)), "shape"),
        (Image(1, 1, 1), [[[256]]], "0..255"),
        (Image(1, 1, 1), [[[-1]]], "0..255"),
        (Vector(2), [1.0], "shape"),
        (Vector(2), [1.0, float("nan")], "NaN"),
        (Vector(1), [float("inf")], "infinity"),
        (Vector(1), [1e39], "float32 cannot: 1e"),
        (Number(), 10**39, "expected numbers"),
        (Vector(2), [[1.0], [1.0, 2.0]], "no array"),
        (Vector(1), ["1"], "numbers"),
        (Number(), [1.0], "shape"),
        (Label(names=("cat", "dog")), "dgo", "did you mean 'dog'"),
        (Label(classes=2), 2, "outside 0..1"),
        (Label(classes=2), -1, "outside 0..1"),
        (Text(), 3, "expected text"),
        (Tokens(), ["word"], "numbers"),
        (Tokens(), [2**31], "expected values"),
        (Boxes(), [[2, 0, 2, 3]], "no area"),
        (Tokens(), [[1], [2, 3]], "no array"),
        (Labels(), [[1], [2, 3]], "no array"),
        (Boxes(), [[0, 0, 1]], "shape"),
        (Boxes(), [[0, 0, 1, 1], [0]], "no array"),
        (Boxes(), 5, "shape"),
        (Text(), "\ud800", "UTF-8"),
    ],
)
def test_a_bad_value_is_refused_with_its_reason(field, value, reason):
    facts = field.facts([0]) if isinstance(field, Label) else {}
    with pytest.raises(BadRow, match=reason):
        field.check(value, facts)


@pytest.mark.parametrize("field", [Vector(3), Image(3, 1, 1), Number()], ids=["vector", "image", "number"])
@given(data=st.data())
def test_moments_are_those_of_the_whole_column(field, data):
    shape = {Vector: (3,), Image: (3, 1, 1), Number: ()}[type(field)]
    values = data.draw(st.lists(numpy_st.arrays(np.uint8, shape), min_size=1, max_size=8))
    facts = field.facts(values)
    column = np.stack(values).astype(np.float64).reshape(len(values), *shape[:1]) / (255 if len(shape) == 3 else 1)
    np.testing.assert_allclose(facts["mean"], column.mean(0), atol=1e-12)
    spread = column.std(0)
    np.testing.assert_allclose(facts["std"], np.where(spread > 1e-12, spread, 1), atol=1e-9)


def test_a_constant_column_keeps_its_scale():
    assert Number().facts([5.0, 5.0]) == {"mean": 5.0, "std": 1.0}


@pytest.mark.parametrize(
    ("field", "values", "classes", "counts"),
    [
        (Label(), [2, 0, 2], ["0", "1", "2"], [1, 0, 2]),
        (Label(), ["dog", "cat", "dog"], ["cat", "dog"], [1, 2]),
        (Label(names=("no", "yes")), [1, 1], ["no", "yes"], [0, 2]),
        (Label(names=("no", "yes")), ["yes", "no"], ["no", "yes"], [1, 1]),
        (Label(classes=3), [0], ["0", "1", "2"], [1, 0, 0]),
        (Label(), [], [], []),
    ],
)
def test_classes_are_declared_or_learned(field, values, classes, counts):
    assert field.facts(values) == {"classes": classes, "counts": counts}


FIELDS = {"x": Vector(2), "y": Number(target=True)}


@pytest.mark.parametrize("value", [3, "cat", np.int64(0), 2.0])
def test_a_class_that_is_not_declared_is_right_until_the_classes_are_known(value):
    Label().check_parsed(value)


@pytest.mark.parametrize(
    ("label", "value", "reason"),
    [
        (Label(), None, "numbers"),
        (Label(), -1, "below 0"),
        (Label(), 1.5, "whole numbers"),
        (Label(classes=2), 2, "outside 0..1"),
        (Label(names=("cat", "dog")), "dgo", "did you mean 'dog'"),
    ],
)
def test_a_class_that_no_facts_could_make_right_is_refused_at_once(label, value, reason):
    with pytest.raises(BadRow, match=reason):
        label.check_parsed(value)


def test_only_a_whole_parsed_row_must_have_every_column():
    check_parsed({"y": 1, "more": None}, FIELDS, whole=False)
    with pytest.raises(BadRow, match="'x' is missing"):
        check_parsed({"y": 1}, FIELDS, whole=True)
    with pytest.raises(BadRow, match="'y' is missing"):
        check_parsed({"x": [1, 2], "y": None}, FIELDS, whole=False)


def test_a_row_needs_its_target_except_when_predicting():
    with pytest.raises(BadRow, match="'y' is missing"):
        check_row({"x": [1, 2]}, FIELDS, {})
    assert list(check_row({"x": [1, 2]}, FIELDS, {}, targets=False)) == ["x"]


def test_a_row_always_needs_its_inputs():
    with pytest.raises(BadRow, match="'x' is missing"):
        check_row({"x": None, "y": 1}, FIELDS, {}, targets=False)


def test_a_bad_value_is_reported_with_its_field():
    with pytest.raises(BadRow, match="'x': expected shape"):
        check_row({"x": [1], "y": 1}, FIELDS, {})


def test_an_undeclared_entry_is_the_author_s_error():
    with pytest.raises(UserError, match="'z'"):
        check_row({"x": [1, 2], "y": 1, "z": 0}, FIELDS, {})


def test_a_field_without_a_check_says_so():
    with pytest.raises(TypeError, match="Field does not say"):
        Field().check(1, {})


@pytest.mark.parametrize(
    ("name", "valid", "answer"),
    [
        ("optimiser", ["optimizer", "data"], "did you mean 'optimizer'?"),
        ("LR", ["lr", "momentum"], "did you mean 'lr'?"),
        ("mom", ["lr", "momentum"], "did you mean 'momentum'?"),
        ("zzz", ["b", "a"], "there are: a, b"),
        ("zzz", [], ""),
    ],
)
def test_the_nearest_name_is_suggested(name, valid, answer):
    assert did_you_mean(name, valid) == answer
