"""What looks doubtful in a store: each doubt is raised by a small store that has the fault, and by none that has not."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from distributed.analysis import alike, clues, doubts, sheet, stores, views
from distributed.data import convert, derive, write
from distributed.data.settings import Data
from distributed.data.store import Store
from tasks.columns import Pictures
from tasks.task import (
    Boxes,
    ClassMap,
    Example,
    Image,
    Label,
    Labels,
    Number,
    ObjectMasks,
    Picture,
    Task,
    Text,
    Tokens,
    Vector,
)

RANDOM = np.random.default_rng(0)
ANIMALS = Label(names=("cat", "dog"))
SCENE = {"picture": Picture(), "boxes": Boxes(), "labels": Labels(), "masks": ObjectMasks()}


def stored(tmp_path, fields: dict, rows: list[dict], held_out: list[dict] | None = None, given_facts=None) -> Store:
    """A store of these rows: train, and the held-out ones as validation and test alike (a copy of one row of train each
    where there are none: such a small set is doubted, but for another reason).
    """

    class Given(Task):
        def examples(self, source):
            last = [rows[-1]] if held_out is None else held_out
            splits = (("train", rows), ("validation", last), ("test", last))
            return [Example(row, split) for split, some in splits for row in some]

        def facts(self, rows):
            return {**super().facts(rows), **(given_facts or {})}

    Given.fields = fields
    return Store(convert.prepare(Given(), "given", Data(max_bad=0), tmp_path))


def found(store: Store, kind: str, split: str = "train") -> list[views.Doubt]:
    return [doubt for doubt in doubts.look(store)[0] if (doubt.kind, doubt.split) == (kind, split)]


def only(store: Store, kind: str, split: str = "train") -> views.Doubt:
    (doubt,) = found(store, kind, split)
    return doubt


def scenery(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture unlike those of other seeds: a few soft hills of colour, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Pillow.fromarray(coarse).resize((width, height), Pillow.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    written = io.BytesIO()
    Pillow.fromarray(pixels).save(written, "JPEG", quality=quality)
    return written.getvalue()


def vectors(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=6), "label": int(random.integers(2))} for _ in range(count)]


VECTORS = {"x": Vector(6), "label": ANIMALS}


# ---- nothing to doubt


def test_a_sound_store_raises_no_doubt(tmp_path):
    store = stored(tmp_path, VECTORS, vectors(200), vectors(40, seed=1))
    # Its validation and test are the same rows, which is the one thing to be said of it.
    assert [(doubt.kind, doubt.split) for doubt in doubts.look(store)[0]] == [("duplicates", "test")]
    assert doubts.look(store)[1] == {"train": 200, "validation": 40, "test": 40}


def test_a_large_split_is_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "MOST_ROWS", 50)
    rows = vectors(300)
    for row in rows:
        row["x"][3] = 7
    store = stored(tmp_path, VECTORS, rows)
    assert doubts.look(store)[1] == {"train": 50, "validation": 1, "test": 1}
    assert "component 3: the same in all rows" in only(store, "constant").message
    assert "of all rows of test 1 are also in train" in found(store, "duplicates", "test")[-1].message


# ---- too few, too uneven


def test_few_rows_of_a_split_and_of_a_class_are_doubted(tmp_path):
    rows = [{"x": row["x"], "label": int(i < 3)} for i, row in enumerate(vectors(60))]
    store = stored(tmp_path, VECTORS, rows, rows[10:14])
    train, classes = found(store, "few rows")
    assert train.message.startswith("only 60 rows") and classes.message.endswith(
        "1 of 2 classes have under 10: dog (3)"
    )
    held_out, missing = found(store, "few rows", "test")
    assert held_out.message == "only 4 rows: figures from them are good to +- 25 %"
    assert missing.message.endswith("1 of 2 classes have none: dog (0)")


@pytest.mark.parametrize(("rare", "doubted"), [(15, True), (60, False)])
def test_a_class_ten_times_as_frequent_as_another_is_doubted(tmp_path, rare, doubted):
    rows = [{"x": row["x"], "label": int(i < rare)} for i, row in enumerate(vectors(200))]
    assert [d.message[:62] for d in found(stored(tmp_path, VECTORS, rows), "imbalance")] == [
        "'label': cat (185) is 12 times as frequent as dog (15); saying"
    ] * doubted


# ---- the same row twice


def test_a_row_of_train_that_is_in_test_is_named_with_its_twin_and_its_source(tmp_path):
    rows, others = vectors(100), vectors(40, seed=1)
    doubt = only(stored(tmp_path, VECTORS, rows, [*others, rows[7]]), "duplicates", "validation")
    assert doubt.message == "1 of 41 rows are also in train; the first: row 40 is row 7 of train"
    assert (doubt.rows, doubt.sources) == ([40], ["row 141"])


def test_a_copy_of_a_photograph_in_another_quality_and_brightness_is_a_near_duplicate(tmp_path):
    size = 120, 160
    rows = [{"picture": jpeg(scenery(seed, *size), 95), "label": seed % 2} for seed in range(40)]
    darker = (scenery(12, *size) * 0.8).astype(np.uint8)
    copies = [jpeg(scenery(11, *size), 60), jpeg(darker, 90), jpeg(scenery(13, 240, 320), 90)]
    others = [{"picture": jpeg(scenery(1000 + seed, *size), 95), "label": 0} for seed in range(40)]
    fields = {"picture": Picture(), "label": ANIMALS}
    store = stored(tmp_path, fields, rows, [*others, *({"picture": copy, "label": 1} for copy in copies)])
    doubt = only(store, "near-duplicates", "validation")
    assert doubt.rows == [40, 41, 42] and doubt.message.endswith("the first: row 40 is row 11 of train")
    assert not found(store, "duplicates", "validation")


def test_a_text_with_another_ending_is_a_near_duplicate_and_a_text_of_the_same_words_is_not(tmp_path):
    words = [f"{one}{two}" for one in ("ka", "lo", "mi", "ru", "se") for two in ("ton", "ben", "gal", "dur")]
    texts = [" ".join(RANDOM.choice(words, 30)) for _ in range(60)]
    near, shuffled = texts[5].upper() + "  again", " ".join(sorted(texts[6].split()))
    store = stored(
        tmp_path, {"text": Text()}, [{"text": one} for one in texts], [{"text": one} for one in (shuffled, near)]
    )
    doubt = only(store, "near-duplicates", "validation")
    assert doubt.rows == [1] and "row 1 is row 5 of train" in doubt.message


def test_tokens_that_differ_in_one_place_are_near_duplicates(tmp_path):
    rows = [{"tokens": RANDOM.integers(2, 500, 60)} for _ in range(50)]
    changed, other = rows[9]["tokens"].copy(), RANDOM.integers(2, 500, 60)
    changed[30] = 1
    store = stored(tmp_path, {"tokens": Tokens()}, rows, [{"tokens": other}, {"tokens": changed}])
    assert only(store, "near-duplicates", "validation").rows == [1]


def test_numbers_that_differ_in_the_last_digit_are_near_duplicates_unless_they_are_few(tmp_path):
    rows, others = vectors(150), vectors(40, seed=1)
    others[3] = {"x": rows[20]["x"] + 1e-6, "label": rows[20]["label"]}
    assert only(stored(tmp_path / "six", VECTORS, rows, others), "near-duplicates", "validation").rows == [3]
    rows, others = ([{**row, "x": row["x"][:1]} for row in some] for some in (rows, others))
    store = stored(tmp_path / "one", {"x": Vector(1), "label": ANIMALS}, rows, others)
    assert not found(store, "near-duplicates", "validation")


def test_the_same_picture_with_another_question_is_no_duplicate(tmp_path):
    rows = [{"picture": jpeg(scenery(n), 95), "question": f"what is to be seen at place {n} of it?"} for n in range(30)]
    asked = [{"picture": jpeg(scenery(3), 50), "question": "an altogether different question about something else"}]
    store = stored(tmp_path, {"picture": Picture(), "question": Text()}, rows, asked)
    assert not found(store, "near-duplicates", "validation") and not found(store, "duplicates", "validation")


def test_equal_inputs_with_different_labels_are_doubted_in_both_splits(tmp_path):
    rows, others = vectors(100), vectors(40, seed=1)
    others[5] = {"x": rows[8]["x"], "label": 1 - rows[8]["label"]}
    store = stored(tmp_path, VECTORS, rows, others)
    train, held_out = only(store, "contradictions"), only(store, "contradictions", "validation")
    assert train.rows == [8] and held_out.rows == [5]
    assert train.message.endswith("the first: row 8 is cat and dog")


# ---- pictures


def unreadable(pixels: np.ndarray, kind: str) -> dict:
    """What a store holds of a picture whose file has lost its end: only its header is looked at when it is encoded."""
    written = io.BytesIO()
    Pillow.fromarray(pixels).save(written, kind)
    data = written.getvalue()
    return {"bytes": data[: len(data) * 4 // 5], "height": pixels.shape[0], "width": pixels.shape[1]}


@pytest.mark.parametrize(("kind", "said"), [("PNG", "is no picture that can be read"), ("JPEG", "end too early")])
def test_a_picture_whose_end_is_lost_is_doubted(tmp_path, kind, said):
    rows = [{"picture": scenery(seed)} for seed in range(8)]
    rows[4] = {"picture": unreadable(scenery(4), kind)}
    doubt = only(stored(tmp_path, {"picture": Picture()}, rows), "unreadable")
    assert doubt.rows == [4] and said in doubt.message and doubt.sources == ["row 5"]


def test_pictures_of_one_shade_are_doubted_and_such_with_a_dot_are_not(tmp_path):
    white = np.full((60, 80, 3), 255, np.uint8)
    dotted = white.copy()
    dotted[30, 30:34] = 0
    rows = [{"picture": one} for one in (scenery(1), white, dotted, scenery(2))]
    assert only(stored(tmp_path / "any", {"picture": Picture()}, rows), "blank").rows == [1]
    rows = [{"image": row["picture"][:40, :40].transpose(2, 0, 1)} for row in rows]
    assert only(stored(tmp_path / "one", {"image": Image(3, 40, 40)}, rows), "blank").rows == [1]


# ---- boxes and masks


def scene(boxes=((5, 5, 20, 20),), labels=(0,), mask=(48, 64), **more) -> dict:
    planes = np.zeros((len(boxes), *mask), np.uint8)
    planes[:, 5:20, 5:20] = 1
    return {"picture": scenery(len(more) + len(boxes)), "boxes": boxes, "labels": labels, "masks": planes, **more}


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        (scene([(5, 5, 66, 20)]), "boxes", "1 of 3 boxes reach outside their pictures; the first: row 1, 5 5 66 20 in"),
        (scene([(-3, 5, 20, 20)]), "boxes", "reach outside"),
        (scene([(5, 5, 6, 20)]), "boxes", "less than 2 pixels wide or high"),
        (scene(labels=(0, 1)), "boxes", "1 rows have not as many 'labels' as 'boxes'; the first: row 1, 2 and 1"),
        (scene(masks=np.zeros((0, 48, 64), np.uint8)), "boxes", "not as many 'masks' as 'boxes'"),
        (
            scene(mask=(24, 32)),
            "masks",
            "masks of another size than the picture; the first: row 1, 32 x 24 in a picture",
        ),
    ],
)
def test_boxes_and_masks_that_do_not_fit_are_doubted(tmp_path, broken, kind, said):
    doubt = only(
        stored(
            tmp_path,
            SCENE,
            [
                scene(),
                broken,
                scene(),
            ],
        ),
        kind,
    )
    assert said in doubt.message and doubt.rows == [1]


def test_boxes_and_masks_that_fit_are_not_doubted(tmp_path):
    touching = [scene([(0, 0, 64, 48)]), scene([], []), scene([(0, 0, 9, 9), (3, 3, 64, 47)], (1, 1))]
    store = stored(tmp_path, SCENE, touching)
    assert {doubt.kind for doubt in doubts.look(store)[0]} <= {"few rows", "duplicates"}


def test_a_class_map_of_another_size_is_doubted(tmp_path):
    rows = [{"picture": scenery(n), "classes": np.zeros((48 - n, 64), np.uint8)} for n in range(3)]
    store = stored(tmp_path, {"picture": Picture(), "classes": ClassMap()}, rows)
    assert only(store, "masks").rows == [1, 2]


# ---- columns


def test_constant_columns_are_named(tmp_path):
    rows = [{**row, "size": 3.0, "text": "same", "price": 5.0} for row in vectors(20)]
    fields = {**VECTORS, "size": Number(), "text": Text(), "price": Number(target=True)}
    assert only(stored(tmp_path, fields, rows), "constant").message.startswith(
        "'size', 'price', 'text': the same in all"
    )


def test_a_number_that_counts_the_rows_is_doubted_and_one_that_does_not_is_not(tmp_path):
    rows = [{**row, "number": 1000 + i, "age": i % 50, "score": i / 7} for i, row in enumerate(vectors(120))]
    store = stored(tmp_path, {**VECTORS, "number": Number(), "age": Number(), "score": Number()}, rows)
    assert only(store, "identifier").message.startswith("'number' only ever grows")


def _told(row: dict, number: int) -> dict:
    """A row in which every column but those of `LEAKS` is noise."""
    random = np.random.default_rng(number)
    noise = {"text": " ".join(random.choice(["some", "words", "more"], 12)), "tokens": random.integers(0, 30, 12)}
    return {**row, **noise, "image": random.integers(0, 256, (1, 9, 9), np.uint8)}


def _watermarked(row: dict) -> np.ndarray:
    image = row["image"].copy()
    image[0, :3, :3] = 255 * row["label"]
    return image


LEAKS = {
    "nothing": ("x", lambda row: row["x"], ""),
    "a component": (
        "x",
        lambda row: [*row["x"][:2], row["label"] * 4 - 2 + row["x"][0] / 9, *row["x"][3:]],
        "component 2",
    ),
    "a word": ("text", lambda row: row["text"] + " refund" * row["label"], "'refund' in 'text'"),
    "a token": ("tokens", lambda row: [*row["tokens"][1:], 77 * row["label"]], "'77' in 'tokens'"),
    "the length of a text": ("text", lambda row: row["text"] + " some" * 9 * row["label"], "the length of 'text'"),
    "the length of tokens": (
        "tokens",
        lambda row: [*row["tokens"], *row["tokens"][: row["label"]]],
        "the length of 'tok",
    ),
    "the mean shade": ("image", lambda row: row["image"] // 2 + 128 * row["label"], "the mean shade of 'image'"),
    "a watermark": ("image", _watermarked, "the shade of 'image' at"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_gives_the_label_away_is_named(tmp_path, name):
    column, leaking, said = LEAKS[name]
    rows = [_told(row, i) for i, row in enumerate(vectors(200))]
    rows = [{**row, column: leaking(row)} for row in rows]
    fields = {**VECTORS, "text": Text(), "tokens": Tokens(), "image": Image(1, 9, 9)}
    messages = [doubt.message for doubt in found(stored(tmp_path, fields, rows), "leak")]
    assert bool(messages) == bool(said) and all(said in message for message in messages), messages


def test_the_size_of_a_file_that_gives_the_label_away_is_named(tmp_path):
    rows = [{"picture": jpeg(scenery(n), 95 if n % 2 else 30), "label": n % 2} for n in range(60)]
    assert (
        "file size of 'picture'"
        in only(stored(tmp_path, {"picture": Picture(), "label": ANIMALS}, rows), "leak").message
    )


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1], 1),
        ([6, 5, 4, 3, 2, 1], [0, 0, 0, 1, 1, 1], 1),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 2, 2, 0, 0, 0, 1, 1, 1], 1),
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 1], 5 / 6),
        ([7, 7, 8, 8, 9, 9], [0, 0, 1, 1, 0, 0], 1),  # few values: each says its class
        ([5, 5, 5, 5], [0, 0, 0, 1], 3 / 4),
        ([1, 2, 2, 2, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], 8 / 10),  # equal numbers are not parted
    ],
)
def test_the_best_rule_of_one_number(values, labels, expected):
    assert clues.rule_accuracy(np.array(values, float), np.array(labels)) == pytest.approx(expected)


# ---- labels


def test_a_label_that_no_neighbour_has_is_suspicious(tmp_path):
    rows = [{"x": row["x"] + 8 * (i % 2), "label": i % 2} for i, row in enumerate(vectors(120))]
    sound = stored(tmp_path / "sound", VECTORS, rows)
    rows[31] = {**rows[31], "label": 0}
    doubt = only(stored(tmp_path / "odd", VECTORS, rows), "suspicious labels")
    assert doubt.rows == [31] and doubt.message.endswith("the first: row 31 is cat, its neighbours are all dog")
    assert not found(sound, "suspicious labels")


def test_neighbours_that_know_nothing_are_not_believed(tmp_path):
    rows = [{"x": row["x"], "label": int(i % 25 == 0)} for i, row in enumerate(vectors(300))]
    assert not found(stored(tmp_path, VECTORS, rows), "suspicious labels")


# ---- hashes


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=6), st.integers(1, 4))
def test_windows_are_the_same_where_the_numbers_are_and_never_reach_over_a_row(rows, width):
    values = np.array([one for row in rows for one in row], np.int64)
    hashes, counts = alike.windows(values, np.array([len(row) for row in rows], np.int64), width)
    runs = [tuple(row[at : at + width]) for row in rows for at in range(max(0, len(row) - width + 1))]
    assert len(runs) == len(hashes) == counts.sum()
    assert len(set(runs)) == len(set(hashes.tolist())) == len(set(zip(runs, hashes.tolist(), strict=True)))


def test_similarity_hashes_of_many_rows_are_those_of_each_row_alone():
    lengths = RANDOM.integers(0, 30, 600)
    values = RANDOM.integers(0, 50, lengths.sum())
    together = alike.similarity_hashes(*alike.windows(values, lengths, 3))
    parts = np.split(values, np.cumsum(lengths)[:-1])
    alone = [alike.similarity_hashes(*alike.windows(part, np.array([len(part)]), 3))[0] for part in parts]
    assert together.tolist() == alone


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.lists(st.integers(0, 2**64 - 1), max_size=4))
def test_close_hashes_are_found(first, second):
    second = [*second, *(one ^ 0b101 for one in first[:2])]
    pairs = alike.close_pairs(np.array(first, np.uint64), np.array(second, np.uint64), most_bits=3, most_each=12)
    expected = {(i, j) for i, a in enumerate(first) for j, b in enumerate(second) if (a ^ b).bit_count() <= 3}
    assert {tuple(pair) for pair in pairs.tolist()} == expected


def test_pictures_of_one_size_and_of_any_size_have_the_same_thumbnails():
    pixels = [scenery(seed) for seed in range(3)]
    fixed = alike.thumbnails(np.stack(pixels).transpose(0, 3, 1, 2))
    any_size, broken = alike.thumbnails_of_any_size(Pictures(pixels, np.array([[48, 64]] * 3)))
    assert not broken and np.abs(fixed - any_size).max() < 1


# ---- sizes


def test_sizes_of_pictures_masks_texts_and_tokens_are_told(tmp_path):
    sizes = [(30, 40), (10, 12), (50, 60)]
    rows = [
        {
            "picture": scenery(n, *size), "masks": np.ones((n, *size), np.uint8), "text": "é" * (n + 1),
            "tokens": [1] * (10 * n),
        }
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    fields = {"picture": Picture(), "masks": ObjectMasks(), "text": Text(), "tokens": Tokens()}
    told = stores.describe(stored(tmp_path, fields, rows).path)
    seen = told["splits"]["train"]["sizes"]
    assert seen["picture"] == {"of": "pixels", "smallest": "12x10", "median": "40x30", "largest": "60x50"}
    assert seen["masks"] == {"of": "masks", "smallest": 0, "median": 1, "95 %": 2, "largest": 2, "in all": 3}
    assert (seen["text"]["of"], seen["text"]["largest"]) == ("characters", 3)
    assert (seen["tokens"]["smallest"], seen["tokens"]["largest"]) == (0, 20)
    assert told["samples"][1]["picture"].startswith("PNG 12x10, ") and told["samples"][1]["masks"] == "1 masks of 12x10"


# ---- the contact sheet


def test_every_kind_of_field_stands_on_a_contact_sheet_and_so_does_a_picture_that_cannot_be_read(tmp_path):
    fields = {
        **SCENE, "image": Image(2, 1, 300), "classes": ClassMap(), "vector": Vector(20), "number": Number(), "text": Text(),
        "tokens": Tokens(), "label": ANIMALS,
    }  # fmt: skip
    rows = [
        scene(
            image=RANDOM.integers(0, 256, (2, 1, 300), np.uint8), classes=np.array([[0, 1, 255], [7, 7, 7]], np.uint8),
            vector=np.arange(20) + n, number=n / 8, text="w" * 500 + str(n), tokens=[1, 2, n], label=n % 2,
        )
        for n in range(4)
    ]  # fmt: skip
    rows[2]["picture"] = unreadable(scenery(9), "PNG")
    store = stored(tmp_path, fields, rows, given_facts={"tokens": {"vocabulary": {"good": 2}}})
    path = tmp_path / "sheet.html"
    assert sheet.write(path, stores.describe(store.path), store, doubts.look(store)[0]) == 6
    page = path.read_text()
    assert page.count("<figure") == 6 and page.count("<img") == 6 * 3 - 1 and page.count("cannot be read") > 1
    for words in ("300 x 1 pixels", "3 tokens<blockquote>1 good 3", "501 characters",
                  "0.125", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 ...", "1 masks of 64 x 48"):  # fmt: skip
        assert words in page, words


def test_two_unpaired_sets_are_looked_at_together(tmp_path):
    class Unpaired(Task):
        fields = {"image": Image(1, 16, 18)}

        def examples(self, source):
            names = [(split, domain) for split in ("train", "validation", "test") for domain in ("zebra", "horse")] * 4
            return [Example(number, split, domain=domain) for number, (split, domain) in enumerate(names)]

        def row(self, reference):
            shade = 0 if reference == 7 else np.random.default_rng(reference).integers(0, 256, (1, 16, 18))
            return {"image": np.broadcast_to(shade, (1, 16, 18)).astype(np.uint8)}

    store = Store(convert.prepare(Unpaired(), "unpaired", Data(), tmp_path))
    assert only(store, "blank").sources == ["row 8 (7)"]
    assert sheet.write(tmp_path / "sheet.html", stores.describe(store.path), store, doubts.look(store)[0]) == 8


def test_a_store_of_decoded_pictures_is_doubted_like_the_one_that_it_was_made_of(tmp_path):
    rows = [{"picture": np.full((30, 40, 3), 9, np.uint8) if n == 2 else jpeg(scenery(n), 90)} for n in range(5)]
    store = stored(tmp_path, {"picture": Picture()}, rows)
    made = Store(derive.derived(store.path, derive.Wanted(decoded=True, short_side=None)))
    assert only(made, "blank").rows == only(store, "blank").rows == [2]
    assert stores.describe(made.path)["samples"][2]["picture"] == "pixels 40x30, 3,600 bytes"
    assert sheet.write(tmp_path / "sheet.html", stores.describe(made.path), made, doubts.look(made)[0]) == 7


def test_a_store_with_a_test_split_alone_is_looked_at(tmp_path):
    store = write.write(tmp_path / "own", VECTORS, {"test": vectors(40)})
    assert doubts.look(store) == ([], {"test": 40})
    assert sheet.write(tmp_path / "sheet.html", stores.describe(store.path), store, []) == 24
