"""What all tests share: folders of their own, one pool of ranks, one prepared store a task."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distributed.cli.output import OUT
from tests.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _speaking_anew() -> None:
    """What one command was told of how to speak is not the next one's."""
    OUT.json = OUT.debug = OUT.silent = False


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of prepared data for the whole session."""
    return tmp_path_factory.mktemp("stores")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of an xdist group in one process: pytest 9.2 does not read what xdist 3.8 writes for that."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group and hasattr(item, "_id") and "@" not in item.nodeid:
            item._id = type(item._id).parse(f"{item.nodeid}@{group.args[0]}")
