"""How losses become changed parameters."""

import pytest
import torch
from torch import nn

from distributed.optimizers import OPTIMIZERS, create, settings_class
from distributed.precision import Precision
from distributed.run import Train
from distributed.update import Updater
from distributed.world import World
from tasks.task import frozen

SGD = OPTIMIZERS["sgd"]


def linear(value: float = 1.0) -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def updater_of(
    module: nn.Module, clip_norm: float | None = None, precision: Precision = Precision(), **settings
) -> Updater:
    names = list(module) if isinstance(module, nn.ModuleDict) else ["model"]
    one = {name: settings.get(name, SGD(name="sgd", lr=1.0)) for name in names}
    return Updater(module, one, precision, World(), train=Train(clip_norm=clip_norm))


def weight(net: nn.Module) -> float:
    return net.weight.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_and_is_restored_to_the_bit(name):
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    settings = OPTIMIZERS[name](name=name, lr=0.1, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {}))
    updaters = [updater_of(net, model=settings) for net in nets]

    def step(which: int, at: int) -> None:
        updaters[which].accumulate(at, 1, last=True)(nets[which](torch.full((1, 3), float(at + 1))).square().sum())
        updaters[which].apply(at, 1.0)

    for at in range(3):
        step(0, at)
    nets[1].load_state_dict(nets[0].state_dict())
    tensors, numbers = updaters[0].state()
    updaters[1].restore({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    for which in (0, 1):
        step(which, 3)
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert torch.equal(nets[0].bias, nets[1].bias)


def test_settings_reach_torch():
    settings = OPTIMIZERS["adamw"](name="adamw", lr=0.5, beta1=0.8, weight_decay=0.2)
    group = create(settings, [nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.999), 0.2)
    assert not hasattr(settings_class("torch.optim:Adadelta")(), "nesterov")


def test_updates_only_accumulate_until_apply_and_the_factor_scales_the_rate():
    net = linear()
    updater = updater_of(net)
    for part in (0.25, 0.75):
        updater.accumulate(0, part, last=part == 0.75)(net(torch.ones(1, 1)).sum())
        assert weight(net) == 1
    updater.apply(0, 0.5)
    assert weight(net) == 0.5
    assert net.weight.grad is None


def test_a_second_update_of_one_name_and_an_unknown_name_are_refused():
    net = linear()
    update = updater_of(net).accumulate(0, 1, last=True)
    update(net(torch.ones(1, 1)).sum())
    with pytest.raises(ValueError, match="twice in one step"):
        update(net(torch.ones(1, 1)).sum())
    with pytest.raises(ValueError, match="entries are model"):
        update(net(torch.ones(1, 1)).sum(), "generator")


def test_a_loss_moves_its_own_entry_only_and_all_step_together():
    model = nn.ModuleDict({"a": linear(2.0), "b": linear(3.0)})
    updater = updater_of(model)
    update = updater.accumulate(0, 1, last=True)
    product = model["b"](model["a"](torch.ones(1, 1))).sum()  # a * b
    update(product, "a")
    update(model["b"](torch.ones(1, 1)).sum(), "b")
    updater.apply(0, 1.0)
    assert weight(model["a"]) == 2.0 - 3.0  # the gradient saw b as it was
    assert weight(model["b"]) == 3.0 - 1.0  # the first loss left nothing in b


def test_an_entry_may_step_every_so_many_batches():
    model = nn.ModuleDict({"a": linear(), "b": linear()})
    updater = updater_of(model, a=SGD(name="sgd", lr=1.0, every=3))
    for step in range(6):
        update = updater.accumulate(step, 1, last=True)
        for name in ("a", "b"):
            update(model[name](torch.ones(1, 1)).sum(), name)
        updater.apply(step, 1.0)
    assert (weight(model["a"]), weight(model["b"])) == (1.0 - 2, 1.0 - 6)


def test_a_part_without_units_has_zero_gradients_even_where_its_loss_is_nan():
    net = linear()
    updater = updater_of(net)
    updater.accumulate(0, 0, last=True)(net(torch.ones(1, 1)).sum() * float("nan"))
    assert float(net.weight.grad) == 0


def test_gradients_are_clipped_by_their_norm():
    net = linear(10.0)
    updater = updater_of(net, clip_norm=0.5)
    updater.accumulate(0, 1, last=True)(net(torch.full((1, 1), 8.0)).sum())
    updater.apply(0, 1.0)
    assert weight(net) == pytest.approx(9.5)


def test_gradients_are_clipped_as_they_are_and_not_as_float16_scales_them():
    net = linear(10.0)
    updater = updater_of(net, clip_norm=0.5, precision=Precision(dtype="float16"))
    updater.accumulate(0, 1, last=True)(net(torch.full((1, 1), 0.25)).sum())
    updater.apply(0, 1.0)
    assert weight(net) == pytest.approx(9.75, abs=1e-5)


def test_an_overflow_in_float16_skips_the_step_and_the_scale_is_resumed():
    nets = linear(1.0), linear(1.0)
    updaters = [updater_of(net, precision=Precision(dtype="float16")) for net in nets]
    updaters[0].accumulate(0, 1, last=True)(nets[0](torch.full((1, 1), 1e38)).sum())
    updaters[0].apply(0, 1.0)
    assert weight(nets[0]) == 1.0
    updaters[1].restore(*updaters[0].state())
    assert updaters[1].scaler.get_scale() == updaters[0].scaler.get_scale() < 65536


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter group, as some optimizers do."""

    def __init__(self, params, lr: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["k"] = 0

    def step(self, closure=None):
        self.param_groups[0]["k"] += 1
        return super().step(closure)


def test_what_an_optimizer_counts_in_its_groups_is_resumed():
    nets = linear(), linear()
    settings = settings_class("tests.core.test_update:Counting")(name="tests.core.test_update:Counting", lr=1.0)
    updaters = [updater_of(net, model=settings) for net in nets]
    for step in range(3):
        updaters[0].accumulate(step, 1, last=True)(nets[0](torch.ones(1, 1)).sum())
        updaters[0].apply(step, 1.0)
    updaters[1].restore(*updaters[0].state())
    assert updaters[1].entries["model"].optimizer.param_groups[0]["k"] == 3


def test_frozen_lets_gradients_through_and_collects_none():
    judge, made = linear(2.0), torch.ones(1, 1, requires_grad=True)
    with frozen(judge):
        judge(made).sum().backward()
    assert float(made.grad) == 2.0
    assert judge.weight.grad is None
    assert judge.weight.requires_grad


def test_a_momentum_begins_at_0_where_float16_overflows_in_the_first_step():
    net = linear()
    updater = updater_of(net, precision=Precision(dtype="float16"), model=SGD(name="sgd", lr=1.0, momentum=0.5))
    for step, value in enumerate((1e38, 0.25)):
        updater.accumulate(step, 1, last=True)(net(torch.full((1, 1), value)).sum())
        updater.apply(step, 1.0)
    assert weight(net) == 0.75


def test_a_parameter_may_get_its_first_gradient_after_others_have_a_momentum():
    net = nn.ModuleList([linear(), linear()])
    updater = updater_of(net, model=SGD(name="sgd", lr=1.0, momentum=0.5))
    for step, used in enumerate((net[:1], net)):
        updater.accumulate(step, 1, last=True)(sum(one(torch.ones(1, 1)) for one in used).sum())
        updater.apply(step, 1.0)
    assert (weight(net[0]), weight(net[1])) == (1 - 1 - 1.5, 1 - 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_entry_that_gets_no_loss_stays_as_it_is(dtype):
    model = nn.ModuleDict({"a": linear(), "b": linear()})
    updater = updater_of(model, precision=Precision(dtype=dtype), a=SGD(name="sgd", lr=1.0, l1=0.5))
    updater.accumulate(0, 1, last=True)(model["b"](torch.ones(1, 1)).sum(), "b")
    updater.apply(0, 1.0)
    assert (weight(model["a"]), weight(model["b"])) == (1.0, 0.0)


def test_what_an_updater_takes_back_stays_as_it_was_told():
    net = linear()
    updater = updater_of(net, model=OPTIMIZERS["adam"](name="adam"))

    def step(at: int) -> None:
        updater.accumulate(at, 1, last=True)(net(torch.ones(1, 1)).sum())
        updater.apply(at, 1.0)

    step(0)
    told, numbers = updater.state()
    told = {name: tensor.clone() for name, tensor in told.items()}
    kept = {name: tensor.clone() for name, tensor in told.items()}
    updater.restore(told, numbers)
    step(1)
    assert all(torch.equal(told[name], kept[name]) for name in kept)
