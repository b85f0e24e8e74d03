"""What in a store is likely to spoil what is learned from it: pure functions over a sample of its rows.

A doubt is a hint to look, not an error: its message says what was seen and where.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from distributed.analysis import alike, clues, views
from distributed.analysis.stores import balance
from distributed.analysis.views import Doubt, View, dense, listed
from distributed.data.store import Store
from tasks.columns import Pictures
from tasks.fields import (
    Boxes,
    ClassMap,
    Image,
    Labels,
    ObjectMasks,
    Picture,
    Text,
    Tokens,
)

FEW_TRAIN, FEW_HELD_OUT, FEW_OF_CLASS = 100, 30, 10  # rows; 30 rows know a share of 90 % to +- 5.5 %
IMBALANCE, MAJORITY = 10, 0.9  # largest : smallest class; share of the largest
MOST_CHARACTERS = 500  # of a text that are compared
TINY = 2  # pixels of a box's side


def look(store: Store) -> tuple[list[Doubt], dict[str, int]]:
    """Returns all doubts about a store, and how many rows of each split were looked at."""
    seen = {split: views.of_split(store, split) for split, count in store.counts().items() if count}
    found = [*_few(store), *_imbalanced(store), *_duplicates(store, seen), *_contradictions(seen)]
    for view in seen.values():
        found += [*_unseen(view), *_bad_boxes(view), *_bad_masks(view)]
    if "train" in seen:
        train = seen["train"]
        found += [*clues.constant(train), *clues.identifiers(train), *clues.leaks(train)]
    found += clues.suspicious(list(seen.values()))
    sources = {split: store.sources(split) for split in {doubt.split for doubt in found if doubt.rows}}
    named = [replace(one, sources=[sources[one.split][row] for row in one.rows]) for one in found]
    return named, {split: len(view) for split, view in seen.items()}


# ---- too few, too uneven


def _few(store: Store) -> Iterator[Doubt]:
    for split, rows in store.counts().items():
        if rows < (FEW_TRAIN if split == "train" else FEW_HELD_OUT):
            why = (
                "little can be learned from them"
                if split == "train"
                else f"figures from them are good to {_error(rows)}"
            )
            yield Doubt("few rows", split, f"only {rows} rows: {why}")
        for name, counts in balance(store, split).items():
            few = FEW_OF_CLASS if split == "train" else 1
            short = {label: count for label, count in counts.items() if count < few}
            if short:
                classes = listed(
                    [f"{label} ({count})" for label, count in sorted(short.items(), key=lambda one: one[1])]
                )
                least = f"under {few}" if few > 1 else "none"
                yield Doubt(
                    "few rows", split, f"'{name}': {len(short)} of {len(counts)} classes have {least}: {classes}"
                )


def _error(rows: int) -> str:
    """How far a share of one half may be off, in one of three cases."""
    return f"+- {50 / max(rows, 1) ** 0.5:.0f} %"


def _imbalanced(store: Store) -> Iterator[Doubt]:
    for name, counts in balance(store, "train").items() if "train" in store.counts() else ():
        there = {label: count for label, count in counts.items() if count}
        if len(there) < 2:
            continue
        small, large = min(there, key=there.__getitem__), max(there, key=there.__getitem__)
        share, ratio = there[large] / sum(there.values()), there[large] / there[small]
        if share >= MAJORITY or ratio >= IMBALANCE:
            yield Doubt(
                "imbalance", "train",
                f"'{name}': {large} ({there[large]:,}) is {ratio:.0f} times as frequent as {small} ({there[small]:,});"
                f" saying {large} always would be right in {share:.0%}",
            )  # fmt: skip


# ---- the same row twice


def _duplicates(store: Store, views: dict[str, View]) -> Iterator[Doubt]:
    for second, first in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if first in views and second in views:
            yield from _across(views[first], views[second])
    known = store.manifest.get("duplicates", {}).get("test_in_train", 0)
    sampled = any(len(view) < store.counts()[split] for split, view in views.items())
    if known and sampled:
        yield Doubt("duplicates", "test", f"of all rows of test {known:,} are also in train: figures flatter")


def _across(first: View, second: View) -> Iterator[Doubt]:
    twins = dict(zip(first.identities.tolist(), range(len(first)), strict=True))
    same = [(twins[one], place) for place, one in enumerate(second.identities.tolist()) if one in twins]
    near = _near(first, second, {place for _, place in same})
    for kind, pairs, how in (("duplicates", same, "also in"), ("near-duplicates", near, "nearly the same as a row of")):
        if pairs:
            where, place = pairs[0]
            yield second.doubt(
                kind,
                f"{len(pairs):,} of {len(second):,} rows are {how} {first.split}; the first: row"
                f" {second.numbers[place]} is row {first.numbers[where]} of {first.split}",
                [place for _, place in pairs],
            )


def _near(first: View, second: View, known: set[int]) -> list[tuple[int, int]]:
    """Returns the rows of `second` that are nearly a row of `first`, in all of their inputs, and that row."""
    pairs: np.ndarray | None = None
    for name in first.thumbnails:
        seen = first.thumbnails[name], second.thumbnails[name]
        if pairs is None:
            pairs = alike.close_pairs(*map(alike.difference_hashes, seen), most_bits=10)
        parts = [pairs[start : start + 4096] for start in range(0, len(pairs), 4096)]
        kept = [part[alike.alike_pictures(seen[0][part[:, 0]], seen[1][part[:, 1]])] for part in parts]
        pairs = np.concatenate([pairs[:0], *kept])
    for name in first.inputs(Text, Tokens):
        (hashes, counts), (others, other_counts) = (_windows(view, name) for view in (first, second))
        if pairs is None:
            pairs = alike.close_pairs(
                alike.similarity_hashes(hashes, counts), alike.similarity_hashes(others, other_counts), most_bits=12
            )
        one, two = (np.split(part, np.cumsum(many)[:-1]) for part, many in ((hashes, counts), (others, other_counts)))
        # Two short texts are soon alike.
        pairs = np.array(
            [
                (i, j) for i, j in pairs.tolist()
                if min(len(one[i]), len(two[j])) >= 20 and alike.shared(one[i], two[j]) >= 0.8
            ], np.int64,
        ).reshape(-1, 2)  # fmt: skip
    pairs = _near_numbers(first, second, pairs)
    found: dict[int, int] = {}
    for where, place in pairs.tolist():
        if place not in known:
            found.setdefault(place, where)
    return [(where, place) for place, where in sorted(found.items())]


def _near_numbers(first: View, second: View, pairs: np.ndarray | None) -> np.ndarray:
    """Keeps the pairs whose numbers are alike to a hundredth of their spread; finds them where there are none yet."""
    _, numbers = dense(first)
    _, others = dense(second)
    mean, std = numbers.mean(0, dtype=np.float64), numbers.std(0, dtype=np.float64)
    varied = std > 0
    scaled, also = ((part[:, varied] - mean[varied]) / std[varied] for part in (numbers, others))
    if pairs is not None:
        return pairs[(np.abs(scaled[pairs[:, 0]] - also[pairs[:, 1]]) <= 0.01).all(1)]
    # Rows of few numbers, or of numbers with few values, are alike by chance.
    if scaled.shape[1] < 4 or sum(len(np.unique(column)) > 20 for column in scaled.T[:64]) < 4:
        return np.empty((0, 2), np.int64)
    rounded, again = (np.round(part, 2) + 0.0 for part in (scaled, also))
    places = {row.tobytes(): place for place, row in enumerate(rounded)}
    found = [(places[row.tobytes()], place) for place, row in enumerate(again) if row.tobytes() in places]
    return np.array(found, np.int64).reshape(-1, 2)


def _windows(view: View, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of all runs of 5 characters of a text, or of 3 tokens."""
    if isinstance(view.fields[name], Tokens):
        return alike.windows(*view.columns[name], width=3)
    texts = [" ".join(text[: 2 * MOST_CHARACTERS].casefold().split())[:MOST_CHARACTERS] for text in view.columns[name]]
    letters = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    return alike.windows(letters, np.array([len(text) for text in texts], np.int64), width=5)


def _contradictions(views: dict[str, View]) -> Iterator[Doubt]:
    """The same input with different labels, within a split or across."""
    for name in next(iter(views.values())).labels() if views else ():
        labels: dict[bytes, set[int]] = {}
        for view in views.values():
            for one, label in zip(view.identities.tolist(), view.columns[name].tolist(), strict=True):
                labels.setdefault(one, set()).add(label)
        for view in views.values():
            identities = view.identities.tolist()
            at_odds = [place for place, one in enumerate(identities) if len(labels[one]) > 1]
            if at_odds:
                row, said = view.numbers[at_odds[0]], labels[identities[at_odds[0]]]
                names = view.names(name)
                yield view.doubt(
                    "contradictions",
                    f"{len(at_odds):,} rows have the inputs of another row but another '{name}'; the first: row {row}"
                    f" is {' and '.join(names[one] for one in sorted(said))}",
                    at_odds,
                )


# ---- pictures, boxes, masks


def _unseen(view: View) -> Iterator[Doubt]:
    """Pictures that cannot be read, and such as show nothing."""
    for name, broken in view.broken.items():
        if broken:
            place = min(broken)
            yield view.doubt(
                "unreadable",
                f"'{name}': {len(broken):,} pictures cannot be read; the first: row {view.numbers[place]}:"
                f" {broken[place]}",
                sorted(broken),
            )
    for name, thumbs in view.thumbnails.items():
        blank = [
            place
            for place in np.flatnonzero(thumbs.std((1, 2)) < 2 * alike.BLANK).tolist()
            if _is_blank(view, name, place)
        ]
        if blank:
            yield view.doubt("blank", f"'{name}': {len(blank):,} pictures are of one shade, they show nothing", blank)


def _is_blank(view: View, name: str, place: int) -> bool:
    """Looks at the whole picture: a small thing is hardly seen in a thumbnail."""
    column = view.columns[name]
    if isinstance(column, Pictures):
        one = replace(column, data=column.data[place : place + 1], sizes=column.sizes[place : place + 1])
        return float(one.decoded()[0].float().std((1, 2)).max()) < alike.BLANK
    return float(column[place].std((1, 2)).max()) < alike.BLANK


def _size_of(view: View) -> np.ndarray | None:
    """Returns height and width of the one input picture of every row, (N, 2); None where there is not just one."""
    names = view.inputs(Image, Picture)
    if len(names) != 1:
        return None
    one = view.fields[names[0]]
    if isinstance(one, Image):
        return np.broadcast_to(np.array(one.shape[1:]), (len(view), 2))
    return view.columns[names[0]].sizes


def _bad_boxes(view: View) -> Iterator[Doubt]:
    sizes = _size_of(view)
    for name in view.of_kind(Boxes):
        boxes, counts = view.columns[name]
        owners = np.arange(len(view)).repeat(counts)
        small = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) < TINY
        faults = [(small, f"are less than {TINY} pixels wide or high")]
        if sizes is not None:
            # A box that ends at width or height touches the border; some count pixels from 1.
            outside = (boxes[:, :2] < -1).any(1) | (boxes[:, 2:] > sizes[owners][:, ::-1] + 1).any(1)
            faults.append((outside, "reach outside their pictures"))
        for bad, what in faults:
            if bad.any():
                at = np.flatnonzero(bad)[0]
                box = " ".join(f"{side:g}" for side in boxes[at])
                yield view.doubt(
                    "boxes", f"'{name}': {bad.sum():,} of {len(boxes):,} boxes {what}; the first: row"
                    f" {view.numbers[owners[at]]}, {box}{_of_size(sizes, owners[at])}", np.unique(owners[bad]),
                )  # fmt: skip
    yield from _uneven(view)


def _of_size(sizes: np.ndarray | None, place: int) -> str:
    return "" if sizes is None else f" in a picture of {sizes[place, 1]} x {sizes[place, 0]}"


def _uneven(view: View) -> Iterator[Doubt]:
    """Rows whose objects have not one box, one label and one mask each."""
    counts = {name: view.columns[name][1] for name in view.of_kind(Boxes, Labels)}
    counts |= {name: np.array([len(m.counts) for m in view.columns[name].rows]) for name in view.of_kind(ObjectMasks)}
    kinds = [type(view.fields[name]) for name in counts]
    if len(set(kinds)) < len(kinds):
        return  # of several fields of a kind nobody knows which go together
    (first, expected), *others = counts.items() or [("", np.empty(0))]
    for name, count in others:
        bad = np.flatnonzero(count != expected)
        if len(bad):
            at = bad[0]
            yield view.doubt(
                "boxes", f"{len(bad):,} rows have not as many '{name}' as '{first}'; the first: row {view.numbers[at]},"
                f" {count[at]} and {expected[at]}", bad,
            )  # fmt: skip


def _bad_masks(view: View) -> Iterator[Doubt]:
    sizes = _size_of(view)
    if sizes is None:
        return
    masks = {name: view.columns[name].sizes for name in view.of_kind(ClassMap) if view.fields[name].target}
    for name in view.of_kind(ObjectMasks):
        rows = view.columns[name].rows
        # Without an object there is no mask whose size could differ.
        masks[name] = np.array(
            [(m.height, m.width) if m.counts else tuple(s) for m, s in zip(rows, sizes, strict=True)]
        )
    for name, others in masks.items():
        bad = np.flatnonzero((others != sizes).any(1))
        if len(bad):
            at = bad[0]
            yield view.doubt(
                "masks", f"'{name}': {len(bad):,} rows have masks of another size than the picture; the first: row"
                f" {view.numbers[at]}, {others[at, 1]} x {others[at, 0]}{_of_size(sizes, at)}", bad,
            )  # fmt: skip
