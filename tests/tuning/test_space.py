"""Search spaces: what is drawn lies inside, what cannot be is refused with its place."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.dimensions import Choice, IntRange, LogUniform, SpaceError, Uniform, points_of
from search_spaces.files import HERE, MAX_BYTES, for_task, load, read
from search_spaces.space import Space, applies, space_of

OURS = sorted(path.stem for path in HERE.glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- what there is


@pytest.mark.parametrize("name", OURS)
def test_every_space_of_ours_draws_points_of_its_own(name: str) -> None:
    space = load(name)
    for seed in range(50):
        assert space.holds(space.sample(random.Random(seed).random))
    assert all(space.holds(point) for point in space.grid(3))
    assert space_of(space.plain(), space.name) == space


@pytest.mark.parametrize(
    ("dimension", "quantile", "value"),
    [
        (LogUniform(1e-4, 1e-2), 0.5, 1e-3),
        (LogUniform(1e-4, 1e-2), 0.0, 1e-4),
        (Uniform(-1, 3), 0.25, 0.0),
        (Uniform(0, 1, 0.25), 0.99, 1.0),
        (Uniform(0, 0.3, 0.1), 0.8, 0.3),  # 0.3 / 0.1 is 2.9999999999999996
        (Uniform(-1e308, 1e308), 0.5, 0.0),  # the width of the range is no float
        (IntRange(1, 4), 0.0, 1),
        (IntRange(1, 4), 0.999, 4),
        (IntRange(10, 30, 10), 0.5, 20),
        (IntRange(1, 1000, log=True), 0.5, 22),
        (Choice((True, 1, "a")), 0.4, 1),
    ],
)
def test_quantiles_map_to_values(dimension: object, quantile: float, value: object) -> None:
    assert dimension.at(quantile) == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("dimension", "points", "values"),
    [
        (Choice(("adam", "sgd", "lion")), 2, ["adam", "sgd", "lion"]),
        (IntRange(1, 3), 3, [1, 2, 3]),
        (IntRange(0, 99), 2, [25, 75]),
        (Uniform(0, 1), 2, [0.25, 0.75]),
        (LogUniform(1e-4, 1e-1), 3, [0.000316228, 0.00316228, 0.0316228]),
        (IntRange(1, 6, log=True), 4, [1, 2, 5]),  # two of the four fall together
    ],
)
def test_a_grid_takes_the_middles_of_equal_shares(dimension: object, points: int, values: list[object]) -> None:
    assert points_of(dimension, points) == values


def test_conditions_decide_what_a_grid_holds() -> None:
    space = Space(
        {
            "optimizer.name": Choice(("adam", "sgd")),
            "optimizer.momentum": Choice((0.0, 0.5, 0.9), when={"optimizer.name": ("sgd",)}),
            "optimizer.nesterov": Choice((True, False), when={"optimizer.momentum": (0.5, 0.9)}),
        }
    )
    grid = list(space.grid(2))
    assert len(grid) == space.size() == 1 + 1 + 2 * 2
    assert grid[0] == {"optimizer.name": "adam"}
    assert {"optimizer.name": "sgd", "optimizer.momentum": 0.0} in grid
    assert not space.holds({"optimizer.name": "adam", "optimizer.momentum": 0.5})


def test_size_is_none_where_a_setting_is_continuous() -> None:
    assert load("default").size() is None
    assert load("folds").size() == 5


def test_a_grid_of_a_billion_points_is_refused_before_it_is_enumerated() -> None:
    space = Space({f"task.s{index}": IntRange(1, 1000) for index in range(3)})
    assert space.size() == 10**9
    with pytest.raises(SpaceError, match="1,000,000,000 points"):
        space.grid(1000)


def test_names_come_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "# a comment\ntask.width: {int: [8, 64]}\n\ntrain.epochs: 5\n")
    assert load(path).names() == [("train.epochs", f"{path}:4"), ("task.width", f"{path}:2")]
    assert load("folds").names()[1] == ("data.fold", "search_spaces/folds.yaml:4")


def test_a_space_is_found_by_path_then_by_name_then_by_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("digits").origins["task.width"].startswith("search_spaces/")
    (tmp_path / "digits").write_text("task.width: {int: [8, 64]}")
    assert list(load("digits").dimensions) == ["task.width"]
    assert for_task("housing").name == "housing"
    assert for_task("my_task.MyTask").name == for_task("../secret").name == "default"


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    text = "a.lr: {log_uniform: [1e-4, '1e-1']}\na.decay: {choice: [1e-4, '1e-4', no]}\n"
    space = load(written(tmp_path, text))
    assert space.dimensions["a.lr"] == LogUniform(1e-4, 1e-1)
    assert space.dimensions["a.decay"] == Choice((1e-4, "1e-4", False))


def test_describe_shows_ranges_and_conditions() -> None:
    assert load("housing").describe()[3] == ("optimizer.momentum", "0 .. 0.95", "optimizer.name = sgd")


# ---- what cannot be

BAD = {  # text -> (line, words of the message, words of the hint)
    "a.b: {uniform: [2, 1]}": (1, "lower bound 2 is not below the upper bound 1", ""),
    "a.b: {uniform: [1, 1]}": (1, "not below", "single value"),
    "x.y: 1\na.b: {log_uniform: [0, 1]}": (2, "cannot begin at 0", "above 0"),
    "a.b: {log_uniform: [-1, 1]}": (1, "cannot begin at -1", ""),
    "a.b: {uniform: [.nan, 1]}": (1, "not a finite number", ""),
    "a.b: {uniform: [0, .inf]}": (1, "not a finite number", ""),
    "a.b: {uniform: [0, 'nan']}": (1, "not a finite number", ""),
    "a.b: {uniform: [0, one]}": (1, "'one' is not a number", ""),
    "a.b: {uniform: [0, true]}": (1, "True is not a number", ""),
    "a.b: {uniform: [0]}": (1, "two bounds", "[low, high]"),
    "a.b: {uniform: 3}": (1, "two bounds", "[low, high]"),
    "a.b: {uniform: [0, 1], step: 2}": (1, "step 2 does not fit", ""),
    "a.b: {uniform: [0, 1], step: 0}": (1, "step 0 does not fit", ""),
    "a.b: {uniform: [0, 1], stpe: 0.1}": (1, "unknown option 'stpe'", "'step'"),
    "a.b: {int: [0.5, 3]}": (1, "0.5 is not a whole number", ""),
    "a.b: {int: [1, 1e300]}": (1, "whole number", ""),
    "a.b: {int: [0, 9], log: true}": (1, "cannot begin at 0", ""),
    "a.b: {int: [1, 9], log: true, step: 2}": (1, "no step", "drop"),
    "a.b: {int: [1, 9], log: 1}": (1, "log is true or false", ""),
    "a.b: {int: [1, 1" + "0" * 400 + "]}": (1, "too large", ""),
    "a.b: {int: [1, 1" + "0" * 5000 + "]}": (1, "cannot be read as int", ""),
    "a.b: {choice: []}": (1, "choice is empty", "at least one"),
    "a.b: {choice: 5}": (1, "list of values", "choice: [32, 64]"),
    "a.b: {choice: [1, 2, 1]}": (1, "names 1 twice", ""),
    "a.b: {choice: [.nan, 2]}": (1, "not a finite number", ""),
    "a.b: {choice: [{c: 1}]}": (1, "is not a number, a text", ""),
    "a.b: {loguniform: [1, 2]}": (1, "unknown kind of range 'loguniform'", "did you mean 'log_uniform'?"),
    "a.b: {when: {c.d: 1}}": (1, "unknown kind", "there are"),
    "a.b: {int: [1, 2], choice: [1]}": (1, "both int and choice", ""),
    "a.b: [32, 64]": (1, "no kind of range", "write {choice: [32, 64]}"),
    "a.b:": (1, "no value", ""),
    "a.b: {fixed: 1, when: {c.d: 1}}": (1, "unknown option 'when'", ""),
    "a.b: {choice: [1], when: {c.d: 1}}": (1, "'c.d', which is not in this search space", ""),
    "a.bc: 1\na.b: {choice: [1], when: {a.bd: 1}}": (2, "not in this search space", "did you mean 'a.bc'?"),
    "a.b: {choice: [1], when: {c.d: 1}}\nc.d: {choice: [1, 2]}": (1, "which is drawn later", "move 'c.d' above"),
    "a.b: {choice: [1], when: {a.b: 1}}": (1, "which is drawn later", ""),
    "a.b: {choice: [sgd]}\nc.d: {choice: [1], when: {a.b: sdg}}": (2, "being 'sdg', which it never is", "'sgd'"),
    "a.b: {uniform: [0, 1]}\nc.d: {choice: [1], when: {a.b: 0.5}}": (2, "no separate values", "a choice"),
    "a.b: 1\nc.d: {choice: [1], when: {a.b: true}}": (2, "being True, which it never is", ""),
    "a.b: 1\nc.d: {choice: [1], when: {}}": (2, "a condition names", "when:"),
    "a.b: 1\nc.d: {choice: [1], when: {a.b: []}}": (2, "names no value", ""),
    "lr: {uniform: [0, 1]}": (1, "neither a dotted setting", ""),
    "a.b: {choice: [1]}\n\N{CYRILLIC SMALL LETTER A}.c: 1": (2, r"\u0430.c", ""),
    "a b.c: 1": (1, "neither a dotted setting", ""),
    "summary: median\na.b: {choice: [1, 2]}": (None, "unknown summary 'median'", "mean"),
    "summary: mean\na.b: {uniform: [1, 2]}": (None, "can be counted", "choice and int"),
    "a.b: 1": (None, "varies nothing", ""),
    "": (None, "is empty", "default.yaml"),
    "- a.b": (1, "maps settings to ranges", ""),
    "a.b: {choice: [1]}\na.c: 1\na.b: {choice: [2]}": (3, "'a.b' is there twice", ""),
    "a.b: {int: [1, 2],\n  int: [1, 3]}": (2, "'int' is there twice", ""),
    "a.b:\n\tchoice: [1]": (2, "a tab", "spaces"),
    "a.b: [1, 2\nc: d": (2, "not YAML", ""),
    "a.b: 1\n--- \nb.c: 2": (2, "not YAML", ""),
    "a.b: !!python/object/apply:os.system [echo]": (1, "!!python/object/apply:os.system is not plain data", "quote"),
    "a.b: !mine 3": (1, "!mine is not plain data", ""),
    "a.b: 2026-01-01": (1, "!!timestamp is not plain data", "quote"),
    "a.b: !!int abc": (1, "cannot be read as int", ""),
    "a.b: !!bool maybe": (1, "cannot be read as bool", ""),
    "? [a, b]\n: 1": (1, "a key must be a name", ""),
    "1: 2": (1, "'1' is no name", ""),
    "<<: {a.b: 1}": (1, "!!merge is not plain data", ""),
    "a.b: *nobody": (1, "not YAML: found undefined alias", ""),
    "a.b: &a [*a]": (1, "aliases", ""),
    "a.b: " + "[" * 5000: (1, "nested too deeply", ""),
    "a.b: \x00": (1, "control character", ""),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_space_is_refused_with_its_place_and_a_hint(tmp_path: Path, text: str) -> None:
    line, message, hint = BAD[text]
    path = written(tmp_path, text)
    with pytest.raises(SpaceError) as caught:
        load(path)
    said = f"{caught.value.message} {caught.value.hint}"
    assert message in caught.value.message
    assert hint in said
    assert "\n" not in caught.value.message
    if line:
        assert f"{path}:{line}" in caught.value.message


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a.a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a.a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(SpaceError, match="aliases"):
        load(written(tmp_path, "\n".join(lines)))


def test_a_large_file_and_one_in_another_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="larger than 64 KiB"):
        load(written(tmp_path, "#" * (MAX_BYTES + 1)))
    (tmp_path / "latin.yaml").write_bytes("# fine\n# Größe\n".encode("latin-1"))
    with pytest.raises(SpaceError, match=r"latin.yaml:2: not UTF-8"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", ["digit", "../space", "nowhere/x.yaml", "x" * 300])
def test_an_unknown_space_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(SpaceError, match="there is no search space") as caught:
        load(name)
    assert "digits" in caught.value.hint


def test_more_settings_than_anyone_searches_are_refused() -> None:
    with pytest.raises(SpaceError, match="more than 200 settings"):
        Space({f"a.b{index}": Choice((1, 2)) for index in range(201)})


def test_conditions_that_entangle_everything_are_refused_in_time() -> None:
    deciding = {f"a.b{index}": Choice((1, 2)) for index in range(60)}
    last = {"a.last": Choice((1,), when=dict.fromkeys(deciding, (1,)))}
    with pytest.raises(SpaceError, match="depend on one another"):
        Space(deciding | last)


# ---- any space

numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))
plain_values = st.one_of(st.booleans(), st.integers(-5, 5), st.text("ab\u00e9 :", max_size=3), numbers)


@st.composite
def dimensions(draw: st.DrawFn) -> LogUniform | Uniform | IntRange | Choice:
    kind = draw(st.sampled_from(["log", "uniform", "stepped", "int", "log int", "choice"]))
    low, width = draw(numbers), draw(st.floats(1e-3, 1e6))
    if kind == "log":
        return LogUniform(abs(low) + 1e-9, abs(low) + width)
    if kind == "uniform":
        return Uniform(low, low + width)
    if kind == "stepped":
        return Uniform(low, low + width, width / draw(st.floats(1, 50)))
    whole, count = int(low), draw(st.integers(1, 10**6))
    if kind == "int":
        return IntRange(whole, whole + count, draw(st.integers(1, count)))
    if kind == "log int":
        return IntRange(abs(whole) + 1, abs(whole) + 1 + count, log=True)
    return Choice(
        tuple(draw(st.lists(plain_values, min_size=1, max_size=4, unique_by=lambda v: (str(type(v)), str(v)))))
    )


@given(st.data(), st.integers(0, 2**32))
def test_samples_of_any_space_lie_inside_and_obey_conditions(data: st.DataObject, seed: int) -> None:
    try:
        free = data.draw(st.lists(dimensions(), min_size=1, max_size=4))
    except SpaceError:  # a choice of 1 and 1.0
        return
    deciding = Choice(("x", "y", 1))
    held = data.draw(st.sampled_from(["x", "y", 1]))
    dependent = [type(one)(**{**one.__dict__, "when": {"a.deciding": (held,)}}) for one in free]
    space = Space(
        {f"a.free{index}": one for index, one in enumerate(free)}
        | {"a.deciding": deciding}
        | {f"a.dependent{index}": one for index, one in enumerate(dependent)}
    )
    point = space.sample(random.Random(seed).random)
    assert space.holds(point)
    assert list(point)[: len(free)] == [f"a.free{index}" for index in range(len(free))]
    assert any(name.startswith("a.dependent") for name in point) == (point["a.deciding"] == held)
    for name, dimension in space.dimensions.items():
        assert (name in point) == applies(dimension, point)
        assert name not in point or dimension.holds(point[name])
    assert space_of(yaml.safe_load(yaml.safe_dump(space.plain()))) == space
    for points in (1, 2):
        if space.grid_size(points) <= 500:
            grid = list(space.grid(points))
            assert len(grid) == space.grid_size(points)
            assert all(space.holds(chosen) for chosen in grid)


PIECES = [
    *"{}[]:,&*!|>-?'\"#%@`~\\ \n\t\r\0\x1f\x85\u2028\u0430",
    "a.b",
    "c.d",
    ": ",
    "- ",
    "\n  ",
    "1e-4",
    "<<",
    "null",
]
PIECES += [
    "choice",
    "int",
    "uniform",
    "log_uniform",
    "fixed",
    "when",
    "step",
    "log",
    "summary",
    "mean",
    ".nan",
    "0x",
    "1_",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_text_is_a_space_or_a_space_error(text: str) -> None:
    try:
        data, origins = read(text, "any.yaml")
        space_of(data, "any", origins)
    except SpaceError as error:
        assert error.message


CONDITIONAL = {
    "optimizer.lr": {"log_uniform": [0.01, 1]},
    "optimizer.name": {"choice": ["adam", "sgd", "rmsprop"]},
    "optimizer.momentum": {"uniform": [0, 0.9], "when": {"optimizer.name": ["sgd", "rmsprop"]}},
    "task.width": {"int": [1, 3], "when": {"optimizer.name": "sgd"}},
}


def test_corners_show_every_choice_and_both_ends_of_every_range() -> None:
    space = space_of(CONDITIONAL)
    corners = list(space.corners())
    assert all(space.holds(corner) for corner in corners)
    assert {corner["optimizer.name"] for corner in corners} == {"adam", "sgd", "rmsprop"}
    for name, ends in {"optimizer.lr": (0.01, 1), "optimizer.momentum": (0, 0.9), "task.width": (1, 3)}.items():
        assert set(ends) <= {corner[name] for corner in corners if name in corner}


def test_a_pinned_setting_no_longer_varies_and_takes_what_depends_on_it_along() -> None:
    space = space_of(CONDITIONAL)
    adam = space.pinned("optimizer.name", "adam")
    assert (dict(adam.fixed), list(adam.dimensions)) == ({"optimizer.name": "adam"}, ["optimizer.lr"])
    rmsprop = space.pinned("optimizer.name", "rmsprop")
    assert list(rmsprop.dimensions) == ["optimizer.lr", "optimizer.momentum"]
    assert rmsprop.dimensions["optimizer.momentum"].when == {"optimizer.name": ("rmsprop",)}
    still = space.pinned("optimizer.momentum", 0.5)
    assert {point.get("optimizer.momentum") for point in still.grid(2)} == {None, 0.5}
    assert "optimizer.momentum" in still.dimensions
