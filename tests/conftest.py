"""Shared fixtures: a small toy set, and SRDL runs of seconds."""

import os

import pytest
import torch

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


@pytest.fixture(scope="session")
def animals():
    """The root of the real VOC2012 subset, from the environment variable VOC_ANIMALS."""
    if "VOC_ANIMALS" not in os.environ:
        pytest.skip("VOC_ANIMALS is not set")
    return os.environ["VOC_ANIMALS"]
