"""Shared fixtures: a small toy set, and SRDL runs of seconds."""

import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import srdl

SMALL = "--image-size 64 --limit 8 -b 4 --epochs 1 -j 0 --amp off --gpus cpu".split()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A drawn toy set of 40 training and 24 validation images."""
    root = str(tmp_path_factory.mktemp("data") / "toy")
    data.draw_toy(root, 40, 24)
    return root


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """run("--no-erase", out="a") trains in-process for seconds and returns (record, run folder). No picture."""
    monkeypatch.setattr(srdl, "draw_attention", lambda run, path: path.touch())

    def train(*flags, out="run"):
        folder = tmp_path / out
        args = srdl.parse(["--root", toy, *SMALL, "--out", str(folder), *flags])
        return srdl.main(args), folder

    return train


fake_gpu = pytest.mark.skipif(torch.__version__ < "2.15", reason="older fake GPUs want a driver (2.6 aborts)")


class StaysOnTheDevice(TorchDispatchMode):
    """For fake CUDA tensors, which need no GPU: fails where a tensor is elsewhere, or where the program would wait for
    the GPU (a value is looked at, a shape depends on values). With `rows` it counts those `waits` instead, and answers
    them with 1 and that many rows."""

    def __init__(self, rows=None):
        super().__init__()
        self.calls, self.waits, self.rows = 0, [], rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, by_mask = func._schema.name.removeprefix("aten::"), []
        if name == "index":
            by_mask = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"):
            assert self.rows is not None, name
            self.waits.append(name)
            if name == "_local_scalar_dense":
                return 1
            shape = args[0].shape[by_mask[0].dim() :] if by_mask else (args[0].dim(),)
            return torch.empty(self.rows, *shape, device="cuda", dtype=args[0].dtype if by_mask else torch.long)
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            assert not isinstance(t, torch.Tensor) or t.device.type == "cuda", f"{name} gives {t.device}"
        self.calls += 1
        return out


def plain_bce(logits, y):
    """Mean binary cross-entropy as papers print it, a cell at a time: y log p + (1 - y) log(1 - p)."""
    cells = zip(logits.detach().double().sigmoid().flatten().tolist(), y.flatten().tolist(), strict=True)
    return -sum(math.log(p) if present else math.log(1 - p) for p, present in cells) / y.numel()


@pytest.fixture
def steps(monkeypatch):
    """steps(network) -> a list of (outputs, labels, logged terms), which a run fills at every training step; a cell of
    the labels is made -1."""

    def watch(network):
        seen, now = [], {}
        forward, batches, update = network.forward, common.Run.batches, common.Run.update

        def see_forward(*inputs, **named):
            now["outputs"] = forward(*inputs, **named)
            return now["outputs"]

        def see_batches(run, epoch):
            for batch in batches(run, epoch):
                batch[1][0, 0] = -1  # a difficult object
                now["labels"] = batch[1].cpu()
                yield batch

        def see_update(run, loss, **terms):
            values = {name: term.item() for name, term in {"loss": loss, **terms}.items()}
            seen.append((now["outputs"], now["labels"], values))
            update(run, loss, **terms)

        monkeypatch.setattr(network, "forward", see_forward)
        monkeypatch.setattr(common.Run, "batches", see_batches)
        monkeypatch.setattr(common.Run, "update", see_update)
        return seen

    return watch


@pytest.fixture(scope="session")
def animals():
    """The root of the real VOC2012 subset, from the environment variable VOC_ANIMALS."""
    if "VOC_ANIMALS" not in os.environ:
        pytest.skip("VOC_ANIMALS is not set")
    return os.environ["VOC_ANIMALS"]
