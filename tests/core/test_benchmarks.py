"""The benchmarks run, and tell what they promise; never how fast: that depends on the machine and its load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = {
    "A_f32_vs_torchvision", "A_u8_vs_torchvision", "A_f32_vs_ffcv", "B_jpeg_vs_imagefolder", "B_256_vs_imagefolder",
    "B_decoded_vs_imagefolder", "C_tokens_vs_list", "D_targets_vs_coco", "memory_8_vs_copies", "first_batch",
}  # fmt: skip
SMALLER_IS_BETTER = {"MiB", "ms"}


@pytest.mark.slow
def test_the_benchmark_of_data_prints_its_rows_as_json_and_nothing_else():
    command = [sys.executable, "benchmarks/data.py", "--quick", "--rows", "tiny", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = {row["name"]: row for row in json.loads(ended.stdout)["rows"]}
    if sys.platform != "linux":
        rows.setdefault("memory_8_vs_copies", rows["first_batch"])  # counted in /proc alone
    assert set(rows) >= ROWS
    for name, row in rows.items():
        assert set(row) == {"name", "ours", "peer", "peer_name", "ratio", "unit"}
        assert row["ours"] > 0, name
        if row["peer"] is None:
            assert row["ratio"] is None, name
        else:
            better, worse = ("peer", "ours") if row["unit"] in SMALLER_IS_BETTER else ("ours", "peer")
            assert row["ratio"] == pytest.approx(row[better] / row[worse]), name


def test_a_size_that_is_not_known_is_answered_with_those_that_are():
    command = [sys.executable, "benchmarks/data.py", "--rows", "huge"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert "choose from" in ended.stderr and "tiny" in ended.stderr
