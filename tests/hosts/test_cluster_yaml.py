"""The cluster launcher's file, in each of its three forms, as the installed Ray itself prepares and checks it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed.hosts import ray_cluster

FILE = Path(__file__).resolve().parents[2] / "cluster.yaml"
FORMS = ("on-premise", "aws", "gcp")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def chosen(form: str) -> dict[str, Any]:
    """The file with one form's block in force, and the two others commented out, as its head says to do it."""
    lines, block = [], None
    for line in FILE.read_text("utf-8").splitlines():
        mark = re.fullmatch(r"# (>>>|<<<) (\S+)", line)
        if mark:
            block = mark[2] if mark[1] == ">>>" else None
        elif block == form:
            lines.append(re.sub(r"^# ?", "", line) if form != "on-premise" else line)
        elif block is None:
            lines.append(line)
    return yaml.safe_load("\n".join(lines))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def test_the_file_as_it_is_is_the_on_premise_form() -> None:
    assert yaml.safe_load(FILE.read_text("utf-8")) == chosen("on-premise")


@pytest.mark.parametrize("form", FORMS)
def test_ray_accepts_each_form(form: str) -> None:
    ready = prepared(chosen(form))
    assert ready["provider"]["type"] == {"on-premise": "local"}.get(form, form)
    assert ready["head_node_type"] in ready["available_node_types"]


@pytest.mark.parametrize("form", ["aws", "gcp"])
def test_ray_refuses_a_misspelt_key_of_a_node(form: str) -> None:
    config = chosen(form)
    config["available_node_types"]["gpu-spot"]["lables"] = {}
    with pytest.raises(Exception, match="lables"):
        prepared(config)


@pytest.mark.parametrize("form", FORMS)
def test_dashboard_is_on_loopback_and_the_token_is_demanded(form: str) -> None:
    ready = prepared(chosen(form))
    starts = {name: " ".join(ready[name]) for name in ("head_start_ray_commands", "worker_start_ray_commands")}
    assert "--dashboard-host=127.0.0.1" in starts["head_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in commands for commands in starts.values())


@pytest.mark.parametrize("form", ["aws", "gcp"])
def test_spot_workers_are_labelled_and_the_head_is_none(form: str) -> None:
    kinds = chosen(form)["available_node_types"]
    assert {name: kind["labels"]["market"] for name, kind in kinds.items() if name in ("head", "gpu-spot")} == {
        "head": "on-demand",
        "gpu-spot": "spot",
    }


def test_what_may_come_is_read_from_the_file_that_ray_up_leaves(tmp_path: Path) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert ray_cluster.from_launcher(file) == []
    for form, expected in (("aws", [2, 8]), ("gcp", [8]), ("on-premise", [])):
        file.write_text(yaml.safe_dump(prepared(chosen(form))))
        added = ray_cluster.from_launcher(file)
        assert sorted(count for _, count in added) == expected
        assert all(resources["GPU"] == 1 for resources, _ in added)


def test_nodes_that_are_there_already_are_not_counted_twice() -> None:
    gpu, head = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0, ray_cluster.HEAD: 1.0}
    kinds = [({"CPU": 4, "GPU": 1}, 3), ({"CPU": 8}, 1)]
    assert ray_cluster.remaining(kinds, [head, gpu, gpu, {"CPU": 8.0}]) == [({"CPU": 4, "GPU": 1}, 1)]
    assert ray_cluster.remaining(kinds, [head]) == kinds
