from distributed import checkpoint
from distributed.config import Given
from distributed.hosts import trial
from distributed.world import World
import json


def test_x(tmp_path, stores):
    given = {
        n: Given(v, "test")
        for n, v in {
            "task.model": "mlp",
            "data.limit": 300,
            "train.epochs": 4,
            "data.batch_size": 50,
            "checkpoint.background": True,
            "checkpoint.every": 1,
            "log.tensorboard": False,
        }.items()
    }
    setup = trial.Setup("digits", given, {}, tmp_path / "runs", stores, tmp_path / "sweep")
    told = []

    def report(epoch, value, shown, last):
        newest, _ = checkpoint.newest(setup.folder("0000"))
        told.append((epoch, newest.step if newest else None, last))
        return "continue"

    trial.work(setup, "0000", {}, World(), report)
    print(told)
    for epoch, step, last in told:
        assert step >= epoch * told[-1][1] / 4
    assert [t[0] for t in told] == [1, 2, 3, 4] and told[-1][2]
