"""What rank 0 measures beside the figures of the task: time, machine, device; and its looks at the network."""

import logging
from typing import Any

from torch import nn

from distributed import saved
from distributed.analysis import flops
from distributed.analysis.samples import Samples
from distributed.data.store import Store
from distributed.loop import Progress
from distributed.monitor import Course, Monitor
from distributed.record import Recorder
from distributed.run import Run
from distributed.world import World

log = logging.getLogger("whipray")


class Watch:
    """Measures while a run trains, until it is closed. Belongs to rank 0."""

    def __init__(self, run: Run, store: Store, world: World, recorder: Recorder) -> None:
        self.run, self.store, self.world, self.recorder = run, store, world, recorder
        self.flops = flops.per_row(run, store, world.device) if run.log.flops else 0.0
        peak = flops.peak(world.device, run) if run.log.flops else None
        self.peak = peak * world.size if peak else None  # TFLOP/s of all devices
        self.monitor = Monitor(world.device) if run.log.machine else None
        self.course = Course(run.values)
        self.samples: Samples | None = None
        self.looking = bool(run.log.told) and bool(run.log.images or run.log.histograms or run.log.graph)
        self.drawn = not run.log.graph  # a graph is drawn once

    def record(self, one: Progress, speed: dict[str, float]) -> dict[str, Any]:
        """Records what the loop has told, with what was measured since it last told; returns the row."""
        measured = dict(speed)
        if one.kind == "train":
            assert one.learning is not None, one.kind
            measured |= one.learning.times.take(one.learning.updater.modules())
            measured |= self.monitor.take() if self.monitor else {}
            if self.flops and "samples_per_second" in speed:
                done = self.flops * speed["samples_per_second"] / 1e12  # TFLOP/s
                measured["tflops"] = round(done, 3)
                measured |= {"mfu": round(100 * done / self.peak, 2)} if self.peak else {}
        row = self.recorder.add(one.kind, one.epoch, one.step, one.metrics, measured)
        self.course.add(row)
        return row

    def look(self, one: Progress) -> None:
        """Shows the writers what the network that was judged says about rows of validation, and what it looks like.

        It leaves the network in evaluation mode. A look that fails is given up with a warning, and ends no training.
        """
        if not self.looking or one.kind != "validation":
            return
        assert one.learning is not None, one.kind
        try:
            with one.learning.average.applied():
                self._look(one.learning.model.plain, one.step)
        except Exception as error:  # noqa: BLE001 - drawing depends on what a user's task returns; the training does not
            self.looking = False
            log.warning("samples of validation are shown no more: %s: %s", type(error).__name__, error)

    def _look(self, network: nn.Module, step: int) -> None:
        settings = self.run.log
        if self.samples is None:
            self.samples = Samples(self.run, self.store, self.world.device, settings.images or 1)
        if settings.images:
            drawn = self.samples.drawn(network)
            if isinstance(drawn, str):
                self.recorder.text("validation/samples", step, drawn)
            else:
                self.recorder.images("validation/samples", step, [drawn])
        if settings.histograms:
            for tag, counts, edges in self.samples.histograms(network):
                self.recorder.histogram(tag, step, counts, edges)
        if not self.drawn:
            self.drawn = True
            definition = self.samples.graph(network)
            if definition:
                self.recorder.graph(definition)

    def close(self) -> None:
        if self.monitor:
            self.monitor.close()
        hint = self.course.hint()
        if hint:
            saved.note(self.recorder.path.parent, hint)
