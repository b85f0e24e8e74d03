"""What in a store is likely to spoil what is learned from it: pure functions over a sample of its rows.

A doubt is a hint to look, not an error: every message says what was seen and where. At most 20,000 rows of a split are
looked at, 5,000 where pictures must be decoded; `looked_at` says how many.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distributed.analysis import alike
from distributed.analysis.stores import balance
from distributed.data.split import digest
from distributed.data.store import Store
from tasks.columns import Pictures
from tasks.fields import (
    Boxes,
    ClassMap,
    Facts,
    Field,
    Image,
    Label,
    Labels,
    Number,
    ObjectMasks,
    Picture,
    Text,
    Tokens,
    Vector,
)

MOST_ROWS, MOST_PICTURES = 20_000, 5_000  # of a split
MOST_BYTES = 256 << 20  # of a split's rows of one shape
MOST_NEIGHBOURS = 5_000  # rows that are held against one another
MOST_LEAKS = 5_000  # rows that rules are tried on
MOST_WORDS = 2_000  # most frequent ones that are tried as rules
MOST_COMPONENTS = 512  # of a vector that are tried as rules
MOST_CHARACTERS = 500  # of a text that are compared
LISTED = 20  # rows of one doubt

FEW_TRAIN, FEW_HELD_OUT, FEW_OF_CLASS = 100, 30, 10  # rows; 30 rows know a share of 90 % to +- 5.5 %
IMBALANCE, MAJORITY = 10, 0.9  # largest : smallest class; share of the largest
LEAK, LEAK_ROWS = 0.995, 40  # share of rows that one rule gets right; rows without which no rule is believed
TINY = 2  # pixels of a box's side
K = 10  # neighbours
TRUSTED = 0.85  # mean share of each class that neighbours get right, without which their word is not taken


@dataclass(frozen=True)
class Doubt:
    """Something to look at, the rows where it was seen (at most 20 of them), and where those came from."""

    kind: str
    split: str
    message: str
    rows: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """The rows of one split that are looked at."""

    split: str
    fields: dict[str, Field]
    facts: Facts
    numbers: np.ndarray  # (N,) of the rows in their split
    columns: dict[str, Any]  # as `Rows.take` gives them
    identities: np.ndarray  # (N,) V16: of the inputs' content
    thumbnails: dict[str, np.ndarray]  # of each input picture, (N, 16, 18) float32; NaN where it cannot be read
    broken: dict[str, dict[int, str]]  # of each column of pictures: why which of these rows cannot be read

    def __len__(self) -> int:
        return len(self.numbers)

    def inputs(self, *kinds: type[Field]) -> list[str]:
        return [name for name, one in self.fields.items() if isinstance(one, kinds) and not one.target]

    def of_kind(self, *kinds: type[Field]) -> list[str]:
        return [name for name, one in self.fields.items() if isinstance(one, kinds)]

    def labels(self) -> list[str]:
        return [name for name in self.of_kind(Label) if self.fields[name].target]

    def names(self, label: str) -> list[str]:
        """The names of a field's classes; their numbers where it has none."""
        return self.facts.get(label, {}).get("classes") or [str(n) for n in range(int(self.columns[label].max()) + 1)]

    def doubt(self, kind: str, message: str, positions: Any = ()) -> Doubt:
        return Doubt(kind, self.split, message, self.numbers[list(positions)[:LISTED]].tolist())


def look(store: Store) -> tuple[list[Doubt], dict[str, int]]:
    """Returns all doubts about a store, and how many rows of each split were looked at."""
    views = {split: _view(store, split) for split, count in store.counts().items() if count}
    found = [*_few(store), *_imbalanced(store), *_duplicates(store, views), *_contradictions(views)]
    for view in views.values():
        found += [*_unseen(view), *_bad_boxes(view), *_bad_masks(view)]
    if "train" in views:
        found += [*_constant(views["train"]), *_identifiers(views["train"]), *_leaks(views["train"])]
    found += _suspicious(list(views.values()))
    sources = {split: store.sources(split) for split in {doubt.split for doubt in found if doubt.rows}}
    named = [replace(one, sources=[sources[one.split][row] for row in one.rows]) for one in found]
    return named, {split: len(view) for split, view in views.items()}


# ---- what is looked at


def _view(store: Store, split: str) -> View:
    fields, total = store.fields, store.counts()[split]
    size = sum(4 * int(np.prod(_shape(one))) for one in fields.values())
    most = min(MOST_ROWS, max(1, MOST_BYTES // max(size, 1)))
    if any(isinstance(one, Picture) for one in fields.values()):
        most = min(most, MOST_PICTURES)
    rows = store.rows(split, limit=most)
    columns = rows.take(np.arange(len(rows)))
    thumbs, broken = {}, {}
    for name, one in fields.items():
        if isinstance(one, Image) and not one.target:
            thumbs[name] = alike.thumbnails(columns[name])
        elif isinstance(one, Picture):
            pictures = Pictures(*columns[name], one.channels, nearest=isinstance(one, ClassMap))
            thumbs[name], broken[name] = alike.thumbnails_of_any_size(pictures)
    numbers = np.arange(total) if rows.subset is None else rows.subset
    seen = {name: thumb for name, thumb in thumbs.items() if not fields[name].target}
    return View(split, fields, store.facts, numbers, columns, _identities(fields, columns, len(rows)), seen, broken)


def _shape(one: Field) -> tuple[int, ...]:
    return one.shape if isinstance(one, Image) else (one.length,) if isinstance(one, Vector) else (1,)


def _identities(fields: dict[str, Field], columns: dict[str, Any], count: int) -> np.ndarray:
    """Returns what is the same for rows of the same inputs; nothing is, where there are no inputs."""
    inputs = {name: one for name, one in fields.items() if not one.target}
    parts: dict[str, Any] = {"row": range(count)} if not inputs else {}
    for name, one in inputs.items():
        column = columns[name]
        if isinstance(one, (Tokens, Labels, Boxes)):
            column = np.split(column[0], np.cumsum(column[1])[:-1])
        parts[name] = column[0] if isinstance(one, Picture) else column
    rows = [digest({name: part[row] for name, part in parts.items()}) for row in range(count)]
    return np.frombuffer(b"".join(rows), "V16")


def _dense(view: View) -> tuple[list[str], np.ndarray]:
    """Returns the names and values of all numbers that each row has as inputs: (N, numbers) float32."""
    names, parts = [], [np.empty((len(view), 0), np.float32)]
    for name in view.inputs(Number):
        names.append(f"'{name}'")
        parts.append(view.columns[name][:, None])
    for name in view.inputs(Vector):
        values = view.columns[name]
        called = view.facts.get(name, {}).get("names") or [str(place) for place in range(values.shape[1])]
        names += [f"'{name}', component {one}" for one in called]
        parts.append(values)
    return names, np.concatenate(parts, axis=1)


# ---- too few, too uneven


def _few(store: Store) -> Iterator[Doubt]:
    for split, rows in store.counts().items():
        least = FEW_TRAIN if split == "train" else FEW_HELD_OUT
        if rows < least:
            why = "little can be learned from them" if split == "train" else f"figures from them are good to {_error(rows)}"
            yield Doubt("few rows", split, f"only {rows} rows: {why}")
        for name, counts in balance(store, split).items():
            few = FEW_OF_CLASS if split == "train" else 1
            short = {label: count for label, count in counts.items() if count < few}
            # Every class is short in a set that is short as a whole, which has been said.
            if short and (rows >= least or not all(short.values())):
                listed = _listed([f"{label} ({count})" for label, count in sorted(short.items(), key=lambda o: o[1])])
                least_words = f"under {few} rows" if few > 1 else "no row"
                yield Doubt("few rows", split, f"'{name}': {len(short)} of {len(counts)} classes have {least_words}: {listed}")


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


def _listed(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


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
    _, numbers = _dense(first)
    _, others = _dense(second)
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
            at_odds = [place for place, one in enumerate(view.identities.tolist()) if len(labels[one]) > 1]
            if at_odds:
                row, said = view.numbers[at_odds[0]], labels[view.identities.tolist()[at_odds[0]]]
                names = view.names(name)
                yield view.doubt(
                    "contradictions",
                    f"{len(at_odds):,} rows have the inputs of another row but another '{name}'; the first: row {row} is"
                    f" {' and '.join(names[one] for one in sorted(said))}",
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
                f"'{name}': {len(broken):,} pictures cannot be read; the first: row {view.numbers[place]}: {broken[place]}",
                sorted(broken),
            )
    for name, thumbs in view.thumbnails.items():
        blank = [place for place in np.flatnonzero(thumbs.std((1, 2)) < 2 * alike.BLANK) if _is_blank(view, name, place)]
        if blank:
            yield view.doubt("blank", f"'{name}': {len(blank):,} pictures are of one shade, they show nothing", blank)


def _is_blank(view: View, name: str, place: int) -> bool:
    """Looks at the whole picture: a small thing is hardly seen in a thumbnail."""
    column, one = view.columns[name], view.fields[name]
    if isinstance(one, Picture):
        pictures = Pictures(column[0][place : place + 1], column[1][place : place + 1], one.channels)
        return float(pictures.decoded()[0].float().std((1, 2)).max()) < alike.BLANK
    return float(column[place].std((1, 2)).max()) < alike.BLANK


def _size_of(view: View) -> np.ndarray | None:
    """Returns height and width of the one input picture of every row, (N, 2); None where there is not just one."""
    names = view.inputs(Image, Picture)
    if len(names) != 1:
        return None
    one = view.fields[names[0]]
    if isinstance(one, Image):
        return np.broadcast_to(np.array(one.shape[1:]), (len(view), 2))
    return view.columns[names[0]][1]


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
    counts |= {name: np.array([len(m.counts) for m in view.columns[name]]) for name in view.of_kind(ObjectMasks)}
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
    masks = {name: view.columns[name][1] for name in view.of_kind(ClassMap) if view.fields[name].target}
    for name in view.of_kind(ObjectMasks):
        rows = view.columns[name]
        # Without an object there is no mask whose size could differ.
        masks[name] = np.array([(m.height, m.width) if m.counts else tuple(s) for m, s in zip(rows, sizes, strict=True)])
    for name, others in masks.items():
        bad = np.flatnonzero((others != sizes).any(1))
        if len(bad):
            at = bad[0]
            yield view.doubt(
                "masks", f"'{name}': {len(bad):,} rows have masks of another size than the picture; the first: row"
                f" {view.numbers[at]}, {others[at, 1]} x {others[at, 0]}{_of_size(sizes, at)}", bad,
            )  # fmt: skip


# ---- columns that say nothing, or too much


def _constant(view: View) -> Iterator[Doubt]:
    if len(view) < 2:
        return
    names, numbers = _dense(view)
    same = [name for name, is_same in zip(names, (numbers == numbers[0]).all(0), strict=True) if is_same]
    targets = [name for name in view.of_kind(Number, Label) if view.fields[name].target]
    same += [f"'{name}'" for name in targets if (view.columns[name] == view.columns[name][0]).all()]
    same += [f"'{name}'" for name in view.inputs(Text) if len(set(view.columns[name])) == 1]
    if same:
        yield view.doubt("constant", f"{_listed(same)}: the same in all rows, nothing can be learned from it")


def _identifiers(view: View) -> Iterator[Doubt]:
    names, numbers = _dense(view)
    if len(view) < LEAK_ROWS:
        return
    steps = np.diff(numbers, axis=0)
    one_way, whole = (steps > 0).all(0) | (steps < 0).all(0), (numbers == np.floor(numbers)).all(0)
    for place in np.flatnonzero(one_way & whole):
        yield view.doubt(
            "identifier", f"{names[place]} only ever {'grows' if steps[0, place] > 0 else 'falls'} from row to row: is it a"
            " row number or a date, which new rows will not have?",
        )  # fmt: skip


def _leaks(view: View) -> Iterator[Doubt]:
    """One number, one word, or one property of a file that gives the label away."""
    for name in view.labels():
        rows = np.linspace(0, len(view) - 1, min(len(view), MOST_LEAKS)).astype(np.int64)
        labels = view.columns[name][rows]
        shares = np.bincount(labels) / len(labels)
        if len(labels) < LEAK_ROWS or np.count_nonzero(shares) < 2 or shares.max() >= MAJORITY:
            continue
        for group in _clues(view, rows):
            best, told = max(((rule_accuracy(values, labels), words) for words, values in group), default=(0, ""))
            if best >= LEAK:
                yield view.doubt("leak", f"{told} alone tells '{name}' in {best:.1%} of the rows: will new rows have it?")
        for best, told in _words(view, rows, labels):
            if best >= LEAK:
                yield view.doubt("leak", f"{told} alone tells '{name}' in {best:.1%} of the rows: is it the answer?")


def _clues(view: View, rows: np.ndarray) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Yields groups of simple features, with their names, of which the most telling one is spoken of."""
    names, numbers = _dense(view)
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
            data, sizes = view.columns[name]
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
    cuts = [_cut(values[labels == low], values[labels == high]) for low, high in zip(order, order[1:], strict=False)]
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


def _suspicious(views: list[View]) -> Iterator[Doubt]:
    """Rows all of whose nearest neighbours have one other label, where neighbours are mostly right."""
    for name in views[0].labels() if views else ():
        share = min(1, MOST_NEIGHBOURS / sum(map(len, views)))
        chosen = [np.linspace(0, len(view) - 1, max(1, int(share * len(view)))).astype(np.int64) for view in views]
        features = np.concatenate([_features(view)[rows] for view, rows in zip(views, chosen, strict=True)])
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
                    f"{bad.sum():,} of {len(bad):,} rows have a '{name}' that none of their {K} nearest neighbours has; the"
                    f" first: row {view.numbers[row]} is {names[given]}, all of its neighbours are {names[said[at]]}",
                    rows[bad],
                )


def _features(view: View) -> np.ndarray:
    """Returns what rows are compared by, (N, features) float32: all their numbers to one scale, and small pictures."""
    _, numbers = _dense(view)
    std = numbers.std(0)
    numbers = (numbers - numbers.mean(0)) / np.where(std > 0, std, 1)
    thumbs = [np.nan_to_num(seen).reshape(len(view), -1) / 64 for seen in view.thumbnails.values()]
    return np.concatenate([numbers, *thumbs], axis=1)


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
