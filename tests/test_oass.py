"""oass.py: plain loops for every keypoint, patch, tile and loss, who gets a gradient, the teacher, every row."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, plain_bce
from PIL import Image
from test_common import same_run, stop_in_epoch
from torch import nn
from torch.nn import functional as nnf

import common
import data
import eval as metrics
import oass
from data import UserError


@pytest.fixture(scope="module", autouse=True)
def one_thread(two_threads):
    """What is computed here is so small that threads would only wait for each other."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(min(2, os.cpu_count() or 1))


class Eye(nn.Module):
    """Stands in for common.Backbone: one convolution at stride 16 that sees a little of its neighbours, BatchNorm on
    request. Runs of milliseconds."""

    norm = False

    def __init__(self, name="resnet18", weights="none", last_stride=2, frozen=(), frozen_bn=False):
        super().__init__()
        assert last_stride == 1
        self.channels, self.conv = (3, 5, 11), nn.Conv2d(3, 11, 20, 16, 2)
        self.bn = nn.BatchNorm2d(11) if self.norm else nn.Identity()

    def forward(self, images):
        return None, None, self.bn(self.conv(images)).relu()


class NormedEye(Eye):
    norm = True


def network(classes=7, seed=0, eye=Eye, **options):
    torch.manual_seed(seed)
    return oass.OASS(eye(last_stride=1), classes, **options)


@pytest.fixture
def oass_run(toy, tmp_path, monkeypatch):
    """oass_run("--csi", out="a") trains in-process for a second, on a network of one layer; (record, folder)."""
    monkeypatch.setattr(common, "Backbone", NormedEye)
    monkeypatch.setattr(oass, "draw_keypoints", lambda run, path: path.touch())

    def train(*flags, out="run", resume=False):
        folder = tmp_path / out
        start = ["--resume", str(folder)] if resume else ["--root", toy, *SMALL, "--out", str(folder)]
        return oass.main(oass.parse([*start, *flags])), folder

    return train


def randoms(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some_labels(b=5, c=7, seed=0):
    """(B, C) bool: another number of present classes in every image; 0 in the last, all in the first."""
    y = torch.zeros(b, c, dtype=torch.bool)
    for i in range(b):
        order = torch.randperm(c, generator=torch.Generator().manual_seed(seed + i))
        y[i, order[: round(c * (b - 1 - i) / max(b - 1, 1))]] = True
    return y


def equal_with_gradients(ours, naive, *inputs):
    """Two functions of the inputs have the same values and the same gradients, and some gradient is not 0."""
    grads = []
    for function in (ours, naive):
        values = function(*inputs)
        grads.append([v.detach() for v in values])
        for value in values:
            grads[-1] += torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12))
    assert max(g.abs().max() for g in grads[0][2:] if g is not None) > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Keypoints


def naive_argmax(channel):
    best = (0, 0)
    for y, x in itertools.product(range(channel.shape[0]), range(channel.shape[1])):
        if channel[y, x] > channel[best]:
            best = (y, x)
    return best


def naive_top_k(channel, k, weighted):
    h, w = channel.shape
    found = []
    for y, x in itertools.product(range(h), range(w)):
        window = channel[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if channel[y, x] > 0 and (channel[y, x] >= window).all():
            found.append((channel[y, x].item(), y, x))
    found = sorted(found, key=lambda peak: -peak[0])[:k]  # Python's sort is stable too
    if not found:
        return naive_argmax(channel)
    weights = [v if weighted else 1.0 for v, _, _ in found]
    mean = [sum(p * f[axis] for p, f in zip(weights, found, strict=True)) / sum(weights) for axis in (1, 2)]
    return round(mean[0]), round(mean[1])  # Python rounds half to even


def naive_keypoints(cam, y, strategy, k=3):
    """List of (image, class or None, (y, x))."""
    b, c, h, w = cam.shape
    found = []
    for i in range(b):
        if strategy == "center":
            found.append((i, None, (h // 2, w // 2)))
        elif strategy == "max":
            found.append((i, None, naive_argmax(torch.stack(list(cam[i])).max(0).values)))
        else:
            for j in range(c):
                if y[i, j]:
                    cell = naive_argmax(cam[i, j])
                    cell = cell if strategy == "cmax" else naive_top_k(cam[i, j], k, strategy == "ctopk-w")
                    found.append((i, j, cell))
    return [(i, j, (min(max(cy, 1), h - 1), min(max(cx, 1), w - 1))) for i, j, (cy, cx) in found]


def some_cams(kind, b=5, c=7, h=11, w=13):
    cam = randoms(b, c, h, w, dtype=torch.float)
    if kind == "smooth":
        cam = nnf.avg_pool2d(cam, 3, 1, 1)
    elif kind == "ties":
        cam = (2 * cam).round()
    elif kind == "constant":
        cam = torch.full_like(cam, 0.3)
    elif kind == "zero":
        cam = torch.zeros_like(cam)
    elif kind == "negative":
        cam = -cam.abs() - 0.1
    elif kind == "corners":
        cam = -cam.abs()
        for j in range(c):
            cam[:, j, (h - 1) * (j % 2), (w - 1) * (j // 2 % 2)] = 1 + j
    elif kind == "one cell":
        cam = cam[:, :, :1, :1]
    return cam


@pytest.mark.parametrize("kind", ["random", "smooth", "ties", "constant", "zero", "negative", "corners"])
@pytest.mark.parametrize("strategy", ["center", "max", "cmax", "ctopk", "ctopk-w"])
def test_every_strategy_equals_a_loop(strategy, kind):
    cam, y = some_cams(kind), some_labels()
    for k in (3, 2, 50) if "topk" in strategy else (3,):
        image, cls, cells = oass.keypoints(cam, y, strategy, k)
        classes = [None] * len(image) if cls is None else cls.tolist()
        found = list(zip(image.tolist(), classes, map(tuple, cells.tolist()), strict=True))
        assert found == naive_keypoints(cam, y, strategy, k)
    if kind == "random" and strategy != "center":
        assert len(set(map(tuple, cells.tolist()))) > 3


def test_the_map_may_have_two_cells_a_side():
    cam, y = some_cams("random", h=2, w=2), some_labels()
    for strategy in ("center", "max", "cmax", "ctopk", "ctopk-w"):
        assert (oass.keypoints(cam, y, strategy)[2] == 1).all()


def test_max_ignores_labels_and_gets_one_keypoint_an_image():
    cam = some_cams("random")
    cam[2, 3, 4, 5] = 99
    for y in (some_labels(), torch.zeros(5, 7, dtype=torch.bool)):
        image, cls, cells = oass.keypoints(cam, y, "max")
        assert image.tolist() == list(range(5)) and cls is None and cells[2].tolist() == [4, 5]


def test_topk_centre_by_hand():
    cam = torch.zeros(1, 9, 9)
    cam[0, 2, 2], cam[0, 2, 6], cam[0, 7, 4], cam[0, 5, 8] = 3, 1, 2, 0.5
    assert oass.local_maxima(cam)[0].nonzero().tolist() == [[2, 2], [2, 6], [5, 8], [7, 4]]
    assert oass.top_k_centre(cam, 1, True).tolist() == oass.top_k_centre(cam, 1, False).tolist() == [[2, 2]]
    assert oass.top_k_centre(cam, 3, False).tolist() == [[4, 4]]  # (2 + 2 + 7) / 3, (2 + 6 + 4) / 3
    assert oass.top_k_centre(cam, 3, True).tolist() == [[4, 3]]  # (6 + 2 + 14) / 6, (6 + 6 + 8) / 6; D1's 1/k: (1, 1)
    assert oass.top_k_centre(cam, 2, False).tolist() == [[4, 3]]  # 4.5: to even
    cam[0, 2, 2], cam[0, 2, 6], cam[0, 7, 4], cam[0, 5, 8] = 0.1, 0, 0.1, 0  # equal weights are exact, too
    assert oass.top_k_centre(cam, 3, True).tolist() == [[4, 3]]


@pytest.mark.parametrize("value", [5.0, 1e-30])
def test_ctopk_w_with_one_maximum_is_that_maximum(value):
    cam = torch.full((1, 7, 11), -1.0)
    cam[0, 5, 3] = value
    for weighted in (True, False):
        assert oass.top_k_centre(cam, 3, weighted).tolist() == [[5, 3]]


def test_gt_bbox_is_the_mean_of_the_centres_of_the_visible_boxes():
    rng = np.random.default_rng(0)
    sides = np.sort(rng.uniform(0, 96, (23, 2, 2)), 2)
    cls, image = rng.integers(0, 7, 23), np.sort(rng.integers(0, 4, 23))
    boxes = torch.tensor(np.column_stack([image, cls, sides[:, 0, 0], sides[:, 1, 0], sides[:, 0, 1], sides[:, 1, 1]]))
    y = some_labels()
    _, _, cells = oass.keypoints(torch.zeros(5, 7, 6, 6), y, "gt-bbox", boxes=boxes.float())
    expected, places = [], []
    for i, j in y.nonzero().tolist():
        own = [s for s, a, b in zip(sides, cls, image, strict=True) if (b, a) == (i, j)]
        middle = np.mean([s.mean(1) for s in own], 0) if own else np.array([48, 48])
        places.append(len(own))
        expected.append([min(max(round(v / 16), 1), 5) for v in middle[::-1].tolist()])
    assert cells.tolist() == expected and min(places) == 0 and max(places) > 1
    _, _, cells = oass.keypoints(torch.zeros(5, 7, 6, 6), y, "gt-bbox", boxes=torch.zeros(0, 6))
    assert (cells == 3).all()


def test_a_batch_without_a_present_class_keeps_one_pair_of_no_weight():
    cam, y = some_cams("random"), torch.zeros(5, 7, dtype=torch.bool)
    for strategy in ("cmax", "ctopk", "ctopk-w", "gt-bbox"):
        image, cls, cells = oass.keypoints(cam, y, strategy, boxes=torch.zeros(0, 6))
        assert image.tolist() == cls.tolist() == [0] and cells.shape == (1, 2)
    assert oass.puzzle_losses(cam, cam[image] + 1, y, image, cls) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Patches, tiling


def naive_patches(images, cells):
    """The four crops of every image, one interpolation each: TL, TR, BL, BR along the batch."""
    h, w = images.shape[2:]
    parts = [[], [], [], []]
    for image, (y, x) in zip(images, (16 * cells).tolist(), strict=True):
        crops = (image[:, :y, :x], image[:, :y, x:], image[:, y:, :x], image[:, y:, x:])
        for part, crop in zip(parts, crops, strict=True):
            part.append(nnf.interpolate(crop[None], (h // 2, w // 2), mode="bilinear", align_corners=False)[0])
    return torch.stack([patch for part in parts for patch in part])


def naive_tiled(maps, cells):
    n, h, w = len(cells), 2 * maps.shape[2], 2 * maps.shape[3]
    tiles = []
    for i, (y, x) in enumerate(cells.tolist()):
        sizes = ((y, x), (y, w - x), (h - y, x), (h - y, w - x))
        parts = [
            nnf.interpolate(maps[k * n + i][None], size, mode="bilinear", align_corners=False)[0]
            for k, size in enumerate(sizes)
        ]
        tiles.append(torch.cat([torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)], 1))
    return torch.stack(tiles)


def every_cell(h, w):
    return torch.tensor(list(itertools.product(range(1, h), range(1, w))))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 1e-6)])
def test_patches_and_tiles_equal_crops_and_interpolations_for_every_keypoint(dtype, tolerance):
    """In float32 too: there interpolate's own coordinates are off by 1e-5, so it is asked in float64."""
    cells = every_cell(4, 6)
    images = randoms(len(cells), 3, 64, 96, dtype=dtype)
    patches = oass.patches_of(images, cells)
    assert patches.shape == (4 * len(cells), 3, 32, 48) and patches.dtype == dtype
    assert torch.allclose(patches.double(), naive_patches(images.double(), cells), rtol=tolerance, atol=tolerance)
    cells = every_cell(10, 14)
    maps = randoms(4 * len(cells), 3, 5, 7, dtype=dtype)
    tiles = oass.tiled(maps, cells)
    assert tiles.shape == (len(cells), 3, 10, 14)
    assert torch.allclose(tiles.double(), naive_tiled(maps.double(), cells), rtol=tolerance, atol=tolerance)


def test_the_two_ways_are_differentiated_as_interpolation_is():
    cells, maps = every_cell(4, 6), randoms(60, 3, 2, 3).requires_grad_()
    target = randoms(15, 3, 4, 6, seed=1)
    equal_with_gradients(
        lambda m: [(oass.tiled(m, cells) * target).sum()] * 2,
        lambda m: [(naive_tiled(m, cells) * target).sum()] * 2,
        maps,
    )


def test_no_patch_reads_across_the_cut():
    cells = torch.tensor([[1, 5], [3, 2]])
    images = torch.zeros(2, 3, 64, 96)
    for image, (y, x) in zip(images, (16 * cells).tolist(), strict=True):
        image[:, :y, :x], image[:, :y, x:], image[:, y:, :x], image[:, y:, x:] = 1, 2, 3, 4
    patches = oass.patches_of(images, cells)
    for k, part in enumerate(patches.chunk(4), 1):
        assert torch.allclose(part, torch.tensor(float(k)), rtol=1e-6)


def test_the_centre_is_plain_quadrants_bit_for_bit():
    images, maps = randoms(3, 3, 64, 96, dtype=torch.float), randoms(12, 7, 2, 3, dtype=torch.float)
    cells = torch.tensor([[2, 3]] * 3)
    halves = [x for y in images.split(32, 2) for x in y.split(48, 3)]
    assert torch.equal(oass.patches_of(images, cells), torch.cat(halves))
    whole = torch.empty(3, 7, 4, 6)
    whole[:, :, :2, :3], whole[:, :, :2, 3:], whole[:, :, 2:, :3], whole[:, :, 2:, 3:] = maps.chunk(4)
    assert torch.equal(oass.tiled(maps, cells), whole)


def test_puzzlecams_reading_equals_merging_quadrants_bit_for_bit():
    """With shared weights and BatchNorm in training, statistics and gradients included."""
    images, y = randoms(5, 3, 64, 96, dtype=torch.float), some_labels()
    ours, plain = (network(eye=NormedEye, keypoint="center").train() for _ in range(2))
    logits, _, cam, cam_re, image, cls = ours(images, y)
    l_p, l_re = oass.puzzle_losses(cam, cam_re, y, image, cls)
    f = plain.backbone(images)[2]
    quadrants = torch.cat(
        [images[:, :, :32, :48], images[:, :, :32, 48:], images[:, :, 32:, :48], images[:, :, 32:, 48:]]
    )
    quadrants = quadrants.contiguous(memory_format=torch.channels_last)  # the same memory, or convolutions round else
    own = plain.head(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    parts = plain.head(plain.backbone(quadrants)[2].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(4)
    merged = torch.cat([torch.cat(parts[:2], 3), torch.cat(parts[2:], 3)], 2)
    assert torch.equal(cam, own) and torch.equal(cam_re, merged) and torch.equal(logits, own.mean((2, 3)))
    assert torch.equal(l_re, ((own - merged).abs() * y.float()[:, :, None, None]).mean())
    assert torch.allclose(l_p, nnf.binary_cross_entropy_with_logits(merged.mean((2, 3)), y.float()), rtol=1e-6)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, plain.state_dict()[name]), name
    l_re.backward()
    ((own - merged).abs() * y.float()[:, :, None, None]).mean().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-8), name


def test_the_head_and_resizing_commute():
    cells, model = every_cell(4, 6), network().requires_grad_(False)
    features = randoms(60, 11, 2, 3, dtype=torch.float)
    first = oass.tiled(model.cam(features)[0].permute(0, 3, 1, 2), cells)
    last = model.cam(oass.tiled(features, cells))[0].permute(0, 3, 1, 2)
    assert torch.allclose(first, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["max", "ctopk-w"])
def test_more_pairs_than_a_chunk_change_nothing(strategy):
    images, y = randoms(5, 3, 64, 96, dtype=torch.float), some_labels()
    teacher, calls = NormedEye(last_stride=1).eval(), []
    teacher.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    results = [network(keypoint=strategy, chunk=n).train()(images, y, teacher=teacher) for n in (100, 3)]
    pairs = 5 if strategy == "max" else int(y.sum())
    assert calls == [4 * pairs] + [12] * (pairs // 3) + [4 * (pairs % 3)] * (pairs % 3 > 0)
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def naive_bce(x, y):
    return -sum((y[j] * x[j].sigmoid().log() + (1 - y[j]) * (-x[j]).sigmoid().log()) for j in range(len(y))) / len(y)


def test_losses_of_one_keypoint_an_image_equal_a_loop():
    y = some_labels()

    def naive(cam, cam_re):
        p = sum(naive_bce(cam_re[i].mean((1, 2)), y[i].double()) for i in range(5)) / 5
        re = sum((cam[i, j] - cam_re[i, j]).abs().sum() for i in range(5) for j in range(7) if y[i, j])
        return p, re / cam.numel()

    inputs = randoms(5, 7, 3, 2).requires_grad_(), randoms(5, 7, 3, 2, seed=1).requires_grad_()
    equal_with_gradients(lambda a, b: oass.puzzle_losses(a, b, y, torch.arange(5)), naive, *inputs)


def test_channel_wise_losses_equal_a_loop_with_another_number_of_classes_in_every_image():
    y = some_labels()
    assert y.sum(1).unique().numel() == 5
    image, cls = y.nonzero().T

    def naive(cam, cam_re):
        totals = [0, 0]
        for i in range(5):
            for j in range(7):
                if y[i, j]:
                    n = int(((image == i) & (cls == j)).nonzero())
                    n_pos = max(int(y[i].sum()), 1)
                    totals[0] = totals[0] + naive_bce(cam_re[n].mean((1, 2)), y[i].double()) / n_pos / 5
                    totals[1] = totals[1] + (cam[i, j] - cam_re[n, j]).abs().mean() / n_pos / 5
        return totals

    inputs = randoms(5, 7, 3, 2).requires_grad_(), randoms(len(cls), 7, 3, 2, seed=1).requires_grad_()
    equal_with_gradients(lambda a, b: oass.puzzle_losses(a, b, y, image, cls), naive, *inputs)


def test_the_ramp_at_0_50_100_and_150_epochs():
    assert [oass.ramp(epoch * 7, 100 * 7) for epoch in (0, 50, 100, 150)] == [0, 0.5, 1, 1]
    assert oass.ramp(0, 0) == 1
    for epochs, expected in ((30, 30), (100, 100), (200, 100)):
        assert oass.parse(["--data", "voc2012", "--epochs", str(epochs)]).ramp_epochs == expected


@pytest.mark.parametrize("strategy", [s for s in oass.STRATEGIES if s != "none"])
def test_who_gets_which_gradient(strategy):
    """L_re reaches f and g, L_p-cls only g (D3); with shared weights both; nothing reaches the teacher."""
    images, y, boxes = randoms(5, 3, 64, 96, dtype=torch.float), some_labels(), torch.zeros(0, 6)
    for shared, term in itertools.product((False, True), (0, 1)):
        model, teacher = network(keypoint=strategy, csi=True).train(), None if shared else Eye(last_stride=1).eval()
        out = model(images, y, boxes, teacher=teacher)
        loss = oass.puzzle_losses(*out[2:4], y, *out[4:])[term]
        loss.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        trunk = {"backbone.conv.weight", "backbone.conv.bias"} if term == 1 or shared else set()
        assert reached == trunk | {"head.weight"}, (shared, term)
        assert shared or all(p.grad is None for p in teacher.parameters())


def test_the_keypoint_and_the_mask_pass_no_gradient():
    model = network(csi=True, keypoint="none").train()
    model(randoms(5, 3, 64, 96, dtype=torch.float))[1].sum().backward()
    assert model.head.weight.grad is None and model.backbone.conv.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Teacher


def test_the_teacher_after_one_step_is_the_mean():
    torch.manual_seed(0)
    teacher, student = (NormedEye(last_stride=1) for _ in range(2))
    student.train()(randoms(5, 3, 64, 96, dtype=torch.float))
    old, new = ({n: t.clone() for n, t in m.state_dict().items()} for m in (teacher, student))
    oass.update_teacher(teacher, student, oass.teacher_decay(1, 10_000))
    for name, tensor in teacher.state_dict().items():
        expected = new[name] if name == "bn.num_batches_tracked" else (old[name] + new[name]) / 2
        assert torch.allclose(tensor, expected, rtol=1e-6), name
    assert new["bn.num_batches_tracked"] == 1 and not torch.equal(old["bn.running_mean"], new["bn.running_mean"])
    assert all(torch.equal(t, new[n]) for n, t in student.state_dict().items())


def test_the_teachers_decay_is_mean_teachers_with_a_horizon_that_fits_the_run():
    assert [oass.teacher_decay(step, 33_000) for step in (1, 2, 999, 5000)] == pytest.approx(
        [1 / 2, 2 / 3, 0.999, 0.999]
    )
    assert [oass.teacher_decay(step, 100) for step in (1, 9, 50)] == pytest.approx([0.5, 0.9, 0.95])
    assert oass.teacher_decay(1, 1) == 0.5


def test_the_teacher_follows_every_optimizer_step_of_a_run(oass_run, monkeypatch):
    real, students = oass.update_teacher, []

    def update(teacher, student, decay):
        students.append(({n: t.clone() for n, t in student.state_dict().items()}, decay))
        real(teacher, student, decay)

    monkeypatch.setattr(oass, "update_teacher", update)
    for parts in ("1", "2"):
        students.clear()
        _, folder = oass_run("--epochs", "3", "--accumulate", parts, "--lr", "0.01", out=parts)
        state = common.load_checkpoint(folder / "last.pt")
        assert [d for _, d in students] == [oass.teacher_decay(n, 6) for n in range(1, 7)] and state["step"] == 6
        torch.manual_seed(0)
        first = {n: t for n, t in oass.build(oass.parse([]), range(12)).backbone.state_dict().items()}
        for name, tensor in state["extra"]["teacher"].items():
            mean = first[name]
            for student, decay in students:
                mean = student[name] if mean.dtype == torch.long else decay * mean + (1 - decay) * student[name]
            assert torch.allclose(mean, tensor, atol=1e-6), name
        assert not torch.allclose(first["conv.weight"], state["extra"]["teacher"]["conv.weight"], atol=1e-3)


def test_the_teacher_is_no_part_of_the_network_and_can_be_tested(oass_run, tmp_path):
    _, folder = oass_run("--epochs", "2", "--lr", "0.01")
    state = common.load_checkpoint(folder / "last.pt")
    assert {n.split(".")[0] for n in state["model"]} == {"backbone", "head"}
    flags = ["--evaluate", "--checkpoint", str(folder), "--gpus", "cpu", "--out"]
    oass.main(oass.parse([*flags, str(tmp_path / "student")]))
    oass.main(oass.parse([*flags, str(tmp_path / "teacher"), "--test-teacher"]))
    ran, student, teacher = (
        metrics.load_scores(f / "scores.npz")["scores"] for f in (folder, tmp_path / "student", tmp_path / "teacher")
    )
    assert np.array_equal(ran, student) and not np.allclose(student, teacher, atol=1e-5)
    model = network(12, eye=NormedEye)
    model.load_state_dict(state["model"] | {f"backbone.{n}": t for n, t in state["extra"]["teacher"].items()})
    _, test = data.load(oass.parse(["--root", state["config"]["root"], "--limit", "8"]))
    images = data.normalise(data.collate([data.Images(test, 64)[0, i] for i in range(4)]).images)
    with torch.no_grad():
        assert np.allclose(model.eval()(images), teacher[:4], atol=1e-5)
    _, other = oass_run("--keypoint", "none", out="none")
    with pytest.raises(UserError, match="has no teacher"):
        flags[2] = str(other)
        oass.main(oass.parse([*flags, str(tmp_path / "x"), "--test-teacher"]))


# ---------------------------------------------------------------------------------------------------------------------
# CSI


def naive_csi(csi, f, cam):
    """Sec. 2.2 as printed, every instance held; f (B, h, w, D), cam (B, h, w, C)."""
    maps = []
    for c in range(cam.shape[3]):
        positive = cam[..., c].detach().relu()
        mask = torch.stack([m / max(m.max().item(), 1e-5) for m in positive])
        instance = (mask[..., None] * f).permute(0, 3, 1, 2)  # (B, D, h, w)
        maps.append(nnf.conv2d(instance, csi.score.weight[c][None, :, None, None], csi.score.bias[c][None]))
    logits = nnf.conv2d(torch.cat(maps, 1), csi.mix.weight[:, :, None, None], csi.mix.bias)
    return logits.mean((2, 3))


@pytest.mark.parametrize("kind", ["random", "one negative class", "negative", "tiny"])
def test_cheap_csi_equals_the_instances_in_values_and_gradients(kind):
    torch.manual_seed(0)
    csi = oass.CSI(11, 7).double()
    cam = randoms(5, 3, 2, 7)
    if kind == "one negative class":
        cam[..., 3] = -cam[..., 3].abs()
    elif kind == "negative":
        cam = -cam.abs()
    elif kind == "tiny":
        cam = cam * 1e-9
    inputs = [randoms(5, 3, 2, 11, seed=1).requires_grad_(), *csi.parameters()]

    def sums(function):
        return lambda f, *parameters: (function(f).square().sum(), function(f).sum())

    equal_with_gradients(sums(lambda f: csi(f, cam)), sums(lambda f: naive_csi(csi, f, cam)), *inputs)
    mask = csi.mask(cam)
    assert mask.min() >= 0 and mask.max() <= 1 and (kind == "tiny" or ((cam > 0).any() == mask.any()))
    if kind == "random":
        assert torch.equal(mask.amax((1, 2)), (cam.amax((1, 2)) > 0).double())


def test_csi_scores_at_inference():
    with_csi, without = network(csi=True), network()
    without.load_state_dict(with_csi.state_dict(), strict=False)
    images = randoms(5, 3, 64, 96, dtype=torch.float)
    with torch.no_grad():
        logits, instances, cam, cam_re, *_ = with_csi.train()(images)
        assert torch.equal(with_csi.eval()(images), instances) and torch.equal(without.eval()(images), logits)
    assert cam_re is None and not torch.allclose(instances, logits) and cam.shape == (5, 7, 4, 6)


# ---------------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize(
    ("flags", "count"),
    [([], 23_548_992), (["--csi"], 23_590_392), (["--backbone", "resnet101"], 42_541_120)],
)
def test_the_papers_network_has_the_known_number_of_parameters_and_stride_16(flags, count):
    with torch.device("meta"):
        model = oass.build(oass.parse(["--data", "voc2012", "--weights", "none", *flags]), range(20))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert model.backbone(torch.empty(1, 3, 512, 512))[2].shape == (1, 2048, 32, 32)
    assert model.head.bias is None


BATCHES = [
    (strategy, case, b, classes)
    for strategy in oass.STRATEGIES[1:]
    for case in ("nothing", "everything", "constant image")
    for b, classes in ((3, 7), (1, 7), (2, 500), (1, 1))
    if classes < 500 or case != "everything" or strategy == "cmax"  # 1,000 pairs: once is enough
]


@pytest.mark.parametrize(("strategy", "case", "b", "classes"), BATCHES)
def test_any_batch_trains(strategy, case, b, classes):
    y = torch.full((b, classes), case == "everything")
    images = torch.zeros(b, 3, 64, 32) if case == "constant image" else randoms(b, 3, 64, 32, dtype=torch.float)
    y[:1, :1] |= case == "constant image"
    for teacher in (None, Eye(last_stride=1).eval()):
        model = network(classes, keypoint=strategy, csi=True).train()
        if case != "everything":
            model.head.weight.data = -model.head.weight.data.abs()  # an all-negative CAM
        out = model(images, y, torch.zeros(0, 6), teacher=teacher)
        terms = oass.puzzle_losses(*out[2:4], y, *out[4:])
        loss = sum(terms) + sum(nnf.binary_cross_entropy_with_logits(x, y.float()) for x in out[:2])
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cams_choices_and_scores_are_float32_in_half_precision(dtype):
    images, y = randoms(5, 3, 64, 96, dtype=torch.float), some_labels()
    model, teacher = network(csi=True, keypoint="ctopk-w").train(), Eye(last_stride=1).eval()
    with torch.autocast("cpu", dtype):
        f = model.backbone(images)[2]
        logits, instances, cam, cam_re, _, _ = model(images, y, teacher=teacher)
    assert f.dtype == dtype
    with torch.no_grad():
        expected, _ = model.cam(f)
    assert torch.equal(cam, expected.permute(0, 3, 1, 2))
    assert {x.dtype for x in (logits, instances, cam, cam_re)} == {torch.float32}
    patches = []
    teacher.register_forward_pre_hook(lambda module, args: patches.append(args[0]))
    with torch.autocast("cpu", dtype):
        model(images, y, teacher=teacher)
    image, _, cells = oass.keypoints(cam, y, "ctopk-w")
    assert torch.equal(patches[0], oass.patches_of(images[image], cells))


def test_two_images_equal_two_times_one():
    images, y = randoms(2, 3, 64, 96, dtype=torch.float), some_labels()[1:3]
    model, teacher = network(csi=True, keypoint="cmax").train(), Eye(last_stride=1).eval()
    both = model(images, y, teacher=teacher)
    for i in range(2):
        one = model(images[i : i + 1], y[i : i + 1], teacher=teacher)
        own = both[4] == i
        for a, b in zip(one[:4], (*(t[i : i + 1] for t in both[:3]), both[3][own]), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["max", "ctopk-w", "gt-bbox"])
def test_gpu_equals_cpu(strategy):
    images, y, boxes = randoms(5, 3, 64, 96, dtype=torch.float), some_labels(), torch.tensor([[0, 1, 2.0, 3, 40, 50]])
    model, teacher = network(csi=True, keypoint=strategy).train(), Eye(last_stride=1).eval()
    expected = model(images, y, boxes, teacher=teacher)
    found = model.cuda()(images.cuda(), y.cuda(), boxes.cuda(), teacher=teacher.cuda())
    for a, b in zip(expected, found, strict=True):
        assert a is b is None or torch.allclose(a, b.cpu(), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_training_on_a_gpu_in_half_precision(oass_run, amp):
    record, _ = oass_run("--gpus", "0", "--amp", amp, "--keypoint", "ctopk-w", "--csi")
    assert np.isfinite(record["loss"])


@pytest.mark.gpu
def test_one_keypoint_an_image_needs_no_synchronisation():
    model, teacher = network(keypoint="max").train().cuda(), Eye(last_stride=1).eval().cuda()
    images, y = randoms(5, 3, 64, 96, dtype=torch.float).cuda(), some_labels().cuda()
    model(images, y, teacher=teacher)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(images, y, teacher=teacher)
        sum(oass.puzzle_losses(*out[2:4], y, *out[4:])).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# Processes, resume


CASES = {  # without BatchNorm; teacher and losses too, with accumulated parts and the moving average
    "pairs": ["--keypoint", "ctopk-w", "--csi", "--accumulate", "2", "--ema-decay", "0.5"],
    "shared": ["--keypoint", "cmax", "--shared-teacher"],
    "boxes": ["--keypoint", "gt-bbox"],
}


def train_as_a_rank(rank, world, rendezvous, flags, out):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=rendezvous)
    common.Backbone = Eye
    oass.draw_keypoints = lambda run, path: path.touch()
    for name, own in CASES.items():
        oass.main(oass.parse([*flags, *own, "--gpus", ",".join(["cpu"] * world), "--out", f"{out}/{name}"]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(oass_run, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "Backbone", Eye)
    flags = ["--epochs", "3", "--ramp-epochs", "1"]
    arguments = (2, f"file://{tmp_path}/meet", ["--root", toy, *SMALL[:-2], *flags], str(tmp_path / "two"))
    torch.multiprocessing.spawn(train_as_a_rank, arguments, 2)
    for name, own in CASES.items():
        folders = tmp_path / "two" / name, oass_run(*flags, *own, out=f"one/{name}")[1]
        one, two = (common.load_checkpoint(folder / "last.pt") for folder in folders)
        teachers = [state["extra"].get("teacher", {}) for state in (one, two)]
        assert one["step"] == two["step"] == 6 and bool(teachers[0]) == (name != "shared")
        for a, b in ((one["model"], two["model"]), teachers):
            assert all(torch.allclose(a[n], b[n], rtol=1e-3, atol=2e-5) for n in a)
        logs = [(folder / "log.jsonl").read_text().splitlines() for folder in folders]
        assert [json.loads(log[0])["processes"] for log in logs] == [2, 1]
        for a, b in zip(*(map(json.loads, log[1:]) for log in logs), strict=True):
            assert all(a[n] == pytest.approx(b[n], rel=1e-3) for n in a if n.startswith("L_"))


@pytest.mark.parametrize(
    ("epoch", "flags"),
    [(1, []), (0, ["--keypoint", "ctopk-w", "--csi", "--ema-decay", "0.9"])]
    + [(2, ["--shared-teacher", "--accumulate", "2"]), (1, ["--recipe", "puzzlecam", "--lr", "0.01"])],
)
def test_resume_equals_the_straight_run(oass_run, monkeypatch, epoch, flags):
    _, straight = oass_run("--epochs", "3", *flags, out="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, epoch, KeyboardInterrupt)
        oass_run("--epochs", "3", *flags, out="broken")
    _, broken = oass_run(out="broken", resume=True)
    same_run(straight, broken)
    state = common.load_checkpoint(broken / "last.pt")
    assert ("teacher" in state["extra"]) == (flags[:1] not in (["--shared-teacher"], ["--recipe"]))


def test_init_from_starts_student_and_teacher(oass_run):
    _, first = oass_run("--lr", "0.01", "--csi", out="a")
    _, second = oass_run("--init-from", str(first), "--csi", "--lr", "0", "--weight-decay", "0", out="b")
    old, new = (common.load_checkpoint(f / "last.pt") for f in (first, second))
    names = [n for n in old["model"] if "bn." not in n]
    assert all(torch.equal(old["model"][n], new["model"][n]) for n in names)
    assert torch.equal(new["extra"]["teacher"]["conv.weight"], old["model"]["backbone.conv.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Every row of Table 3, PuzzleCAM and the baseline are one command


ROWS = {"baseline": ["--baseline"], "none": ["--keypoint", "none"], "CSI alone": ["--keypoint", "none", "--csi"]}
for strategy in ("gt-bbox", "max", "cmax", "ctopk", "ctopk-w"):
    ROWS[strategy] = ["--keypoint", strategy]
    ROWS[f"{strategy} + CSI"] = ["--keypoint", strategy, "--csi"]
for strategy in ("center", "gt-bbox", "max", "cmax", "ctopk", "ctopk-w"):
    ROWS[f"{strategy}, shared"] = ["--keypoint", strategy, "--shared-teacher"]
ROWS["center"] = ["--keypoint", "center"]
ROWS["PuzzleCAM's recipe"] = ["--recipe", "puzzlecam", "--epochs", "1"]


@pytest.fixture(scope="module")
def rows():
    return {}


@pytest.mark.parametrize("row", ROWS)
def test_row(row, oass_run, rows):
    flags = ROWS[row]
    record, folder = (
        oass_run("--ramp-epochs", "0", *flags) if "none" not in flags and row != "baseline" else oass_run(*flags)
    )
    state = common.load_checkpoint(folder / "last.pt")
    oass_terms = row not in ("baseline", "none", "CSI alone")
    csi = "--csi" in flags
    assert {n.split(".")[0] for n in state["model"]} == {"backbone", "head"} | ({"csi"} if csi else set())
    terms = {"L_cls"} | ({"L_csi"} if csi else set()) | ({"L_p", "L_re"} if oass_terms else set())
    assert {n for n in record if n.startswith("L_")} == terms
    shared = "--shared-teacher" in flags or row.startswith("PuzzleCAM")
    assert ("teacher" in state["extra"]) == (oass_terms and not shared)
    alpha_p, alpha_re = (1, 4) if row.startswith("PuzzleCAM") else (1 / 15, 1 / 15)
    total = record["L_cls"] + record.get("L_csi", 0)
    total += alpha_p * record.get("L_p", 0) + alpha_re * record.get("L_re", 0)
    assert record["loss"] == pytest.approx(total, rel=1e-5)
    rows[row] = record, state["model"]
    # beside the rows before it; of a single row run by -k there are none
    if row == "none" and "baseline" in rows:
        assert all(torch.equal(rows["baseline"][1][n], t) for n, t in state["model"].items())
    elif not csi and row != "baseline":  # same start, other updates
        others = [n for n in rows if n not in (row, "none") and "CSI" not in n]
        for other in others:
            weights = rows[other][1]
            assert any(not torch.equal(weights[n], t) for n, t in state["model"].items()), other
    elif row.endswith(" + CSI") and row[:-6] in rows:
        assert any(not torch.equal(t, state["model"][n]) for n, t in rows[row[:-6]][1].items())


@pytest.mark.parametrize("strategy", ["max", "cmax"])
def test_the_terms_of_a_run_equal_plain_sums(strategy, oass_run, steps):
    seen = steps(oass.OASS)
    oass_run("--csi", "--keypoint", strategy, "--ramp-epochs", "0", "--alpha-p", "2", "--alpha-re", "3")
    for (logits, instances, cam, cam_re, image, cls), labels, terms in seen:
        y = labels != 0  # difficult objects are positives
        assert terms["L_cls"] == pytest.approx(plain_bce(logits, y), rel=1e-5)
        assert terms["L_csi"] == pytest.approx(plain_bce(instances, y), rel=1e-5)
        weight = [1 if cls is None else 1 / int(y[i].sum()) for i in image.tolist()]
        p = [w * plain_bce(m.mean((1, 2)), y[i]) for w, m, i in zip(weight, cam_re, image.tolist(), strict=True)]
        assert terms["L_p"] == pytest.approx(sum(p) / len(y), rel=1e-5)
        assert terms["L_re"] == pytest.approx(oass.puzzle_losses(cam, cam_re, y, image, cls)[1].item(), rel=1e-5)
        total = terms["L_cls"] + terms["L_csi"] + 2 * terms["L_p"] + 3 * terms["L_re"]
        assert terms["loss"] == pytest.approx(total, rel=1e-6) and y.any()
    assert len(seen) == 2


def test_the_weights_rise_within_the_run(oass_run):
    _, folder = oass_run("--epochs", "4", "--ramp-epochs", "3", "--lr", "0", "--weight-decay", "0")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    # 2 steps an epoch: shares 0 1 | 2 3 | 4 5 | 6 6 sixths; lr 0: the terms differ little between the steps
    shares = [(r["loss"] - r["L_cls"]) * 15 / (r["L_p"] + r["L_re"]) for r in records]
    assert shares == pytest.approx([0.5 / 6, 2.5 / 6, 4.5 / 6, 1], rel=0.05)
    record, _ = oass_run("--epochs", "4", "--lr", "0", "--weight-decay", "0", out="recipe")
    assert record["loss"] - record["L_cls"] == pytest.approx((record["L_p"] + record["L_re"]) / 15, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--baseline --keypoint max", "--keypoint max contradicts it"),
        ("--baseline --csi", "--csi contradicts it"),
        ("--baseline --shared-teacher", "--shared-teacher has no effect with --keypoint none"),
        ("--keypoint none --alpha-re 1", "--alpha-re has no effect with --keypoint none"),
        ("--keypoint none --ramp-epochs 1", "--ramp-epochs has no effect"),
        ("--keypoint cmax --top-k 2", "--top-k has no effect with --keypoint cmax"),
        ("--shared-teacher --teacher-chunk 4", "--teacher-chunk has no effect with one call"),
        ("--recipe puzzlecam --teacher-chunk 4", "--teacher-chunk has no effect with one call"),
        ("--image-size 80", "--image-size 80: expected a multiple of 32"),
        ("--data nuswide --keypoint gt-bbox", "needs boxes, and nuswide has none"),
        ("--test-teacher", "--test-teacher belongs to --evaluate"),
        ("--ramp-epochs -1", "--ramp-epochs -1.0 is out of range"),
        ("--keypoint middle", "invalid choice"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        oass.parse(flags.split())
    assert message in capsys.readouterr().err


def test_the_papers_recipes():
    for name in ("voc2012", "voc2007", "coco", "nuswide"):
        args = oass.parse(["--data", name])
        assert (args.backbone, args.weights, args.image_size, args.view) == ("resnet50", "v1", 512, "canvas")
        assert (args.epochs, args.batch_size, args.lr, args.new_lr, args.weight_decay) == (100, 32, 1e-4, 10, 1e-4)
        assert (args.alpha_p, args.alpha_re, args.ramp_epochs, args.ramp_p) == (1 / 15, 1 / 15, 100, True)
        assert (args.keypoint, args.top_k, args.csi, args.schedule, args.optimizer) == ("max", 3, False, "poly", "adam")
        assert args.difficult_train == args.difficult_test == "positive" and args.interpolation == "bicubic"
    args = oass.parse("--data voc2012 --recipe puzzlecam".split())
    assert (args.keypoint, args.shared_teacher, args.alpha_p, args.alpha_re) == ("center", True, 1, 4)
    assert (args.epochs, args.lr, args.ramp_epochs, args.ramp_p, args.optimizer) == (15, 0.1, 7.5, False, "sgd")
    assert (args.batch_size, args.image_size, args.schedule, args.recipe) == (32, 512, "poly", "voc2012")
    assert oass.parse("--recipe puzzlecam --epochs 2 --keypoint none".split()).shared_teacher is False


@pytest.mark.parametrize("recipe", ["oass", "puzzlecam"])
def test_rates_and_weight_decay_of_every_parameter(recipe):
    args = oass.parse(["--data", "voc2012", "--recipe", recipe, "--csi"])
    model = network(20, eye=NormedEye, csi=True)
    optimizer = oass.optimizer_of(model, args)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    if recipe == "oass":
        weight, bias, new, new_bias = (1e-4, 1e-4), (1e-4, 0), (1e-3, 1e-4), (1e-3, 0)
        norm = bias
        assert isinstance(optimizer, torch.optim.Adam)
    else:
        weight, bias, new, new_bias = (0.1, 1e-4), (0.2, 0), (1.0, 1e-4), (2.0, 0)
        norm = weight
        assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(1e-4, True)}
    expected = {"backbone.conv.weight": weight, "backbone.conv.bias": bias}
    expected |= {"backbone.bn.weight": norm, "backbone.bn.bias": bias, "head.weight": new}
    expected |= {
        f"csi.{part}.{kind}": v for part in ("score", "mix") for kind, v in (("weight", new), ("bias", new_bias))
    }
    assert found.keys() == expected.keys()
    assert all(found[n] == pytest.approx(expected[n]) for n in found)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(args.lr)  # the one that is logged
    schedule = oass.schedule_of(optimizer, args, 100)
    for _ in range(50):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(args.lr * 0.5**0.9)


def test_voc2012_without_id_lists_says_loudly_that_it_is_another_protocol():
    assert oass.protocol(oass.parse([])).__next__ and not list(oass.protocol(oass.parse([])))
    both = "--data voc2012 --train-list a.txt --val-list b.txt".split()
    assert not list(oass.protocol(oass.parse(both)))
    for flags, wanted, absent in (
        (both[:2], "--train-list and --val-list", "nothing"),
        (both[:4], "--val-list", "--train-list"),
    ):
        first, *_, last = oass.protocol(oass.parse(flags))
        assert first.startswith("WARNING: NOT TABLE 1's PROTOCOL") and wanted in first and absent not in first
        assert last.endswith("and val")


def test_every_flag_of_oass_has_help_and_is_read(capsys):
    source = Path("oass.py").read_text()
    flags = [flag.replace("-", "_") for flag in re.findall(r'add\(\s*"--([\w-]+)"', source)]
    assert len(flags) == 11 and all(f"args.{flag}" in source for flag in flags if flag != "recipe")
    with pytest.raises(SystemExit):
        oass.parse(["--help"])
    assert "(default: None)" not in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------------------------------
# Picture, and the script as a user runs it


def test_the_picture_shows_maxima_keypoint_and_cuts_where_they_are():
    cam = torch.full((6, 6), -1.0)
    cam[1, 4], cam[5, 0] = 1, 2
    plain = Image.new("RGB", (240, 240), (9, 9, 9))
    shown = np.asarray(oass.mark(plain.copy(), cam, (2, 5)))
    assert (shown[60, 180] == 255).all() and (shown[220, 20] == 255).all()  # cells (1, 4), (5, 0): 40 pixels each
    assert (shown[80, 200] == (40, 90, 255)).all()  # the keypoint: the corner of cell (2, 5)
    assert (shown[80, 2] == 255).all() and (shown[202, 200] == 255).all() and (shown[80, 7] == 9).all()
    assert (np.asarray(oass.mark(plain.copy(), cam)) == 255).any(2).sum() < 200


@pytest.mark.parametrize("flags", [["--keypoint", "gt-bbox"], ["--keypoint", "center"], ["--baseline"]])
def test_every_kind_of_picture_is_drawn(toy, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(common, "Backbone", NormedEye)
    folder = tmp_path / "run"
    oass.main(oass.parse(["--root", toy, *SMALL, "--out", str(folder), *flags]))
    oass.main(oass.parse(["--evaluate", "--checkpoint", str(folder), "--gpus", "cpu", "--out", str(tmp_path / "test")]))
    for path in (folder, tmp_path / "test"):
        with Image.open(path / "figures" / "keypoints.png") as picture:
            assert picture.size == (1000, 26 + 8 * 312)


def test_the_script_runs_and_leaves_what_it_promises(toy, tmp_path):
    out = tmp_path / "run"
    flags = "--image-size 64 --limit 16 -b 8 --epochs 1 -j 0 --amp bf16 --gpus cpu --keypoint ctopk-w --csi".split()
    command = [sys.executable, "oass.py", "--root", toy, "--out", str(out), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mAP points" in result.stdout and "full after 1 of 2 steps" in result.stdout
    for name in ("keypoints", "curves"):
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.width == 1000
    files = {p.name for p in out.iterdir()}
    assert {"config.json", "log.jsonl", "scores.npz", "per_class.csv", "last.pt", "best.pt", "figures"} == files


def test_the_canvas_pads_with_zeros(oass_run, monkeypatch):
    monkeypatch.setitem(oass.RECIPE, "toy", oass.RECIPE["toy"] | {"view": "canvas"})
    real, zeros = oass.OASS.forward, []

    def forward(self, images, *others, **named):
        zeros.append((images == 0).all(1).any((1, 2)))
        return real(self, images, *others, **named)

    monkeypatch.setattr(oass.OASS, "forward", forward)
    record, _ = oass_run("--keypoint", "gt-bbox", "--image-size", "160")
    assert np.isfinite(record["loss"]) and torch.cat(zeros).float().mean() > 0.5
