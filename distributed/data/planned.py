"""A split as a run's settings want it: which rows, in which order, of which domains."""

from distributed.data.loader import ONE, Loader, Transform
from distributed.data.order import Balanced, Plan, Sample, Weighted, seed_of
from distributed.data.settings import Data
from distributed.data.store import Rows, Store
from distributed.world import World
from tasks.errors import UserError, did_you_mean
from tasks.fields import Label, Number, Weight


def loader(
    store: Store, split: str, data: Data, seed: int, transform: Transform, world: World, *, training: bool = True,
    partners: int = 0,
) -> Loader:  # fmt: skip
    """Returns what feeds a rank with a split: for training in the order of `data`, else in the order it is stored.

    With `data.overfit` it is the training split, and unaugmented, whatever is asked for. Raises UserError for a
    sampling or an order that the columns do not allow.
    """
    if data.overfit:
        split, transform, partners = "train", _unaugmented(transform), 0
    sets = {name: store.rows(split, data.most, name or None) for name in store.domains(split) or [ONE]}
    epoch = store.epoch_rows(split, data.most)
    plans = {}
    for name, rows in sets.items():
        order, sample = (data.order, _sample(rows, store, data)) if training else ("sequential", None)
        lengths = rows.lengths if order == "length" else None
        # Each domain has permutations and draws of its own: else rows would meet the same partner for ever.
        its_seed = seed_of(seed, *name.encode()) if name else seed
        plans[name] = Plan(epoch, data.batch_size, its_seed, order, lengths, sample, len(rows))
    prefetch = data.prefetch if training else 0
    return Loader(
        sets, plans, transform, rank=world.rank, world_size=world.size, device=world.device, prefetch=prefetch,
        resident=data.resident == "auto", partners=partners,
    )  # fmt: skip


def _unaugmented(transform: Transform) -> Transform:
    return lambda batch, draw, training: transform(batch, draw, False)


def _sample(rows: Rows, store: Store, data: Data) -> Sample | None:
    if data.sample != "weighted" and data.weights:
        raise UserError(f"data.weights={data.weights} acts with data.sample=weighted only", "set both, or neither")
    if data.sample == "balanced":
        labels = [name for name, field in store.fields.items() if isinstance(field, Label)]
        if not labels:
            raise UserError("data.sample=balanced needs a column of classes, a Label", "use data.sample=all")
        return Balanced(rows.dense(labels[0]))
    if data.sample == "weighted":
        numbers = [name for name, field in store.fields.items() if isinstance(field, Number)]
        weights = [name for name in numbers if isinstance(store.fields[name], Weight)]
        name = data.weights or next(iter(weights), "")
        if name not in numbers:
            near = did_you_mean(name, numbers) or "declare a Weight that row() fills"
            raise UserError(f"data.weights='{name}' is no column of numbers", near)
        return Weighted(rows.dense(name))
    return None
