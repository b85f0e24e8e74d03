"""What classifiers share: how their settings shape the loss, mix rows, weigh classes, and what they refuse."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from distributed import config
from distributed.run import resolve
from tasks import augment
from tasks.classifier import Classifier
from tasks.digits import Digits
from tasks.errors import UserError
from tasks.reviews import Reviews
from tasks.task import Draw, Image, Label, Number, Picture, Tokens, Vector
from tests import runs

B = 6
MLP = ("task.model=mlp", "precision.dtype=float64", "train.steps=20", "data.batch_size=50")
FACTS = {
    "image": {"mean": [0.3], "std": [0.3]},
    "label": {"classes": [str(i) for i in range(10)], "counts": [10, 30, *[20] * 7, 0]},
}
RECIPES = {
    "mixup": ["task.mixup=0.4"],
    "cutmix": ["task.cutmix=1"],
    "mixup or cutmix": ["task.mixup=0.2", "task.cutmix=1"],
    "smoothing": ["task.smoothing=0.1"],
    "focal": ["task.focal=2"],
    "balanced": ["task.weighting=balanced"],
    "effective": ["task.weighting=effective", "task.effective_beta=0.99"],
    "own weights": ["task.class_weights=1,2,1,1,0.5,1,1,3,1,1"],
    "all": ["task.mixup=0.2", "task.cutmix=1", "task.smoothing=0.1", "task.focal=1", "task.weighting=balanced"],
}


def gathered(task, training=True, rows=B):
    """A batch as the loader hands it over, and as the task transforms it."""
    random = np.random.default_rng(0)
    batch = {
        "image": torch.from_numpy(random.integers(0, 256, (rows, 1, 8, 8)).astype(np.uint8)),
        "label": torch.arange(rows) % 10,
        "row": torch.arange(rows),
    }
    if training and task.partners:
        batch["partner"] = torch.arange(rows).roll(2)[:, None]
    return batch, task.transform(batch, Draw(0, 0, np.arange(rows)), training)


def network_of(task, training=True):
    torch.manual_seed(0)
    return task.build(FACTS, None).train(training)


# ---- the loss


def test_without_settings_the_loss_is_the_cross_entropy():
    task = Digits(model="mlp")
    network, (_, batch) = network_of(task), gathered(task)
    rows = functional.cross_entropy(network(batch["image"]), batch["label"], reduction="none")
    torch.testing.assert_close(task.row_loss(network, batch), rows)
    torch.testing.assert_close(task.loss(network, batch), {"cross_entropy": rows.mean()})


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_is_the_mean_of_the_rows_losses(name):
    task = resolve("digits", config.from_words(["task.model=mlp", *RECIPES[name]])).task
    network, (_, batch) = network_of(task), gathered(task)
    rows = task.row_loss(network, batch)
    assert rows.shape == (B,) and rows.dtype == torch.float32
    torch.testing.assert_close(task.loss(network, batch)["cross_entropy"], rows.mean())
    assert not torch.allclose(
        rows, functional.cross_entropy(network(batch["image"]), torch.arange(B), reduction="none")
    )


@pytest.mark.parametrize("name", RECIPES)
def test_in_evaluation_the_loss_is_the_plain_cross_entropy_of_rows_as_they_are(name):
    task = resolve("digits", config.from_words(["task.model=mlp", *RECIPES[name]])).task
    network, (raw, batch) = network_of(task, training=False), gathered(task, training=False)
    assert torch.equal(batch["image"], raw["image"] / 255) and torch.equal(batch["label"], raw["label"])
    plain = functional.cross_entropy(network(batch["image"]), batch["label"])
    torch.testing.assert_close(task.loss(network, batch)["cross_entropy"], plain)
    torch.testing.assert_close(task.row_loss(network, batch).mean(), plain)
    assert task.predict(network, batch)["label"].shape == (B,)


def test_a_row_loss_of_ones_own_is_what_the_loss_is_a_mean_of():
    class Squared(Digits):
        def row_loss(self, model, batch):
            return super().row_loss(model, batch).square()

    task = Squared(model="mlp")
    network, (_, batch) = network_of(task), gathered(task)
    assert task.loss(network, batch)["cross_entropy"] == task.row_loss(network, batch).mean()


# ---- mixed rows


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_rows_and_labels_are_mixed_as_augment_mixes_them(mixing):
    task = Digits(**mixing)
    raw, batch = gathered(task)
    images, targets = raw["image"] / 255, functional.one_hot(raw["label"], 10).float()
    mix = augment.mixup if "mixup" in mixing else augment.cutmix
    [alpha] = mixing.values()
    expected = mix(images, targets, Draw(0, 0, np.arange(B)), alpha, torch.arange(B).roll(2))
    assert task.partners == 1
    assert torch.equal(batch["image"], expected[0]) and torch.equal(batch["label"], expected[1])
    assert not torch.equal(batch["image"], images)


def test_with_both_each_row_meets_one_of_the_two():
    rows = 400
    task = Digits(mixup=0.4, cutmix=1.0)
    raw, batch = gathered(task, rows=rows)
    images = raw["image"] / 255
    theirs = images[raw["partner"][:, 0]]
    pasted = ((batch["image"] == images) | (batch["image"] == theirs)).flatten(1).all(1)
    assert 0.4 < pasted.float().mean() < 0.6
    torch.testing.assert_close(batch["label"].sum(1), torch.ones(rows))
    share = batch["label"][torch.arange(rows), raw["label"]].view(-1, 1, 1, 1)
    averaged = share * images + (1 - share) * theirs
    torch.testing.assert_close(batch["image"][~pasted], averaged[~pasted])


def test_the_digits_are_not_mixed_by_default():
    task = Digits()
    raw, batch = gathered(task)
    assert task.partners == 0 and torch.equal(batch["label"], raw["label"])


def test_all_numbers_of_a_row_are_averaged_with_one_share():
    class Measured(Classifier):
        fields = {"sizes": Vector(3), "age": Number(), "kind": Label(classes=2)}

    task = Measured(mixup=0.5)
    batch = {
        "sizes": torch.zeros(4, 3) + torch.arange(4.0)[:, None], "age": torch.arange(4.0),
        "kind": torch.tensor([0, 1, 0, 1]), "partner": torch.tensor([[1], [0], [3], [2]]),
    }  # fmt: skip
    out = task.transform(batch, Draw(0, 0, np.arange(4)), True)
    assert torch.equal(out["sizes"], out["age"][:, None].expand(4, 3)) and out["kind"].shape == (4, 2)
    assert not torch.equal(out["age"], batch["age"])


def test_a_transform_that_forgets_to_mix_is_noticed():
    class Plain(Digits):
        def transform(self, batch, draw, training):
            return {**batch, "image": batch["image"] / 255}

    task = Plain(model="mlp", mixup=0.2)
    network, (_, batch) = network_of(task), gathered(task)
    with pytest.raises(UserError, match=r"Plain.transform\(\) leaves rows as they are") as caught:
        task.loss(network, batch)
    assert "self.mixed(batch, draw)" in caught.value.hint


# ---- weights of classes


def rows_weigh(task):
    """What a training row of each class weighs."""
    return network_of(task).get_buffer("class_weights")


COUNTS = torch.tensor(FACTS["label"]["counts"], dtype=torch.float32)


@pytest.mark.parametrize(
    "setting",
    [{"weighting": "balanced"}, {"weighting": "effective"}, {"class_weights": (1.0, *[2.0] * 9)}],
    ids=["balanced", "effective", "own"],
)
def test_the_training_rows_weigh_1_in_the_mean(setting):
    weights = rows_weigh(Digits(model="mlp", **setting))
    assert ((weights * COUNTS).sum() / COUNTS.sum()).item() == pytest.approx(1)


def test_balanced_classes_have_the_same_sum_of_weights_and_an_absent_one_has_none():
    sums = rows_weigh(Digits(model="mlp", weighting="balanced")) * COUNTS
    torch.testing.assert_close(sums[:9], sums[:1].expand(9))
    assert sums[9] == 0


def test_effective_rows_are_those_of_the_paper():
    weights = rows_weigh(Digits(model="mlp", weighting="effective", effective_beta=0.9))
    effective = (1 - 0.9**COUNTS) / (1 - 0.9)
    torch.testing.assert_close(weights[:9] * effective[:9], (weights[0] * effective[0]).expand(9))
    almost = rows_weigh(Digits(model="mlp", weighting="effective", effective_beta=0.999999))
    torch.testing.assert_close(almost, rows_weigh(Digits(model="mlp", weighting="balanced")), rtol=1e-3, atol=0)


def test_own_weights_keep_their_proportions():
    weights = rows_weigh(Digits(model="mlp", class_weights=(1.0, 4.0, *[2.0] * 8)))
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 4.0, *[2.0] * 8]))


def test_a_rows_loss_is_that_of_its_class_times_its_weight():
    task = Digits(model="mlp", weighting="balanced")
    network, (_, batch) = network_of(task), gathered(task)
    plain = functional.cross_entropy(network(batch["image"]), batch["label"], reduction="none")
    torch.testing.assert_close(task.row_loss(network, batch), plain * rows_weigh(task)[batch["label"]])


def test_weights_are_in_no_checkpoint():
    assert network_of(Digits(model="mlp", weighting="balanced")).state_dict().keys() == (
        network_of(Digits(model="mlp")).state_dict().keys()
    )


def wrapped_rows(world, task):
    network, (_, batch) = network_of(task), gathered(task)
    wrapped = world.wrap(network)
    assert isinstance(wrapped, DistributedDataParallel)
    return torch.equal(task.row_loss(wrapped, batch), task.row_loss(network, batch))


def test_weights_are_found_under_what_wraps_the_network(ranks):
    task = Digits(model="mlp", weighting="balanced")
    network, (_, batch) = network_of(task), gathered(task)
    compiled = torch.compile(network, backend="eager")
    assert torch.equal(task.row_loss(compiled, batch), task.row_loss(network, batch))
    assert all(ranks(2, wrapped_rows, task))


def test_the_weights_of_a_teacher_inside_are_not_taken_for_the_networks_own():
    class Inside(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher, self.student = teacher, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x):
            return self.student(x)

    class Taught(Digits):
        def network(self, facts, load):
            return Inside(load("first"))

    teacher = network_of(Digits(model="mlp", weighting="balanced"))
    task = Taught(class_weights=(1.0, *[2.0] * 9))
    network = task.build(FACTS, lambda reference: teacher)
    assert torch.equal(task._found(network), network.get_buffer("class_weights"))
    assert not torch.equal(task._found(network), teacher.get_buffer("class_weights"))


def test_a_build_that_leaves_the_weights_out_is_noticed():
    class Own(Digits):
        def build(self, facts, load):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    task = Own(weighting="balanced")
    network, (_, batch) = network_of(task), gathered(task)
    with pytest.raises(UserError, match=r"Own.build\(\) replaces") as caught:
        task.loss(network, batch)
    assert "network()" in caught.value.hint


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "reason", "hint"),
    [
        (["task.class_weights=1,2,3"], "task.class_weights=1,2,3: 3 numbers for 10 classes", "0, 1, 2, 3, 4"),
        (["task.class_weights=1,-2,3"], "task.class_weights=1,-2,3: a weight cannot be below 0", "relative"),
        (["task.class_weights=1,2", "task.weighting=balanced"], "both say what classes weigh", "set one of them"),
        (["task.effective_beta=0.9"], "task.weighting is none", "task.weighting=effective"),
        (["task.weighting=balanced", "task.effective_beta=0.9"], "task.weighting is balanced", "effective"),
        (["task.smoothing=1"], "task.smoothing=1 (command line): expected a number, at least 0, below 1", "spread"),
        (["task.weighting=balancd"], "expected none or balanced or effective", "did you mean 'balanced'?"),
        (["task.mixup=-1"], "task.mixup=-1 (command line): expected a number, at least 0", "averaged"),
        (["task.stochastic_depth=0.1"], "task.model is cnn", "task.model=residual"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_is_read(words, reason, hint):
    with pytest.raises(UserError) as caught:
        resolve("digits", config.from_words(words))
    assert reason in caught.value.message and hint in caught.value.hint


def test_weights_that_leave_no_row_anything_are_refused():
    with pytest.raises(UserError, match="no class that has rows weighs anything") as caught:
        network_of(Digits(class_weights=(*[0.0] * 9, 1.0)))
    assert "10,30,20" in caught.value.hint


def test_weights_are_counted_where_the_classes_are_learned():
    class Shown(Classifier):
        fields = {"sizes": Vector(3), "kind": Label()}

        def network(self, facts, load):
            return nn.Linear(3, len(facts["kind"]["classes"]))

    facts = {"kind": {"classes": ["cat", "dog", "owl"], "counts": [1, 1, 2]}}
    assert Shown(class_weights=(1.0, 1.0, 1.0)).build(facts, None).get_buffer("class_weights").tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="2 numbers for 3 classes") as caught:
        Shown(class_weights=(1.0, 1.0)).build(facts, None)
    assert caught.value.hint == "one a class, in this order: cat, dog, owl"
    with pytest.raises(UserError, match="task.mixup needs classes that are declared, and 'kind' learns its own"):
        Shown(mixup=0.2)


@pytest.mark.parametrize(
    ("inputs", "mixing", "reason"),
    [
        ({"words": Tokens()}, {"mixup": 0.2}, "task.mixup cannot mix rows of 'words', which is Tokens"),
        ({"words": Tokens()}, {"cutmix": 1.0}, "task.cutmix cannot mix rows of 'words', which is Tokens"),
        ({"photo": Picture()}, {"mixup": 0.2}, "task.mixup cannot mix rows of 'photo', which is Picture"),
        (
            {"sizes": Vector(3)},
            {"cutmix": 1.0},
            "task.cutmix is for tasks whose one input is a picture; these are sizes",
        ),
        ({"image": Image(1, 8, 8), "age": Number()}, {"mixup": 0.2, "cutmix": 1.0}, "these are image, age"),
    ],
)
def test_columns_that_cannot_be_mixed_are_refused(inputs, mixing, reason):
    class Some(Classifier):
        fields = {**inputs, "kind": Label(classes=2)}

    Some(smoothing=0.1, focal=2.0, weighting="balanced")
    with pytest.raises(UserError, match=reason):
        Some(**mixing)


def test_reviews_are_smoothed_and_not_mixed():
    assert Reviews(smoothing=0.1).partners == 0
    with pytest.raises(UserError, match="'tokens', which is Tokens"):
        Reviews(mixup=0.2)


def test_encoded_pictures_can_be_mixed_by_a_task_that_decodes_them():
    class Photos(Classifier):
        fields = {"photo": Picture(), "kind": Label(classes=2)}

        def transform(self, batch, draw, training):
            batch = {**batch, "photo": batch["photo"].resized((4, 4)).float() / 255}
            return self.mixed(batch, draw) if training else batch

    assert Photos(mixup=0.2, cutmix=1.0).partners == 1


def test_a_classifier_without_one_label_is_told_to_be_a_task():
    class Prices(Classifier):
        fields = {"sizes": Vector(3), "price": Number(target=True)}

    with pytest.raises(TypeError, match=r"Prices is a Classifier, whose one target is a Label; .* \['price'\]"):
        Prices(mixup=0.2)
    with pytest.raises(TypeError, match="Prices has no network: define network"):
        Prices().build({}, None)


def test_every_setting_says_what_it_is():
    known = config.settings_of(Classifier, "task")
    assert {f.name for f in dataclasses.fields(Classifier)} - {"source"} == {
        name.partition(".")[2] for name, setting in known.items() if setting.meaning and "source" not in name
    }


# ---- one worker and several


@pytest.mark.parametrize("name", RECIPES)
def test_several_ranks_and_micro_batches_learn_what_one_learns(tmp_path, stores, ranks, name):
    one = runs.train(tmp_path, stores, "digits", *MLP, *RECIPES[name], name="one")
    several = runs.begin(tmp_path, stores, "digits", *MLP, *RECIPES[name], "data.micro_batch_size=9", name="several")
    ranks(2, runs.work, several.to_plain())
    assert runs.distance(runs.parameters(one), runs.parameters(several)) < 1e-9
    here, there = ([row["loss"] for row in runs.rows(run) if "loss" in row] for run in (one, several))
    assert len(here) == 2 and here == pytest.approx(there, abs=1e-9)  # of the training and of the validation


def test_each_recipe_is_another_training(tmp_path, stores):
    few = ("task.model=mlp", "train.steps=5", "data.batch_size=50")
    learned = [
        runs.parameters(runs.train(tmp_path, stores, "digits", *few, *more, name=str(number)))
        for number, more in enumerate([[], *RECIPES.values()])
    ]
    for number, one in enumerate(learned):
        assert all(runs.distance(one, other) > 1e-6 for other in learned[:number])
