"""What one setting of a search space may be: a range, a logarithmic range, whole numbers, a choice, a fixed value."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from typing import Any, TypeGuard

Value = (
    None | bool | int | float | str | list[Any]
)  # what a setting may be set to: anything that JSON and YAML agree on
When = Mapping[str, tuple[Value, ...]]  # setting drawn before -> the values under which a dimension exists

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


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points_of(dimension: Dimension, points: int) -> list[Value]:
    """Returns the values that a grid tries: all of a choice; of a range the middles of `points` equal shares."""
    levels = dimension.levels
    if (
        not isinstance(dimension, LogUniform)
        and levels is not None
        and (isinstance(dimension, Choice) or levels <= points)
    ):
        return [dimension.nth(index) for index in range(levels)]
    values = [dimension.at((index + 0.5) / points) for index in range(points)]
    if dimension.levels is None:  # six digits are enough for a point that stands for its share
        values = [min(max(float(f"{value:.6g}"), dimension.low), dimension.high) for value in values]
    return list(dict.fromkeys(values))


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
