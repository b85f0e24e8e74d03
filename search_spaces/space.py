"""The search space as plain data: which settings vary, between what, and under which condition.

A `Space` maps dotted setting names to dimensions, in order; a dimension may depend on settings drawn before it.
Nothing here knows what the settings mean: whoever assembles the configuration checks `names()` against it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from re import fullmatch
from typing import Any, Literal, TypeGuard, get_args

Value = (
    None | bool | int | float | str | list[Any]
)  # what a setting may be set to: anything that JSON and YAML agree on
When = Mapping[str, tuple[Value, ...]]  # setting drawn before -> the values under which a dimension exists

SETTING = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)+"
MAX_SETTINGS = 200  # in one space
MAX_GRID = 1_000_000  # points that a grid may have
MAX_WHOLE = 2**53  # beyond it neighbouring integers are one float


class SpaceError(ValueError):
    """A search space that cannot be used: `message` says what and where, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both, so that the error survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def nearest(name: object, valid: Iterable[object]) -> str:
    """Returns "did you mean 'x'?" for the nearest of the valid names, else the list of them."""
    names = {str(candidate).lower(): str(candidate) for candidate in valid}
    near = get_close_matches(str(name).lower(), names, n=1)
    return f"did you mean '{names[near[0]]}'?" if near else f"there are: {', '.join(names.values())}"


def number(value: object) -> float:
    """Returns a bound as a finite float; YAML 1.1 reads `1e-4` as a string, so strings of numbers count."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SpaceError(f"{shown(value)} is not a number")
    try:
        result = float(value)
    except ValueError:
        raise SpaceError(f"{shown(value)} is not a number") from None
    except OverflowError:
        raise SpaceError("a bound is too large for a floating-point number") from None
    if not math.isfinite(result):
        raise SpaceError(f"{shown(value)} is not a finite number")
    return result


def whole(value: object) -> int:
    """Returns a bound of an integer range."""
    result = number(value)
    if result != int(result) or abs(result) > MAX_WHOLE:
        raise SpaceError(f"{shown(value)} is not a whole number up to 2^53")
    return int(result)


def same(one: object, other: object) -> bool:
    """Says whether two values of a setting are equal; True is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(value: object) -> str:
    """Returns a value as messages and tables show it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def conditions(when: Mapping[str, Any]) -> When:
    """Returns conditions in their one form: {setting: (values)}; a single value may stand alone."""
    if not isinstance(when, Mapping) or not when:
        raise SpaceError("a condition names a setting and its values", "write when: {optimizer.name: [sgd]}")
    found = {name: tuple(values) if isinstance(values, list | tuple) else (values,) for name, values in when.items()}
    for name, values in found.items():
        if not values:
            raise SpaceError(f"the condition on {shown(name)} names no value")
    return found


def plain(value: object) -> Value:
    """Returns a value of a setting after checking that it is plain, finite data."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise SpaceError(f"{shown(value)} is not a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SpaceError(f"{shown(value)} is not a number, a text, true, false, null or a list of these")


def check_range(low: float, high: float) -> None:
    if not low < high:
        raise SpaceError(
            f"the lower bound {shown(low)} is not below the upper bound {shown(high)}",
            "write the lower bound first; for a single value write the value itself",
        )


def set_fields(dimension: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(dimension, name, value)  # the dataclasses are frozen; this is their __post_init__


def check_positive(low: float) -> None:
    if low <= 0:
        raise SpaceError(f"a logarithmic range cannot begin at {shown(low)}", "begin it above 0, or drop the logarithm")


@dataclass(frozen=True)
class LogUniform:
    """Every factor between low and high is equally likely: learning rates, weight decay."""

    low: float
    high: float
    _: KW_ONLY
    when: When = field(default_factory=dict)

    levels = None  # number of separate values; None: continuous

    def __post_init__(self) -> None:
        set_fields(self, low=number(self.low), high=number(self.high))
        check_range(self.low, self.high)
        check_positive(self.low)

    def at(self, quantile: float) -> float:
        """Returns the value below which `quantile` (0..1) of the range lies."""
        value = math.exp(math.log(self.low) * (1 - quantile) + math.log(self.high) * quantile)
        return min(max(value, self.low), self.high)

    def holds(self, value: object) -> bool:
        return is_number(value) and self.low <= value <= self.high

    def plain(self) -> dict[str, Any]:
        return {"log_uniform": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{shown(self.low)} .. {shown(self.high)}, logarithmic"


@dataclass(frozen=True)
class Uniform:
    """Every value between low and high is equally likely; with a step only low, low + step, ..."""

    low: float
    high: float
    step: float | None = None
    _: KW_ONLY
    when: When = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_fields(self, low=number(self.low), high=number(self.high))
        check_range(self.low, self.high)
        if self.step is not None:
            set_fields(self, step=number(self.step))
            if not 0 < self.step <= self.high - self.low or (self.high - self.low) / self.step > MAX_WHOLE:
                raise SpaceError(
                    f"the step {shown(self.step)} does not fit into {shown(self.low)} .. {shown(self.high)}"
                )

    @property
    def levels(self) -> int | None:
        # 1e-9: 0.3 / 0.1 is 2.9999999999999996
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def nth(self, index: int) -> float:
        """Returns the value of a level, 0 being `low`."""
        assert self.step is not None
        return min(float(f"{self.low + index * self.step:.12g}"), self.high)

    def at(self, quantile: float) -> float:
        if self.levels is not None:
            return self.nth(min(int(quantile * self.levels), self.levels - 1))
        return min(max(self.low * (1 - quantile) + self.high * quantile, self.low), self.high)

    def holds(self, value: object) -> bool:
        if not is_number(value) or not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(
            value, self.nth(round((value - self.low) / self.step)), rel_tol=1e-9, abs_tol=1e-12
        )

    def plain(self) -> dict[str, Any]:
        return {"uniform": [self.low, self.high]} | ({} if self.step is None else {"step": self.step})

    def __str__(self) -> str:
        return f"{shown(self.low)} .. {shown(self.high)}" + (f", step {shown(self.step)}" if self.step else "")


@dataclass(frozen=True)
class IntRange:
    """The integers low, low + step, ... up to high; logarithmic ones favour the small."""

    low: int
    high: int
    step: int = 1
    log: bool = False
    _: KW_ONLY
    when: When = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_fields(self, low=whole(self.low), high=whole(self.high), step=whole(self.step))
        check_range(self.low, self.high)
        if not isinstance(self.log, bool):
            raise SpaceError(f"log is true or false, not {shown(self.log)}")
        if not 0 < self.step <= self.high - self.low:
            raise SpaceError(f"the step {self.step} does not fit into {self.low} .. {self.high}")
        if self.log:
            check_positive(self.low)
            if self.step != 1:
                raise SpaceError("a logarithmic range has no step", "drop step or log")

    @property
    def levels(self) -> int:
        return (self.high - self.low) // self.step + 1

    def nth(self, index: int) -> int:
        return self.low + index * self.step

    def at(self, quantile: float) -> int:
        if self.log:  # each integer owns half a step on both sides of it
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return min(max(round(math.exp(low * (1 - quantile) + high * quantile)), self.low), self.high)
        return self.nth(min(int(quantile * self.levels), self.levels - 1))

    def holds(self, value: object) -> bool:
        return (
            is_number(value)
            and value == int(value)
            and self.low <= value <= self.high
            and (int(value) - self.low) % self.step == 0
        )

    def plain(self) -> dict[str, Any]:
        options = {"step": self.step} if self.step != 1 else {"log": True} if self.log else {}
        return {"int": [self.low, self.high]} | options

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step != 1 else ""
        return f"{self.low} .. {self.high}, whole{step}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few values, in no order."""

    values: tuple[Value, ...]
    _: KW_ONLY
    when: When = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, list | tuple):
            raise SpaceError(f"a choice is a list of values, not {shown(self.values)}", "write choice: [32, 64]")
        set_fields(self, values=tuple(plain(value) for value in self.values))
        if not self.values:
            raise SpaceError("the choice is empty", "name at least one value")
        for index, value in enumerate(self.values):
            if any(same(value, earlier) for earlier in self.values[:index]):
                raise SpaceError(f"the choice names {shown(value)} twice")

    @property
    def levels(self) -> int:
        return len(self.values)

    def nth(self, index: int) -> Value:
        return self.values[index]

    def at(self, quantile: float) -> Value:
        return self.values[min(int(quantile * self.levels), self.levels - 1)]

    def holds(self, value: object) -> bool:
        return any(same(value, own) for own in self.values)

    def plain(self) -> dict[str, Any]:
        return {"choice": list(self.values)}

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


Dimension = LogUniform | Uniform | IntRange | Choice
KINDS: dict[str, tuple[type, tuple[str, ...]]] = {  # name in YAML -> class, further options
    "log_uniform": (LogUniform, ()),
    "uniform": (Uniform, ("step",)),
    "int": (IntRange, ("step", "log")),
    "choice": (Choice, ()),
}
Summary = Literal["mean"]


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points_of(dimension: Dimension, points: int) -> list[Value]:
    """Returns the values that a grid tries: all of a choice; of a range the middles of `points` equal shares."""
    if isinstance(dimension, Choice) or (dimension.levels is not None and dimension.levels <= points):
        return [dimension.nth(index) for index in range(dimension.levels)]
    values = [dimension.at((index + 0.5) / points) for index in range(points)]
    if dimension.levels is None:  # six digits are enough for a point that stands for its share
        values = [min(max(float(f"{value:.6g}"), dimension.low), dimension.high) for value in values]
    return list(dict.fromkeys(values))


@dataclass(frozen=True)
class Space:
    """Dotted setting -> dimension, in the order of drawing; `fixed` settings are the same in every trial."""

    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Value] = field(default_factory=dict)
    summary: Summary | None = None  # "mean": every point is run, mean and spread are reported, nothing wins
    name: str = ""  # for messages and tables
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)  # setting -> file:line

    def __post_init__(self) -> None:
        if self.summary not in (None, *get_args(Summary)):
            raise SpaceError(f"unknown summary {shown(self.summary)}", nearest(self.summary, get_args(Summary)))
        if len(self.dimensions) + len(self.fixed) > MAX_SETTINGS:
            raise SpaceError(f"more than {MAX_SETTINGS} settings in one search space")
        for name in [*self.fixed, *self.dimensions]:
            if not isinstance(name, str) or not fullmatch(SETTING, name):
                raise self._error(name, "not the name of a setting", "write its dotted name, such as 'optimizer.lr'")
        for name, dimension in self.dimensions.items():
            if name in self.fixed:
                raise self._error(name, "both fixed and varied")
            for deciding, values in dimension.when.items():
                self._check_condition(name, deciding, values)
        self._count(lambda dimension: dimension.levels or 1)
        if self.summary and self.size() is None:
            raise SpaceError("a summary needs a space whose points can be counted", "use choice and int only")

    def _check_condition(self, name: str, deciding: str, values: tuple[Value, ...]) -> None:
        earlier = [*self.fixed, *list(self.dimensions)[: list(self.dimensions).index(name)]]
        if deciding in self.dimensions and deciding not in earlier:
            raise self._error(name, f"depends on '{deciding}', which is drawn later", f"move '{deciding}' above it")
        if deciding not in earlier:
            hint = nearest(deciding, earlier) if earlier else ""
            raise self._error(name, f"depends on {shown(deciding)}, which is not in this search space", hint)
        possible: Dimension = self.dimensions.get(deciding) or Choice((self.fixed[deciding],))
        if possible.levels is None:
            hint = "let the condition name a choice or an integer"
            raise self._error(name, f"depends on '{deciding}', which has no separate values", hint)
        for value in values:
            if not possible.holds(value):
                hint = nearest(value, possible.values) if isinstance(possible, Choice) else f"it is {possible}"
                raise self._error(name, f"depends on '{deciding}' being {shown(value)}, which it never is", hint)

    def _error(self, name: object, problem: str, hint: str = "") -> SpaceError:
        origin = self.origins.get(str(name))
        return SpaceError(f"{shown(name)}{f' ({origin})' if origin else ''}: {problem}", hint)

    def names(self) -> list[tuple[str, str]]:
        """Returns every setting that the space names, with its origin (file:line)."""
        return [(name, self.origins.get(name, self.name)) for name in [*self.fixed, *self.dimensions]]

    def draw(self, pick: Callable[[str, Dimension], Value]) -> dict[str, Value]:
        """Returns one point: the fixed settings, and of the others, in order, those whose condition holds."""
        drawn = dict(self.fixed)
        for name, dimension in self.dimensions.items():
            if applies(dimension, drawn):
                drawn[name] = pick(name, dimension)
        return drawn

    def sample(self, uniform: Callable[[], float]) -> dict[str, Value]:
        """Returns a random point; `uniform` gives numbers in [0, 1), one a dimension, drawn or not."""
        quantiles = {name: uniform() for name in self.dimensions}
        return self.draw(lambda name, dimension: dimension.at(quantiles[name]))

    def holds(self, settings: Mapping[str, Value]) -> bool:
        """Says whether the settings are a point of the space, conditions included; other settings do not matter."""
        drawn = {**self.fixed, **settings}
        return all(same(drawn[name], value) for name, value in self.fixed.items()) and all(
            name in drawn and dimension.holds(drawn[name]) if applies(dimension, drawn) else name not in drawn
            for name, dimension in self.dimensions.items()
        )

    def size(self) -> int | None:
        """Returns the number of points, or None where a dimension is continuous."""
        if any(dimension.levels is None for dimension in self.dimensions.values()):
            return None
        return self._count(lambda dimension: dimension.levels or 1)

    def grid_size(self, points: int) -> int:
        """Returns how many points `grid(points)` has."""
        return self._count(lambda dimension: len(points_of(dimension, points)), points)

    def grid(self, points: int) -> Iterator[dict[str, Value]]:
        """Yields every point, the last setting varying fastest; `points` of every range that has more."""
        size = self.grid_size(points)
        if size > MAX_GRID:
            raise SpaceError(
                f"a grid over {self.name or 'this search space'} has {size:,} points, more than {MAX_GRID:,}",
                "vary fewer settings, or search by random or tpe",
            )
        return self._grid(dict(self.fixed), list(self.dimensions.items()), points)

    def _grid(
        self, drawn: dict[str, Value], rest: list[tuple[str, Dimension]], points: int
    ) -> Iterator[dict[str, Value]]:
        if not rest:
            yield drawn
        elif not applies(rest[0][1], drawn):
            yield from self._grid(drawn, rest[1:], points)
        else:
            name, dimension = rest[0]
            for value in points_of(dimension, points):
                yield from self._grid({**drawn, name: value}, rest[1:], points)

    def _count(self, levels: Callable[[Dimension], int], points: int | None = None) -> int:
        """Counts points without visiting them: only values that a later condition names are told apart."""
        states: Counter[tuple[tuple[str, int], ...]] = Counter({(): 1})  # (setting, index into its named values) ...
        named: dict[str, list[Value]] = {}
        dimensions = list(self.dimensions.items())
        for index, (name, dimension) in enumerate(dimensions):
            later = [other.when for _, other in dimensions[index + 1 :]]
            tried = dimension if points is None else Choice(tuple(points_of(dimension, points)))
            named[name] = []
            for value in (value for when in later for value in when.get(name, ())):
                if tried.holds(value) and not any(same(value, known) for known in named[name]):
                    named[name].append(value)
            others = levels(dimension) - len(named[name])
            after: Counter[tuple[tuple[str, int], ...]] = Counter()
            for state, count in states.items():
                kept = tuple(known for known in state if any(known[0] in when for when in later))
                if not applies(dimension, {**self.fixed, **{known: named[known][at] for known, at in state}}):
                    after[kept] += count
                    continue
                for at in range(len(named[name])):
                    after[(*kept, (name, at))] += count
                if others:
                    after[kept] += count * others
            if len(after) > 10_000:
                raise SpaceError("too many settings depend on one another", "split the search space")
            states = after
        return sum(states.values())

    def describe(self) -> list[tuple[str, str, str]]:
        """Returns (setting, its values, its condition) a row, to be shown."""
        return [(name, str(value), "") for name, value in self.fixed.items()] + [
            (name, str(dimension), "; ".join(f"{key} = {' | '.join(map(str, v))}" for key, v in dimension.when.items()))
            for name, dimension in self.dimensions.items()
        ]

    def plain(self) -> dict[str, Any]:
        """Returns the space as the data of its YAML file; `space_of` reads it back."""
        data: dict[str, Any] = {"summary": self.summary} if self.summary else {}
        data |= {name: {"fixed": value} for name, value in self.fixed.items()}
        for name, dimension in self.dimensions.items():
            when = {deciding: list(values) for deciding, values in dimension.when.items()}
            data[name] = dimension.plain() | ({"when": when} if when else {})
        return data


def applies(dimension: Dimension, drawn: Mapping[str, Value]) -> bool:
    """Says whether a dimension exists beside the settings drawn so far."""
    return all(
        name in drawn and any(same(drawn[name], value) for value in values) for name, values in dimension.when.items()
    )


def space_of(data: Mapping[str, Any], name: str = "", origins: Mapping[str, str] | None = None) -> Space:
    """Returns the space that plain data describe, as a YAML file or a journal holds them."""
    origins = origins or {}
    dimensions, fixed, summary = {}, {}, None
    for key, value in data.items():
        place = f" ({origins[key]})" if key in origins else ""
        try:
            if key == "summary":
                summary = value
            elif not isinstance(key, str) or not fullmatch(SETTING, key):
                raise SpaceError("neither a dotted setting such as 'optimizer.lr' nor the option 'summary'")
            else:
                parsed = dimension_of(value)
                if isinstance(parsed, Fixed):
                    fixed[key] = parsed.value
                else:
                    dimensions[key] = parsed
        except SpaceError as error:
            raise SpaceError(f"{shown(key)}{place}: {error.message}", error.hint) from None
    if not dimensions:
        raise SpaceError(f"the search space {name} varies nothing", "name a setting: optimizer.lr: {choice: [0.1, 1]}")
    return Space(dimensions, fixed, summary, name, origins)


@dataclass(frozen=True)
class Fixed:
    """A setting that is the same in every trial."""

    value: Value


def dimension_of(data: object) -> Dimension | Fixed:
    """Returns the dimension that one entry of a YAML file describes: {kind: ..., option: ..., when: {...}}."""
    if isinstance(data, bool | int | float | str):
        return Fixed(plain(data))
    if not isinstance(data, Mapping):
        example = f"write {{choice: {data}}}" if isinstance(data, list) and data else "write {choice: [32, 64]}"
        raise SpaceError("no kind of range" if data is not None else "no value", example)
    kinds = [key for key in data if key in (*KINDS, "fixed")]
    if not kinds:
        unknown = next((key for key in data if key != "when"), "")
        raise SpaceError(f"unknown kind of range {shown(unknown)}", nearest(unknown, [*KINDS, "fixed"]))
    if len(kinds) > 1:
        raise SpaceError(f"both {kinds[0]} and {kinds[1]}", "give it one of them")
    (kind,) = kinds
    options = {key: value for key, value in data.items() if key != kind}
    known = () if kind == "fixed" else (*KINDS[kind][1], "when")
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "a fixed value stands alone"
            raise SpaceError(f"unknown option {shown(option)} of {kind}", hint)
    if kind == "fixed":
        return Fixed(plain(data[kind]))
    if "when" in options:
        options["when"] = conditions(options["when"])
    if kind == "choice":
        return Choice(data[kind], **options)
    bounds = data[kind]
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise SpaceError(f"{kind} takes two bounds, not {shown(bounds)}", f"write {kind}: [low, high]")
    return KINDS[kind][0](*bounds, **options)
