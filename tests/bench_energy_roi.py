"""Run by hand: region selection at B = 16, C = 20, ks = 4, ke = 2, kr = 3 against the plain scipy code, an image and a
map at a time (its docstring's), on maps of 14x14 and 18x18; then its share of a training step. CPU, and GPU if there is
one. Seconds are medians; on a GPU the plain code includes its copy to the CPU.

python tests/bench_energy_roi.py

The step is ResNet-101 at 448 px and batch 16 in bf16 on a GPU, ResNet-18 at 96 px on a CPU.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as nnf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_energy_roi import plain_selection

import common
import energy_roi


def median_seconds(run, device, repeats):
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i > 1:  # the first ones warm up
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def selection(device, size):
    """Smooth maps: a third of the cells positive, one to five regions in each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 20, size, size, generator=generator)
    z = nnf.avg_pool2d(noise, 3, 1, 1, count_include_pad=False) * 3 - 0.4
    inputs = [z, torch.randn(16, 20, generator=generator), torch.full((20,), 0.3), torch.ones(20)]
    inputs = [t.to(device) for t in inputs]
    plain = median_seconds(lambda: plain_selection(*(t.cpu().numpy() for t in inputs), 4, 2, 3), device, 5)
    ours = median_seconds(lambda: energy_roi.select_regions(*inputs), device, 21)
    expected = plain_selection(*(t.cpu().numpy() for t in inputs), 4, 2, 3)
    same = all(np.array_equal(a, b.cpu()) for a, b in zip(expected, energy_roi.select_regions(*inputs), strict=False))
    print(f"{device}, {size}x{size}: plain {plain:.4f} s, ours {ours:.4f} s, {plain / ours:.1f} times; same: {same}")


def step(device):
    """A training step of random images, with the selection and with its result kept from before."""
    name, size, batch, amp = ("resnet101", 448, 16, True) if device == "cuda" else ("resnet18", 96, 16, False)
    torch.manual_seed(0)
    model = energy_roi.EnergyROI(common.Backbone(name), 80).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.rand(batch, 80, device=device) < 0.036

    def train():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits, local, z, _, _ = model(images)
        loss = sum(nnf.binary_cross_entropy_with_logits(x, y.float()) for x in (logits, local))
        (loss + energy_roi.weak_loss(z, y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    real, kept = energy_roi.select_regions, []

    def remember(*args, **options):
        kept[:] = [real(*args, **options)]
        return kept[0]

    energy_roi.select_regions = remember
    whole = median_seconds(train, device, 9)
    energy_roi.select_regions = lambda *args, **options: kept[0]
    without = median_seconds(train, device, 9)
    energy_roi.select_regions = real
    print(
        f"{device}: training step, {name}, {size} px, batch {batch}: {whole:.4f} s, without selection {without:.4f} s, "
        f"share {100 * (whole - without) / whole:.1f} %"
    )


def main():
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"{device}: {where}, torch {torch.__version__}")
        for size in (14, 18):
            selection(device, size)
        step(device)


if __name__ == "__main__":
    main()
