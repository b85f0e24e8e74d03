"""What all tests share: folders of their own, one pool of ranks, one prepared store a task."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of prepared data for the whole session."""
    return tmp_path_factory.mktemp("stores")
