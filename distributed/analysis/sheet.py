"""A contact sheet of a store: one HTML file that holds all it shows, loads nothing and runs nothing.

Whatever comes from the data is escaped, and the page forbids itself scripts and the network.
"""

import base64
import html
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import simplejpeg

from distributed import durable
from distributed.analysis.views import Doubt
from distributed.data.store import Store
from tasks.columns import Masks, Pictures
from tasks.errors import BadRow, UserError
from tasks.fields import Boxes, ClassMap, Field, Image, Label, Labels, ObjectMasks, Picture, Text, Tokens
from tasks.formats import pictures as formats

MOST, MOST_OF_DOUBT = 120, 6  # rows on the sheet, and of one doubt
SIDE, SMALL = 208, 104  # pixels of a picture's longer side at most, and at least
CHARACTERS, NUMBERS = 400, 12  # of a text and of a list that are shown
BARS = 40  # classes of a split
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008b8b", "#c71585", "#808000", "#9a6324", "#0b5394")

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; --faint: #8882; --warn: #b35900; }
@media (prefers-color-scheme: dark) { :root { --warn: #ffb066; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 75rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; } th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: block; height: .7rem; min-width: 1px; background: #4363d8; print-color-adjust: exact; }
.bars td:nth-child(3) { width: 20rem; }
.doubt { border-left: 4px solid var(--warn); padding: .1rem .8rem; margin: .8rem 0; }
.rows { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .3rem; max-width: 15rem;
  break-inside: avoid; overflow-wrap: anywhere; font-size: .85rem; unicode-bidi: isolate; }
.picture { position: relative; display: inline-block; line-height: 0; }
.picture img { image-rendering: auto; } .picture img.pixels { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
svg rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg text { font: bold 11px system-ui, sans-serif; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.name { opacity: .7; } .lost { padding: 1rem; background: var(--faint); } blockquote { margin: .2rem 0; }
@media print { body { margin: 0; max-width: none; } }
</style>
</head>
<body>
<h1>$title</h1>
<p>$path</p>
$body
</body>
</html>
""")


def write(path: Path, told: dict[str, Any], store: Store, doubts: list[Doubt]) -> int:
    """Writes the sheet of a store, replacing a file that is there; returns how many rows it shows.

    `told` is what `stores.describe` returns. Raises UserError where the file cannot be written.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no file can be written there", "give the name of a file in a folder that exists")
    picked = _picked(store, doubts)
    body = [_splits(told), _facts(told), _doubts(store, doubts, picked), _classes(told), _rows(store, picked)]
    title = f"{store.path.parent.name} {store.path.name}"
    page = PAGE.substitute(title=_escaped(title), path=_escaped(store.path), body="\n".join(body))
    try:
        durable.write(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", "give another file by --html") from None
    return sum(map(len, picked.values()))


def _escaped(value: Any) -> str:
    return html.escape(str(value), quote=True)


# ---- tables


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    top = "".join(f"<th>{_escaped(name)}</th>" for name in head)
    lines = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _splits(told: dict[str, Any]) -> str:
    rows = [
        (name, f"{split['rows']:,}", f"{split['bytes']:,}", "; ".join(_words(split["sizes"])))
        for name, split in told["splits"].items()
    ]
    duplicates = told["duplicates"]
    return (
        f"<h2>Splits</h2>{_table(('split', 'rows', 'bytes', 'sizes'), rows)}"
        f"<p>{told['skipped']['rows']:,} rows set aside, {duplicates['rows']:,} duplicates,"
        f" {duplicates['test_in_train']:,} of test also in train.</p>"
    )


def _words(sizes: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name} ({one['of']}): " + ", ".join(f"{what} {_said(size)}" for what, size in one.items() if what != "of")
        for name, one in sizes.items()
    ]


def _facts(told: dict[str, Any]) -> str:
    facts = {
        name: "; ".join(f"{key}: {_said(value)}" for key, value in (told["facts"].get(name) or {}).items())
        for name in told["fields"]
    }
    rows = [(name, kind, facts[name]) for name, kind in told["fields"].items()]
    return f"<h2>Fields</h2>{_table(('field', 'kind', 'facts'), rows)}"


def _said(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return ", ".join(map(_said, value)) if isinstance(value, list) else str(value)


def _doubts(store: Store, doubts: list[Doubt], picked: dict[str, list[int]]) -> str:
    if not doubts:
        return "<h2>Doubts</h2><p>None.</p>"
    parts = []
    for one in doubts:
        shown = [row for row in one.rows if row in set(picked.get(one.split, ()))]
        links = ", ".join(f'<a href="#{_anchor(one.split, row)}">{row}</a>' for row in shown)
        parts.append(
            f'<div class="doubt"><b>{_escaped(one.kind)}</b> ({_escaped(one.split)}): {_escaped(one.message)}'
            f"{f'<br>rows below: {links}' if links else ''}</div>"
        )
    return f"<h2>Doubts</h2>{''.join(parts)}"


def _classes(told: dict[str, Any]) -> str:
    parts = []
    for split, facts in told["splits"].items():
        for name, counts in facts["classes"].items():
            largest, total = max(counts.values(), default=0) or 1, sum(counts.values()) or 1
            most = sorted(counts, key=counts.__getitem__, reverse=True)[:BARS]
            lines = "".join(
                f'<tr><td>{_escaped(label)}</td><td class="number">{count:,} ({count / total:.1%})</td>'
                f'<td><span class="bar" style="width:{100 * count / largest:.1f}%"></span></td></tr>'
                for label, count in counts.items() if label in set(most)
            )  # fmt: skip
            left = f"<p>and {len(counts) - BARS} smaller classes</p>" if len(counts) > BARS else ""
            parts.append(f'<h3>{_escaped(name)}, {_escaped(split)}</h3><table class="bars">{lines}</table>{left}')
    return f"<h2>Classes</h2>{''.join(parts)}" if parts else ""


# ---- rows


def _picked(store: Store, doubts: list[Doubt]) -> dict[str, list[int]]:
    """Returns the rows to show of each split: some of every doubt, and some of each class of train."""
    picked: dict[str, list[int]] = {}
    left = MOST
    for one in doubts:
        for row in one.rows[:MOST_OF_DOUBT]:
            if left > MOST // 2 and row not in picked.setdefault(one.split, []):
                picked[one.split].append(row)
                left -= 1
    split = "train" if store.counts().get("train") else next((name for name, n in store.counts().items() if n), "")
    if split:
        there = picked.setdefault(split, [])
        there += [row for row in _of_every_class(store, split) if row not in there][:left]
    return picked


def _of_every_class(store: Store, split: str) -> list[int]:
    rows = store.rows(split)
    label = next((name for name, field in store.fields.items() if isinstance(field, Label)), None)
    if label is None:
        return list(range(min(MOST // 2, len(rows))))
    labels = rows.dense(label)
    classes = np.unique(labels)[:MOST]
    each = max(1, min(12, MOST // 2 // len(classes)))
    return [int(row) for one in classes for row in np.flatnonzero(labels == one)[:each]]


def _rows(store: Store, picked: dict[str, list[int]]) -> str:
    parts = []
    for split, numbers in picked.items():
        if numbers:
            columns, sources = store.rows(split).take(np.array(numbers)), store.sources(split)
            figures = [
                _figure(store, columns, place, f"{split} {row}", sources[row], _anchor(split, row))
                for place, row in enumerate(numbers)
            ]
            parts.append(f'<h2>Rows of {_escaped(split)}</h2><div class="rows">{"".join(figures)}</div>')
    return "".join(parts)


def _anchor(split: str, row: int) -> str:
    return f"{_escaped(split)}-{row}"


def _figure(store: Store, columns: dict[str, Any], place: int, name: str, source: str | None, anchor: str) -> str:
    row = {column: _value(field, columns[column], place) for column, field in store.fields.items()}
    parts = []
    for column, field in store.fields.items():
        if isinstance(field, (Image, Picture)):
            parts.append(_picture(store, column, row))
        else:
            parts.append(
                f'<div><span class="name">{_escaped(column)}:</span> {_shown(store, column, field, row[column])}</div>'
            )
    where = f" &larr; {_escaped(source)}" if source else ""
    return (
        f'<figure id="{anchor}">{"".join(parts)}<figcaption class="name">{_escaped(name)}{where}</figcaption></figure>'
    )


def _value(field: Field, column: Any, place: int) -> Any:
    """One row's value of a column as `Rows.take` gives it; a picture as `Pictures` of one."""
    if isinstance(field, Picture):
        return replace(column, data=column.data[place : place + 1], sizes=column.sizes[place : place + 1])
    if isinstance(field, Image):
        pixels = column[place].transpose(1, 2, 0)
        if field.channels not in (1, 3):
            pixels = pixels.mean(2, keepdims=True).astype(np.uint8)
        return Pictures([np.ascontiguousarray(pixels)], np.array([pixels.shape[:2]]), pixels.shape[2])
    if isinstance(field, (Tokens, Labels, Boxes)):
        values, lengths = column
        start = int(lengths[:place].sum())
        return values[start : start + int(lengths[place])]
    return column.rows[place] if isinstance(field, ObjectMasks) else column[place]


def _classes_of(store: Store, name: str, number: int) -> str:
    classes = store.facts.get(name, {}).get("classes") or []
    return classes[number] if 0 <= number < len(classes) else str(number)


def _shown(store: Store, name: str, field: Field, value: Any) -> str:
    if isinstance(field, Label):
        return f"<b>{_escaped(_classes_of(store, name, int(value)))}</b>"
    if isinstance(field, Text):
        cut = value if len(value) <= CHARACTERS else f"{value[:CHARACTERS]}..."
        return f"{len(value):,} characters<blockquote>{_escaped(cut)}</blockquote>"
    if isinstance(field, Labels):
        return _escaped(_short([_classes_of(store, name, int(one)) for one in value]))
    if isinstance(field, ObjectMasks):
        return f"{len(value.counts)} masks of {value.width} x {value.height}"
    if isinstance(field, Boxes):
        return f"{len(value)} boxes"
    numbers = np.asarray(value).reshape(-1)
    if isinstance(field, Tokens):
        # A vocabulary is looked up word by word: few numbers are shown of each row.
        known = store.facts.get(name, {}).get("vocabulary") or {}
        wanted = set(numbers[: 4 * NUMBERS].tolist())
        words = {number: word for word, number in known.items() if number in wanted}
        told = [words.get(one, str(one)) for one in numbers.tolist()]
        return f"{len(numbers):,} tokens<blockquote>{_escaped(_short(told, 4 * NUMBERS, ' '))}</blockquote>"
    return _escaped(_short([f"{one:.4g}" for one in numbers[: NUMBERS + 1].tolist()]))


def _short(words: list[str], most: int = NUMBERS, between: str = ", ") -> str:
    return between.join(words[:most]) + (" ..." if len(words) > most else "")


# ---- pictures


def _picture(store: Store, name: str, row: dict[str, Any]) -> str:
    """A thumbnail, with the row's masks in it and its boxes over it where they are of this picture."""
    pictures, field = row[name], store.fields[name]
    height, width = map(int, pictures.sizes[0])
    size, factor = _fitted(height, width)
    try:
        # A small picture is enlarged by whole numbers: every pixel stays a square.
        shrunk = pictures.resized(size if factor == 1 else (height, width))[0].permute(1, 2, 0).numpy()
    except (BadRow, ValueError) as error:
        return f'<div class="lost">{_escaped(name)}: cannot be read: {_escaped(error)}</div>'
    if isinstance(field, ClassMap):
        pixels = np.array([_rgb(one) for one in range(256)], np.uint8)[shrunk[:, :, 0]]
    else:
        pixels = np.repeat(shrunk, 3, axis=2) if shrunk.shape[2] == 1 else shrunk
    alone = sum(isinstance(one, (Image, Picture)) and not one.target for one in store.fields.values()) == 1
    drawn = ""
    if alone and not field.target:
        pixels = _with_masks(store, row, pixels, (height, width))
        drawn = "".join(_drawn(store, row, width, height))
    pixels = pixels.repeat(factor, 0).repeat(factor, 1)
    shown = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
    alt = f"{name}, {width} x {height} pixels"
    over = f'<svg viewBox="0 0 {pixels.shape[1]} {pixels.shape[0]}">{drawn}</svg>' if drawn else ""
    kind = ' class="pixels"' if factor > 1 else ""
    data = _data(pixels, sharp=factor > 1 or isinstance(field, ClassMap))
    image = f'<img src="{data}" {shown} alt="{_escaped(alt)}"{kind}>'
    return f'<div class="picture">{image}{over}</div><div class="name">{_escaped(alt)}</div>'


def _fitted(height: int, width: int) -> tuple[tuple[int, int], int]:
    """Returns the size to show a picture at, and by how much a small one is enlarged."""
    longest = max(height, width)
    if longest <= SMALL:
        factor = SMALL // longest
        return (height * factor, width * factor), factor
    scale = min(1, SIDE / longest)
    return (max(1, round(height * scale)), max(1, round(width * scale))), 1


def _rgb(number: int) -> tuple[int, ...]:
    """The colour of a class in a class map: white where pixels do not count."""
    if number == 255:
        return (255, 255, 255)
    return (0, 0, 0) if number == 0 else tuple(bytes.fromhex(COLOURS[(number - 1) % len(COLOURS)][1:]))


def _with_masks(store: Store, row: dict[str, Any], pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Tints the pixels (h, w, 3) of each object's mask, where masks are of the picture's size."""
    mixed = pixels.astype(np.float32)
    for name, field in store.fields.items():
        mask = row[name]
        if isinstance(field, ObjectMasks) and (mask.height, mask.width) == size:
            for number, plane in enumerate(Masks([mask]).decoded()[0].numpy()):
                y, x = (np.arange(pixels.shape[axis]) * size[axis] // pixels.shape[axis] for axis in (0, 1))
                inside = plane[np.ix_(y, x)] > 0
                mixed[inside] = 0.55 * mixed[inside] + 0.45 * np.array(_rgb(number % len(COLOURS) + 1))
    return mixed.round().astype(np.uint8)


def _drawn(store: Store, row: dict[str, Any], width: int, height: int) -> Iterator[str]:
    """Yields the row's boxes as SVG, with their classes where each has one."""
    (shown_height, shown_width), _ = _fitted(height, width)
    across, down = shown_width / width, shown_height / height
    labels = [name for name, field in store.fields.items() if isinstance(field, Labels)]
    for name, field in store.fields.items():
        if not isinstance(field, Boxes):
            continue
        numbers = row[labels[0]] if len(labels) == 1 and len(row[labels[0]]) == len(row[name]) else None
        for place, (left, top, right, bottom) in enumerate(row[name].tolist()):
            colour = COLOURS[place % len(COLOURS)]
            x, y = left * across, top * down
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{(right - left) * across:.1f}"'
                f' height="{(bottom - top) * down:.1f}" stroke="{colour}"/>'
            )
            if numbers is not None:
                called = _classes_of(store, labels[0], int(numbers[place]))
                yield f'<text x="{x + 2:.1f}" y="{max(y, 0) + 11:.1f}" fill="{colour}">{_escaped(called)}</text>'


def _data(pixels: np.ndarray, *, sharp: bool) -> str:
    """A picture (height, width, 3) uint8 as a data URI: PNG where each pixel counts, else JPEG."""
    if sharp and min(pixels.shape[:2]) > 1:
        kind, data = "png", formats.normalised(np.ascontiguousarray(pixels), 3)["bytes"]
    else:
        kind, data = "jpeg", simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=85, colorspace="RGB")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
