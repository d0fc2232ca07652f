"""srdl.py against the paper: naive float64 oracles for every equation, every row of its tables, degenerate inputs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import plain_bce
from PIL import Image
from torch import nn
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import srdl
from data import UserError


def nodes_of(classes):
    return torch.from_numpy(data.word_vectors([f"w{i} x{i % 3}" for i in range(classes)], "hash"))


def car(classes=7, width=11, seed=0, **options):
    torch.manual_seed(seed)
    return srdl.CAR(width, nodes_of(classes), **options).double()


def some_features(b=2, d=11, h=3, w=5, seed=0):
    """ReLU'd features (B, D, H, W); the last image is flat, so every maximum ties."""
    f = torch.randn(b, d, h, w, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).relu()
    if b > 1:
        f[-1] = f[-1, :, :1, :1]
    return f


# ---------------------------------------------------------------------------------------------------------------------
# The naive graph: the paper's equations, one class after the other


def naive_runs(m, alpha):
    """Eqs. 9, 10 for one marginal: positions of the chosen run."""
    low, high = min(m), max(m)
    if high == low:
        return []
    hot = [(x - low) / (high - low) >= alpha for x in m]
    runs, run = [], []
    for i, on in enumerate([*hot, False]):
        if on:
            run.append(i)
        elif run:
            runs, run = [*runs, run], []
    best = [r for r in runs if any(m[i] == high for i in r)]
    return max(best, key=len)  # the first of the widest


def naive_car(head, f, top_k=0, alpha=0.5):
    """Logits and erased logits from (B, D, H, W), materialising every F_c."""
    x = head.nodes
    if head.graph:
        v = head.graph.adjacency
        root = torch.diag(v.abs().sum(1) ** -0.5)
        for weight in head.graph.weights:
            x = nnf.leaky_relu(root @ v @ root @ x @ weight, 0.2)
    gmp = f.flatten(2).max(2).values
    scale = 0.5 if head.f_ca and head.f_sa else 1
    logits, erased = [], []
    for image, pooled in zip(f, gmp, strict=True):
        rows, maps = [], []
        for c in range(len(x)):
            w = head.f_w(x[c])
            ca = torch.sigmoid(head.f_c(torch.tanh(head.f_ca(pooled) * w))) if head.f_ca else torch.zeros_like(pooled)
            sa = torch.zeros_like(image[0])
            if head.f_sa:
                sa = torch.sigmoid(head.f_s(torch.tanh(head.f_sa(image.permute(1, 2, 0)) * w))[..., 0])
            maps.append((sa, ca))
            rows.append(naive_logit(head, image, sa, ca, c, scale))
        logits.append(torch.stack(rows))
        for c in sorted(range(len(x)), key=lambda j: -rows[j].item())[:top_k]:
            sa, ca = maps[c]
            keep = torch.ones_like(sa)
            for i in naive_runs([sa[:, j].max().item() for j in range(sa.shape[1])], alpha):
                for j in naive_runs([row.max().item() for row in sa], alpha):
                    keep[j, i] = 0
            rows[c] = naive_logit(head, image, sa * keep, ca, c, scale)
        erased.append(torch.stack(rows))
    return torch.stack(logits), torch.stack(erased)


def naive_logit(head, image, sa, ca, c, scale):
    attended = scale * image * sa + scale * image * ca[:, None, None]  # Eq. 6
    feature = attended.flatten(1).max(1).values
    return (feature * head.classifier.weight[c]).sum() + head.classifier.bias[c]


def cheap_car(head, f, top_k=0, alpha=0.5):
    flat, size = f.flatten(2).transpose(1, 2), f.shape[2:]
    sa, ca = head.attend(flat)
    logits = head.classify(flat, sa, ca)
    return logits, srdl.erased_logits(head, flat, sa, ca, logits, size, top_k, alpha) if top_k else logits


def gradients(head, forward, f, **options):
    f = f.clone().requires_grad_()
    head.zero_grad()
    logits, erased = forward(head, f, **options)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=f.dtype).view_as(logits)
    (logits.sin() * weight + erased.cos() * weight.flip(0)).sum().backward()
    # the flat image's positions tie up to rounding, which is the processor's
    seen = {"logits": logits.detach(), "erased": erased.detach(), "f": f.grad[:-1], "flat f": f.grad[-1].sum((1, 2))}
    return seen | {n: p.grad.clone() for n, p in head.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7])
def test_the_cheap_head_equals_the_naive_graph(chunk, top_k, monkeypatch):
    f, head = some_features(), car()
    monkeypatch.setattr(srdl, "HELD", {"cpu": chunk * f.numel()})
    naive, cheap = (gradients(head, forward, f, top_k=top_k) for forward in (naive_car, cheap_car))
    for name in naive:
        assert torch.allclose(naive[name], cheap[name], rtol=1e-12, atol=1e-12), name
    assert naive["f"].abs().max() > 0 and naive["graph.adjacency"].abs().max() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"gcn": False},
        {"channel_attention": False},
        {"spatial_attention": False},
        {"gcn": False, "spatial_attention": False},
    ],
)
def test_each_reduced_head_equals_the_naive_graph(options):
    f, head = some_features(), car(**options)
    naive, cheap = (gradients(head, forward, f) for forward in (naive_car, cheap_car))
    for name in naive:
        assert torch.allclose(naive[name], cheap[name], rtol=1e-12, atol=1e-12), name


def test_inference_equals_training_forward():
    f, head = some_features(), car()
    with torch.no_grad():
        assert torch.equal(cheap_car(head, f)[0], cheap_car(head, f)[0])
        without = cheap_car(head, f)[0]
    assert torch.equal(without, cheap_car(head, f)[0].detach())


def test_equal_positions_send_the_gradient_to_the_first():
    f = torch.ones(1, 4, 2, requires_grad=True)
    srdl.class_features(f, torch.ones(1, 1, 4), torch.zeros(1, 1, 2)).sum().backward()
    assert f.grad[0].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_tanh_score_passes_gradcheck():
    torch.manual_seed(0)
    u, w, v = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 5), (7, 5), (5,)))
    assert torch.autograd.gradcheck(srdl.tanh_score, (u, w, v))


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > t.element_size():
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_nothing_of_size_bcpd_is_ever_held(monkeypatch):
    b, c, d, h, w = 2, 29, 53, 11, 13
    f, head = some_features(b, d, h, w), car(c, d)
    f.requires_grad_()
    monkeypatch.setattr(srdl, "HELD", {"cpu": f.numel()})
    with Largest() as largest:
        logits, erased = cheap_car(head, f, top_k=2)
        (logits + erased).sum().backward()
    assert largest.numel < b * c * d * h * w / 2
    with Largest() as largest:
        naive_like = f.flatten(2)[:, None] * torch.ones(b, c, 1, h * w)
    assert largest.numel == naive_like.numel()  # the recorder sees what it should


# ---------------------------------------------------------------------------------------------------------------------
# Graph, parameters, cost


def mean_cosine(x):
    x = nnf.normalize(x, dim=1)
    return ((x @ x.T).sum() - len(x)).item() / (len(x) * (len(x) - 1))


@pytest.mark.parametrize("classes", [12, 20, 80])
def test_the_graph_keeps_classes_apart(classes):
    torch.manual_seed(0)
    names = data.VOC_CLASSES if classes == 20 else data.TOY_CLASSES if classes == 12 else [f"w{i}" for i in range(80)]
    nodes = torch.from_numpy(data.word_vectors(names, "hash"))
    graph = srdl.ClassGraph(classes)
    assert mean_cosine(graph(nodes)) < 0.6
    with torch.no_grad():  # D4: the obvious random start makes all classes one
        graph.adjacency.uniform_(0, 1)
    assert mean_cosine(graph(nodes)) > 0.95


def test_the_normalised_adjacency_follows_training():
    graph = srdl.ClassGraph(5, width=3)
    nodes = torch.randn(5, 3)
    before = graph(nodes)
    with torch.no_grad():
        graph.adjacency.mul_(-2)  # D from |V|: the scale cancels, the sign stays
    assert not torch.allclose(graph(nodes), before)
    with torch.no_grad():
        graph.adjacency.mul_(-0.5)
    assert torch.allclose(graph(nodes), before)


def test_head_size_and_cost_at_the_papers_shape():
    head = srdl.CAR(2048, torch.ones(80, 300))
    assert sum(p.numel() for p in head.parameters()) == 13_551_729
    f = torch.zeros(1, 196, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.classify(f, *head.attend(f))
    assert counter.get_total_flops() / 2 < 1.33e9


def test_class_weights_are_kept_until_a_parameter_changes():
    head = car()
    with torch.no_grad():
        first = head.class_weights()
        assert head.class_weights() is first
        head.graph.weights[0].mul_(2)
        second = head.class_weights()
        assert not torch.equal(first, second)
        head.load_state_dict(car(seed=1).state_dict())
        assert torch.equal(head.class_weights(), car(seed=1).class_weights())
    assert head.class_weights().requires_grad


def test_class_weights_follow_a_fused_optimizer():
    head = car().eval()
    optimizer = torch.optim.Adam(head.parameters(), fused=True)  # leaves the parameters' version counters alone
    with torch.no_grad():
        before = head.class_weights()
    head.train().class_weights().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = head.eval().class_weights()
        assert torch.equal(after, head.embed()) and not torch.equal(after, before)


# ---------------------------------------------------------------------------------------------------------------------
# Erasing


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.0])
def test_eqs_9_and_10_equal_a_plain_loop(alpha):
    rng = np.random.default_rng(0)
    rows = [rng.random((1500, 13)), rng.integers(0, 3, (1500, 13)) / 2, rng.integers(0, 2, (1500, 13)) * 1.0]
    rows.append(np.repeat(rng.random((500, 5)), 3, 1)[:, :13])  # plateaus
    rows.append(np.ones((3, 13)) * 0.7)
    m = torch.from_numpy(np.concatenate(rows))
    chosen = srdl.longest_peak_run(m, alpha)
    for row, ours in zip(m.tolist(), chosen.tolist(), strict=True):
        assert [i for i, on in enumerate(ours) if on] == naive_runs(row, alpha)


def test_several_maxima_take_the_widest_run_then_the_first():
    m = torch.tensor([[1, 0, 1, 0.6, 0, 0.7, 0.8, 0.9], [1, 0.5, 0, 1, 0.5, 0, 0, 0]])
    assert srdl.longest_peak_run(m, 0.5).nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 1]]


def test_rectangle_is_columns_times_rows():
    sa = torch.zeros(5, 7)
    sa[1:3, 4:6] = 0.9
    sa[4, 0] = 0.5
    gone = srdl.erased_rectangle(sa, 0.6)
    assert gone.nonzero().tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]
    assert not srdl.erased_rectangle(torch.full((2, 3, 5, 7), 0.4), 0.5).any()


def test_only_the_most_confident_classes_change_and_softly():
    f, head = some_features(b=3), car()
    with torch.no_grad():
        logits, erased = cheap_car(head, f, top_k=2)
        changed = (logits != erased).float()
        top = logits.topk(2, 1).indices
        assert changed.sum() > 0 and changed.gather(1, top).sum() == changed.sum()
        flat = f.flatten(2).transpose(1, 2)
        sa, ca = head.attend(flat)
        gone_entirely = head.classify(flat, torch.zeros_like(sa), ca)  # CA is kept: not zero features
    assert (gone_entirely - head.classifier.bias).abs().min() > 0


def test_more_erased_classes_than_classes_is_an_error(toy):
    with pytest.raises(ValueError, match="top_k 8 is more than the 7 classes"):
        cheap_car(car(), some_features(), top_k=8)
    args = srdl.parse(["--root", toy, "--top-k", "13"])
    with pytest.raises(UserError, match="--top-k 13 is more than the 12 classes"):
        srdl.build(args, data.TOY_CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# The other heads of Table 6


def test_sd_equals_its_description():
    torch.manual_seed(0)
    head, f = srdl.SD(11, nodes_of(7)).double(), some_features(3)
    flat = f.flatten(2).transpose(1, 2)
    for image, logits in zip(flat, head(flat), strict=True):
        for c in range(7):
            joint = torch.tanh(head.fc1(image) * head.fc2(head.nodes[c]))  # (P, 1024)
            weights = head.fc_a(head.fc3(joint)).softmax(0)  # (P, 1)
            expected = (weights * image).sum(0) @ head.classifier.weight[c] + head.classifier.bias[c]
            assert torch.allclose(logits[c], expected, rtol=1e-10)


def test_sam_equals_its_description():
    torch.manual_seed(0)
    head, f = srdl.SAM(11, 7).double(), some_features(3)
    conv, transform = nn.Conv2d(11, 7, 1).double(), nn.Conv2d(11, srdl.SD_WIDTH, 1).double()
    conv.load_state_dict({"weight": head.mask.weight[..., None, None], "bias": head.mask.bias})
    transform.load_state_dict({"weight": head.transform.weight[..., None, None], "bias": head.transform.bias})
    masks, values = conv(f).sigmoid(), transform(f)
    expected = torch.einsum("bchw,bdhw->bcd", masks, values)
    logits = (expected * head.classifier.weight).sum(2) + head.classifier.bias
    assert torch.allclose(head(f.flatten(2).transpose(1, 2)), logits, rtol=1e-6, atol=1e-7)


def test_class_activation_maps_average_to_the_logits():
    flat = some_features(3).flatten(2).transpose(1, 2).float()
    head = srdl.GAP(11, 7)
    maps = head.maps(flat)
    assert maps.shape == (3, 7, 15) and torch.allclose(maps.mean(2), head(flat), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The network


def network(classes=7, head="car", **options):
    torch.manual_seed(0)
    return srdl.SRDL(common.Backbone("resnet18", last_stride=1), nodes_of(classes), head, **options)


def test_the_network_equals_the_naive_graph_on_its_feature_map():
    model, images = network(alpha=0.4).train(), torch.randn(2, 3, 64, 96)
    model.backbone.eval()
    with torch.no_grad():
        ours = model(images)
        f = model.backbone(images)[2].double()  # Eq. 1: (B, D, H, W)
        naive = naive_car(model.head.double(), f, top_k=3, alpha=0.4)
    assert f.shape[2:] == (4, 6) and not torch.allclose(*naive, atol=1e-3)
    for a, b in zip(ours, naive, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_look_shows_the_spatial_attention_and_the_rectangles_of_all_classes():
    model, images = network(alpha=0.4).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        p, maps, gone = model.look(images)
        f, head = model.backbone(images)[2], model.head
        assert torch.allclose(p, model(images).sigmoid(), atol=1e-6) and maps.shape == gone.shape == (2, 7, 4, 6)
        for b, c in np.ndindex(2, 7):
            joint = torch.tanh(head.f_sa(f[b].permute(1, 2, 0)) * head.f_w(head.graph(head.nodes)[c]))
            assert torch.allclose(maps[b, c], head.f_s(joint)[..., 0].sigmoid(), atol=1e-5)
            rows, columns = (naive_runs(maps[b, c].amax(axis).tolist(), 0.4) for axis in (1, 0))
            assert gone[b, c].nonzero().tolist() == [[y, x] for y in rows for x in columns]


def test_inference_ignores_erasing():
    images = torch.randn(2, 3, 64, 64)
    with_erasing, without = network(), network(top_k=0)
    without.load_state_dict(with_erasing.state_dict())
    with torch.no_grad():
        assert torch.equal(with_erasing.eval()(images), without.eval()(images))
    logits, erased = with_erasing.train()(images)
    assert erased.shape == logits.shape and without.train()(images)[1] is None


@pytest.mark.parametrize("head", ["car", "gap", "sd", "sam"])
def test_two_images_equal_two_times_one(head):
    model, images = network(head=head).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(model(images), torch.cat([model(i[None]) for i in images]), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 20, 500])
@pytest.mark.parametrize("positives", [0, 1])
def test_any_number_of_classes_and_no_positive_label_train(classes, positives):
    model = network(classes, top_k=1).train()
    for module in model.modules():  # a batch of one and BatchNorm: statistics over the map alone
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    logits, erased = model(torch.randn(1, 3, 64, 64))
    y = torch.full_like(logits, positives)
    loss = sum(nnf.binary_cross_entropy_with_logits(x, y) for x in (logits, erased))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["car", "gap", "sd", "sam"])
def test_half_precision_is_finite_and_close_and_scores_are_float32(dtype, head):
    model, images = network(head=head).train(), torch.randn(2, 3, 32, 64)
    with torch.autocast("cpu", dtype):
        logits, erased = model(images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.to(dtype).float())
    assert head != "car" or erased.dtype == torch.float32
    (logits if erased is None else logits + erased).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.allclose(logits, model(images)[0], atol=0.1)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    model, images = network().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(model.cuda()(images.cuda()).cpu(), expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_training_on_a_gpu_in_half_precision(run, amp):
    record, _ = run("--gpus", "0", "--amp", amp)
    assert np.isfinite(record["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Every row of the paper's tables is one command


CAR_PARTS = {"graph", "f_w", "f_ca", "f_c", "f_sa", "f_s", "classifier", "nodes"}
ROWS = {
    "ours": ([], CAR_PARTS),
    "baseline": (["--baseline"], {"classifier"}),
    "head gap": (["--head", "gap"], {"classifier"}),
    "CAR": (["--no-erase"], CAR_PARTS),
    "SD": (["--head", "sd"], {"fc1", "fc2", "fc3", "fc_a", "classifier", "nodes"}),
    "SAM": (["--head", "sam"], {"mask", "transform", "classifier"}),
    "w/o GCN": (["--no-erase", "--no-gcn"], CAR_PARTS - {"graph"}),
    "w/o CA": (["--no-erase", "--no-channel-attention"], CAR_PARTS - {"f_ca", "f_c"}),
    "w/o SA": (["--no-erase", "--no-spatial-attention"], CAR_PARTS - {"f_sa", "f_s"}),
    "top-k 1": (["--top-k", "1"], CAR_PARTS),
    "top-k 8": (["--top-k", "8"], CAR_PARTS),
    "alpha 0.1": (["--alpha", "0.1"], CAR_PARTS),
    "alpha 0.9": (["--alpha", "0.9"], CAR_PARTS),
}


@pytest.fixture(scope="module")
def rows():
    return {}


@pytest.mark.parametrize("row", ROWS)
def test_table_row(row, run, rows):
    flags, parts = ROWS[row]
    record, folder = run("-b", "8", *flags)
    state = common.load_checkpoint(folder / "last.pt")
    assert {name.split(".")[1] for name in state["model"] if name.startswith("head.")} == parts
    erases = not flags or flags[0] in ("--top-k", "--alpha")
    assert ("L_era" in record) == erases and "L_ori" in record
    assert record["loss"] == pytest.approx(record["L_ori"] + record.get("L_era", 0), rel=1e-5)
    assert (folder / "figures" / "attention.png").exists() == ("--no-spatial-attention" not in flags)
    rows[row] = record, state["model"]
    ours, weights = rows["ours"]
    if parts == CAR_PARTS and row != "ours":  # same start, one step: same L_ori, another update
        assert record["L_ori"] == ours["L_ori"]
        assert any(not torch.equal(weights[n], state["model"][n]) for n in weights)
        assert record.get("L_era") != ours["L_era"]
    if row == "head gap":
        assert all(torch.equal(rows["baseline"][1][n], t) for n, t in state["model"].items())


def test_eqs_11_to_13_equal_plain_sums(run, steps):
    seen = steps(srdl.SRDL)
    run("--limit", "4", "--image-size", "32")
    for (logits, erased), labels, terms in seen:
        y = labels == 1  # difficult objects are negatives
        assert terms["L_ori"] == pytest.approx(plain_bce(logits, y), rel=1e-5)
        assert terms["L_era"] == pytest.approx(plain_bce(erased, y), rel=1e-5)
        assert terms["loss"] == pytest.approx(terms["L_ori"] + terms["L_era"], rel=1e-6)
        assert terms["L_ori"] != terms["L_era"] and y.any()
    assert len(seen) == 1


@pytest.mark.parametrize("switch", ["gcn", "channel_attention", "spatial_attention"])
def test_a_switch_changes_the_output_of_the_same_weights(switch):
    whole, less = network(top_k=0).eval(), network(top_k=0, **{switch: False}).eval()
    missing = less.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        assert not torch.allclose(whole(images), less(images), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--baseline --head sd", "--head sd contradicts"),
        ("--no-erase --top-k 3", "--top-k has no effect"),
        ("--baseline --alpha 0.5", "--alpha has no effect"),
        ("--no-spatial-attention --top-k 2", "--top-k has no effect"),
        ("--head sam --no-gcn", "--no-gcn is a part of CAR"),
        ("--no-channel-attention --no-spatial-attention", "leave no attention"),
        ("--alpha 1", r"--alpha 1.0: expected a number in \(0, 1\)"),
        ("--top-k 0", "expected 1 or more"),
    ],
)
def test_contradicting_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        srdl.parse(flags.split())
    import re

    assert re.search(message, capsys.readouterr().err)


def test_no_spatial_attention_implies_no_erasing():
    assert srdl.parse(["--no-spatial-attention"]).no_erase and srdl.parse(["--head", "sd"]).no_erase


def test_the_papers_recipe():
    for name in ("coco", "voc2007"):
        recipe = srdl.RECIPE[name]
        assert (recipe["lr"], recipe["weight_decay"], recipe["epochs"], recipe["batch_size"]) == (1e-5, 5e-4, 20, 16)
        assert (recipe["image_size"], recipe["view"], recipe["weights"]) == (448, "square-crop", "v1")
        assert (recipe["top_k"], recipe["alpha"], recipe["train_backbone"]) == (3, 0.5, "layer4")
    args = srdl.parse(["--data", "voc2007"])
    assert args.schedule == "step" and args.difficult_train == args.difficult_test == "negative"


def test_the_learning_rate_drops_after_10_of_20_epochs(run):
    _, folder = run("--schedule", "step", "--epochs", "4", "--eval-every", "4", "--lr", "1e-3")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records if "epoch" in r] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_train_backbone_layer4_leaves_the_rest_still(run):
    _, folder = run("--train-backbone", "layer4", "--lr", "0.1")
    args = srdl.parse(["--train-backbone", "layer4"])
    torch.manual_seed(0)
    start = srdl.build(args, data.TOY_CLASSES).state_dict()
    end = common.load_checkpoint(folder / "last.pt")["model"]
    moved = {n for n in end if not torch.equal(start[n], end[n])}
    assert not any(n.startswith(("backbone.to8", "backbone.to16")) for n in moved)
    assert "backbone.to32.layer4.0.bn1.running_mean" in moved and "backbone.to32.layer4.0.conv1.weight" in moved


# ---------------------------------------------------------------------------------------------------------------------
# As a user runs it


def test_the_script_runs_and_leaves_what_it_promises(toy, tmp_path):
    out = tmp_path / "run"
    flags = "--image-size 64 --limit 16 -b 8 --epochs 2 -j 1 --amp bf16 --gpus cpu".split()
    command = [sys.executable, "srdl.py", "--root", toy, "--out", str(out), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mAP points" in result.stdout and "protocol: toy" in result.stdout
    files = {p.name for p in out.iterdir()}
    assert {"config.json", "log.jsonl", "scores.npz", "per_class.csv", "last.pt", "best.pt", "figures"} == files
    with Image.open(out / "figures" / "attention.png") as picture:
        assert picture.width == 1000 and picture.height > 8 * 200
    with Image.open(out / "figures" / "curves.png") as picture:
        assert picture.width == 1000
    header, *epochs = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert header["command"].startswith("srdl.py --root") and header["precision"] == "bf16"
    assert [r["epoch"] for r in epochs] == [1, 2] and {"map_points", "top3_OF1", "seconds", "L_era"} <= set(epochs[-1])


@pytest.mark.parametrize("flags", [[], ["--baseline"]])
def test_real_voc_images_with_real_weights(animals, tmp_path, flags):
    weights = f"{animals}/../weights/mobilenet_v2_imagenet.pth"
    args = ["--data", "voc2012", "--root", animals, "--backbone", "mobilenet_v2", "--weights", weights]
    args += ["--glove", f"{animals}/../glove/voc20.npz", "--image-size", "96", "--limit", "8", "-b", "4"]
    args += ["--epochs", "1", "-j", "0", "--gpus", "cpu", "--amp", "off", "--out", str(tmp_path / "run"), *flags]
    record = srdl.main(srdl.parse(args))
    assert np.isfinite(record["loss"]) and record["images"] == 8
