"""The benchmarks run, and tell what they promise; never how fast: that depends on the machine and its load."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import side_by_side

ROOT = Path(__file__).parents[2]
ROWS = {
    "A_f32_vs_torchvision", "A_u8_vs_torchvision", "A_f32_vs_ffcv", "B_jpeg_vs_imagefolder", "B_256_vs_imagefolder",
    "B_decoded_vs_imagefolder", "C_tokens_vs_list", "D_targets_vs_coco", "memory_8_vs_copies", "first_batch",
}  # fmt: skip
TRAINING_ROWS = {
    "train_mlp", "train_cnn", "train_lstm", "train_seq2seq", "bare_loop", "first_step", "first_step_2", "checkpoint_pause",
}  # fmt: skip
SMALLER_IS_BETTER = {"MiB", "ms", "s"}


def told(script: str) -> dict[str, dict]:
    """Returns the rows that a benchmark prints, by name."""
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--rows", "tiny", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    return {row["name"]: row for row in json.loads(ended.stdout)["rows"]}


def check(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        assert set(row) == {"name", "ours", "peer", "peer_name", "ratio", "unit"}
        if row["peer"] is None:
            assert row["ratio"] is None, name
        else:
            better, worse = ("peer", "ours") if row["unit"] in SMALLER_IS_BETTER else ("ours", "peer")
            assert row["ratio"] == pytest.approx(row[better] / row[worse]), name


@pytest.mark.slow
def test_the_benchmark_of_data_prints_its_rows_as_json_and_nothing_else():
    rows = told("data.py")
    if sys.platform != "linux":
        rows.setdefault("memory_8_vs_copies", rows["first_batch"])  # counted in /proc alone
    assert set(rows) >= ROWS
    assert all(row["ours"] > 0 for row in rows.values())
    check(rows)


@pytest.mark.slow
def test_the_benchmark_of_training_prints_its_rows_as_json_and_nothing_else():
    rows = told("train.py")
    assert set(rows) >= TRAINING_ROWS
    # A pause is a difference of times: on a busy machine it may be anything.
    assert all(row["ours"] > 0 for name, row in rows.items() if not name.startswith("checkpoint"))
    check(rows)


def test_speed_counts_neither_the_first_steps_of_a_figure_nor_those_without_rows(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(side_by_side, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def steps():
        for rows, took in ((7, 50), (7, 50), (0, 50), (3, 1), (3, 2), (0, 50), (3, 1), (3, 2), (7, 50)):
            clock[0] += took
            yield rows

    assert side_by_side.speed(steps(), seconds=5, untimed=2, least=1)() == 12 / 6
    assert side_by_side.speed(steps(), seconds=0, untimed=2, least=2)() == 6 / 3


def test_a_size_that_is_not_known_is_answered_with_those_that_are():
    command = [sys.executable, "benchmarks/data.py", "--rows", "huge"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert "choose from" in ended.stderr and "tiny" in ended.stderr
