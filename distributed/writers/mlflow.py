"""MLflow: one MLflow run a run, one experiment a task.

It goes to MLFLOW_TRACKING_URI; without that to a SQLite file in the run directory, because MLflow gives up its store of
plain files. The id of the MLflow run is kept in the run directory, so that a run that goes on goes on there too.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distributed import durable

KEPT = "mlflow.json"  # in the run directory: the id of the MLflow run, and where it is
MOST = 100  # settings that MLflow takes at once


class MLflow:
    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        # A training tells nobody but its user that it exists.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        for chatty in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)
        kept = directory / KEPT
        before = json.loads(kept.read_text()) if kept.exists() else {}
        if before.get("uri") == uri:
            self.run = before["run"]
            self.client.update_run(self.run, status="RUNNING")
            return
        self.run = self.client.create_run(_experiment(self.client, directory, uri), run_name=directory.name).info.run_id
        self.client.set_tag(self.run, "whipray.directory", str(directory))
        durable.write_json(kept, {"run": self.run, "uri": uri})

    def settings(self, values: Mapping[str, Any]) -> None:
        """A setting that was changed when the run went on becomes a tag: MLflow's parameters are written once."""
        from mlflow.entities import Param

        before = self.client.get_run(self.run).data.params
        now = {name: str(value) for name, value in values.items()}
        new = [Param(name, value) for name, value in now.items() if name not in before]
        for start in range(0, len(new), MOST):
            self.client.log_batch(self.run, params=new[start : start + MOST])
        for name, value in now.items():
            if before.get(name, value) != value:
                self.client.set_tag(self.run, f"changed.{name}", value)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(f"{kind}/{n}", float(v), now, step) for n, v in values.items()])

    def images(self, tag: str, step: int, pictures: list[np.ndarray]) -> None:
        for number, pixels in enumerate(pictures):
            self.client.log_image(self.run, pixels, f"{tag}/{step:08d}-{number}.png")

    def text(self, tag: str, step: int, markdown: str) -> None:
        self.client.log_text(self.run, markdown, f"{tag}/{step:08d}.md")

    def histogram(self, tag: str, step: int, counts: np.ndarray, edges: np.ndarray) -> None:
        told = {"counts": counts.tolist(), "edges": edges.tolist()}  # in a file: MLflow has no histograms
        self.client.log_dict(self.run, told, f"histograms/{tag}/{step:08d}.json")

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _experiment(client: Any, directory: Path, uri: str) -> str:
    """The id of the task's experiment, made where it is not there."""
    name = directory.parent.name
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    ours = {} if os.environ.get("MLFLOW_TRACKING_URI") else {"artifact_location": (directory / "mlflow").as_uri()}
    return client.create_experiment(name, **ours)
