"""TensorBoard events in the run directory, written without torch or TensorFlow."""

import importlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class TensorBoard:
    """Event files that `tensorboard --logdir runs` shows."""

    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Modules of generated classes, which no type checker sees.
        self.events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.tensors: Any = importlib.import_module("tensorboard.compat.proto.tensor_pb2")
        self.writer = EventFileWriter(str(directory), max_queue_size=100, flush_secs=10)
        if resumed_at is not None:
            # TensorBoard forgets what an earlier process wrote after this step.
            log = self.events.SessionLog
            start = log(status=log.START)
            self.writer.add_event(self.events.Event(wall_time=time.time(), step=resumed_at + 1, session_log=start))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Rows of the HParams table."""
        from tensorboard.plugins.hparams import summary_v2

        plain = {n: v if isinstance(v, (bool, int, float, str)) else str(v) for n, v in values.items()}
        self._add(0, summary_v2.hparams_pb(plain))

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        value = self.summaries.Summary.Value
        tagged = [value(tag=f"{kind}/{name}", simple_value=number) for name, number in values.items()]
        self._add(step, self.summaries.Summary(value=tagged))

    def images(self, tag: str, step: int, pictures: list[np.ndarray]) -> None:
        for number, pixels in enumerate(pictures):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "png")
            height, width, _ = pixels.shape
            image = self.summaries.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=data.getvalue()
            )
            name = tag if len(pictures) == 1 else f"{tag}/{number}"
            self._value(step, tag=name, image=image)

    def text(self, tag: str, step: int, markdown: str) -> None:
        plugin = self.summaries.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self.tensors.TensorProto(dtype="DT_STRING", string_val=[markdown.encode()])
        tensor.tensor_shape.dim.add(size=1)
        self._value(
            step, tag=tag, metadata=self.summaries.SummaryMetadata(plugin_data=plugin), tensor=tensor
        )  # fmt: skip

    def histogram(self, tag: str, step: int, counts: np.ndarray, edges: np.ndarray) -> None:
        middles = (edges[:-1] + edges[1:]) / 2  # the sums are as exact as the bins
        histogram = self.summaries.HistogramProto(
            min=edges[0], max=edges[-1], num=counts.sum(), sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(), bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
        )  # fmt: skip
        self._value(step, tag=tag, histo=histogram)

    def graph(self, definition: bytes) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=0, graph_def=definition))

    def _value(self, step: int, **named: Any) -> None:
        self._add(step, self.summaries.Summary(value=[self.summaries.Summary.Value(**named)]))

    def _add(self, step: int, summary: Any) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self.writer.close()
