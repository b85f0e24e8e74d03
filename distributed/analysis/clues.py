"""What columns say about labels: nothing, too much, or something else than the label that a row was given."""

import itertools
import re
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from distributed.analysis import alike
from distributed.analysis.views import Doubt, View, dense, listed
from tasks.fields import (
    Label,
    Number,
    Picture,
    Text,
    Tokens,
)

MOST_LEAKS = 5_000  # rows that rules are tried on
MOST_COMPONENTS = 512  # of a vector that are tried as rules
MOST_NEIGHBOURS = 5_000  # rows that are held against one another
MAJORITY = 0.9  # share of the largest class above which rules are not tried: always saying it is too good a rule
LEAK, LEAK_ROWS = 0.995, 40  # share of rows that one rule gets right; rows without which no rule is believed
K = 10  # neighbours
TRUSTED = 0.85  # mean share of each class that neighbours get right, without which their word is not taken


def constant(view: View) -> Iterator[Doubt]:
    if len(view) < 2:
        return
    names, numbers = dense(view)
    same = [name for name, is_same in zip(names, (numbers == numbers[0]).all(0), strict=True) if is_same]
    targets = [name for name in view.of_kind(Number, Label) if view.fields[name].target]
    same += [f"'{name}'" for name in targets if (view.columns[name] == view.columns[name][0]).all()]
    same += [f"'{name}'" for name in view.inputs(Text) if len(set(view.columns[name])) == 1]
    if same:
        yield view.doubt("constant", f"{listed(same)}: the same in all rows, nothing can be learned from it")


def identifiers(view: View) -> Iterator[Doubt]:
    names, numbers = dense(view)
    if len(view) < LEAK_ROWS:
        return
    steps = np.diff(numbers, axis=0)
    one_way, whole = (steps > 0).all(0) | (steps < 0).all(0), (numbers == np.floor(numbers)).all(0)
    for place in np.flatnonzero(one_way & whole):
        way = "grows" if steps[0, place] > 0 else "falls"
        yield view.doubt(
            "identifier", f"{names[place]} only ever {way} from row to row: is it a row number, or a date?"
        )


def leaks(view: View) -> Iterator[Doubt]:
    """One number, one word, or one property of a file that gives the label away."""
    for name in view.labels():
        rows = np.linspace(0, len(view) - 1, min(len(view), MOST_LEAKS)).astype(np.int64)
        labels = view.columns[name][rows]
        shares = np.bincount(labels) / len(labels)
        if len(labels) < LEAK_ROWS or np.count_nonzero(shares) < 2 or shares.max() >= MAJORITY:
            continue
        for group in _clues(view, rows):
            rules = [(rule_accuracy(values, labels), words) for words, values in group]
            best, told = max(rules, key=itemgetter(0), default=(0, ""))
            if best >= LEAK:
                yield view.doubt(
                    "leak", f"{told} alone tells '{name}' in {best:.1%} of the rows: will new rows have it?"
                )
        for best, told in _words(view, rows, labels):
            if best >= LEAK:
                yield view.doubt("leak", f"{told} alone tells '{name}' in {best:.1%} of the rows: is it the answer?")


def _clues(view: View, rows: np.ndarray) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Yields groups of simple features, with their names, of which the most telling one is spoken of."""
    names, numbers = dense(view)
    yield [(names[i], numbers[rows, i]) for i in range(min(len(names), MOST_COMPONENTS))]
    for name in view.inputs(Text):
        texts = view.columns[name]
        yield [(f"the length of '{name}'", np.array([len(texts[row]) for row in rows]))]
    for name in view.inputs(Tokens):
        yield [(f"the length of '{name}'", view.columns[name][1][rows])]
    for name, thumbs in view.thumbnails.items():
        seen = np.nan_to_num(thumbs[rows])
        group = [(f"the mean shade of '{name}'", seen.mean((1, 2)))]
        if isinstance(view.fields[name], Picture):
            data, sizes = view.columns[name].data, view.columns[name].sizes
            group += [(f"the {side} of '{name}'", sizes[rows, i]) for i, side in enumerate(("height", "width"))]
            group += [(f"the file size of '{name}'", np.array([data[row].nbytes for row in rows]))]
        height, width = alike.THUMBNAIL
        group += [
            (f"the shade of '{name}' at {x / width:.0%} of its width and {y / height:.0%} of its height", seen[:, y, x])
            for y in range(height) for x in range(width)
        ]  # fmt: skip
        yield group


def rule_accuracy(values: np.ndarray, labels: np.ndarray) -> float:
    """Returns which share of labels (N,) the best simple rule of one number (N,) gets right.

    The rule cuts the number's range once between every two classes that are neighbours by their medians; a number of
    few values says the most frequent label of each.
    """
    kinds, which = np.unique(values, return_inverse=True)
    classes, labels = np.unique(labels, return_inverse=True)
    count = len(classes)
    if len(kinds) <= 2 * count:
        table = np.bincount(which * count + labels, minlength=len(kinds) * count).reshape(-1, count)
        return float(table.max(1).sum() / len(values))
    order = np.argsort([np.median(values[labels == one]) for one in range(count)], kind="stable")
    cuts = [_cut(values[labels == low], values[labels == high]) for low, high in itertools.pairwise(order)]
    said = order[np.searchsorted(np.maximum.accumulate(cuts), values, side="right")]
    return float((said == labels).mean())


def _cut(low: np.ndarray, high: np.ndarray) -> float:
    """Returns the number below which most of `low` lie, and from which on most of `high`."""
    values = np.concatenate([low, high])
    order = np.argsort(values, kind="stable")
    values, gain = values[order], np.where(order < len(low), 1, -1).cumsum()
    gain[:-1][values[1:] == values[:-1]] = -len(values)  # no cut parts equal numbers
    best = int(gain.argmax())
    return float(values[best + 1]) if best + 1 < len(values) else float("inf")


# A word, or one sign of a language that does not part its words.
WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")


def _words(view: View, rows: np.ndarray, labels: np.ndarray) -> Iterator[tuple[float, str]]:
    """Yields how well the presence of the most telling word of each text or sequence tells the label."""
    for name in view.inputs(Text, Tokens):
        if isinstance(view.fields[name], Text):
            said = [set(WORD.findall(view.columns[name][row].casefold())) for row in rows]
        else:
            tokens, lengths = view.columns[name]
            parts = np.split(tokens, np.cumsum(lengths)[:-1])
            said = [set(parts[row].tolist()) for row in rows]
        counts: dict[Any, np.ndarray] = {}
        whole = np.bincount(labels)
        for words, label in zip(said, labels.tolist(), strict=True):
            for word in words:
                counts.setdefault(word, np.zeros(len(whole), np.int64))[label] += 1
        right = {word: (with_it.max() + (whole - with_it).max()) / len(rows) for word, with_it in counts.items()}
        if right:
            best = max(right, key=right.__getitem__)
            vocabulary = view.facts.get(name, {}).get("vocabulary") or {}
            called = next((word for word, number in vocabulary.items() if number == best), best)
            yield float(right[best]), f"'{called}' in '{name}'"


# ---- labels that their neighbours do not have


def suspicious(views: list[View]) -> Iterator[Doubt]:
    """Rows all of whose nearest neighbours have one other label, where neighbours are mostly right."""
    for name in views[0].labels() if views else ():
        share = min(1, MOST_NEIGHBOURS / sum(map(len, views)))
        chosen = [np.linspace(0, len(view) - 1, max(1, int(share * len(view)))).astype(np.int64) for view in views]
        features = _to_one_scale([dense(view)[1][rows] for view, rows in zip(views, chosen, strict=True)])
        for picture in views[0].thumbnails:
            small = [view.thumbnails[picture][rows] for view, rows in zip(views, chosen, strict=True)]
            features = np.concatenate(
                [features, np.nan_to_num(np.concatenate(small)).reshape(len(features), -1) / 64], 1
            )
        labels = np.concatenate([view.columns[name][rows] for view, rows in zip(views, chosen, strict=True)])
        if len(labels) < LEAK_ROWS or not features.shape[1]:
            continue
        around = labels[_neighbours(features)]  # (N, K)
        votes = np.stack([(around == one).sum(1) for one in range(labels.max() + 1)], axis=1)
        large = [one for one in range(votes.shape[1]) if (labels == one).sum() > K]
        if not large or np.mean([(votes[labels == one].argmax(1) == one).mean() for one in large]) < TRUSTED:
            continue
        odd = (around == around[:, :1]).all(1) & (around[:, 0] != labels)
        ends = np.cumsum([len(rows) for rows in chosen])[:-1]
        for view, rows, bad, said in zip(views, chosen, np.split(odd, ends), np.split(around[:, 0], ends), strict=True):
            if bad.any():
                at, names = np.flatnonzero(bad)[0], view.names(name)
                row, given = rows[at], view.columns[name][rows[at]]
                yield view.doubt(
                    "suspicious labels",
                    f"{bad.sum():,} of {len(bad):,} rows have a '{name}' that none of their {K} neighbours has;"
                    f" the first: row {view.numbers[row]} is {names[given]}, its neighbours are all {names[said[at]]}",
                    rows[bad],
                )


def _to_one_scale(parts: list[np.ndarray]) -> np.ndarray:
    numbers = np.concatenate(parts)
    std = numbers.std(0)
    return (numbers - numbers.mean(0)) / np.where(std > 0, std, 1)


def _neighbours(features: np.ndarray) -> np.ndarray:
    """Returns the K nearest other rows of each: (N, K)."""
    squares = (features**2).sum(1)
    found = []
    for start in range(0, len(features), alike.STEP):
        part = features[start : start + alike.STEP]
        distances = squares[None] - 2 * part @ features.T
        distances[np.arange(len(part)), np.arange(start, start + len(part))] = np.inf  # itself
        found.append(np.argpartition(distances, K, axis=1)[:, :K])
    return np.concatenate(found)
