"""sadcl.py: float64 loops for every loss, the attention against torch's, both stages, every row of its ablation."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import plain_bce
from PIL import Image
from test_common import same_run, stop_in_epoch
from torch import nn
from torch.nn import functional as nnf

import common
import data
import eval as metrics
import sadcl

SMALL = "--image-size 64 --limit 8 -b 4 --epochs 2 --stop-after 1 1 -j 0 --amp off --gpus cpu".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread(two_threads):
    """What is computed here is so small that threads would only wait for each other."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(min(2, os.cpu_count() or 1))


class Eye(nn.Module):
    """Stands in for common.Backbone: one convolution at stride 16, no BatchNorm. Runs of milliseconds."""

    def __init__(self, name="resnet18", weights="none", last_stride=2, frozen=(), frozen_bn=False):
        super().__init__()
        self.channels, self.conv = (3, 5, 11), nn.Conv2d(3, 11, 16, 16)

    def forward(self, images):
        return None, None, self.conv(images).relu()


def network(classes=7, seed=0, contrastive=True, dropout=0.0, **options):
    torch.manual_seed(seed)
    options = {"width": 16, "ffn": 29, "project": True, "heads": 2} | options
    return sadcl.SADCL(Eye(), classes, contrastive=contrastive, dropout=dropout, **options)


@pytest.fixture
def sadcl_run(toy, tmp_path, monkeypatch):
    """sadcl_run("--lambda-p", "0", out="a", width=32) trains in-process for a second, on Eye; (record, folder)."""
    monkeypatch.setattr(common, "Backbone", Eye)
    monkeypatch.setattr(sadcl, "draw_attention", lambda run, path: path.touch())
    monkeypatch.setattr(sadcl, "draw_embeddings", lambda run, path: path.touch())

    def train(*flags, out="run", resume=False):
        folder = tmp_path / out
        start = ["--resume", str(folder)] if resume else ["--root", toy, *SMALL, "--out", str(folder)]
        args = sadcl.parse([*start, *flags])
        args.width = 16
        return sadcl.main(args), folder

    return train


def some_labels(b=5, c=7, seed=0):
    """(B, C) bool: about a third present; class 0 never, class 1 always, the last image has nothing."""
    y = torch.rand(b, c, generator=torch.Generator().manual_seed(seed)) < 0.35
    y[:, 0], y[:, 1], y[-1] = False, True, False
    return y


def randoms(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def options(**values):
    values = {"lambda_s": 16.0, "lambda_p": 50.0, "sscl": "clean", "contrast_chunk": 0} | values
    return SimpleNamespace(**values)


def equal_with_gradients(ours, naive, *inputs):
    """Two functions of the inputs have the same value and the same gradients, and some gradient is not 0."""
    grads = []
    for function in (ours, naive):
        value = function(*inputs)
        grads.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert max(g.abs().max() for g in grads[0][1:]) > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


@pytest.mark.parametrize(
    ("flags", "classes", "stage", "count"),
    [
        ([], 80, 1, 193_579_088),
        ([], 81, 1, 193_583_185),
        ([], 500, 1, 195_299_828),
        (["--encoder-layers", "0"], 80, 1, 143_220_816),
        ([], 80, 2, 200_037_456),
    ],
)
def test_the_papers_network_has_the_known_number_of_trained_parameters(flags, classes, stage, count):
    with torch.device("meta"):
        model = sadcl.build(sadcl.parse(["--data", "coco", "--weights", "none", *flags]), range(classes), stage)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_paper_freezes_batchnorm_and_the_network_up_to_stride_4():
    for name in ("resnet101", "mobilenet_v2"):
        with torch.device("meta"):
            args = sadcl.parse(["--data", "coco", "--weights", "none", "--backbone", name])
            model = sadcl.build(args, range(3), 1).train()
        norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(m.training or m.weight.requires_grad for m in norms)
        convs = {n: m for n, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)}
        still = {n for n, m in convs.items() if not m.weight.requires_grad}
        early = r"to8\.(conv1|layer1\.)" if name == "resnet101" else r"to8\.[0-3]\."
        assert still == {n for n in convs if re.match(early, n)}
        assert (args.width, args.ffn) == ((2048, 4) if name == "resnet101" else (512, 4))
        assert isinstance(model.project, nn.Identity) == (name == "resnet101")


def test_position_encoding_equals_a_literal_loop():
    h, w, d = 3, 5, 12
    expected = torch.zeros(h * w, d, dtype=torch.double)
    for y in range(h):
        for x in range(w):
            for offset, at, last in ((0, y + 1, h), (d // 2, x + 1, w)):
                for i in range(d // 2):
                    angle = at / (last + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / (d // 2))
                    expected[y * w + x, offset + i] = math.cos(angle) if i % 2 else math.sin(angle)
    assert torch.allclose(sadcl.position_encoding(h, w, d).double(), expected, atol=1e-5)


def as_torch(attention):
    """nn.MultiheadAttention with the weights of ours."""
    other = nn.MultiheadAttention(attention.out.in_features, attention.heads, batch_first=True).double().eval()
    own = {"in_proj_weight": attention.weight, "in_proj_bias": attention.bias}
    other.load_state_dict(own | {f"out_proj.{n}": p for n, p in attention.out.named_parameters()})
    return other


@pytest.mark.parametrize("shared", [False, True])
def test_attention_equals_torchs(shared):
    torch.manual_seed(0)
    ours = sadcl.Layer(12, 13, heads=3).attention.double().eval()
    nn.init.normal_(ours.bias)
    q, k, v = randoms(1 if shared else 2, 5, 12), randoms(2, 7, 12, seed=1), randoms(2, 7, 12, seed=2)
    expected, weights = as_torch(ours)(q.expand(2, -1, -1), k, v)
    assert torch.allclose(ours(q, k, v), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours.maps(q, k), weights, rtol=1e-10, atol=1e-12)


def test_the_start_of_the_matrices_is_that_of_torchs_transformer():
    torch.manual_seed(0)
    layer = sadcl.Layer(64, 256)
    for matrix in (layer.attention.weight, layer.attention.out.weight, layer.linear1.weight, layer.linear2.weight):
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.97 * bound < matrix.abs().max() <= bound
    assert not layer.attention.bias.any() and not layer.attention.out.bias.any()
    model = sadcl.SADCL(Eye(), 200, 64, 64)
    assert abs(model.query.std() - 1) < 0.05 and 0.97 / 8 < model.classifier.weight.abs().max() <= 1 / 8


@pytest.mark.parametrize("encoder_layers", [0, 1, 2])
def test_the_network_equals_its_description(encoder_layers):
    model = network(encoder_layers=encoder_layers).double().eval()
    for p in model.parameters():  # biases and norms away from their start
        p.data += 0.1 * torch.randn_like(p)
    images = torch.randn(2, 3, 48, 80, dtype=torch.double)
    f = model.project(model.backbone.conv(images).relu())
    position = sadcl.position_encoding(3, 5, 16)[None].double()
    x = f.flatten(2).transpose(1, 2)

    def rest(layer, x, attended):
        x = layer.norm1(x + attended)
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))

    for layer in model.encoder:
        x = rest(layer, x, as_torch(layer.attention)(x + position, x + position, x)[0])
    h = torch.zeros(2, 7, 16, dtype=torch.double)
    for layer in model.decoder:
        h = rest(layer, h, as_torch(layer.attention)(h + model.query, x + position, x)[0])
    h = model.norm(h)
    logits = torch.stack([h[:, c] @ model.classifier.weight[c] + model.classifier.bias[c] for c in range(7)], 1)
    assert len(model.encoder) == encoder_layers and len(model.decoder) == 2
    assert torch.allclose(model(images), logits, rtol=1e-10, atol=1e-12)
    assert torch.allclose(model.train()(images)[1], h, rtol=1e-10, atol=1e-12)
    p, maps = model.look(images)
    assert torch.allclose(p, logits.sigmoid(), rtol=1e-10, atol=1e-12) and maps.shape == (2, 7, 3, 5)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, 7, dtype=torch.double))


def test_dropout_acts_in_training_only():
    model, images = network(dropout=0.5), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        assert not torch.equal(model.train()(images)[0], model(images)[0])
    rates = {m.p for m in sadcl.build(small_args(), range(3), 1).modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.1} and sadcl.Attention(4).dropout == 0.1


def small_args(*flags):
    args = sadcl.parse(flags)
    args.width = 16
    return args


def test_class_activation_maps_average_to_the_baselines_logits():
    torch.manual_seed(0)
    model, images = sadcl.GAP(Eye(), 7), torch.randn(2, 3, 48, 80)
    p, maps = model.look(images)
    assert maps.shape == (2, 7, 3, 5) and torch.allclose(model.eval()(images).sigmoid(), p, atol=1e-6)
    assert torch.allclose(model.train()(images)[0], maps.mean((2, 3)), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize(("gamma_neg", "gamma_pos"), [(4, 0), (2, 0), (3, 1)])
def test_asymmetric_loss_equals_a_loop_and_its_weight_has_no_gradient(gamma_neg, gamma_pos):
    y = some_labels().double()

    def naive(x):
        total = 0
        for i in range(5):
            for j in range(7):
                p = 1 / (1 + torch.exp(-x[i, j]))
                if y[i, j]:
                    total = total - (1 - p.item()) ** gamma_pos * torch.log(p)
                else:
                    total = total - p.item() ** gamma_neg * torch.log(1 - p)
        return total / 5

    equal_with_gradients(lambda x: sadcl.asymmetric_loss(x, y, gamma_neg, gamma_pos), naive, randoms(5, 7))


def naive_sscl(h2, y, official=False, tau=0.2):
    """h2 (2, B, C, E): projections of both views."""
    b = len(y)
    entries = [(v, i, j) for v in range(2) for i in range(b) for j in range(y.shape[1]) if y[i, j]]
    z = {e: h2[e] / h2[e].norm() for e in entries}
    total = 0
    for a in entries:
        if official and not y[(a[0] * b + a[1]) // 2, a[2]]:
            continue
        others = [q for q in entries if q != a]
        same = [q for q in others if q[2] == a[2]]
        below = sum(torch.exp(z[a] @ z[q] / tau) for q in others)
        total = total - sum(torch.log(torch.exp(z[a] @ z[q] / tau) / below) for q in same) / len(same)
    return total / len(entries)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("b", [5, 4, 1])
def test_sscl_equals_a_loop_over_pairs(official, b):
    y = some_labels(b)
    y[0, 2] = True
    if b == 1:
        y[0, 1] = True

    def ours(h2):
        return sadcl.sscl(torch.stack([h2[0][y], h2[1][y]], 1), y, official=official)

    equal_with_gradients(ours, lambda h2: naive_sscl(h2, y, official), randoms(2, b, 7, 11))


def test_the_official_mask_drops_anchors_but_not_their_count():
    y, z = some_labels(), randoms(int(some_labels().sum()), 2, 11)
    assert sadcl.sscl(z, y, official=True) < sadcl.sscl(z, y)
    everything = torch.ones(2, 3, dtype=torch.bool)  # nothing to drop
    z = randoms(6, 2, 11)
    assert sadcl.sscl(z, everything, official=True) == sadcl.sscl(z, everything)


def naive_pscl(prototypes, z, y, tau=0.07):
    total = 0
    for j in range(y.shape[1]):
        s = [prototypes[j] @ z[i, j] / prototypes[j].norm() / z[i, j].norm() / tau for i in range(len(y))]
        total = total + torch.log(sum(map(torch.exp, s)))
        if y[:, j].any():
            total = total - torch.log(sum(torch.exp(v) for v, present in zip(s, y[:, j], strict=True) if present))
        else:
            total = total - max(v.item() for v in s)
    return total / y.sum()


def test_pscl_equals_a_loop_and_is_never_negative():
    y = some_labels()

    def ours(prototypes, z):
        return sadcl.pscl(nnf.cosine_similarity(z, prototypes, dim=2) / 0.07, y)

    equal_with_gradients(ours, lambda p, z: naive_pscl(p, z, y), randoms(7, 11), randoms(5, 7, 11, seed=1))
    s = randoms(5, 7)
    one = torch.zeros(5, 7, dtype=torch.bool)
    one[0, 3] = True
    assert sadcl.pscl(s, y) > 0 and sadcl.pscl(s, one) > 0


def test_pscl_of_an_absent_class_pushes_its_samples_away():
    y, s = some_labels(), randoms(5, 7)
    sadcl.pscl(s, y).backward()
    assert torch.allclose(s.grad[:, 0], s.detach()[:, 0].softmax(0) / y.sum())


def test_contrast_equals_loops_over_projections():
    model, y = network().double(), some_labels()
    h, bank = randoms(5, 7, 16), randoms(5, 7, 16, seed=1).detach()

    def ours(h, *parameters):
        return sum(sadcl.contrast(model, h, bank, y, options()).values())

    def naive(h, *parameters):
        project = model.projection
        return naive_sscl(torch.stack([project(h), project(bank)]), y) + naive_pscl(
            project(model.prototypes), project(h), y
        )

    equal_with_gradients(ours, naive, h, *model.projection.parameters(), model.prototypes)


def test_sscl_ignores_absent_classes_and_pscl_needs_them():
    model, y, bank = network().double(), some_labels(), randoms(5, 7, 16, seed=1).detach()
    h = randoms(5, 7, 16).detach()
    other = torch.where(y[..., None], h, randoms(5, 7, 16, seed=2).detach())
    one, two = (sadcl.contrast(model, x, bank, y, options()) for x in (h, other))
    assert one["L_SSCL"] == two["L_SSCL"] and one["L_PSCL"] != two["L_PSCL"]
    again = sadcl.contrast(model, h, torch.where(y[..., None], bank, 9), y, options())
    assert again["L_SSCL"] == one["L_SSCL"]
    again = sadcl.contrast(model, h, bank + 1, y, options())
    assert again["L_SSCL"] != one["L_SSCL"] and again["L_PSCL"] == one["L_PSCL"]


def test_a_chunk_is_contrasted_alone():
    model, y = network().double(), some_labels(4)
    h, bank = randoms(4, 7, 16).detach(), randoms(4, 7, 16, seed=1).detach()
    halves = [sadcl.contrast(model, h[i : i + 2], bank[i : i + 2], y[i : i + 2], options()) for i in (0, 2)]
    chunked, whole = (sadcl.contrast(model, h, bank, y, options(contrast_chunk=n)) for n in (2, 9))
    for name in ("L_SSCL", "L_PSCL"):
        assert torch.allclose(chunked[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-12)
        assert not torch.allclose(chunked[name], whole[name])
        assert whole[name] == sadcl.contrast(model, h, bank, y, options())[name]


@pytest.mark.parametrize(("b", "classes"), [(3, 7), (1, 7), (2, 500), (1, 1)])
@pytest.mark.parametrize("case", ["nothing", "one class never", "everything"])
def test_any_batch_trains(b, classes, case):
    model = network(classes).train()
    y = torch.full((b, classes), case == "everything")
    if case == "one class never":
        y[:, 1:] = True
    logits, h = model(torch.randn(b, 3, 48, 48))
    terms = sadcl.contrast(model, h, torch.randn(b, classes, 16), y, options())
    loss = nnf.binary_cross_entropy_with_logits(logits, y.float()) + sum(terms.values())
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not y.any():
        assert terms["L_SSCL"] == terms["L_PSCL"] == 0
        assert not model.prototypes.grad.any() and not model.projection[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_scores_are_float32_in_half_precision(dtype):
    model, images, y = network(), torch.randn(5, 3, 48, 48), some_labels()
    bank = torch.randn(5, 7, 16)
    with torch.autocast("cpu", dtype):
        logits, h = model(images)
        terms = sadcl.contrast(model, h, bank, y, options())
        assert model.project(model.backbone(images)[2]).dtype == dtype
    assert {logits.dtype, h.dtype, *(t.dtype for t in terms.values())} == {torch.float32}
    expected = sadcl.contrast(model, model(images)[1], bank, y, options())
    assert all(torch.allclose(terms[n], expected[n], rtol=0.03) for n in terms)
    z = torch.randn(int(y.sum()), 2, 11).to(dtype)
    with torch.autocast("cpu", dtype):
        assert torch.equal(sadcl.sscl(z, y), sadcl.sscl(z.float(), y))
        sadcl.sscl(z.requires_grad_(), y).backward()


# ---------------------------------------------------------------------------------------------------------------------
# Memory bank, prototypes


def test_the_bank_takes_what_is_present_and_sure_without_gradient():
    h, y, bank = randoms(5, 7, 3), some_labels(), torch.zeros(5, 7, 3, dtype=torch.double)
    logits = randoms(5, 7, seed=3) * 3
    sadcl.update_bank(bank, h, logits, y)
    for i in range(5):
        for j in range(7):
            taken = y[i, j] and logits[i, j].item() > math.log(0.8 / 0.2)
            assert torch.equal(bank[i, j], h[i, j].detach() if taken else torch.zeros(3).double())
    assert bank.any() and not bank.requires_grad


def test_the_bank_gets_no_gradient_and_is_no_part_of_the_network():
    model, y = network(), some_labels()
    sadcl.contrast(model, torch.randn(5, 7, 16), bank := torch.randn(5, 7, 16), y, options())["L_SSCL"].backward()
    assert bank.grad is None and all(t.shape[:1] != (5,) for t in model.state_dict().values())


def a_run(model, batch, state=None, rank=0, world=1, **others):
    said = []
    args = SimpleNamespace(batch_size=batch)
    env = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    return SimpleNamespace(model=model, args=args, env=env, state=state, said=said, say=said.append, **others)


def test_the_bank_starts_as_the_prototypes_or_goes_on():
    model = network()
    stored = torch.arange(4 * 7 * 16.0).view(4, 7, 16)
    for state in (None, {"extra": {}}):
        run = a_run(model, 4, state, world=2)
        bank = sadcl.start_bank(run)
        assert torch.equal(bank, model.prototypes.detach().expand(2, 7, 16)) and not run.said
        assert bank.data_ptr() != model.prototypes.data_ptr()
    for world in (1, 2, 4):  # another number of processes divides the same bank
        parts = [sadcl.start_bank(a_run(model, 4, {"extra": {"bank": stored}}, rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat(parts), stored)
    run = a_run(model, 2, {"extra": {"bank": stored}})
    assert torch.equal(sadcl.start_bank(run), model.prototypes.detach().expand(2, 7, 16))
    assert "--batch-size 4, started again from the prototypes" in run.said[0]


def test_prototypes_are_means_over_confident_then_all_positives_then_the_query(toy, monkeypatch):
    args = small_args("--root", toy, "--limit", "13", "--image-size", "64", "-b", "4", "-j", "0")
    train, _ = data.load(args)
    train.labels[:, 3] = 0
    train.labels[0, 5] = -1
    model = network(12)
    images = data.Images(train, 64, train=True)
    run = a_run(model, 4, train_loader=SimpleNamespace(images=images), stage=sadcl.stage_of(args, 2))
    run.args, run.autocast = args, lambda: torch.autocast("cpu", enabled=False)
    model.eval()
    batch = data.collate([data.Images(train, 64, interpolation="bilinear")[0, i] for i in range(13)])
    with torch.no_grad():
        h = model.embed(data.normalise(batch.images))
        p = model.classifier(h).sigmoid()
    y = batch.labels == 1
    confidence = float(p[y].median())
    expected, kinds = torch.zeros(12, 16), [0, 0, 0]
    for c in range(12):
        sure = [h[i, c] for i in range(13) if y[i, c] and p[i, c] > confidence]
        some = [h[i, c] for i in range(13) if y[i, c]]
        kind = 0 if sure else 1 if some else 2
        kinds[kind] += 1
        expected[c] = torch.stack(sure or some or [model.query[c].detach()]).mean(0)
    means, found = sadcl.class_means(run, confidence)
    assert torch.allclose(means, expected, atol=1e-5) and found == kinds and min(kinds) > 0
    assert not means.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def gradients_of_a_rank(rank, world, rendezvous, out):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=rendezvous)
    common.start(sadcl.parse(["--gpus", ",".join(["cpu"] * world)]))
    y, images = some_labels(6), randoms(6, 3, 48, 48, dtype=torch.float).detach()
    cases = {"all": (options(), y), "chunks": (options(contrast_chunk=2), y), "sscl": (options(lambda_p=0), y)}
    cases |= {"pscl": (options(lambda_s=0), y), "none": (options(), torch.zeros_like(y))}
    y[3:] = False  # the second process has no positive
    part, found = slice(rank * 6 // world, (rank + 1) * 6 // world), {}
    for name, (args, y) in cases.items():
        model = network().train()
        model.prototypes.requires_grad_(args.lambda_p > 0)
        bank = randoms(6, 7, 16, seed=1, dtype=torch.float).detach()
        net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        logits, h = net(images[part])
        terms = sadcl.contrast(model, h, bank[part], y[part], args)
        (nnf.binary_cross_entropy_with_logits(logits, y[part].float()) + sum(terms.values())).backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | terms
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    for world in (1, 2):
        arguments = (world, f"file://{tmp_path}/{world}", str(tmp_path / f"{world}.pt"))
        torch.multiprocessing.spawn(gradients_of_a_rank, arguments, world)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for case in one:
        for name in one[case]:
            assert torch.allclose(one[case][name], two[case][name], rtol=1e-4, atol=1e-6), (case, name)
    assert one["all"]["prototypes"].abs().max() > 1e-3 and one["all"]["projection.0.weight"].abs().max() > 1e-3
    assert one["all"]["L_SSCL"] != one["chunks"]["L_SSCL"]


def train_as_a_rank(rank, world, rendezvous, flags):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=rendezvous)
    common.Backbone = Eye
    sadcl.draw_attention = sadcl.draw_embeddings = lambda run, path: path.touch()
    sadcl.Attention.__init__.__defaults__ = (4, 0.0)  # dropout differs between processes
    args = sadcl.parse([*flags, "--gpus", ",".join(["cpu"] * world)])
    args.width = 16
    sadcl.main(args)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_train_both_stages_as_one_and_either_resumes_the_other(toy, tmp_path):
    def train(world, *flags):
        meet = f"file://{tmp_path}/{len(list(tmp_path.iterdir()))}"
        torch.multiprocessing.spawn(train_as_a_rank, (world, meet, list(flags)), world)

    start = ["--root", toy, *SMALL[:-2], "--epochs", "4", "--stop-after", "1", "2", "--out"]
    train(1, *start, str(tmp_path / "one"))
    train(2, *start, str(tmp_path / "two"))
    one, two = (common.load_checkpoint(tmp_path / n / "last.pt") for n in ("one", "two"))
    assert one["step"] == two["step"] == 4 and len(two["extra"]["bank"]) == 4
    for name, tensor in (one["model"] | one["extra"]).items():
        other = (two["model"] | two["extra"])[name]
        if name.endswith("attention.bias"):  # k's shifts all scores alike: its gradient is noise, which Adam blows up
            tensor, other = (torch.cat([t[:16], t[32:]]) for t in (tensor, other))
        assert torch.allclose(tensor, other, rtol=1e-3, atol=2e-5), name
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in lines if "epoch" in r] == [1, 2, 2]
    # a finished run of two processes reports the same in one
    train(1, "--resume", str(tmp_path / "two"))


# ---------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_in_either_stage_equals_the_straight_run(sadcl_run, monkeypatch, epoch):
    flags = ["--epochs", "4", "--stop-after", "2", "2"]
    _, straight = sadcl_run(*flags, out="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, epoch, KeyboardInterrupt)
        sadcl_run(*flags, out="broken")
    state = common.load_checkpoint(straight.parent / "broken" / "last.pt")
    assert state["stage"] == (1 if epoch < 2 else 2) and ("bank" in state["extra"]) == (epoch == 3)
    _, broken = sadcl_run(out="broken", resume=True)
    same_run(straight, broken)
    one, two = (common.load_checkpoint(f / "stage1.pt") for f in (straight, broken))
    assert one["stage"] == two["stage"] == 1 and torch.equal(one["ema"]["query"], two["ema"]["query"])


def test_a_run_stopped_between_the_stages_goes_on(sadcl_run, monkeypatch):
    _, straight = sadcl_run(out="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sadcl, "class_means", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        sadcl_run(out="broken")
    assert common.load_checkpoint(straight.parent / "broken" / "last.pt")["stage"] == 1
    _, broken = sadcl_run(out="broken", resume=True)
    same_run(straight, broken)


def test_resume_with_another_batch_size_restarts_only_the_bank(sadcl_run, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 3, KeyboardInterrupt)
        sadcl_run("--epochs", "4", "--stop-after", "2", "2")
    stored, found = common.load_checkpoint(tmp_path / "run" / "last.pt"), {}
    real = common.Run.epochs

    def epochs(run):
        weights = {n: t.clone() for n, t in run.model.state_dict().items()}
        found.update(model=weights, group=dict(run.optimizer.param_groups[0]), moments=run.optimizer.state_dict())
        return real(run)

    monkeypatch.setattr(common.Run, "epochs", epochs)
    _, folder = sadcl_run("-b", "2", resume=True)
    assert "memory bank: of --batch-size 4, started again from the prototypes for 2" in capsys.readouterr().out
    assert all(torch.equal(found["model"][n], t) for n, t in stored["model"].items())
    group = stored["optimizer"]["param_groups"][0]
    assert (found["group"]["lr"], found["group"]["betas"]) == (group["lr"], group["betas"])
    assert found["moments"]["state"].keys() == stored["optimizer"]["state"].keys()
    state = common.load_checkpoint(folder / "last.pt")
    assert len(state["extra"]["bank"]) == 2 and (state["epoch"], state["step"]) == (4, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Stages, schedule, EMA


def test_learning_rate_and_beta_follow_one_cycle_that_the_stage_leaves_early(sadcl_run):
    _, folder = sadcl_run("--epochs", "10", "--stop-after", "3", "2", "--lr", "1e-3")
    for name, cycle, steps in (("stage1", 20, 6), ("last", 10, 4)):  # the toy's second cycle has half the epochs
        optimizer = torch.optim.AdamW([torch.zeros(1)], 1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-3, cycle, pct_start=0.2, div_factor=25, final_div_factor=1e4
        )
        betas = [optimizer.param_groups[0]["betas"][0]]
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            betas.append(optimizer.param_groups[0]["betas"][0])
        state = common.load_checkpoint(folder / f"{name}.pt")
        group = state["optimizer"]["param_groups"][0]
        assert group["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert group["betas"] == pytest.approx(optimizer.param_groups[0]["betas"])
        assert (betas[0], group["betas"][1], group["weight_decay"]) == (0.95, 0.999, 5e-3) and min(betas) < 0.87
        assert state["step"] == steps


def test_stage_2_starts_from_the_moving_average_of_stage_1(sadcl_run):
    still = ["--lr", "0", "--weight-decay", "0"]
    _, folder = sadcl_run("--stage", "1", "--epochs", "4", "--stop-after", "4", out="one")
    stage1 = common.load_checkpoint(folder / "stage1.pt")
    assert not torch.equal(stage1["ema"]["query"], stage1["model"]["query"])
    _, both = sadcl_run(out="both")
    average = common.load_checkpoint(both / "stage1.pt")["ema"]
    for source, weights in ((folder, stage1["ema"]), (both, average)):  # of both stages: the first one's
        flags = ["--stage", "2", "--init-from", str(source), "--stop-after", "1", *still]
        _, second = sadcl_run(*flags, out=f"two-{source.name}")
        model = common.load_checkpoint(second / "last.pt")["model"]
        assert all(torch.equal(model[n], t) for n, t in weights.items())
        assert {n.split(".")[0] for n in model.keys() - weights.keys()} == {"projection", "prototypes"}
        assert not torch.equal(model["prototypes"], model["query"])


def test_the_second_of_both_stages_starts_from_it_too(sadcl_run, monkeypatch):
    start = {}

    def fill(run, trained):
        start.update({n: t.clone() for n, t in run.model.state_dict().items()}, trained=trained)

    monkeypatch.setattr(sadcl, "fill_prototypes", fill)
    _, folder = sadcl_run("--epochs", "4", "--stop-after", "4", "1", out="a")
    for flags in ([], ["--init-from", str(folder)]):  # which is for stage 1
        _, folder = sadcl_run("--epochs", "4", "--stop-after", "4", "1", *flags, out=f"b{len(flags)}")
        stage1 = common.load_checkpoint(folder / "stage1.pt")
        assert start["trained"] and not torch.equal(stage1["ema"]["query"], stage1["model"]["query"])
        assert all(torch.equal(start[n], t) for n, t in stage1["ema"].items())


def test_both_stages_are_one_run(sadcl_run, capsys):
    record, folder = sadcl_run()
    text = capsys.readouterr().out
    assert (
        "EMA horizon: 1 of 2 steps" in text
        and "stage 1 all" in text
        and "stage 2 all" in text
        and "stage 2: SADCL" in text
        and "prototypes: " in text
    )
    header, *epochs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert [(r["stage"], r["epoch"], r["step"]) for r in epochs] == [(1, 1, 2), (2, 2, 2)] and header["config"]
    assert {"L_ASL"} == {n for n in epochs[0] if n.startswith("L_")}
    assert {"L_BCE", "L_SSCL", "L_PSCL"} == {n for n in epochs[1] if n.startswith("L_")}
    assert epochs[1]["map_points"] == record["map_points"] and "raw_map_points" in epochs[1]
    files = {"config.json", "log.jsonl", "scores.npz", "per_class.csv", "last.pt", "best.pt", "stage1.pt", "figures"}
    assert {p.name for p in folder.iterdir()} == files


def test_stage_2_alone_starts_its_prototypes_as_queries_and_says_so(sadcl_run, capsys):
    _, folder = sadcl_run("--stage", "2", "--stop-after", "1", "--lr", "0", "--weight-decay", "0")
    assert "no stage 1 (--init-from RUN): the prototypes start as the queries" in capsys.readouterr().out
    model = common.load_checkpoint(folder / "last.pt")["model"]
    assert torch.equal(model["prototypes"], model["query"])


def test_early_stop_ends_past_the_best_epoch_and_goes_on_from_it(sadcl_run, monkeypatch):
    real, values = common.Run.test, iter([30, 31, 50, 20, 40, 20, 20, 20, 20, 20] + [10] * 40)
    monkeypatch.setattr(
        common.Run, "test", lambda self, model=None: real(self, model) | {"map_points": float(next(values))}
    )
    monkeypatch.setitem(sadcl.RECIPE, "toy", sadcl.RECIPE["toy"] | {"patience": 2 / 20})
    flags = "--epochs 20 --early-stop --lr 1e-3 --stop-after 20 1".split()
    _, folder = sadcl_run(*flags)
    epochs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    # reported, raw, reported, raw ...: the best is 50 in epoch 2; the third later epoch is the last
    assert [r["stage"] for r in epochs] == [1, 1, 1, 1, 1, 2]
    assert epochs[1]["map_points"] == 50 and epochs[-1]["epoch"] == 6
    assert common.load_checkpoint(folder / "stage1.pt")["epoch"] == 5


@pytest.mark.parametrize("parts", [1, 2])
def test_training_fills_the_bank_part_by_part(sadcl_run, monkeypatch, parts):
    real, places = sadcl.update_bank, []

    def update(bank, *others):
        places.append((bank.storage_offset() // bank[0].numel(), len(bank)))
        real(bank, *others)

    monkeypatch.setattr(sadcl, "update_bank", update)
    monkeypatch.setattr(sadcl, "BANK_CONFIDENCE", 0.0)
    _, folder = sadcl_run("--accumulate", str(parts), "--lambda-p", "0")
    assert places == ([(0, 4)] * 2 if parts == 1 else [(0, 2), (2, 2)] * 2)
    state = common.load_checkpoint(folder / "last.pt")
    bank = state["extra"]["bank"]
    changed = (bank != state["model"]["prototypes"]).any(2)  # (4, 12); without PSCL the prototypes stay
    assert bank.shape == (4, 12, 16) and changed.any(1).all() and not changed.all() and state["step"] == 2


def test_evaluate_scores_either_stage_as_training_did(sadcl_run, tmp_path):
    record, folder = sadcl_run()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name, expected in (("last", record), ("stage1", log[1])):
        flags = ["--evaluate", "--checkpoint", str(folder / f"{name}.pt"), "--out", str(tmp_path / name)]
        again = sadcl.main(sadcl.parse(flags))
        assert all(again[k] == expected[k] for k in ("map_points", "map_area", "OF1", "top3_CF1"))
    scores = [metrics.load_scores(f / "scores.npz")["scores"] for f in (folder, tmp_path / "last")]
    assert np.array_equal(*scores)


def test_coco_rows_become_vocs_by_name():
    old, new = network(3), network(2, seed=1)
    start = {n: t.clone() for n, t in new.state_dict().items()}
    lists = common.init_from(new, old.state_dict(), ["cat", "airplane", "dining table"], ["aeroplane", "dragon"])
    assert sorted(lists[1]) == ["classifier.bias", "classifier.weight", "prototypes", "query"] and not lists[2]
    for name in lists[1]:
        assert torch.equal(new.state_dict()[name][0], old.state_dict()[name][1])
        assert torch.equal(new.state_dict()[name][1], start[name][1])
    assert torch.equal(new.decoder[1].attention.weight, old.decoder[1].attention.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Every row of the ablation is one command


STAGE_1 = {"project", "encoder", "decoder", "norm", "query", "classifier", "backbone"}
STAGE_2 = STAGE_1 | {"projection", "prototypes"}
ROWS = {
    "baseline": (["--baseline", "--stop-after", "1"], {"backbone", "classifier"}, {"L_ASL"}),
    "SARL*": (["--stage", "1", "--encoder-layers", "0", "--stop-after", "1"], STAGE_1 - {"encoder"}, {"L_ASL"}),
    "SARL": (["--stage", "1", "--stop-after", "1"], STAGE_1, {"L_ASL"}),
    "+SSCL": (["--lambda-p", "0"], STAGE_2, {"L_BCE", "L_SSCL"}),
    "+PSCL": (["--lambda-s", "0"], STAGE_2, {"L_BCE", "L_PSCL"}),
    "both": ([], STAGE_2, {"L_BCE", "L_SSCL", "L_PSCL"}),
    "both, official mask": (["--sscl", "official"], STAGE_2, {"L_BCE", "L_SSCL", "L_PSCL"}),
    "control": (["--lambda-s", "0", "--lambda-p", "0"], STAGE_1, {"L_BCE"}),
}


@pytest.mark.parametrize("row", ROWS)
def test_ablation_row(row, sadcl_run):
    flags, parts, terms = ROWS[row]
    record, folder = sadcl_run(*flags)
    state = common.load_checkpoint(folder / "last.pt")
    assert {name.split(".")[0] for name in state["model"]} == parts
    assert {name for name in record if name.startswith("L_")} == terms
    assert record["stage"] == state["stage"] == (1 if "L_ASL" in terms else 2)
    weights = {"L_ASL": 1, "L_BCE": 1000, "L_PSCL": 50, "L_SSCL": 100 if "official" in flags else 16}
    assert record["loss"] == pytest.approx(sum(weights[n] * record[n] for n in terms), rel=1e-5)
    assert (folder / "stage1.pt").exists() == (row != "baseline")
    assert ("bank" in state["extra"]) == ("L_SSCL" in terms)
    assert (folder / "figures" / "attention.png").exists()
    assert (folder / "figures" / "embeddings.png").exists() == (row != "baseline")
    if row == "+SSCL":  # the prototypes only start the bank; DDP would wait for their gradient
        assert len(state["optimizer"]["param_groups"][0]["params"]) == len(state["model"]) - 1


def test_the_classification_losses_of_both_stages_equal_plain_sums(sadcl_run, steps):
    seen = steps(sadcl.SADCL)
    sadcl_run("--gamma-neg", "2")
    for number, ((logits, _), labels, terms) in enumerate(seen):
        y = labels == 1  # difficult objects are negatives
        if number < 2:  # stage 1
            cells = zip(logits.detach().double().sigmoid().flatten().tolist(), y.flatten().tolist(), strict=True)
            asl = -sum(math.log(p) if present else p**2 * math.log(1 - p) for p, present in cells) / len(y)
            assert terms["L_ASL"] == terms["loss"] == pytest.approx(asl, rel=1e-5)
        else:
            assert terms["L_BCE"] == pytest.approx(plain_bce(logits, y), rel=1e-5)
            total = 1000 * terms["L_BCE"] + 16 * terms["L_SSCL"] + 50 * terms["L_PSCL"]
            assert terms["loss"] == pytest.approx(total, rel=1e-6)
        assert y.any()
    assert len(seen) == 4


def test_each_stage_has_its_own_augmentation(sadcl_run, monkeypatch):
    recipe = sadcl.RECIPE["toy"] | {k: sadcl.PAPER[k] for k in ("view", "pixels", "contrast_chunk")}
    monkeypatch.setitem(sadcl.RECIPE, "toy", recipe)
    real, seen = common.Run.finish_epoch, []

    def finish(run, epoch):
        train, test = run.train_loader.images, run.test_loader.images
        seen.append((train.view, train.pixels, test.view, test.pixels))
        return real(run, epoch)

    monkeypatch.setattr(common.Run, "finish_epoch", finish)
    record, _ = sadcl_run()
    assert np.isfinite(record["loss"])
    assert seen[0] == (data.whole, data.cutout_and_randaugment, data.whole, None)
    assert seen[1] == (data.multi_scale_crop, None, data.whole, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--baseline --stage 2", "--baseline has one stage and no --stage 2"),
        ("--baseline --lambda-p 3", "no --lambda-p"),
        ("--stop-after 1", "--stop-after takes a number for each stage; --stage both has 2"),
        ("--stage 1 --stop-after 9", "stage 1 has a cycle of 2 epochs"),
        ("--lambda-s -1", "--lambda-s -1.0 is out of range"),
        ("--stage 3", "invalid choice"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        sadcl.parse(flags.split())
    assert message in capsys.readouterr().err


def test_the_papers_recipes():
    names = ("batch_size", "lr", "weight_decay", "ema_decay", "gamma_neg", "confidence", "image_size")
    for flags, expected in (
        ("coco", (64, 5e-5, 5e-3, 0.9998, 4, 0.85, 448)),
        ("coco --image-size 512", (128, 1e-4, 1e-2, 0.9997, 2, 0.85, 512)),
        ("coco --image-size 576", (64, 5e-5, 5e-3, 0.9998, 2, 0.95, 576)),
        ("nuswide", (128, 1e-4, 1e-2, 0.9997, 4, 0.85, 448)),
        ("vg500", (64, 1e-4, 1e-2, 0.9997, 4, 0.85, 576)),
        ("voc2007", (64, 5e-5, 5e-3, 0.9998, 4, 0.85, 448)),
    ):
        args = sadcl.parse(["--data", *flags.split()])
        assert tuple(getattr(args, n) for n in names) == expected, flags
        assert (args.epochs, args.stop_after, args.stage, args.coco_images) == (80, [20, 12], "both", "all")
        assert (args.backbone, args.weights, args.difficult_train) == ("resnet101", "v1", "negative")
        assert (args.lambda_s, args.lambda_p, args.contrast_chunk) == (16, 50, 32)
    assert sadcl.parse("--data coco --image-size 512 --lr 3".split()).lr == 3
    assert sadcl.parse("--data coco --epochs 40".split()).stop_after == [10, 6]
    assert sadcl.parse("--data coco --stage 2".split()).stop_after == [12]
    assert sadcl.parse("--data coco --early-stop".split()).stop_after == [80, 80]
    assert sadcl.parse("--sscl official".split()).lambda_s == 100
    stages = [sadcl.stage_of(sadcl.parse(["--data", "coco"]), n) for n in (1, 2)]
    assert stages[0] == common.Stage(1, "whole", "cutout-randaugment", 80, 20)
    assert stages[1] == common.Stage(2, "multi-scale", "none", 80, 12)


def test_every_flag_of_sadcl_has_help_and_is_read(capsys):
    source = Path("sadcl.py").read_text()
    flags = [flag.replace("-", "_") for flag in re.findall(r'add\(\s*"--([\w-]+)"', source)]
    assert len(flags) == 9 and all(f"args.{flag}" in source for flag in flags)
    with pytest.raises(SystemExit):
        sadcl.parse(["--help"])
    assert "(default: None)" not in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, and the script as a user runs it


def test_the_principal_plane_is_that_of_the_svd():
    points = randoms(23, 7).detach() * torch.arange(1, 8)
    mean, axes = sadcl.principal_plane(points)
    v = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T
    assert torch.allclose(axes.T @ axes, torch.eye(2).double()) and torch.allclose(mean, points.mean(0))
    assert torch.allclose((axes * v).sum(0).abs(), torch.ones(2).double())


def test_the_script_runs_and_leaves_what_it_promises(toy, tmp_path):
    out = tmp_path / "run"
    flags = "--image-size 64 --limit 16 -b 8 --epochs 1 -j 0 --amp bf16 --gpus cpu".split()
    command = [sys.executable, "sadcl.py", "--root", toy, "--out", str(out), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mAP points" in result.stdout and "protocol: toy" in result.stdout
    for name, height in (("attention", 8 * 200), ("embeddings", 700), ("curves", 700)):
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.width == 1000 and picture.height >= height
    with Image.open(out / "figures" / "embeddings.png") as picture:
        assert len(picture.getcolors(10**6)) > 12
