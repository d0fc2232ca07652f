"""energy_roi.py against the paper: region selection against scipy, plain loops, every row of its tables."""

import contextlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import SMALL, StaysOnTheDevice, fake_gpu, plain_bce
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import energy_roi
import eval as metrics
from energy_roi import components, select_regions

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


@fake_gpu
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


# ---------------------------------------------------------------------------------------------------------------------
# Losses and fusion


@pytest.mark.parametrize("positives", ["some", "none", "all"])
def test_eq2_equals_a_plain_loop_and_leaves_present_classes_alone(positives):
    torch.manual_seed(0)
    z = torch.randn(3, 5, 7, 11, dtype=torch.double, requires_grad=True)
    y = {"some": torch.rand(3, 5) < 0.4, "none": torch.zeros(3, 5) > 0, "all": torch.ones(3, 5) > 0}[positives]
    ours = energy_roi.weak_loss(z, y)
    terms = []
    for i in range(3):
        absent = [c for c in range(5) if not y[i, c]]
        for a, b in itertools.product(range(7), range(11)):
            cell = [-torch.log(1 - torch.sigmoid(z[i, c, a, b])) / len(absent) for c in absent]
            terms.append(sum(cell, torch.zeros(())) / 77)
    expected = sum(terms) / 3
    assert torch.allclose(ours, expected.to(ours), rtol=1e-12)
    grad = torch.autograd.grad(ours, z)[0]
    assert (grad[y] == 0).all() and (grad[~y] > 0).all()
    if positives != "all":
        assert torch.allclose(grad, torch.autograd.grad(expected, z)[0], rtol=1e-10)


def test_eq2_of_huge_activations_is_finite():
    z = torch.full((1, 2, 3, 3), 500.0, requires_grad=True)
    loss = energy_roi.weak_loss(z, torch.tensor([[False, True]]))
    loss.backward()
    assert loss == 500 and z.grad.isfinite().all()


def test_the_average_of_both_predictions_is_exact_and_monotone():
    a, b = torch.randn(2, 1000, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 4
    mean = (a.sigmoid() + b.sigmoid()) / 2
    assert torch.allclose(energy_roi.mean_prediction(a, b), mean.logit(), rtol=1e-9)
    assert torch.allclose(energy_roi.mean_prediction(a, a), a, rtol=1e-9)
    far = energy_roi.mean_prediction(torch.tensor([40.0, 41, -100]), torch.tensor([40.0, 40, -101]))
    assert far.isfinite().all() and far[0] < far[1] and far[2] == pytest.approx(-100.38, abs=0.01)


def test_the_log_counts_regions_and_boxes():
    z = torch.full((2, 3, 2, 2), -1.0)
    z[0, 1, 0, 0] = z[1, 0, 1, 1] = 1
    top = torch.tensor([[1, 2], [2, 1]])
    valid = torch.zeros(2, 2, 1, 3, dtype=torch.bool)
    valid[0, 0], valid[1, 0, 0, 0] = True, True
    y = torch.tensor([[True, True, False], [False, False, True]])
    seen = energy_roi.regions_seen(z, top, valid, y)
    assert {k: round(float(v), 4) for k, v in seen.items()} == {
        "maps_with_region": 0.25,
        "boxes_per_image": 2.0,
        "silent_present": 0.6667,
    }
    assert energy_roi.regions_seen(z, top, valid, y & False)["silent_present"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The network against plain loops


def network(classes=7, backbone="resnet18", last_stride=1, seed=0, **options):
    torch.manual_seed(seed)
    return energy_roi.EnergyROI(common.Backbone(backbone, last_stride=last_stride), classes, **options)


def frozen_norm(model):
    """In train mode, but for BatchNorm."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def warm(model, images):
    """Statistics of its own for every BatchNorm, the weak maps' shifted so that some maps are silent."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images)
        if model.local:
            model.weak_bn.bias.copy_(torch.linspace(-2.5, 0.5, len(model.weak_bn.bias)))
    return model.eval()


def images_of(b=3, h=64, w=96, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def plain_attention(layer, x):
    """Eqs. 3 and 4 for one image x (T, D), a row at a time."""
    q, k, v = (x @ part.weight.T + part.bias for part in (layer.q, layer.k, layer.v))
    rows = []
    for t in range(len(x)):
        weights = torch.exp(k @ q[t] / q.shape[1] ** 0.5)
        rows.append((weights[:, None] * v).sum(0) / weights.sum())
    return torch.stack(rows)


def plain_forward(model, images):
    """Global and local logits, an image, a box, a class at a time; only what exists takes part."""
    all_levels = model.backbone(images)
    z = model.weak_maps(all_levels[model.weak_level])
    bn, rows = model.weak_bn, ([], [])
    with torch.no_grad():
        g = model.look_globally(all_levels[2])[0]
        stats = [t.detach().float().numpy() for t in (bn.running_mean, bn.running_var)]
        boxes, valid = plain_selection(z.numpy(force=True), g.numpy(force=True), *stats, **model.selection)
    for i in range(len(images)):
        f32 = all_levels[2][i].flatten(1).T  # (P, D)
        y = plain_attention(model.ga, f32) if model.ga else f32
        at = y @ model.fc.weight.T + model.fc.bias
        rows[0].append(torch.stack([at[:, c].max() for c in range(at.shape[1])]))
        rois, owner = [], []
        stride, cell = model.backbone.strides[model.roi_level], model.backbone.strides[model.weak_level]
        for j, r, s in zip(*valid[i].nonzero(), strict=True):
            box = torch.tensor(boxes[i, j, r, s] * cell / stride, dtype=images.dtype)[None]
            rois.append(energy_roi.roi_align(all_levels[model.roi_level][i : i + 1], [box], 3, 1.0, 2, True))
            owner.append(j)
        tokens = [y.max(0).values, *model.transform(torch.cat(rois)).flatten(2).amax(2)]
        out = plain_attention(model.ca, torch.stack(tokens)) if model.ca else torch.stack(tokens)
        summed = {j: sum(o for o, k in zip(out[1:], owner, strict=True) if k == j) for j in owner}
        scores = [v @ model.fc_local.weight.T + model.fc_local.bias for v in summed.values()]
        rows[1].append(torch.stack(scores).amax(0))
    return [torch.stack(r) for r in rows]


def with_gradients(model, forward, images):
    model.zero_grad()
    outputs = forward(model, images)
    weight = torch.linspace(-1, 1, outputs[0].numel(), dtype=images.dtype).view_as(outputs[0])
    (outputs[0].sin() * weight + outputs[1].cos() * weight.flip(0)).sum().backward()
    return [o.detach() for o in outputs] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "last_stride, options",
    [
        (1, {"ke": 2, "kr": 2, "rank": "area"}),
        (1, {"ca": False, "ks": 2}),
        (1, {"ga": False, "kr": 1}),
        (1, {"ga": False, "ca": False, "roi_level": 8, "weak_level": 16, "tied": False}),
        (2, {"ga": False, "ca": False, "roi_level": 8, "weak_level": 16, "tied": False}),
        (1, {"roi_level": 32, "tied": True}),
        (2, {"roi_level": 32, "tied": True}),
    ],
)
def test_the_network_equals_plain_loops(last_stride, options):
    model, images = network(last_stride=last_stride, **options).double(), images_of(2, 48, 80).double()
    warm(model, images)
    frozen_norm(model)
    plain, ours = (with_gradients(model, f, images) for f in (plain_forward, lambda m, x: m(x)[:2]))
    assert len(plain) == len(ours) > 60
    for a, b in zip(plain, ours, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_eq7_equals_a_plain_loop():
    model, f = network(3).double().train(), torch.randn(2, 512, 3, 5, dtype=torch.double)
    nn.init.uniform_(model.weak_bn.weight, 0.5, 2)
    nn.init.normal_(model.weak_bn.bias)
    z = model.weak_maps(f)
    for c in range(3):
        x = torch.stack([(image * model.weak_conv.weight[c]).sum(0) for image in f])  # (B, H, W)
        mu = x.sum() / x.numel()
        x = (x - mu) / (((x - mu) ** 2).sum() / x.numel() + 1e-5).sqrt()
        assert torch.allclose(z[:, c], x * model.weak_bn.weight[c] + model.weak_bn.bias[c], rtol=1e-10)


def test_the_output_is_the_average_of_both_predictions():
    model, images = network().eval(), images_of(2, 32, 48)
    with torch.no_grad():
        output, (logits, local, *_) = model(images), frozen_norm(model)(images)
    assert torch.allclose(output.sigmoid(), (logits.sigmoid() + local.sigmoid()) / 2, atol=1e-6)
    assert not torch.allclose(logits, local, atol=0.01)


def test_global_feature_is_a_maximum_of_its_own():
    model = network(ga=False)
    f = torch.randn(2, 512, 3, 5)
    logits, f_g = model.look_globally(f)
    assert torch.equal(f_g, f.amax((2, 3))) and not torch.allclose(model.fc(f_g), logits, atol=0.1)


def garbage(model, images, more):
    """Local logits, their gradients and BatchNorm's new statistics, in train mode, with `more` masked slots whose boxes
    are arbitrary."""
    model.train().zero_grad()
    levels = model.backbone(images)
    _, f_g = model.look_globally(levels[2])
    boxes = torch.tensor([[0, 0, 32, 48], [16, 16, 64, 64], [0, 16, 32, 32.0]]).repeat(len(images), 1, 1)  # (B, 3, 4)
    valid = torch.tensor([[True, True, False], [False, True, False]])
    if more:
        extra = torch.rand(len(images), more, 4) * 1e3 - 200
        boxes, valid = torch.cat([boxes, extra], 1), nnf.pad(valid, (0, more))
        boxes[:, 2] = -1e6
    f_l = model.look_locally(energy_roi.full(levels[1]), boxes, valid, 16)
    shape = (3 + more, 1, 1)
    embeddings, logits = model.fuse_regions(f_g, f_l, valid.unflatten(1, shape))
    logits.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    stats = {n: t.clone() for n, t in model.named_buffers()}
    return logits.detach(), embeddings.detach()[:, :3], grads, stats


@pytest.mark.parametrize("ca", [True, False])
def test_masked_slots_change_nothing_in_train_mode(ca):
    images = images_of(2).double()  # k's biases have no gradient but rounding
    results = [garbage(network(ca=ca).double(), images, more) for more in (0, 5)]
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    for kind in (2, 3):
        a, b = (r[kind] for r in results)
        assert a.keys() == b.keys() and len(a) > 60
        for name in a:
            assert torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-11), name


def test_regions_that_are_not_there_change_nothing_in_train_mode():
    """More slots than any map has regions: the same step."""
    images, results = images_of(4).double(), []
    for ke in (9, 13):
        model = network(ke=ke).double().train()
        logits, local, _, _, valid = model(images)
        assert not valid[:, :, 8].any() and valid[:, :, 0].any()
        local.square().sum().backward()
        results.append((logits.detach(), local.detach(), model.transform[0][0].conv1.weight.grad, model.fc.weight.grad))
        results[-1] += (model.transform[0][1].bn2.running_var.clone(), model.ca.k.weight.grad)
    for a, b in zip(*results, strict=True):
        assert a is b or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_silent_maps_train():
    model = network().train()
    with torch.no_grad():
        model.weak_bn.bias.fill_(-100)
    logits, local, z, _, valid = model(images_of(2))
    assert (z < 0).all() and valid.flatten(1).sum(1).tolist() == [1, 1]
    y = torch.zeros_like(logits)
    (nnf.binary_cross_entropy_with_logits(local, y) + logits.mean() + energy_roi.weak_loss(z, y > 0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(images_of(1)).isfinite().all()


def test_only_l_weak_trains_the_weak_head():
    model = network().train()
    logits, local, z, _, _ = model(images_of(2))
    (logits.sum() + local.sum()).backward(retain_graph=True)
    assert model.weak_conv.weight.grad is None and model.weak_bn.bias.grad is None
    model.zero_grad()
    energy_roi.weak_loss(z, torch.zeros(2, 7) > 0).backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"backbone", "weak_conv", "weak_bn"}


def test_a_tied_weak_head_has_the_classifiers_weight():
    model = network(tied=True).train()
    f = torch.randn(2, 512, 3, 5)
    z = model.weak_maps(f)
    expected = nnf.batch_norm(nnf.conv2d(f, model.fc.weight[..., None, None]), None, None, training=True)
    assert torch.allclose(z, expected, atol=1e-5) and not any("weak_conv" in n for n in model.state_dict())
    energy_roi.weak_loss(z, torch.zeros(2, 7) > 0).backward()
    assert model.fc.weight.grad.abs().sum() > 0 and model.fc.bias.grad is None


def test_classes_are_chosen_by_the_same_rule_in_training_and_test():
    model, images = network(), images_of(3)
    warm(model, images)
    with torch.no_grad():
        tested, trained = model.analyse(images), frozen_norm(model)(images)
    assert torch.equal(tested["top"], trained[3]) and torch.equal(tested["valid"], trained[4])
    assert torch.equal(tested["logits"].topk(4).values, tested["logits"].gather(1, tested["top"]))


@pytest.mark.parametrize("options", [{}, {"ca": False, "ga": False}, {"local": False}, {"kr": 5, "ke": 3}])
def test_two_images_equal_two_times_one(options):
    model, images = network(**options), images_of(3)
    warm(model, images)
    with torch.no_grad():
        assert torch.allclose(model(images), torch.cat([model(i[None]) for i in images]), atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("size", [(448, 448), (576, 576), (320, 500), (31, 33)])
def test_every_input_size_works(size, backbone):
    model = network(backbone=backbone, last_stride=2).eval()
    with torch.no_grad():
        seen = model.analyse(images_of(1, *size))
    assert seen["z"].shape[2:] == tuple(-(-n // 32) for n in size)
    assert seen["local"].isfinite().all() and seen["boxes"].shape == (1, 24, 4)


@pytest.mark.parametrize("classes", [1, 3, 500])
@pytest.mark.parametrize("positives", [0, 1])
def test_any_number_of_classes_and_no_positive_label_train(classes, positives):
    model = frozen_norm(network(classes))
    logits, local, z, top, valid = model(images_of(1))
    assert top.shape == (1, min(4, classes)) and local.shape == (1, classes)
    y = torch.full((1, classes), bool(positives))
    loss = sum(nnf.binary_cross_entropy_with_logits(x, y.float()) for x in (logits, local))
    (loss + energy_roi.weak_loss(z, y)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(v.isfinite() for v in energy_roi.regions_seen(z, top, valid, y).values())


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.bfloat16, {"ca": False, "ga": False}), (torch.bfloat16, {"roi_level": 8})]
    + [(torch.float16, {})],
)
def test_half_precision_is_finite_and_scores_are_float32(dtype, options):
    model, images = network(**options).train(), images_of(2, 48, 48)
    with torch.autocast("cpu", dtype):
        logits, local, z, _, valid = model(images)
    for x in (logits, local, z):
        assert x.dtype == torch.float32 and x.isfinite().all() and not torch.equal(x, x.to(dtype).float())
    assert torch.allclose(logits, model(images)[0], atol=0.3) and valid.any()
    if dtype is torch.bfloat16:  # a CPU is very slow at float16's
        (logits.mean() + local.mean() + energy_roi.weak_loss(z, torch.zeros(2, 7) > 0)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu(energy_run, amp):
    record, _ = energy_run("--gpus", "0", "--amp", amp)
    assert np.isfinite(record["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Size and cost


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_of_table_8():
    with torch.device("meta"):
        backbone = common.Backbone("resnet101")
        assert parameters(energy_roi.EnergyROI(backbone, 80, ca=False, ga=False)) == 57_956_736  # paper: 57.63 M
        assert parameters(energy_roi.EnergyROI(backbone, 80)) == 74_660_224  # paper: 74.42 M
        alone = energy_roi.EnergyROI(backbone, 80, local=False, ga=False)
        assert parameters(alone) == parameters(energy_roi.GAP(backbone, 80)) == 42_500_160 + 2049 * 80


def test_macs_of_table_8(monkeypatch):
    """In G at 448 with all 24 boxes; the paper's are 31.39, 32.43, 35.98, of another counter."""
    monkeypatch.setattr(energy_roi, "kept_slots", lambda valid: torch.arange(valid.numel(), device=valid.device))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # has no meta device
    counts = []
    with torch.device("meta"), torch.no_grad():
        backbone, images = common.Backbone("resnet101"), torch.empty(1, 3, 448, 448)
        for options in ({"local": False, "ga": False}, {"ca": False, "ga": False}, {}):
            model = energy_roi.EnergyROI(backbone, 80, **options).eval()
            with FlopCounterMode(display=False) as counter:
                model(images)
            counts.append(counter.get_total_flops() / 2e9)
    assert counts == pytest.approx([31.23, 32.76, 35.49], abs=0.005)
    assert all(abs(a / b - 1) < 0.017 for a, b in zip(counts, (31.39, 32.43, 35.98), strict=True))


@pytest.mark.parametrize("name", common.BACKBONES)
def test_transform_layers_are_a_copy_of_every_backbones_last_stage(name):
    torch.manual_seed(0)
    heavy = name not in ("resnet18", "mobilenet_v2")
    with torch.device("meta" if heavy else "cpu"):
        backbone = common.Backbone(name)
        for level, channels in zip((8, 16, 32), backbone.channels, strict=True):
            layers = energy_roi.transform_layers(backbone, channels)
            own, source = layers.state_dict(), backbone.to32.state_dict()
            other = {n for n in own if own[n].shape != source[n].shape}
            assert own.keys() == source.keys() and len(other) == (
                0 if level == 16 else 1 if name == "mobilenet_v2" else 2
            )
            if not heavy:
                same = {n for n in own if n not in other and torch.equal(own[n], source[n])}
                assert same | other == own.keys()
            assert not {id(p) for p in layers.parameters()} & {id(p) for p in backbone.parameters()}
            pooled = layers.eval()(torch.empty(5, channels, 3, 3))
            assert pooled.shape == (5, backbone.channels[2], 2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Every row of the paper's tables is one command


@pytest.fixture
def energy_run(toy, tmp_path, monkeypatch):
    """energy_run("--no-weak", out="a") trains in-process for seconds and returns (record, run folder). No picture."""
    monkeypatch.setattr(energy_roi, "draw_regions", lambda run, path: path.touch())

    def train(*flags, out="run"):
        folder = tmp_path / out
        args = energy_roi.parse(["--root", toy, *SMALL, "--out", str(folder), *flags])
        return energy_roi.main(args), folder

    return train


GLOBAL, LOCAL = {"backbone", "fc", "ga"}, {"weak_conv", "weak_bn", "transform", "ca", "fc_local"}
ALL = GLOBAL | LOCAL
ROWS = {
    "ours": ([], ALL),
    "baseline": (["--baseline"], {"backbone", "fc"}),
    "w/o CA": (["--no-cross-attention"], ALL - {"ca"}),
    "w/o CA and GA": (["--no-cross-attention", "--no-global-attention"], ALL - {"ca", "ga"}),
    "base": (["--no-local"], GLOBAL),
    "ResNet-101 of Table 8": (["--no-global-attention", "--no-local"], {"backbone", "fc"}),
    "L_g + L_l": (["--no-weak"], ALL),
    "top 4": (["--ks", "4"], ALL),
    "top 8": (["--ks", "8"], ALL),
    "the paper's 24 boxes": (["--ks", "4", "--ke", "2", "--kr", "3"], ALL),
    "area": (["--rank", "area", "--ke", "1"], ALL),
    "tied": (["--tie-weak-head"], ALL - {"weak_conv"}),
    **{
        f"F{r}, F{w}": (["--roi-level", str(r), "--weak-level", str(w)], ALL)
        for r, w in itertools.product((8, 16, 32), repeat=2)
    },
}


@pytest.fixture(scope="module")
def rows():
    return {}


@pytest.mark.parametrize("row", ROWS)
def test_table_row(row, energy_run, rows):
    flags, parts = ROWS[row]
    record, folder = energy_run("-b", "8", *flags)
    state = common.load_checkpoint(folder / "last.pt")["model"]
    assert {name.split(".")[0] for name in state} == parts
    local = "fc_local" in parts
    terms = {k for k in record if k.startswith("L_")}
    assert terms == {"L_global"} | (
        {"L_local", "L_weak"} - ({"L_weak"} if row == "L_g + L_l" else set()) if local else set()
    )
    assert record["loss"] == pytest.approx(sum(record[k] for k in terms), rel=1e-5)
    assert (folder / "figures" / "regions.png").exists() == local == ("boxes_per_image" in record)
    rows[row] = record, state
    ours, weights = rows.setdefault("ours", rows[row])
    if parts == ALL and row not in ("ours", "F16, F32"):  # same start of the backbone, one step
        assert record["L_global"] == pytest.approx(ours["L_global"], rel=1e-4) or "--weak-level" in flags
        different = [
            n for n in weights if not (weights[n].shape == state[n].shape and torch.equal(weights[n], state[n]))
        ]
        assert different or row == "area"  # of one region each, area may choose the same
    if row == "F16, F32":  # the default
        assert all(torch.equal(weights[n], t) for n, t in state.items())
    if row == "L_g + L_l":  # nothing trains the weak head
        start = energy_roi.build(energy_roi.parse(["--image-size", "64"]), data.TOY_CLASSES)
        assert not any(
            p.requires_grad for p in energy_roi.build(energy_roi.parse(flags), data.TOY_CLASSES).weak_bn.parameters()
        )
        assert torch.equal(state["weak_bn.weight"], start.weak_bn.weight)
        assert not torch.equal(weights["weak_bn.bias"], state["weak_bn.bias"])
    levels = {8: 128, 16: 256, 32: 512}
    if "--roi-level" in flags:
        assert state["transform.layer4.0.conv1.weight"].shape[1] == levels[int(flags[1])]
        assert state["weak_conv.weight"].shape[1] == levels[int(flags[3])]


def test_eqs_1_5_and_6_equal_plain_sums(energy_run, steps):
    seen = steps(energy_roi.EnergyROI)
    energy_run("--limit", "4", "--image-size", "32")
    for (logits, local, z, _, _), labels, terms in seen:
        y = labels != 0  # difficult objects are positives
        assert terms["L_global"] == pytest.approx(plain_bce(logits, y), rel=1e-5)
        assert terms["L_local"] == pytest.approx(plain_bce(local, y), rel=1e-5)
        assert terms["L_weak"] == pytest.approx(energy_roi.weak_loss(z, y).item(), rel=1e-5)
        assert terms["loss"] == pytest.approx(terms["L_global"] + terms["L_weak"] + terms["L_local"], rel=1e-6)
        assert terms["L_global"] != terms["L_local"] and y.any()
    assert len(seen) == 1


@pytest.mark.parametrize("change", [{"ks": 2}, {"ke": 1}, {"kr": 1}, {"rank": "area"}])
def test_a_selection_switch_changes_the_output_of_the_same_weights(change):
    ke = 1 if "rank" in change else 2  # another order matters only where a region is left out
    first, second = network(ke=ke), network(**{"ke": ke} | change)
    images = images_of(6, 128, 128)  # 8x8 cells, so that a map can have several regions
    warm(first, images_of(4))
    first.weak_bn.bias.data.fill_(-0.5)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        a, b = first(images), second.eval()(images)
    assert not torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("switch", ["ca", "ga", "local"])
def test_a_switch_changes_the_output_of_the_same_weights(switch):
    whole, less, images = network(), network(**{switch: False}), images_of(2)
    warm(whole, images)
    missing = less.load_state_dict({n: t for n, t in whole.state_dict().items() if "fc_local" not in n}, strict=False)
    assert missing.unexpected_keys and all("fc_local" in n for n in missing.missing_keys)
    with torch.no_grad():
        assert not torch.allclose(whole(images), less.eval()(images), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--baseline --ks 3", "--ks has no effect"),
        ("--baseline --no-local", "--no-local has no effect"),
        ("--baseline --no-global-attention", "--no-global-attention has no effect"),
        ("--no-local --rank area", "--rank has no effect"),
        ("--no-local --tie-weak-head", "--tie-weak-head has no effect"),
        ("--no-local --save-embeddings", "--save-embeddings has no effect"),
        ("--no-local --no-cross-attention", "--no-cross-attention has no effect"),
        ("--tie-weak-head --weak-level 16", "--weak-level 16 is another map"),
        ("--ks 0", "expected 1 or more"),
        ("--roi-level 4", "invalid choice"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        energy_roi.parse(flags.split())
    assert message in capsys.readouterr().err


def test_the_papers_recipe():
    for name, rate in (("coco", 0.0125), ("voc2007", 0.05)):
        args = energy_roi.parse(["--data", name])
        assert (args.lr, args.pretrained_lr, args.weight_decay, args.epochs, args.batch_size) == (
            rate,
            0.1,
            1e-4,
            50,
            16,
        )
        assert (args.image_size, args.view, args.weights, args.backbone) == (448, "multi-scale", "v1", "resnet101")
        assert (args.ks, args.ke, args.kr, args.rank, args.roi_level, args.weak_level) == (4, 2, 3, "energy", 16, 32)
        assert (args.difficult_train, args.difficult_test, args.coco_images) == ("positive", "ignore", "labelled")
    assert energy_roi.parse(["--no-local"]).no_weak
    toy = energy_roi.RECIPE["toy"]
    assert toy["ks"] * toy["ke"] * toy["kr"] == 4 and energy_roi.parse([]).pretrained_lr == 1


def rates(folder):
    """Learning rates by parameter name of a finished run, and its epochs' logged rates."""
    state = common.load_checkpoint(folder / "last.pt")
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return state["optimizer"]["param_groups"], [r["lr"] for r in logged if "epoch" in r]


def test_pretrained_layers_and_their_copy_learn_at_a_tenth_and_rates_drop(energy_run, tmp_path, monkeypatch):
    monkeypatch.setitem(energy_roi.RECIPE, "toy", energy_roi.RECIPE["toy"] | {"optimizer": "sgd"})
    torch.manual_seed(0)
    torch.save(common.torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    flags = [
        "--weights",
        str(tmp_path / "w.pth"),
        "--schedule",
        "step",
        "--epochs",
        "5",
        "--lr",
        "0.01",
        "--limit",
        "4",
    ]
    _, folder = energy_run(*flags, "--eval-every", "5")
    groups, logged = rates(folder)
    assert logged == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-5])  # the first group's; 30 and 40 of 50 epochs
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-3, 1e-2])
    model = energy_roi.build(energy_roi.parse([]), data.TOY_CLASSES)
    sizes = [sum(1 for _ in m.parameters()) for m in (model.backbone, model.transform, model)]
    assert [len(g["params"]) for g in groups] == [sizes[0] + sizes[1], sizes[2] - sizes[0] - sizes[1]]
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 1e-4) for g in groups)


def test_without_pretrained_weights_all_layers_learn_alike_and_resume_keeps_it(energy_run, monkeypatch):
    _, folder = energy_run("--schedule", "step", "--epochs", "2")
    groups, _ = rates(folder)
    assert [g["initial_lr"] for g in groups] == [1e-3, 1e-3]
    assert energy_roi.parse(["--resume", str(folder)]).pretrained_lr == 1
    # from another run's weights it is fine-tuning
    assert energy_roi.parse(["--init-from", str(folder)]).pretrained_lr == 0.1


def test_the_gradient_is_clipped(energy_run, monkeypatch):
    norms = []
    real = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, n: norms.append(n) or real(p, n))
    energy_run()
    assert norms == [10.0, 10.0]


def test_init_from_carries_class_rows_over(energy_run, tmp_path):
    _, folder = energy_run(out="a")
    (tmp_path / "classes.txt").write_text("blue star\nred ring\n")
    still = ["--lr", "0", "--weight-decay", "0", "--classes", str(tmp_path / "classes.txt")]
    _, other = energy_run("--init-from", str(folder), *still, out="b")
    old, new = (common.load_checkpoint(f / "last.pt")["model"] for f in (folder, other))
    rows = [data.TOY_CLASSES.index(c) for c in ("blue star", "red ring")]
    for name in ("fc.weight", "fc_local.bias", "weak_conv.weight", "weak_bn.bias"):
        assert torch.equal(new[name], old[name][rows]), name
    assert torch.equal(new["ca.q.weight"], old["ca.q.weight"])


def test_resume_equals_the_straight_run(energy_run, monkeypatch):
    from test_common import same_run, stop_in_epoch

    flags = ["--epochs", "2", "--limit", "8"]
    _, straight = energy_run(*flags, out="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 1, KeyboardInterrupt)
        energy_run(*flags, out="broken")
    energy_roi.main(energy_roi.parse(["--resume", str(straight.parent / "broken")]))
    same_run(straight, straight.parent / "broken")


def test_embeddings_are_those_of_present_selected_classes(energy_run, toy):
    _, folder = energy_run("--save-embeddings", "--ks", "4")
    with np.load(folder / "embeddings.npz") as file:
        saved = dict(file)
    scores = metrics.load_scores(folder / "scores.npz")
    assert saved["embeddings"].shape == (len(saved["class"]), 256) and len(saved["class"]) > 0
    position = {name: i for i, name in enumerate(scores["images"])}
    for c, name in zip(saved["class"], saved["image"], strict=True):
        assert scores["labels"][position[name], c] == 1
    assert len(set(zip(saved["class"], saved["image"], strict=True))) == len(saved["class"])


# ---------------------------------------------------------------------------------------------------------------------
# Processes, and as a user runs it


def gradients_of_a_rank(rank, world, rendezvous, out):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=rendezvous)
    common.start(energy_roi.parse(["--gpus", ",".join(["cpu"] * world)]))
    result = {}
    for name, options in (("all", {}), ("no weak", {"weak": False}), ("tied", {"tied": True, "ke": 1})):
        model = frozen_norm(network(**options))
        net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        images, y = images_of(4, 64, 64), torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) > 0.7
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        logits, local, z, _, _ = net(images[part])
        loss = sum(nnf.binary_cross_entropy_with_logits(x, y[part].float()) for x in (logits, local))
        if "weak" not in options:
            loss = loss + energy_roi.weak_loss(z, y[part])
        loss.backward()
        result |= {f"{name} {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save(result, out)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    for world in (1, 2):
        arguments = (world, f"file://{tmp_path}/{world}", str(tmp_path / f"{world}.pt"))
        torch.multiprocessing.spawn(gradients_of_a_rank, arguments, world)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5), name


def test_the_script_runs_on_two_processes_and_leaves_what_it_promises(toy, tmp_path):
    out = tmp_path / "run"
    flags = "--image-size 64 --limit 16 -b 8 --epochs 1 -j 0 --amp bf16 --gpus cpu,cpu".split()
    command = [sys.executable, "energy_roi.py", "--root", toy, "--out", str(out), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mAP points") == 1 and "protocol: toy" in result.stdout
    files = {p.name for p in out.iterdir()}
    assert {"config.json", "log.jsonl", "scores.npz", "per_class.csv", "last.pt", "best.pt", "figures"} == files
    for name in ("regions", "curves"):
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.width == 1000
    header, epoch = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert header["processes"] == 2 and {"L_weak", "maps_with_region", "boxes_per_image", "silent_present"} <= set(
        epoch
    )
    assert 1 <= epoch["boxes_per_image"] <= 4 and 0 <= epoch["maps_with_region"] <= 1


def test_the_picture_shows_solid_and_dashed_boxes(toy, tmp_path, monkeypatch):
    drawn = []
    real = energy_roi.draw_box
    monkeypatch.setattr(
        energy_roi,
        "draw_box",
        lambda d, box, colour, dashed: drawn.append((colour, dashed)) or real(d, box, colour, dashed),
    )
    flags = ["--root", toy, *SMALL, "--out", str(tmp_path / "run"), "--ks", "4", "--ke", "2", "--kr", "3"]
    energy_roi.main(energy_roi.parse(flags))
    assert {colour for colour, _ in drawn} == set(energy_roi.SCALES) and {d for _, d in drawn} == {False, True}
    picture = np.asarray(Image.open(tmp_path / "run" / "figures" / "regions.png"))
    assert all((picture == colour).all(2).sum() > 100 for colour in energy_roi.SCALES)


@pytest.mark.parametrize("flags", [[], ["--baseline"]])
def test_real_voc_images_with_real_weights(animals, tmp_path, flags):
    weights = f"{animals}/../weights/mobilenet_v2_imagenet.pth"
    args = ["--data", "voc2012", "--root", animals, "--backbone", "mobilenet_v2", "--weights", weights]
    args += ["--image-size", "96", "--limit", "8", "-b", "4", "--epochs", "1", "-j", "0", "--gpus", "cpu"]
    record = energy_roi.main(energy_roi.parse([*args, "--amp", "off", "--out", str(tmp_path / "run"), *flags]))
    assert np.isfinite(record["loss"]) and record["images"] == 8
