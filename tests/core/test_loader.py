"""From a store to batches: the same rows whatever is gathered at once, made ahead, resident or shared."""

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed.data import convert, loader, planned
from distributed.data.loader import Loader
from distributed.data.order import Plan
from distributed.data.resident import Resident
from distributed.data.settings import Data
from distributed.data.store import Store
from distributed.data.write import write
from distributed.world import World
from tasks.errors import UserError
from tasks.task import Boxes, Example, Image, Label, Number, Picture, Ragged, Source, Task, Text, Tokens, Weight

ROWS = 230
FIELDS = {"image": Image(1, 2, 2), "tokens": Tokens(), "boxes": Boxes(), "text": Text(), "label": Label(classes=3)}


def row(i: int) -> dict:
    boxes = [[x, 0, x + 1 + i, 9] for x in range(i % 3)]
    return {
        "image": np.full((1, 2, 2), i % 256),
        "tokens": [i] * (i % 7),
        "boxes": boxes,
        "text": f"<{i}>",
        "label": i % 3,
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write(tmp_path_factory.mktemp("stores") / "x", FIELDS, {"train": [row(i) for i in range(ROWS)]})


def drawn(batch: dict, draw, training: bool) -> dict:
    return {**batch, "draw": draw.uniform()}


def seen(batches) -> dict[int, tuple]:
    """What came for each row, however it was batched."""
    found = {}
    for batch in batches:
        tokens, boxes, padded = batch["tokens"].split(), batch["boxes"].split(), batch["tokens"].padded()
        for place, number in enumerate(batch["row"].tolist()):
            assert padded[place].tolist() == tokens[place].tolist() + [0] * (padded.shape[1] - len(tokens[place]))
            assert number not in found
            found[number] = (
                batch["image"][place, 0, 0, 0].item(), tokens[place].tolist(), boxes[place].tolist(),
                batch["text"][place], batch["label"][place].item(), batch["draw"][place].item() if "draw" in batch else None,
            )  # fmt: skip
    return found


@pytest.mark.parametrize("order", ["shuffle", "length", "sequential"])
@pytest.mark.parametrize("block", [1, 300, 10**6])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_epoch_is_the_same_however_much_is_gathered_or_made_ahead(store, monkeypatch, order, block, prefetch):
    monkeypatch.setattr(loader, "BLOCK_BYTES", block)
    rows = store.rows("train")
    plan = Plan(ROWS, 16, 3, order, rows.lengths)
    found = seen(Loader(rows, plan, drawn, prefetch=prefetch).epoch(1))
    plain = Loader(rows, Plan(ROWS, 16, 3), drawn)
    draws = {number: values[-1] for number, values in seen(plain.epoch(1)).items()}
    for i in range(ROWS):
        want = row(i)
        assert found[i] == (i, want["tokens"], want["boxes"], want["text"], want["label"], draws[i])


def test_the_ranks_and_micro_batches_of_a_batch_are_the_batch(store):
    rows = store.rows("train")
    for k in range(5):
        whole = seen(Loader(rows, Plan(ROWS, 48, 3), drawn).micro_batches(2, k)[1])
        parts = {}
        for rank in range(3):
            sizes, batches = Loader(rows, Plan(ROWS, 48, 3), drawn, rank=rank, world_size=3).micro_batches(2, k, 7)
            batches = list(batches)
            assert sizes == [len(batch["row"]) for batch in batches]
            parts |= seen(batches)
        assert parts == whole


def test_evaluation_sees_every_row_once_on_any_number_of_ranks(store):
    rows = store.rows("train")
    for size in (1, 3):
        found = {}
        for rank in range(size):
            found |= seen(Loader(rows, Plan(ROWS, 16, 0, "sequential"), rank=rank, world_size=size).in_order(7))
        assert sorted(found) == list(range(ROWS))


def test_an_epoch_can_be_entered_anywhere(store):
    rows, plan = store.rows("train"), Plan(ROWS, 16, 3)
    whole = [batch["row"].tolist() for batch in Loader(rows, plan).epoch(4)]
    for k in (0, 3, plan.steps - 1):
        for prefetch in (0, 2):
            entered = Loader(rows, plan, prefetch=prefetch)
            assert [next(entered.micro_batches(4, j)[1])["row"].tolist() for j in range(k, plan.steps)] == whole[k:]


def test_a_transformation_that_draws_later_than_at_first_is_refused(store):
    def late(batch, draw, training):
        return {**batch, "noise": torch.rand(2)} if len(seen_batches) == 5 or seen_batches.append(1) else batch

    seen_batches: list[int] = []
    with pytest.raises(UserError, match=r"drew from torch's own generator \(aten.rand"):
        list(Loader(store.rows("train"), Plan(ROWS, 16, 3), late, prefetch=2).epoch(0))
    own = torch.Generator()
    quiet = Loader(
        store.rows("train"), Plan(ROWS, 16, 3), lambda b, d, t: {**b, "x": torch.rand(2, generator=own)}, prefetch=2
    )
    assert len(list(quiet.epoch(0))) == quiet.plan.steps


def test_micro_batches_are_made_one_by_one_and_no_more_than_asked_for_ahead(store):
    made = []

    def count(batch, draw, training):
        made.append(len(batch["row"]))
        return batch

    _, batches = Loader(store.rows("train"), Plan(ROWS, 60, 3), count, prefetch=0).micro_batches(0, 0, 10)
    assert made == []
    next(batches)
    assert len(made) == 1
    made.clear()
    ahead = Loader(store.rows("train"), Plan(ROWS, 60, 3), count, prefetch=2)
    _, batches = ahead.micro_batches(0, 0, 10)
    for _ in range(2):
        next(batches)
    ahead._ahead.shutdown()
    assert len(made) <= 4, "two that were asked for, two ahead"


def test_a_transformation_that_draws_from_torchs_own_generator_is_never_run_ahead(store):
    threads = set()

    def noisy(batch, draw, training):
        threads.add(threading.current_thread().name)
        return {**batch, "noise": torch.rand(2)}

    for batch in Loader(store.rows("train"), Plan(ROWS, 16, 3), noisy, prefetch=2).epoch(0):
        assert "noise" in batch
    assert threads == {threading.main_thread().name}

    def quiet(batch, draw, training):
        threads.add(threading.current_thread().name)
        return batch

    list(Loader(store.rows("train"), Plan(ROWS, 16, 3), quiet, prefetch=2).epoch(0))
    assert len(threads) == 2, "one that draws from `draw` alone is"


def test_an_error_in_a_batch_made_ahead_is_raised_where_the_batch_is_wanted(store):
    def failing(batch, draw, training):
        if 100 in batch["row"]:
            raise ValueError("row 100")
        return batch

    with pytest.raises(ValueError, match="row 100"):
        list(Loader(store.rows("train"), Plan(ROWS, 16, 3), failing, prefetch=2).epoch(0))


def test_a_resident_split_gives_the_same_columns(store):
    rows = store.rows("train", limit=50)
    resident = Resident(rows, torch.device("cpu"))
    picked = np.array([3, 49, 3, 0])
    plain, there = rows.take(picked), resident.take(picked)
    assert list(there) == list(plain)
    for name in ("image", "label"):
        assert np.array_equal(there[name].numpy(), plain[name])
    for name in ("tokens", "boxes"):
        assert isinstance(there[name], Ragged)
        assert np.array_equal(there[name].values.numpy(), plain[name][0])
        assert np.array_equal(there[name].lengths.numpy(), plain[name][1])
    assert there["text"] == plain["text"]


# ---- what the settings of a run make of it


class Domains(Task):
    """Horses and zebras: two sets of other sizes, unpaired."""

    fields = {"image": Image(1, 1, 1), "label": Label(classes=3), "weight": Weight()}

    def examples(self, source: Source):
        for i in range(120):
            yield Example({"image": [[[i]]], "label": i % 3, "weight": 1.0}, domain="horses")
        for i in range(40):
            yield Example({"image": [[[200 + i % 50]]], "label": 0, "weight": float(i % 2)}, domain="zebras")


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> Store:
    return Store(convert.prepare(Domains(), "domains", Data(), tmp_path_factory.mktemp("stores")))


def test_a_batch_of_two_domains_holds_as_many_rows_of_each(domains):
    assert domains.domains() == ["horses", "zebras"]
    feed = planned.loader(domains, "train", Data(batch_size=10), 0, Domains().transform, World())
    horses, zebras = (len(domains.rows("train", domain=name)) for name in ("horses", "zebras"))
    assert len(feed) == horses > zebras
    rows = {"horses": [], "zebras": []}
    for batch in feed.epoch(0):
        assert len(batch["horses"]["row"]) == len(batch["zebras"]["row"]) == len(batch["row"])
        assert batch["horses"]["image"].dtype == torch.float32
        assert batch["horses"]["image"].max() < 200 / 255 <= batch["zebras"]["image"].min()
        for name, column in rows.items():
            column += batch[name]["row"].tolist()
    assert sorted(rows["horses"]) == list(range(horses))
    assert sorted(rows["zebras"][:zebras]) == list(range(zebras)), "the smaller set comes again when it is used up"


def test_the_rows_of_two_domains_of_one_size_meet_in_ever_new_pairs(tmp_path):
    class Twins(Task):
        fields = {"image": Image(1, 1, 1), "label": Label(classes=2)}

        def examples(self, source: Source):
            for i in range(240):
                yield Example(
                    {"image": [[[i]]], "label": i % 2},
                    "train" if i < 200 else ("validation", "test")[i % 2],
                    domain="ab"[i // 2 % 2],
                )

    twins = Store(convert.prepare(Twins(), "twins", Data(), tmp_path))
    feed = planned.loader(twins, "train", Data(batch_size=10), 0, Twins().transform, World())
    pairs = {
        pair for epoch in range(5) for batch in feed.epoch(epoch)
        for pair in zip(batch["a"]["row"].tolist(), batch["b"]["row"].tolist(), strict=True)
    }  # fmt: skip
    assert len(pairs) > 450, "of 500"


def test_evaluation_sees_each_row_of_each_domain_once(domains):
    for size in (1, 3):
        found = {"horses": [], "zebras": []}
        for rank in range(size):
            world = World(rank, size)
            feed = planned.loader(domains, "train", Data(), 0, Domains().transform, world, training=False)
            for batch in feed.in_order(9):
                for name in set(batch) - {"row"}:
                    found[name] += batch[name]["row"].tolist()
        for name, rows in found.items():
            assert sorted(rows) == list(range(len(domains.rows("train", domain=name))))
    assert feed.rows == sum(map(len, found.values()))


def test_the_draws_of_two_domains_are_not_the_same(domains):
    told = []

    def transform(batch, draw, training):
        told.append({name: one.uniform().tolist() for name, one in draw.items()})
        return batch

    next(planned.loader(domains, "train", Data(batch_size=10), 0, transform, World()).epoch(0))
    assert told[0]["horses"] != told[0]["zebras"]


def test_classes_are_balanced_and_rows_weighted_on_request(domains, store):
    balanced = planned.loader(store, "train", Data(batch_size=30, sample="balanced"), 0, drawn, World())
    assert all(
        batch["label"].bincount().tolist() == [10, 10, 10] for batch in balanced.epoch(0) if len(batch["row"]) == 30
    )
    weighted = planned.loader(domains, "train", Data(sample="weighted"), 0, Domains().transform, World())
    zebras = torch.cat([batch["zebras"]["weight"] for batch in weighted.epoch(0)])
    assert zebras.tolist() == [1.0] * len(zebras)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Data(sample="weighted", weights="wieght"), "'wieght' is no column of numbers"),
        (Data(weights="weight"), "acts with data.sample=weighted only"),
    ],
)
def test_impossible_samplings_are_refused(domains, data, words):
    with pytest.raises(UserError, match=words):
        planned.loader(domains, "train", data, 0, Domains().transform, World())


def test_balanced_sampling_needs_classes(tmp_path):
    plain = write(tmp_path / "x", {"number": Number()}, {"train": [{"number": 1.0}] * 9})
    with pytest.raises(UserError, match="needs a column of classes"):
        planned.loader(plain, "train", Data(sample="balanced"), 0, drawn, World())


# ---- memory


def _read_all(path: Path, ready, release, told) -> None:
    rows = Store(path).rows("train")
    total = 0
    for batch in Loader(rows, Plan(len(rows), 256, 0)).epoch(0):
        total += int(batch["image"][:, 0, 0, 0].sum())
    ready.wait()  # all have read everything
    told.put((total, _shared_pages(path)))
    release.wait()


def _shared_pages(path: Path) -> tuple[int, int]:
    """PSS and RSS, in bytes, of the mappings of a store's files in this process (proc(5), smaps)."""
    pss = rss = 0
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            mine = str(path) in line
        elif mine and words[0] == "Pss:":
            pss += int(words[1]) * 1024
        elif mine and words[0] == "Rss:":
            rss += int(words[1]) * 1024
    return pss, rss


def test_eight_processes_share_one_copy_of_the_data(tmp_path):
    count, image = 8, np.zeros((3, 64, 64), np.uint8)
    store = write(
        tmp_path / "x", {"image": Image(3, 64, 64)}, {"train": [{"image": image + i % 5} for i in range(1500)]}
    )
    size = sum(path.stat().st_size for path in store.path.glob("*.arrow"))
    context = multiprocessing.get_context("forkserver")
    ready, release, told = context.Barrier(count), context.Event(), context.Queue()
    processes = [context.Process(target=_read_all, args=(store.path, ready, release, told)) for _ in range(count)]
    for process in processes:
        process.start()
    answers = [told.get(timeout=120) for _ in processes]
    release.set()
    for process in processes:
        process.join()
        process.close()
    told.close()
    assert len({total for total, _ in answers}) == 1
    assert all(rss > 0.95 * size for _, (_, rss) in answers), "each of them sees all of the data"
    assert sum(pss for _, (pss, _) in answers) < 1.1 * size, "and together they hold them once"


def test_pictures_are_views_of_the_mapped_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    store = write(tmp_path / "x", {"photo": Picture()}, {"train": [{"photo": pixels}] * 10})
    taken = store.rows("train").take(np.array([1, 5]))["photo"]
    assert all(not view.flags.owndata and not view.flags.writeable for view in taken.data)
    assert all(np.array_equal(one.permute(1, 2, 0).numpy(), pixels) for one in taken.decoded())


# ---- partners


def mixed(batch: dict, draw, training: bool) -> dict:
    """Each picture with the mean of its partners', by a share that is drawn."""
    images = batch["image"].double()
    share = draw.uniform().double().view(-1, 1, 1, 1)
    theirs = images[batch["partner"]].mean(1)
    return {**batch, "mixed": share * images + (1 - share) * theirs, "partners": batch["row"][batch["partner"]]}


def mixtures(partners: int, k: int, ranks: int, most: int | None, store: Store) -> dict[int, tuple]:
    found = {}
    for rank in range(ranks):
        feed = Loader(store.rows("train"), Plan(ROWS, 48, 3), mixed, rank=rank, world_size=ranks, partners=partners)
        sizes, batches = feed.micro_batches(1, k, most)
        for size, batch in zip(sizes, batches, strict=True):
            assert "partner" not in batch
            assert {len(batch[name]) for name in ("row", "image", "mixed", "partners", "text", "label")} == {size}
            assert len(batch["tokens"].lengths) == size
            for place, number in enumerate(batch["row"].tolist()):
                found[number] = (
                    batch["partners"][place].tolist(),
                    batch["mixed"][place].flatten().tolist(),
                    batch["text"][place],
                )
    return found


@pytest.mark.parametrize("partners", [1, 3])
def test_a_row_is_mixed_with_the_same_partners_whatever_worker_it_falls_to(store, partners):
    for k in (0, 3):
        whole = mixtures(partners, k, 1, None, store)
        assert mixtures(partners, k, 1, 7, store) == whole
        assert mixtures(partners, k, 3, None, store) == whole
        assert mixtures(partners, k, 3, 5, store) == whole
        for number, (theirs, _, text) in whole.items():
            assert number not in theirs
            assert len(set(theirs)) == partners
            assert set(theirs) <= set(whole), "partners are rows of the same global batch"
            assert text == f"<{number}>"
    assert [theirs for theirs, *_ in mixtures(partners, 0, 1, None, store).values()] != [
        theirs for theirs, *_ in mixtures(partners, 1, 1, None, store).values()
    ]


def test_a_batch_of_one_row_is_its_own_partner(store):
    feed = Loader(store.rows("train"), Plan(ROWS, 1, 3), mixed, partners=1)
    batch = next(feed.epoch(0))
    assert batch["partners"].tolist() == [batch["row"].tolist()]
