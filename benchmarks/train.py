"""How fast whipray trains, beside what is commonly used for it: benchmarks/README.md.

Ours is `distributed.loop`, over a store, as every host of a run iterates it. All have the same cores: one for the rows
that count samples, all that there are for the others.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of a clone

from benchmarks import workloads
from benchmarks.side_by_side import Contender, Measure, Row, in_turns, pin, report, speed
from distributed import config, loop
from distributed.data.loader import _keep_freed_memory
from distributed.data.store import Store
from distributed.hosts import job
from distributed.run import Run, resolve
from distributed.world import World

HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "lightning", "accelerate", "ray")
BETWEEN = 16  # steps from one checkpoint to the next, where their pauses are measured


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    rows: int  # of the training split, in batches of 128; half as many of texts
    seconds: float  # that one figure takes
    least: int  # steps that one figure takes
    rounds: int
    starts: int  # rounds of those that start programs
    thorough: bool  # every peer with every number of workers, and those that take long to start


AMOUNTS = {
    "all": Amount(32_768, 2.0, 3, 7, 7, True),
    "few": Amount(2_048, 0.05, 1, 2, 1, False),
    "tiny": Amount(1_024, 0.01, 1, 1, 1, False),  # shows that it works, not how fast
}


# ---- the works, and how people hold their rows


@dataclass(frozen=True)
class Work:
    """What is trained: a task of `workloads.py` for us; for the others its network, with rows as people hold them."""

    task: type[workloads.Work]
    batch_size: int
    dataset: Callable[[dict[str, Any]], Dataset]
    loss: Callable[[nn.Module, Any], Tensor]
    held: Callable[[dict[str, Any]], tuple[Tensor, ...]]  # all rows as tensors, for the bare loop
    batch: Callable[..., Any]  # of the bare loop: from some rows of those to what `loss` takes
    log_every: int  # steps
    at_least: float  # times the best peer
    collate: Callable[[list[Any]], Any] | None = None

    def network(self) -> nn.Module:
        return self.task().build({}, None)  # type: ignore[arg-type]

    def peers_network(self) -> nn.Module:
        """The same without the layer that scales pictures: those of the peers are scaled when they are read."""
        network = self.network()
        return network[1] if isinstance(network, nn.Sequential) else network

    def rows(self, count: int) -> int:
        return count * self.batch_size // 128


class Digits(Dataset):
    """Pixels that become pictures one by one, as torchvision's MNIST holds them."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.data, self.targets = torch.from_numpy(columns["image"][:, 0]), columns["label"].tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((workloads.MEAN,), (workloads.STD,))]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Pillow.fromarray(self.data[row].numpy())), self.targets[row]


def in_memory(columns: dict[str, Any]) -> TensorDataset:
    """The same with all the work of reading done before: the fastest that a DataLoader can be given."""
    images = (torch.from_numpy(columns["image"]).float() / 255 - workloads.MEAN) / workloads.STD
    return TensorDataset(images, torch.from_numpy(columns["label"]))


def texts(columns: dict[str, Any]) -> list[tuple[Tensor, int]]:
    return list(zip(split(columns["tokens"]), columns["label"].tolist(), strict=True))


def pairs(columns: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(split(columns["words"]), split(columns["translation"]), strict=True))


def split(column: tuple[np.ndarray, np.ndarray]) -> list[Tensor]:
    values, lengths = column
    return [torch.from_numpy(one) for one in np.split(values.astype(np.int64), lengths.cumsum()[:-1])]


def pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def collate_texts(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, labels = zip(*rows, strict=True)
    return pad(list(tokens)), torch.tensor([len(one) for one in tokens]), torch.tensor(labels)


def collate_pairs(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    words, translations = zip(*rows, strict=True)
    return pad(list(words)), pad(list(translations))


def class_loss(network: nn.Module, batch: Any) -> Tensor:
    *inputs, labels = batch
    return functional.cross_entropy(network(*inputs), labels)


def translation_loss(network: nn.Module, batch: Any) -> Tensor:
    return workloads.translation_loss(network, *batch)


def held_pictures(columns: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"])


def held_texts(columns: dict[str, Any]) -> tuple[Tensor, ...]:
    tokens = split(columns["tokens"])
    return pad(tokens), torch.tensor([len(one) for one in tokens]), torch.from_numpy(columns["label"])


def held_pairs(columns: dict[str, Any]) -> tuple[Tensor, ...]:
    words, translations = split(columns["words"]), split(columns["translation"])
    return pad(words), pad(translations), *(torch.tensor([len(one) for one in ones]) for ones in (words, translations))


def pictures(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images.to(torch.float32).div_(255), labels


def cut_texts(tokens: Tensor, lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens[:, : int(lengths.max())], lengths, labels


def cut_pairs(words: Tensor, translations: Tensor, many: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
    return words[:, : int(many.max())], translations[:, : int(few.max())]


WORKS = {
    "mlp": Work(workloads.Mlp, 128, Digits, class_loss, held_pictures, pictures, 50, 4.0),
    "cnn": Work(workloads.Cnn, 128, Digits, class_loss, held_pictures, pictures, 1, 1.25),
    "lstm": Work(workloads.Lstm, 64, texts, class_loss, held_texts, cut_texts, 1, 1.25, collate_texts),
    "seq2seq": Work(workloads.Seq2seq, 64, pairs, translation_loss, held_pairs, cut_pairs, 1, 1.25, collate_pairs),
}


# ---- ours


def begun(task: type[workloads.Work], folder: Path, batch_size: int, rows: int, *words: str) -> tuple[Run, Store]:
    """Returns a run as the command resolves it, for ever long, and its store."""
    given = config.from_words(
        [
            f"task.source.rows={rows}", f"data.batch_size={batch_size}", "train.epochs=1000000",
            "optimizer.name=adam", "resources.gpu=0", *words,
        ]
    )  # fmt: skip
    run = resolve(f"benchmarks.workloads:{task.__name__}", given, folder / "runs")
    return run, Store(job.prepare(run, folder / "stores"), dict(run.task.fields))


def ours(work: Work, folder: Path, amount: Amount) -> dict[str, Contender]:
    def contender() -> Measure:
        run, store = begun(work.task, folder, work.batch_size, work.rows(amount.rows), f"log.every={work.log_every}")
        progresses = loop.train(run, store, Path(tempfile.mkdtemp(dir=folder)), World(), None)
        return speed(counted(progresses, work.batch_size), amount.seconds, least=amount.least)

    return {"": contender}


def counted(progresses: Iterator[loop.Progress], batch_size: int) -> Iterator[int]:
    """Yields the rows that were learned since the last yield; 0 after an evaluation or a checkpoint."""
    learned = 0
    for one in progresses:
        yield (one.step - learned) * batch_size if one.kind == "train" else 0
        learned = one.step


def bare(work: Work, columns: dict[str, Any], amount: Amount) -> dict[str, Contender]:
    """A loop over tensors in memory by hand, with our settings: what our loop can at best be."""

    def steps() -> Iterator[int]:
        _keep_freed_memory()
        held = work.held(columns)
        network = work.network()
        if work.task.recipe.get("precision.channels_last"):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        total = torch.zeros(())
        for _ in itertools.count():
            for rows in torch.randperm(len(held[0])).split(work.batch_size):
                loss = work.loss(network, work.batch(*(one.index_select(0, rows) for one in held)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                yield len(rows)

    return {"": lambda: speed(steps(), amount.seconds, least=amount.least)}


# ---- peers


def loader_of(work: Work, columns: dict[str, Any], workers: int, dataset: Callable | None = None) -> DataLoader:
    data = (dataset or work.dataset)(columns)
    return DataLoader(data, work.batch_size, shuffle=True, num_workers=workers, collate_fn=work.collate, drop_last=True)


def plain(work: Work, columns: dict[str, Any], amount: Amount, dataset: Callable | None = None) -> dict[str, Contender]:
    """The loop of PyTorch's tutorials."""

    def steps(workers: int) -> Iterator[int]:
        network, loader = work.peers_network(), loader_of(work, columns, workers, dataset)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in itertools.count():
            for batch in loader:
                optimizer.zero_grad()
                loss = work.loss(network, batch)
                loss.backward()
                optimizer.step()
                yield work.batch_size

    quick = (0, 2) if work.batch is pictures else (0,)
    return {f"{n} workers": functools.partial(stepping, steps, n, amount) for n in (quick, (0, 2))[amount.thorough]}


def stepping(steps: Callable[[int], Iterator[int]], workers: int, amount: Amount) -> Measure:
    return speed(steps(workers), amount.seconds, 1 + 2 * workers, amount.least)  # as many as workers have ready


def with_accelerate(work: Work, columns: dict[str, Any], amount: Amount) -> dict[str, Contender]:
    if not is_installed("accelerate"):
        return {}

    def steps(workers: int) -> Iterator[int]:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        network = work.peers_network()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        network, optimizer, loader = accelerator.prepare(network, optimizer, loader_of(work, columns, workers))
        for _ in itertools.count():
            for batch in loader:
                optimizer.zero_grad()
                loss = work.loss(network, batch)
                accelerator.backward(loss)
                optimizer.step()
                yield work.batch_size

    return {f"{n} workers": functools.partial(stepping, steps, n, amount) for n in counts(amount)}


def with_lightning(work: Work, columns: dict[str, Any], amount: Amount) -> dict[str, Contender]:
    if not is_installed("lightning"):
        return {}

    def contender(workers: int) -> Measure:
        import lightning

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = work.peers_network()

            def training_step(self, batch: Any, number: int) -> Tensor:
                return work.loss(self.network, batch)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.Adam(self.parameters(), lr=1e-3)

        class Clock(lightning.Callback):
            """Ends `fit` when the time is over; begins to count when what workers have ready is used up."""

            begun, steps, took = 0.0, 0, 0.0

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                now = time.perf_counter()
                if trainer.global_step <= 1 + 2 * workers:
                    self.begun = now
                    return
                self.steps, self.took = self.steps + 1, now - self.begun
                trainer.should_stop = self.took >= amount.seconds and self.steps >= amount.least

        module, loader = Module(), loader_of(work, columns, workers)

        def measure() -> float:
            clock = Clock()
            lightning.Trainer(
                accelerator="cpu", devices=1, max_epochs=-1, min_epochs=0, logger=False, callbacks=[clock],
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).fit(module, loader)  # fmt: skip
            return clock.steps * work.batch_size / clock.took

        return measure

    return {f"{n} workers": functools.partial(contender, n) for n in counts(amount)}


def counts(amount: Amount) -> tuple[int, ...]:
    """Numbers of workers that are tried of the slower peers."""
    return (0, 2) if amount.thorough else (0,)


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- rows that count samples


def training(name: str, folder: Path, amount: Amount) -> Iterator[Row]:
    work = WORKS[name]
    columns = columns_of(work, folder, amount)
    peers = {
        "plain PyTorch": plain(work, columns, amount),
        "Lightning": with_lightning(work, columns, amount),
        "Accelerate": with_accelerate(work, columns, amount),
    }
    others: dict[str, dict[str, Contender]] = {}
    if name == "mlp" or amount.thorough:
        others["bare loop"] = bare(work, columns, amount)
    if work.dataset is Digits and (name == "mlp" or amount.thorough):
        others["TensorDataset"] = plain(work, columns, amount, in_memory)
    found = in_turns({"ours": ours(work, folder, amount), **peers, **others}, amount.rounds)
    best = max((one for one in peers if one in found), key=lambda one: found[one].median)
    slower = "; ".join(
        f"{one} {found[one].median:,.0f}" if one in found else f"{one} is missing" for one in peers if one != best
    )
    yield Row(f"train_{name}", "samples/s", found["ours"], found[best], best, work.at_least, note=slower)
    if "TensorDataset" in found:
        told = "the peer reads nothing: its rows are float tensors already"
        yield Row(
            f"train_{name}_in_memory", "samples/s", found["ours"], found["TensorDataset"], "TensorDataset", note=told
        )
    if "bare loop" in found:
        row = "bare_loop" if name == "mlp" else f"bare_loop_{name}"
        yield Row(row, "samples/s", found["ours"], found["bare loop"], "loop by hand, in memory", 0.98)


def columns_of(work: Work, folder: Path, amount: Amount) -> dict[str, Any]:
    """Returns the training rows, so that all learn the same ones."""
    _, store = begun(work.task, folder, work.batch_size, work.rows(amount.rows))
    rows = store.rows("train")
    return rows.take(np.arange(len(rows)))


def ray_train(name: str, folder: Path, amount: Amount) -> Iterator[Row]:
    """A loop inside Ray Train's worker; apart from the others, because Ray's own processes work all the time."""
    if not amount.thorough or not is_installed("ray"):
        return
    work = WORKS[name]
    columns = columns_of(work, folder, amount)
    found = in_turns(
        {"ours": ours(work, folder, amount), "Ray Train": in_ray_train(name, columns, folder, amount)}, amount.rounds
    )
    yield Row(f"train_{name}_vs_ray_train", "samples/s", found["ours"], found["Ray Train"], "Ray Train", work.at_least)


def in_ray_train(name: str, columns: dict[str, Any], folder: Path, amount: Amount) -> dict[str, Contender]:
    """One `fit` that is told by files when to take a figure: beginning one takes many times as long as a figure."""

    def train_function(settings: dict[str, Any]) -> None:
        from ray.train import torch as ray_torch

        torch.set_num_threads(1)
        work = WORKS[name]
        network = ray_torch.prepare_model(work.peers_network())
        loader = ray_torch.prepare_data_loader(loader_of(work, columns, 0))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

        def steps() -> Iterator[int]:
            for _ in itertools.count():
                for batch in loader:
                    optimizer.zero_grad()
                    loss = work.loss(network, batch)
                    loss.backward()
                    optimizer.step()
                    yield work.batch_size

        measure = speed(steps(), amount.seconds, least=amount.least)
        for number in itertools.count():
            while not (asked := Path(settings["folder"]) / f"asked-{number}").exists():
                time.sleep(0.01)
            if asked.read_text() == "end":
                return
            answer = asked.with_name(f"answer-{number}")
            answer.with_suffix(".part").write_text(str(measure()))
            answer.with_suffix(".part").rename(answer)

    def contender() -> Measure:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        meeting = Path(tempfile.mkdtemp(dir=folder))
        ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
        trainer = TorchTrainer(
            train_function, train_loop_config={"folder": str(meeting)}, scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(meeting / "results")),
        )  # fmt: skip
        threading.Thread(target=trainer.fit, daemon=True).start()
        numbers = itertools.count()

        def measure() -> float:
            number = next(numbers)
            (meeting / f"part-{number}").write_text("go")
            (meeting / f"part-{number}").rename(meeting / f"asked-{number}")
            while not (answer := meeting / f"answer-{number}").exists():
                time.sleep(0.01)
            return float(answer.read_text())

        return measure

    return {"": contender}


# ---- time to the first step


def starting(folder: Path, amount: Amount) -> Iterator[Row]:
    """Programs, from their start to the end of their first optimizer step; nothing of them runs before."""
    columns = columns_of(WORKS["mlp"], folder, amount)
    for name in ("image", "label"):
        np.save(folder / f"{name}.npy", columns[name])
    rows = len(columns["label"])
    script = [str(HOME / "benchmarks" / "plain_script.py"), str(folder / "image.npy"), str(folder / "label.npy")]
    found = in_turns(
        {
            "ours": {"": lambda: functools.partial(seconds_to_first_row, folder, rows, 1)},
            "ours, 2 processes": {"": lambda: functools.partial(seconds_to_first_row, folder, rows, 2)},
            "plain script": {"": lambda: functools.partial(seconds_to_printed_time, script)},
        },
        amount.starts,
    )
    told = "from the start of the program; the data are prepared"
    yield Row("first_step", "s", found["ours"], found["plain script"], "plain script", 1 / 0.75, note=told)
    yield Row("first_step_2", "s", found["ours, 2 processes"], found["plain script"], "plain script", 1 / 1.15)


def seconds_to_printed_time(script: list[str]) -> float:
    use_all_cores()
    start = time.time()
    ended = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=True)
    return float(ended.stdout) - start


def seconds_to_first_row(folder: Path, rows: int, workers: int) -> float:
    """By the time that stands in the first row of metrics.jsonl; what comes after it is cut off."""
    use_all_cores()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as runs:
        words = [
            "train", f"{HOME / 'benchmarks' / 'workloads.py'}:Mlp", f"task.source.rows={rows}", "data.batch_size=128",
            "optimizer.name=adam", "log.every=1", f"--workers={workers}", "--no-ray", "resources.gpu=0",
            f"--runs={runs}", f"--stores={folder / 'stores'}",
        ]  # fmt: skip
        start = time.time()
        command = [sys.executable, str(HOME / "whipray.py"), *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            try:
                while not (first := first_line(Path(runs))):
                    if process.poll() is not None:
                        raise SystemExit(f"{' '.join(command)}: {process.stderr.read()}")
                    time.sleep(0.02)
            finally:
                process.kill()
        return json.loads(first)["time"] - start


def first_line(runs: Path) -> str:
    """Returns the first row of a run that has been recorded in full, or nothing."""
    lines = [line for path in runs.rglob("metrics.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return lines[0] if lines and lines[0].endswith("\n") else ""


def use_all_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # those that are not there are left out


# ---- how long a checkpoint holds the training up


def pauses(folder: Path, amount: Amount) -> Iterator[Row]:
    network = workloads.Wide().build({}, None)  # type: ignore[arg-type]
    state = [torch.zeros_like(one) for one in network.parameters() for _ in range(3)]  # and Adam's two
    size = sum(one.nbytes for one in state)

    def copying() -> Measure:
        use_all_cores()
        buffer = [torch.zeros_like(one) for one in state]

        def measure() -> float:
            start = time.perf_counter()
            for one, other in zip(buffer, state, strict=True):
                one.copy_(other)
            return 1e3 * (time.perf_counter() - start)

        return measure

    def saving() -> Measure:
        use_all_cores()

        def measure() -> float:
            start = time.perf_counter()
            torch.save(state, folder / "state.pt")
            return 1e3 * (time.perf_counter() - start)

        return measure

    def training() -> Measure:
        use_all_cores()
        words = ("log.every=1", f"checkpoint.every={BETWEEN}", "log.tensorboard=false")
        run, store = begun(workloads.Wide, folder, 8, 8192, *words)
        progresses = loop.train(run, store, Path(tempfile.mkdtemp(dir=folder)), World(), None)
        return functools.partial(pause, progresses)

    found = in_turns({"ours": {"": training}, "copy": {"": copying}, "torch.save": {"": saving}}, amount.rounds)
    told = f"{size / 1e6:.0f} MB of state: what a step with a checkpoint takes longer than the others"
    yield Row("checkpoint_pause", "ms", found["ours"], found["copy"], "one copy in memory", 1 / 1.5, note=told)
    yield Row("checkpoint_pause_vs_save", "ms", found["ours"], found["torch.save"], "torch.save, no fsync")


def pause(progresses: Iterator[loop.Progress]) -> float:
    """Returns the milliseconds that a step with a checkpoint takes longer than the median of the others."""
    took: dict[int, float] = {}  # by step, up to when the next one is told of
    last, start = 0, 0.0
    for one in progresses:
        if one.kind != "train":
            continue
        now = time.perf_counter()
        if last:
            took[last % BETWEEN] = now - start
        last, start = one.step, now
        if len(took) == BETWEEN and last % BETWEEN == BETWEEN - 1:
            return 1e3 * (took[0] - statistics.median(took.values()))
    raise AssertionError("the training ended")


GROUPS = {
    **{name: functools.partial(training, name) for name in WORKS},
    "start": starting, "checkpoint": pauses,
    **{f"ray_{name}": functools.partial(ray_train, name) for name in WORKS},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within 50 seconds: shorter rounds, no Ray")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--rows", choices=AMOUNTS, help="how much; few with --quick, else all")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS, help="leave out the others")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of the peers, on how they might be used better elsewhere
    for name in ("lightning", "accelerate"):  # once, before processes are forked for them
        if is_installed(name):
            importlib.import_module(name)
    pin(1)
    amount = AMOUNTS[asked.rows or ("few" if asked.quick else "all")]
    with tempfile.TemporaryDirectory(prefix="whipray-benchmark-") as folder, contextlib.redirect_stdout(sys.stderr):
        rows = [row for group in GROUPS if group in asked.only for row in GROUPS[group](Path(folder), amount)]
    report("Training", rows, as_json=asked.json, packages=PACKAGES)


if __name__ == "__main__":
    main()
