"""How many operations a training row costs, and how well a device is used by that (MFU; Chowdhery et al., 2022)."""

import itertools
import re
from dataclasses import replace

import torch
from torch import Tensor

from distributed.data import planned
from distributed.data.store import Store
from distributed.model import Model
from distributed.run import Run
from distributed.world import World

# Dense peaks in TFLOP/s: 16-bit numbers, TF32, float32; from NVIDIA's data sheets of each product, which give those of
# tensor cores with sparsity: half of that is dense. The longest name that fits counts.
PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200": (989.4, 494.7, 67.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.4, 494.7, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.05, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "V100": (125.0, 15.7, 15.7),
    "V100-PCIE": (112.0, 14.0, 14.0),
    "T4": (65.0, 8.1, 8.1),
}


def per_row(run: Run, store: Store, device: torch.device) -> float:
    """Returns the floating-point operations of one row in a training step: forward, backward, what is made again.

    Counted in products and convolutions, as torch's counter does it, over the first (micro-)batch on a network of its
    own, which is thrown away: it costs the memory of a second one for a moment, and what is trained is not touched.
    """
    from torch.utils.flop_counter import FlopCounterMode  # with Triton: too much for runs that do not count

    run = replace(run, precision=replace(run.precision, compile="no"))
    world, workers = World(device=device), run.resources.workers
    size = run.data.micro_batch_size or -(-run.data.batch_size // (workers if isinstance(workers, int) else 1))
    data, partners = replace(run.data, prefetch=0), run.task.partners
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loader = planned.loader(store, "train", data, run.train.seed, run.transform, world, partners=partners)
        rows, batches = loader.micro_batches(0, 0, size)
        [batch] = itertools.islice(batches, 1)
        model = Model.build(run, store.facts, world)

        def update(loss: Tensor, name: str = "model") -> None:
            loss.backward()

        counter = FlopCounterMode(display=False)
        with counter, run.precision.autocast(device):
            run.task.step(model.learning(), batch, update)
    return counter.get_total_flops() / rows[0]


def peak(device: torch.device, run: Run) -> float | None:
    """Returns what one device can do at most in the run's numbers, in TFLOP/s; None where nobody knows."""
    if run.log.peak_tflops is not None:
        return run.log.peak_tflops
    if device.type != "cuda" or run.precision.dtype == "float64":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [known for known in PEAKS if re.search(rf"\b{known}\b", name)]  # an A10G is no A10
    if not fitting:
        return None
    half, tf32, single = PEAKS[max(fitting, key=len)]
    return half if run.precision.dtype != "float32" else tf32 if run.precision.tf32 == "all" else single
