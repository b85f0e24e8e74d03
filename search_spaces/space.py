"""The search space as plain data: which settings vary, between what, and under which condition.

A `Space` maps dotted setting names to dimensions, in order; a dimension may depend on settings drawn before it.
Nothing here knows what the settings mean: whoever assembles the configuration checks `names()` against it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from re import fullmatch
from typing import Any, Literal, get_args

from search_spaces.dimensions import (
    Choice,
    Dimension,
    Fixed,
    SpaceError,
    Value,
    dimension_of,
    nearest,
    points_of,
    same,
    shown,
)

SETTING = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)+"
MAX_SETTINGS = 200  # in one space
MAX_GRID = 1_000_000  # points that a grid may have
Summary = Literal["mean"]


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

    def corners(self) -> Iterator[dict[str, Value]]:
        """Yields points that together show each value of each choice and both ends of each range."""
        for name, dimension in self.dimensions.items():
            ends = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in ends:
                wanted = {**self._needs(name), name: value}
                yield self.draw(lambda one, its, wanted=wanted: wanted[one] if one in wanted else its.at(0.0))

    def _needs(self, name: str) -> dict[str, Value]:
        """What other varied settings must be for a dimension to exist."""
        needs: dict[str, Value] = {}
        for deciding, values in self.dimensions[name].when.items():
            if deciding in self.dimensions:
                needs |= {**self._needs(deciding), deciding: values[0]}
        return needs

    def pinned(self, name: str, value: Value) -> "Space":
        """Returns the space in which a setting that it names has this one value; its condition stays."""
        dimensions, fixed = dict(self.dimensions), dict(self.fixed)
        if name in fixed or not dimensions[name].when:
            dimensions.pop(name, None)
            fixed[name] = value
        else:
            dimensions[name] = Choice((value,), when=dimensions[name].when)
        while gone := [one for one, its in dimensions.items() if not _possible(its, dimensions, fixed)]:
            dimensions = {one: its for one, its in dimensions.items() if one not in gone}
        dimensions = {one: _narrowed(its, dimensions, fixed) for one, its in dimensions.items()}
        return Space(dimensions, fixed, self.summary, self.name, self.origins)

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


def _values(
    dimension: Dimension, deciding: str, dimensions: Mapping[str, Dimension], fixed: Mapping[str, Value]
) -> tuple[Value, ...]:
    """The values of a deciding setting under which a dimension exists, of those that it can still have."""
    there = dimensions.get(deciding) or (Choice((fixed[deciding],)) if deciding in fixed else None)
    return tuple(value for value in dimension.when[deciding] if there is not None and there.holds(value))


def _possible(dimension: Dimension, dimensions: Mapping[str, Dimension], fixed: Mapping[str, Value]) -> bool:
    return all(_values(dimension, deciding, dimensions, fixed) for deciding in dimension.when)


def _narrowed(dimension: Dimension, dimensions: Mapping[str, Dimension], fixed: Mapping[str, Value]) -> Dimension:
    return replace(dimension, when={name: _values(dimension, name, dimensions, fixed) for name in dimension.when})


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
