"""Weights & Biases, offline unless WANDB_MODE says otherwise: `wandb sync` sends it later.

The id of the W&B run is kept in the run directory, so that a run that goes on goes on there too.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distributed import durable

KEPT = "wandb.json"  # in the run directory: the id of the W&B run, and when it began


class WeightsAndBiases:
    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        # Nothing leaves this machine that its user has not asked to be sent.
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb: Any = wandb
        kept = directory / KEPT
        if not kept.exists():
            durable.write_json(kept, {"id": uuid.uuid4().hex[:12], "began": time.time()})
        before = json.loads(kept.read_text())
        self.began, self.counter = before["began"], -1
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or directory.parent.name, name=directory.name,
            id=before["id"], dir=str(directory), resume="allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def settings(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def images(self, tag: str, step: int, pictures: list[np.ndarray]) -> None:
        self._log({"step": step, tag: [self.wandb.Image(pixels) for pixels in pictures]})

    def text(self, tag: str, step: int, markdown: str) -> None:
        self._log({"step": step, tag: self.wandb.Html(f"<pre>{_escaped(markdown)}</pre>")})

    def histogram(self, tag: str, step: int, counts: np.ndarray, edges: np.ndarray) -> None:
        self._log({"step": step, tag: self.wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))})

    def _log(self, values: dict[str, Any]) -> None:
        """W&B's own counter may only grow, also over a resume that it is not told of: it is the run's milliseconds."""
        self.counter = max(self.counter + 1, int(1000 * (time.time() - self.began)))
        self.run.log(values, step=self.counter)

    def close(self) -> None:
        self.run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
