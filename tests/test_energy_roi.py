"""energy_roi.py against the paper: region selection against scipy, plain loops for the rest, every row of its tables."""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import SMALL
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import energy_roi
import eval as metrics
from energy_roi import components, select_regions, strongest_rectangles

# ---------------------------------------------------------------------------------------------------------------------
# Region selection: the oracle is the plain code that select_regions' docstring shows


def plain_code():
    """The functions `rectangles` and `regions` of the docstring."""
    text = inspect.getdoc(select_regions)
    names = {"np": np, "scipy": scipy}
    exec(textwrap.dedent(text[text.index("    def rectangles") :]), names)
    return names["rectangles"], names["regions"]


rectangles, regions = plain_code()


def plain_selection(z, scores, mean, var, ks, ke, kr, rank="energy", eps=1e-5):
    """Boxes (B, K, ke, kr, 4) and valid (B, K, ke, kr) by loops over images and maps."""
    b, c, h, w = z.shape
    k = min(ks, c)
    boxes, valid = np.zeros((b, k, ke, kr, 4), int), np.zeros((b, k, ke, kr), bool)
    step = np.abs(mean.astype(float)) / np.sqrt(var.astype(float) + eps)
    for i in range(b):
        for j, cls in enumerate(sorted(range(c), key=lambda n: -scores[i, n])[:k]):
            for r, scales in enumerate(regions(z[i, cls].astype(float), step[cls], ke, kr, rank)):
                boxes[i, j, r], valid[i, j, r] = scales, True
        if not valid[i].any():
            boxes[i, 0, 0, 0], valid[i, 0, 0, 0] = (0, 0, w, h), True
    return boxes, valid


def spiral(n, gap=2):
    """A path of width 1 from the corner inwards, one free cell between its turns."""
    m = np.zeros((n, n), bool)
    y, x, dy, dx = 0, 0, 0, 1
    m[0, 0] = True
    while True:
        for _ in range(2):
            ahead = [(y + dy * s, x + dx * s) for s in (1, gap)]
            free = all(not (0 <= a < n and 0 <= b < n and m[a, b]) for a, b in ahead)
            if free and 0 <= ahead[0][0] < n and 0 <= ahead[0][1] < n:
                break
            dy, dx = dx, -dy
        else:
            return m
        y, x = ahead[0]
        m[y, x] = True


def comb(h, w, spine):
    m = np.zeros((h, w), bool)
    m[:, ::2] = True
    m[spine] = True
    return m


def serpentine(h, w):
    m = np.zeros((h, w), bool)
    m[::2] = True
    m[1::4, -1] = m[3::4, 0] = True
    return m


def zigzag(h, w):
    """Diagonal teeth, connected by corners only."""
    y, x = np.mgrid[:h, :w]
    return (x + y % 2) % 2 == 0


def adversarial(h, w):
    """Masks (n, h, w) that need many rounds, and all their mirrored and turned forms; and the plain ones."""
    n = min(h, w)
    squares = [spiral(n), spiral(n)[::-1], np.tril(np.ones((n, n), bool)), np.eye(n, dtype=bool)]
    masks = [np.zeros((h, w), bool), np.ones((h, w), bool), zigzag(h, w)]
    for square in squares:
        full = np.zeros((h, w), bool)
        full[:n, :n] = square
        masks.append(full)
    masks += [comb(h, w, 0), comb(h, w, h - 1), comb(h, w, h // 2), serpentine(h, w), comb(w, h, 0).T]
    masks += [serpentine(w, h).T, comb(w, h, w - 1).T]
    single = np.zeros((h, w), bool)
    single[h // 2, w // 3] = True
    dots = np.zeros((h, w), bool)
    dots[::2, ::2] = True
    masks += [single, dots, ~dots]
    return np.stack([np.ascontiguousarray(v) for m in masks for v in (m, m[::-1], m[:, ::-1], m[::-1, ::-1])])


def first_cells(mask):
    """Plain: (P,) the smallest linear index of each cell's component."""
    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    cell = np.arange(mask.size)
    out, labels = cell.copy(), labels.ravel()
    for i in range(1, count + 1):
        out[labels == i] = cell[labels == i].min()
    return out


def check_components(masks):
    ours = components(torch.from_numpy(masks)).numpy()
    for mask, label in zip(masks, ours, strict=True):
        assert np.array_equal(label, first_cells(mask))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 3), (5, 7), (11, 13), (14, 14), (18, 18)])
def test_components_equal_scipys_on_every_kind_of_map(size):
    rng = np.random.default_rng(sum(size))
    noise = rng.random((150, *size)) < rng.random((150, 1, 1))
    walls = adversarial(*size)
    broken = walls[rng.integers(len(walls), size=150)] & (rng.random((150, *size)) < 0.97)
    check_components(np.concatenate([noise, walls, broken]))


@pytest.mark.parametrize("size", [(28, 28), (31, 53), (56, 56), (72, 72)])
def test_components_equal_scipys_on_large_maps(size):
    rng = np.random.default_rng(0)
    noise = rng.random((7, *size)) < np.linspace(0.2, 0.7, 7)[:, None, None]
    check_components(np.concatenate([noise, adversarial(*size)[::3]]))


def test_components_of_all_masks_of_12_cells():
    bits = (np.arange(2**12)[:, None] >> np.arange(12)) & 1
    for size in ((3, 4), (2, 6)):
        check_components(bits.astype(bool).reshape(-1, *size)[:: 1 if size == (3, 4) else 3])


def maps_of(kind, b, c, h, w, rng):
    """z (B, C, H, W) whose sums are exact in float64, so that the oracle's ties are ties."""
    if kind == "normal":
        z = rng.integers(-4000, 4000, (b, c, h, w)) / 1024
    elif kind == "sparse":
        z = rng.integers(-8000, 1500, (b, c, h, w)) / 1024
    elif kind == "smooth":
        noise = rng.standard_normal((b, c, h, w))
        z = (scipy.ndimage.gaussian_filter(noise, (0, 0, 1.5, 1.5)) * 6 * 1024).round() / 1024
    elif kind == "plateaus":  # ties everywhere
        z = rng.integers(-2, 3, (b, c, h, w)) / 2
    elif kind == "positive":
        z = rng.integers(1, 3000, (b, c, h, w)) / 1024
    elif kind == "empty":
        z = -rng.integers(0, 3000, (b, c, h, w)) / 1024
    else:  # adversarial
        masks = adversarial(h, w)
        chosen = masks[rng.integers(len(masks), size=(b, c))]
        z = np.where(chosen, rng.choice([0.5, 1.0, 3.0], (b, c, h, w)), -1)
    return z.astype(np.float32)


KINDS = ("normal", "sparse", "smooth", "plateaus", "positive", "empty", "adversarial")


@pytest.mark.parametrize(
    ("size", "ks", "ke", "kr", "rank"),
    [((14, 14), 4, 2, 3, "energy"), ((14, 14), 4, 2, 3, "area"), ((18, 18), 4, 2, 3, "energy")]
    + [
        ((6, 6), 2, 1, 2, "energy"),
        ((5, 11), 7, 3, 5, "energy"),
        ((11, 5), 1, 5, 1, "area"),
        ((1, 2), 3, 4, 2, "energy"),
    ],
)
def test_selection_equals_the_plain_code(size, ks, ke, kr, rank):
    rng = np.random.default_rng(ks)
    for kind in KINDS:
        b, c = 5, 5  # 7 are more than there are
        z = maps_of(kind, b, c, *size, rng)
        scores = rng.integers(0, 4, (b, c)).astype(np.float32)  # ties among classes too
        mean, var = rng.integers(-3, 4, c).astype("f4") / 4, rng.choice([0.25, 1, 4], c).astype("f4")  # exact steps
        expected, valid = plain_selection(z, scores, mean, var, ks, ke, kr, rank, eps=0.0)
        ours = select_regions(*map(torch.from_numpy, (z, scores, mean, var)), ks, ke, kr, rank, eps=0.0)
        assert np.array_equal(ours[1].numpy(), valid), kind
        assert np.array_equal(ours[0].numpy(), expected), kind


def test_selection_of_arbitrary_float32_maps_equals_the_plain_code():
    rng = np.random.default_rng(0)
    z = (
        rng.standard_normal((24, 11, 14, 14)).astype(np.float32)
        - np.linspace(0, 2.5, 24, dtype="f4")[:, None, None, None]
    )
    z[::2] = scipy.ndimage.gaussian_filter(z[::2], (0, 0, 1, 1)) * 3
    scores, mean = rng.standard_normal((24, 11)).astype("f4"), rng.standard_normal(11).astype("f4") * 0.3
    var = rng.random(11).astype("f4") + 0.1
    expected, valid = plain_selection(z, scores, mean, var, 4, 2, 3)
    boxes, ok, top = select_regions(*map(torch.from_numpy, (z, scores, mean, var)))
    assert np.array_equal(ok.numpy(), valid) and np.array_equal(boxes.numpy(), expected)
    assert np.array_equal(top.numpy(), np.argsort(-scores, 1, kind="stable")[:, :4])
    assert 0.2 < valid.mean() < 0.99 and boxes.shape == (24, 4, 2, 3, 4)


def one_map(*rows, mean=0.0, **options):
    z = torch.tensor(rows, dtype=torch.float)[None, None]
    boxes, valid, _ = select_regions(z, torch.zeros(1, 1), torch.tensor([mean]), torch.ones(1), eps=0.0, **options)
    return boxes[0, 0].tolist(), valid[0, 0].tolist()


def test_energy_counts_the_whole_rectangle_and_area_only_its_size():
    rows = [[1, 0, 0, 0, 9, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    for rank, order in (("energy", [[4, 0, 5, 1], [0, 0, 3, 3]]), ("area", [[0, 0, 3, 3], [4, 0, 5, 1]])):
        boxes, _ = one_map(*rows, ke=2, kr=1, rank=rank)
        assert [b[0] for b in boxes] == order
    # an L around another component: its rectangle's energy has that component in it
    rows = [[1, 0, 0, 5, 0, 0, 0, 6], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    boxes, _ = one_map(*rows, ke=3, kr=1)
    assert [b[0] for b in boxes] == [[0, 0, 5, 3], [7, 0, 8, 1], [3, 0, 4, 1]]


def test_equal_energies_go_by_the_first_cell():
    boxes, _ = one_map([0, 0, 0, 2], [0, 1, 0, 0], [0, 1, 0, 2], ke=3, kr=1)
    assert [b[0] for b in boxes] == [[3, 0, 4, 1], [1, 1, 2, 3], [3, 2, 4, 3]]


@pytest.mark.parametrize("mean", [1.0, -1.0])
def test_boxes_shrink_whatever_the_sign_of_the_mean_and_stay_when_nothing_is_left(mean):
    boxes, valid = one_map([1, 2, 3, 2], [0, 0, 1.5, 0], mean=mean, ke=2, kr=4)
    assert boxes[0] == [[0, 0, 4, 2], [1, 0, 4, 2], [2, 0, 3, 1], [2, 0, 3, 1]]
    assert valid == [[True] * 4, [False] * 4] and boxes[1] == [[0, 0, 0, 0]] * 4


def test_a_smaller_box_lies_in_the_one_before_not_only_in_the_first():
    # After zeta 1 the right part (8) wins; after zeta 2 the left one would, were it not outside the right box.
    z = torch.full((1, 1, 1, 9), 0.5)
    z[0, 0, 0, 1], z[0, 0, 0, 5:9] = 4.0, 2.1
    boxes, _, _ = select_regions(z, torch.zeros(1, 1), torch.ones(1), torch.ones(1), eps=0.0)
    assert boxes[0, 0, 0].tolist() == [[0, 0, 9, 1], [5, 0, 9, 1], [5, 0, 9, 1]]


def test_boxes_are_nested():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(maps_of("smooth", 16, 7, 14, 17, rng))
    boxes, valid, _ = select_regions(z, torch.randn(16, 7), torch.randn(7), torch.rand(7), kr=5)
    outer, inner = boxes[..., :-1, :], boxes[..., 1:, :]
    assert (inner[..., :2] >= outer[..., :2]).all() and (inner[..., 2:] <= outer[..., 2:]).all()
    size = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    assert (size[valid] > 0).all() and (size[..., -1] < size[..., 0])[valid[..., 0]].float().mean() > 0.3


def test_an_image_without_any_region_is_one_box():
    z = torch.full((2, 3, 5, 7), -1.0)
    z[1, 2, 1, 3] = 1  # of a class that is not selected in image 1, and not the first in image 2
    scores = torch.tensor([[3.0, 2, 1], [3, 1, 2]])
    boxes, valid, top = select_regions(z, scores, torch.zeros(3), torch.ones(3), ks=2)
    assert top.tolist() == [[0, 1], [0, 2]]
    assert valid[0].sum() == 1 and valid[0, 0, 0, 0] and boxes[0, 0, 0, 0].tolist() == [0, 0, 7, 5]
    assert valid[1].sum() == 3 and valid[1, 1, 0].all() and boxes[1, 1, 0, 0].tolist() == [3, 1, 4, 2]


def test_images_do_not_see_each_other():
    rng = np.random.default_rng(3)
    z = torch.from_numpy(maps_of("normal", 6, 5, 14, 14, rng))
    scores, mean, var = torch.randn(6, 5), torch.randn(5), torch.rand(5)
    whole = select_regions(z, scores, mean, var)
    for i in range(6):
        one = select_regions(z[i : i + 1], scores[i : i + 1], mean, var)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, one, strict=True))


class StaysOnTheDevice(TorchDispatchMode):
    """Fails where a value is looked at, a shape depends on values, or a tensor changes its device."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"), name
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            assert not isinstance(t, torch.Tensor) or t.device.type == "cuda", f"{name} gives {t.device}"
        self.calls += 1
        return out


def test_selection_never_leaves_the_gpu():
    with FakeTensorMode(), StaysOnTheDevice() as calls:
        z = torch.empty(3, 5, 14, 11, device="cuda")
        scores, mean, var = (torch.empty(s, device="cuda") for s in ((3, 5), (5,), (5,)))
        boxes, valid, top = select_regions(z, scores, mean, var)
        assert boxes.shape == (3, 4, 2, 3, 4) and valid.shape == (3, 4, 2, 3) and top.shape == (3, 4)
        assert calls.calls > 50
        for wrong in (lambda: valid.sum().item(), lambda: boxes[valid], lambda: z.cpu(), lambda: valid.nonzero()):
            with pytest.raises(Exception, match=r"."):
                wrong()


@pytest.mark.gpu
def test_selection_on_a_gpu_equals_the_cpu_without_synchronisation():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        inputs = [torch.from_numpy(maps_of(kind, 16, 20, 14, 14, rng)), torch.randn(16, 20), torch.randn(20)]
        inputs.append(torch.rand(20))
        expected = select_regions(*inputs)
        on_gpu = [t.cuda() for t in inputs]
        select_regions(*on_gpu)  # loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = select_regions(*on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, ours, strict=True)), kind
