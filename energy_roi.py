"""Global Meets Local: Effective Multi-Label Image Classification via Category-Aware Weak Supervision.

J. Zhan, J. Liu, W. Tang, G. Jiang, X. Wang, B.-B. Gao, T. Zhang, W. Wu, W. Zhang, C. Wang, Y. Xie. ACM MM 2022.

A global branch classifies the whole image. A 1x1 convolution makes a map per class, which is taught only where a class
is absent (L_weak): there it must be silent. What still speaks in the maps of the most confident classes are regions;
those with the most energy are cut out of the features, classified again by a local branch that also sees the global
feature, and both predictions are averaged. The search for regions is batched and never leaves the GPU.

    python energy_roi.py                                                     toy data, minutes on two CPU cores
    python energy_roi.py --data coco --gpus 0,1                              the paper's recipe, on two GPUs
    python energy_roi.py --data coco --image-size 576 --backbone resnext101_32x8d --weights swsl --gpus 0,1
    python energy_roi.py --evaluate --checkpoint runs/energy_roi/toy/<time>/last.pt      test a trained model

Letters: B images, C classes, D channels, H W size of the weak maps, P = H*W cells, K = ks classes, ke regions of each,
kr boxes of each region, R = K*ke*kr slots (ko in the paper), of which V are valid in a batch.

| paper | here |
|---|---|
| Eq. 1 and 5, losses | main: L_global, L_local |
| Eq. 2, category-aware weak supervision | weak_loss |
| Sec. 3.3, regions and their energy | components, strongest_rectangles, select_regions |
| Eq. 7, BatchNorm of the maps | EnergyROI.weak_maps |
| Eq. 8, smaller boxes | select_regions, its loop over zeta |
| Eq. 3, global self-attention (GA) | Attention, EnergyROI.look_globally |
| series of transform layers | transform_layers, EnergyROI.look_locally |
| Eq. 4, cross-granularity attention (CA) | Attention with `valid`, EnergyROI.fuse_regions |
| Eq. 6, total loss | main |
| average of both predictions | mean_prediction |
| Tables 3, 4, 5 | --no-cross-attention, --no-global-attention; --ks, --no-local; --no-local, --no-weak |
| Tables 6, 7 | --roi-level, --weak-level; --rank |

Differences from the paper. D: it prints something else; "unstated": it is silent, and this is what we chose.
D1  Eqs. 1, 2, 5 are of one image; we take the mean over the batch, and over classes in Eqs. 1 and 5, where a sum is
    printed. (0.05 * 20 = 0.0125 * 80 hints that theirs was a sum over classes.)
D2  Eq. 2's H and W are said to be the image's; they are the map's. softplus(z) is -log(1 - S(z)) without its delta.
D3  Eq. 8 subtracts zeta * mu. BatchNorm makes the loss blind to the sign of mu, and where it is negative the boxes
    would grow: |mu|. It is subtracted after BatchNorm's affine part (which Eq. 7 does not print), with its eps under
    the root too, inside the box before, so that boxes nest. Where nothing is left, the box before is taken again.
D4  Eq. 4 has no 1/sqrt(d), the text says "similar to Eq. 3", which has: CA_SCALED.
D5  Regions have no gradient, so L_weak alone trains the maps, and nothing asks a present class for a region: maps
    without any are common. No region in an image: one box, the whole image. See the log's maps_with_region (share of
    the K maps), boxes_per_image, and silent_present (share of the present classes whose map has no region).
unstated: all widths. Transform layers are a copy of the backbone's last stage; GA has d -> d, CA q, k d/4 and v d/2.
    With ResNet-101 and C = 80 that is 57,956,736 parameters without CA and GA, 74,660,224 with both (Table 8: 57.63 M,
    74.42 M). Totals of MACs agree with Table 8 too, what the parts add does not (README), so the widths are not theirs.
unstated: "sliced and summed", "max fusion": CA's output without the global token, summed over the boxes of a class,
    linear, maximum over the K classes; without CA the same with F_l. zeta 1 and 2; regions are 8-connected; smaller
    boxes go by energy also with --rank area; missing boxes have no part in CA, sum and maximum; the average is of
    probabilities.
unstated: 3x3 ROIs by roi_align; other levels of --roi-level: the convolutions that read F_r start anew;
    --no-weak: nothing trains the maps, they are BatchNorm of a random projection, unless --tie-weak-head.
unstated: momentum, decay (of BatchNorm too), pretrained layers at 0.1 of the rate (the copy too; all at the full rate
    without pretrained weights), clipping, crop positions, flip: ADD-GCN's, on which the recipe is built. VOC's
    difficult objects are positives in training and ignored in the test.
Training crops are cut in whole source pixels and resized once, where the paper resizes twice: interpolation detail.
The toy recipe (toy data, ResNet-18 from scratch, Adam, one-cycle learning rate, 4 boxes) is ours.
"""

import copy
import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as nnf
from torchvision.ops import roi_align

import common
import data

PAPER = {
    "backbone": "resnet101",  # Sec. 4, from here on
    "weights": "v1",  # unstated: its version
    "image_size": 448,
    "batch_size": 16,
    "epochs": 50,
    "lr": 0.05,  # VOC2007
    "pretrained_lr": 0.1,  # unstated: of lr, for layers that are pretrained
    "optimizer": "sgd",
    "weight_decay": 1e-4,  # unstated
    "schedule": "step",  # x 0.1 at DROPS
    "view": "multi-scale",  # S + 64, crop scales {1, 0.875, 0.75, 0.66, 0.5}, resize to S
    "interpolation": "bilinear",  # unstated
    "ks": 4,
    "ke": 2,
    "kr": 3,
    "difficult_train": "positive",  # unstated
    "difficult_test": "ignore",  # unstated
    "last_stride": 2,
}
RECIPE = {
    "voc2007": PAPER,
    "coco": PAPER | {"lr": 0.0125},
    # ResNet-18 from scratch with 6x6 cells and 2 * 1 * 2 boxes
    "toy": PAPER
    | {"backbone": "resnet18", "weights": "none", "image_size": 96, "batch_size": 32, "epochs": 2, "lr": 1e-3}
    | {"optimizer": "adam", "schedule": "one-cycle", "view": "resize", "last_stride": 1, "ks": 2, "ke": 1, "kr": 2},
}
DROPS = (30 / 50, 40 / 50)  # parts of the run after which the rate drops
MOMENTUM, CLIP = 0.9, 10.0  # unstated
ROI_SIZE, SAMPLING = 3, 2  # unstated
CA_SCALED = True  # D4


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.3 and supplement A: energy-based ROI selection. Every step runs it on B*K maps and on B*K*ke more for each
# further box, so it must not wait for the GPU: all shapes follow from the inputs' shapes, no value is ever looked at.


def components(mask):
    """mask (M, H, W) bool -> label (M, P): the smallest linear index in each cell's 8-connected component. A cell
    outside the mask is its own.

    Labels are a forest: label[p] is a cell of p's component, a root has its own. In a round, each tree's root is hooked
    to the smallest root that touches the tree (3x3 max pooling of -label), then all chains are cut short (label =
    label[label], each time doubling what a cell sees). How many rounds suffice follows from the shape:
    the first leaves only cells without a smaller neighbour, at most one in each 2x2 block. After that, a root that
    outlives two rounds has swallowed another: in the first it is smaller than all roots around it, and these either
    hook to it or to a smaller one, to which it then hooks in the second. So two rounds halve the number of roots.
    """
    m, h, w = mask.shape
    mask, label = mask.flatten(1), torch.arange(h * w, device=mask.device).expand(m, -1)  # (M, P)
    rounds, roots = [h * w], ((h + 1) // 2) * ((w + 1) // 2)
    while roots > 1:
        rounds += [roots, roots]
        roots //= 2
    for roots in rounds:
        near = torch.where(mask, -label, -h * w).float().view(m, 1, h, w)  # exact to 2^24 cells
        near = -nnf.max_pool2d(near, 3, 1, 1).flatten(1).long()
        label = label.scatter_reduce(1, label, torch.where(mask, near, label), "amin")
        for _ in range((roots - 1).bit_length()):  # no chain is longer than the roots are many
            label = label.gather(1, label)
    return label


def strongest_rectangles(m, count, rank="energy"):
    """Maps m (M, H, W) float64 >= 0 -> the rectangles (M, count, 4) around components of m > 0 with the most energy,
    as half-open cells (x0, y0, x1, y1), and whether there are so many, found (M, count). rank: "energy", the sum of m
    over all cells of the rectangle, or "area". Ties: the component whose first cell comes first. 0 where not found.

    Energies are sums of integers, m in units of 2^-24, so that an integral image is exact in float64 in any order of
    summation, and ties are the same on every machine.
    """
    (maps, h, w), mask = m.shape, m > 0
    label = components(mask)  # (M, P)
    cell = torch.arange(h * w, device=m.device).expand(maps, -1)
    x, y = cell % w, cell // w
    x0, y0 = (t.scatter_reduce(1, label, t, "amin") for t in (x, y))  # read at roots only
    x1, y1 = (t.scatter_reduce(1, label, t, "amax") + 1 for t in (x, y))
    if rank == "area":
        score = ((x1 - x0) * (y1 - y0)).double()
    else:
        total = nnf.pad((m * 2**24).round().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)  # integral image
        a, b, c, d = (total.gather(1, j * (w + 1) + i) for j in (y0, y1) for i in (x0, x1))
        score = d - c - b + a
    score = torch.where(mask.flatten(1) & (label == cell), score, -1)  # one candidate a component
    score = nnf.pad(score, (0, max(0, count - h * w)), value=-1)
    score, best = score.sort(dim=1, descending=True, stable=True)
    found, best = score[:, :count] >= 0, best[:, :count].clamp(max=h * w - 1)  # (M, count)
    boxes = torch.stack([t.gather(1, best) for t in (x0, y0, x1, y1)], 2)
    return torch.where(found[..., None], boxes, 0), found


@torch.no_grad()
def select_regions(z, scores, running_mean, running_var, ks=4, ke=2, kr=3, rank="energy", eps=1e-5):
    """z (B, C, H, W): class maps after BatchNorm with these statistics (C,); scores (B, C): the global branch's.
    -> boxes (B, K, ke, kr, 4) in cells, half-open (x0, y0, x1, y1); valid (B, K, ke, kr) bool; top (B, K), the classes
    with the highest scores, K = min(ks, C). No valid slot in an image: its first becomes the whole image.

    For one map z (H, W), with step = |running_mean| / sqrt(running_var + eps) of its class, the same as plain code:

        def rectangles(m, rank="energy"):
            labels, _ = scipy.ndimage.label(m > 0, np.ones((3, 3)))
            boxes = [(x.start, y.start, x.stop, y.stop) for y, x in scipy.ndimage.find_objects(labels)]
            energy = [m[y0:y1, x0:x1].sum() if rank == "energy" else (x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
            return [boxes[i] for i in np.argsort(-np.array(energy), kind="stable")]

        def regions(z, step, ke, kr, rank="energy"):
            for box in rectangles(z.clip(0), rank)[:ke]:
                scales = [box]
                for zeta in range(1, kr):
                    x0, y0, x1, y1 = scales[-1]
                    inside = np.zeros_like(z)
                    inside[y0:y1, x0:x1] = (z - zeta * step).clip(0)[y0:y1, x0:x1]
                    scales.append((rectangles(inside) or scales[-1:])[0])
                yield scales
    """
    b, _, h, w = z.shape
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :ks]  # (B, K)
    k = top.shape[1]
    z = z.gather(1, top[..., None, None].expand(-1, -1, h, w)).flatten(0, 1).double()  # (B*K, H, W)
    step = (running_mean.double().abs() / (running_var.double() + eps).sqrt()).expand(b, -1).gather(1, top)  # D3
    boxes, found = strongest_rectangles(z.relu(), ke, rank)  # (B*K, ke, 4), (B*K, ke)
    z = z[:, None].expand(-1, ke, -1, -1).flatten(0, 1)  # (B*K*ke, H, W)
    step = step.flatten()[:, None].expand(-1, ke).flatten()[:, None, None]  # (B*K*ke, 1, 1)
    scales = [boxes.flatten(0, 1)]
    x, y = torch.arange(w, device=z.device), torch.arange(h, device=z.device)[:, None]
    for zeta in range(1, kr):  # Eq. 8
        x0, y0, x1, y1 = scales[-1][..., None, None].unbind(1)  # (B*K*ke, 1, 1)
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        smaller, left = strongest_rectangles((z - zeta * step).relu() * inside, 1)
        scales.append(torch.where(left, smaller[:, 0], scales[-1]))
    boxes = torch.stack(scales, 1).view(b, -1, 4)  # (B, R, 4)
    valid = found[..., None].expand(-1, -1, kr).reshape(b, -1)  # (B, R)
    first = torch.arange(valid.shape[1], device=z.device) == 0
    empty = ~valid.any(1, keepdim=True) & first  # D5
    whole = torch.stack([x[:1] * 0, x[:1] * 0, x[-1:] + 1, y[-1] + 1], 1)  # (1, 4): 0, 0, W, H
    boxes = torch.where(empty[..., None], whole, boxes)
    return boxes.view(b, k, ke, kr, 4), (valid | empty).view(b, k, ke, kr), top


def kept_slots(valid):
    """valid (B, R) bool -> linear indices (V,) of the valid slots; the step's only synchronisation."""
    return valid.flatten().nonzero().flatten()


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 2 and the average of both predictions, in float32 also under --amp


def full(x):
    """Half precision -> float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weak_loss(z, y):
    """Eq. 2: z (B, C, H, W) before the ReLU, y (B, C) bool. Mean over images of 1/HW sum_cells 1/N sum_{c absent}
    -log(1 - S(z)), N the number of absent classes. Present classes have no part in it."""
    absent = (~y).to(z)
    silence = nnf.softplus(z).mean((2, 3))  # (B, C), D2
    return ((silence * absent).sum(1) / absent.sum(1).clamp(min=1)).mean()


def regions_seen(z, top, valid, y):
    """For the log, as tensors: the share of the K maps (B, K) that have a region, the valid boxes of an image, and the
    share of the present classes (y (B, C) bool) whose map has no region (D5)."""
    found = (z.detach() > 0).flatten(2).any(2)  # (B, C)
    return {
        "maps_with_region": found.gather(1, top).float().mean(),
        "boxes_per_image": valid.flatten(1).sum(1).float().mean(),
        "silent_present": (y & ~found).sum() / y.sum().clamp(min=1),
    }


def mean_prediction(a, b):
    """Logit of (sigmoid(a) + sigmoid(b)) / 2, without rounding the probability."""
    s = nnf.logsigmoid
    return torch.logaddexp(s(a), s(b)) - torch.logaddexp(s(-a), s(-b))


# ---------------------------------------------------------------------------------------------------------------------
# Network


class Attention(nn.Module):
    """One head, no residual, no output projection: x (B, T, D) -> softmax(Q K^T / sqrt(d)) V (B, T, d_v), Eqs. 3 and 4.
    valid (B, T) bool: which tokens may be attended to."""

    def __init__(self, width, key_width, value_width, scaled=True):
        super().__init__()
        self.q, self.k = nn.Linear(width, key_width), nn.Linear(width, key_width)
        self.v = nn.Linear(width, value_width)
        self.scale = key_width**-0.5 if scaled else 1.0

    def forward(self, x, valid=None):
        score = full((self.q(x) * self.scale) @ self.k(x).transpose(1, 2))  # (B, T, T)
        if valid is not None:
            score = score.masked_fill(~valid[:, None], -math.inf)
        return full(score.softmax(2) @ self.v(x))


def transform_layers(backbone, channels):
    """A copy of the backbone's last stage, weights and all; if `channels` are not F16's, the convolutions that read the
    input (the first block's first, and its shortcut's) take them and start anew."""
    layers = copy.deepcopy(backbone.to32)
    usual = backbone.channels[1]
    first = next(m for m in layers.modules() if not isinstance(m, nn.Sequential))  # the first block
    for module in list(first.modules()) if channels != usual else ():
        for name, conv in list(module.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.in_channels == usual:
                new = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
                nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
                setattr(module, name, new)
    return layers


class EnergyROI(nn.Module):
    """images (B, 3, S, S) -> logits (B, C) in eval mode. In training: global logits (B, C), local logits (B, C),
    weak maps z (B, C, H, W), top (B, K), valid (B, R); all but the first None without the local branch.

    ca, ga, local, weak, tied: the rows of Table 3 to 5 and --tie-weak-head; roi_level, weak_level: 8, 16 or 32,
    F_r and F_w of Table 6. `class_dims`: tensors whose first dimension belongs to classes, for --init-from.
    """

    class_dims = dict.fromkeys(("fc.weight", "fc.bias", "fc_local.weight", "fc_local.bias", "weak_conv.weight"), 1)
    class_dims |= {f"weak_bn.{name}": 1 for name in ("weight", "bias", "running_mean", "running_var")}

    def __init__(
        self,
        backbone,
        classes,
        ks=4,
        ke=2,
        kr=3,
        rank="energy",
        roi_level=16,
        weak_level=32,
        ca=True,
        ga=True,
        local=True,
        weak=True,
        tied=False,
    ):
        super().__init__()
        self.backbone, self.local, d = backbone, local, backbone.channels[2]
        self.selection = {"ks": ks, "ke": ke, "kr": kr, "rank": rank}
        self.ga = Attention(d, d, d) if ga else None
        self.fc = nn.Linear(d, classes)
        if local:
            levels = dict(zip((8, 16, 32), backbone.channels, strict=True))
            self.roi_level, self.weak_level = (list(levels).index(n) for n in (roi_level, weak_level))
            self.weak_conv = None if tied else nn.Conv2d(levels[weak_level], classes, 1, bias=False)
            self.weak_bn = nn.BatchNorm2d(classes)
            if not weak:  # nothing trains them; DDP would wait for their gradients
                for layer in filter(None, (self.weak_conv, self.weak_bn)):
                    layer.requires_grad_(False)
            self.transform = transform_layers(backbone, levels[roi_level])
            self.ca = Attention(d, d // 4, d // 2, CA_SCALED) if ca else None
            self.fc_local = nn.Linear(d // 2 if ca else d, classes)

    def look_globally(self, f32):
        """F32 (B, D, H, W) -> global logits (B, C) and F_g (B, D)."""
        x = full(f32.flatten(2).transpose(1, 2))  # (B, P, D)
        if self.ga:
            x = self.ga(x)  # Eq. 3
        with torch.autocast(x.device.type, enabled=False):  # bf16 logits would tie
            return self.fc(x).max(1).values, x.max(1).values  # two maxima: max_p w x_p is not w max_p x_p

    def weak_maps(self, f):
        """F_w (B, D, H, W) -> z (B, C, H, W), Eq. 7 with an affine part (D3), in float32."""
        weight = self.weak_conv.weight if self.weak_conv else self.fc.weight[..., None, None]
        with torch.autocast(f.device.type, enabled=False):
            return self.weak_bn(nnf.conv2d(full(f), weight))

    def look_locally(self, f, boxes, valid, stride):
        """F_r (B, D, H, W) with its stride, boxes (B, R, 4) in pixels, valid (B, R) -> F_l (B, R, D), 0 if not valid.
        Only valid regions pass the transform layers: others would change BatchNorm's statistics, and cost time."""
        slots, r = kept_slots(valid), valid.shape[1]
        rois = torch.cat([(slots // r).to(f)[:, None], boxes.to(f).flatten(0, 1).index_select(0, slots)], 1)  # (V, 5)
        pooled = roi_align(f, rois, ROI_SIZE, 1 / stride, SAMPLING, aligned=True)  # (V, D, 3, 3)
        seen = self.transform(pooled.contiguous(memory_format=torch.channels_last))
        seen = full(seen.flatten(2)).max(2).values  # (V, D)
        return seen.new_zeros(valid.numel(), seen.shape[1]).index_copy(0, slots, seen).view(len(valid), r, -1)

    def fuse_regions(self, f_g, f_l, valid):
        """F_g (B, D), F_l (B, R, D), valid (B, K, ke, kr) -> embeddings of the K classes (B, K, d_v) and local logits
        (B, C)."""
        slots = valid.flatten(1)  # (B, R)
        if self.ca:
            tokens = torch.cat([f_g[:, None], f_l], 1)  # (B, 1 + R, D)
            f_l = self.ca(tokens, torch.cat([slots.new_ones(len(slots), 1), slots], 1))[:, 1:]  # Eq. 4: (B, R, d_v)
        f_l = torch.where(slots[..., None], f_l, 0)
        embeddings = f_l.unflatten(1, (valid.shape[1], -1)).sum(2)  # (B, K, d_v)
        with torch.autocast(f_l.device.type, enabled=False):
            logits = self.fc_local(embeddings)  # (B, K, C)
        known = valid.flatten(2).any(2)[..., None]  # (B, K, 1)
        return embeddings, logits.masked_fill(~known, -math.inf).max(1).values

    def analyse(self, images):
        """Everything that forward, pictures and embeddings ask for, by name; boxes (B, R, 4) in pixels."""
        levels = self.backbone(images)  # F8, F16, F32
        logits, f_g = self.look_globally(levels[2])
        if not self.local:
            return {"logits": logits}
        z, bn, strides = self.weak_maps(levels[self.weak_level]), self.weak_bn, self.backbone.strides
        boxes, valid, top = select_regions(z, logits, bn.running_mean, bn.running_var, **self.selection, eps=bn.eps)
        boxes = boxes.flatten(1, 3) * strides[self.weak_level]
        f_l = self.look_locally(full(levels[self.roi_level]), boxes, valid.flatten(1), strides[self.roi_level])
        embeddings, local = self.fuse_regions(f_g, f_l, valid)
        seen = {"logits": logits, "local": local, "z": z, "top": top, "valid": valid, "boxes": boxes}
        return seen | {"embeddings": embeddings}

    def forward(self, images):
        seen = self.analyse(images)
        if self.training:
            return tuple(seen.get(name) for name in ("logits", "local", "z", "top", "valid"))
        return mean_prediction(seen["logits"], seen["local"]) if self.local else seen["logits"]


class GlobalBranch(nn.Module):
    """images (B, 3, S, S) -> the global branch's logits (B, C), for --export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.look_globally(self.model.backbone(images)[2])[0]


def global_branch(model):
    """What --export writes, and a line that says so: regions are of no fixed number."""
    if not model.local:
        return model, ""
    return GlobalBranch(model), "the global branch only, without the regions' predictions"


class GAP(nn.Module):
    """Baseline: global average pooling, linear; forward as in EnergyROI."""

    class_dims = dict.fromkeys(("fc.weight", "fc.bias"), 1)

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.local, self.fc = backbone, False, nn.Linear(backbone.channels[2], classes)

    def forward(self, images):
        f = full(self.backbone(images)[2])  # (B, D, H, W)
        with torch.autocast(f.device.type, enabled=False):
            logits = self.fc(f.mean((2, 3)))
        return (logits, None, None, None, None) if self.training else logits


# ---------------------------------------------------------------------------------------------------------------------
# Pictures (Figs. 5 to 9) and label-level embeddings (Fig. 4)

BARS = ((60, 110, 200), (230, 130, 40), (60, 150, 80))  # global, local, mean
SCALES = ((230, 30, 30), (255, 150, 0), (255, 240, 0))  # red, orange, yellow: a region's boxes, from large to small


def draw_box(draw, box, colour, dashed):
    """The outline of box (x0, y0, x1, y1), 3 pixels wide."""
    x0, y0, x1, y1 = box
    for a, b, c, d in ((x0, y0, x1, y0), (x0, y1, x1, y1), (x0, y0, x0, y1), (x1, y0, x1, y1)):
        parts = max(1, round(max(c - a, d - b) / 8)) if dashed else 1
        for i in range(0, parts, 2):
            u, v = i / parts, min((i + 1) / parts, 1)
            draw.line((a + u * (c - a), b + u * (d - b), a + v * (c - a), b + v * (d - b)), colour, 3)


@torch.no_grad()
def draw_regions(show, path):
    """Images, each with the ReLU'd maps of the (up to four) classes that the global branch ranks first, their boxes,
    and how sure each branch and their mean are of the class; 1,000 pixels wide."""
    args, model = show.args, show.model
    if not model.local:
        return common.draw_labels(show, path)
    maps = min(4, args.ks, len(show.classes))
    tile = 1000 // (maps + 1) - 8
    picture, height = Image.new("RGB", (1000, 48 + len(show.samples) * (tile + 116)), "white"), tile + 116
    common.write_text(
        picture, (6, 2), "map after ReLU: blue 0, red its maximum. Boxes: red, orange, yellow from large to"
    )
    common.write_text(picture, (6, 22), "small; solid: the region with the highest energy, dashed: the others")
    for row, sample in enumerate(show.samples):
        with show.autocast():
            seen = {k: v[0].cpu() for k, v in model.analyse(show.batch(sample)).items()}
        p = [seen[k].sigmoid() for k in ("logits", "local")]
        p.append(sum(p) / 2)  # (C,) each
        left, top, photo = 4, 48 + row * height, sample.tile(tile)
        picture.paste(photo, (left, top))
        common.write_text(picture, (left + 2, top + tile + 2), sample.name, 13)
        for line, (text, colour) in enumerate(show.captions(sample, p[2])):
            for part, words in enumerate(textwrap.wrap(text, tile // 7)[:2]):
                common.write_text(picture, (left + 2, top + tile + 20 + 44 * line + 18 * part), words, 14, colour)
        boxes, valid = seen["boxes"].view(*seen["valid"].shape, 4) * tile / args.image_size, seen["valid"]
        for column, c in enumerate(seen["top"].tolist()[:maps]):
            left, heat = (column + 1) * (tile + 8) + 4, seen["z"][c].relu().float()
            shown = common.heat_overlay(photo, heat / heat.max().clamp(min=1e-6))
            for region in reversed(range(valid.shape[1])):
                for scale in range(valid.shape[2]):
                    if valid[column, region, scale]:
                        box = [min(v, tile - 2) for v in boxes[column, region, scale].tolist()]
                        box = [v + 3 * scale * sign for v, sign in zip(box, (1, 1, -1, -1), strict=True)]  # all visible
                        draw_box(ImageDraw.Draw(shown), box, SCALES[scale % 3], dashed=region > 0)
            picture.paste(shown, (left, top))
            silent = "" if heat.any() else ", no region"
            common.write_text(
                picture, (left + 2, top + tile + 2), f"{show.classes[c]}, max {heat.max():.2g}{silent}", 13
            )
            for line, (name, colour, q) in enumerate(zip(("global", "local", "mean"), BARS, p, strict=True)):
                y = top + tile + 24 + 24 * line
                ImageDraw.Draw(picture).rectangle(
                    (left + 60, y, left + 60 + (tile - 120) * float(q[c]), y + 14), colour
                )
                common.write_text(picture, (left + 2, y - 2), name, 14)
                common.write_text(picture, (left + tile - 50, y - 2), f"{q[c]:.3f}", 14)
    picture.save(path)


@torch.no_grad()
def save_embeddings(run, path):
    """embeddings.npz: of each test image and selected class that is present, the embedding (n, d_v), the class's index
    (n,) and the image's name (n,). Every process reads all images; the first one writes."""
    model, images = run.reported.eval(), run.test_loader.images
    found = {"embeddings": [], "class": [], "image": []}
    for batch in data.Loader(images, run.args.batch_size, workers=run.args.workers).epoch():
        with run.autocast():
            seen = model.analyse(data.normalise(batch.images.to(run.env.device)))
        top = seen["top"].cpu()  # (B, K)
        row, column = (batch.labels.gather(1, top) == 1).nonzero(as_tuple=True)
        found["embeddings"].append(seen["embeddings"].float().cpu()[row, column].numpy())
        found["class"].append(top[row, column].numpy())
        found["image"] += [images.table.names[i] for i in batch.index[row].tolist()]
    arrays = {k: np.concatenate(v) if k != "image" else np.array(v) for k, v in found.items()}
    with data.write_atomically(path) as file:
        np.savez_compressed(file, **arrays, classes=np.array(images.table.classes))


# ---------------------------------------------------------------------------------------------------------------------
# Command line, training

LOCAL_FLAGS = ("ks", "ke", "kr", "rank", "roi_level", "weak_level", "tie_weak_head", "no_weak", "no_cross_attention")


def parse(argv=None):
    parser = common.arguments("Global Meets Local: regions chosen by energy, attention from global to local.")
    add = parser.add_argument_group("Global Meets Local").add_argument
    positive = common.at_least(1)
    add("--no-cross-attention", action="store_true", help="Table 3: w/o CA")
    add("--no-global-attention", action="store_true", help="Table 3: w/o GA")
    add(
        "--no-local",
        action="store_true",
        help="Table 4 base, Table 5 L_global: no local branch, so no weak supervision",
    )
    add("--no-weak", action="store_true", help="Table 5: without L_weak; maps of an untrained head")
    add("--tie-weak-head", action="store_true", help="weak maps by the weights of the global classifier")
    add("--ks", type=positive, metavar="N", help="Table 4: classes whose maps are searched, at most all")
    add("--ke", type=positive, metavar="N", help="regions of a map")
    add("--kr", type=positive, metavar="N", help="boxes of a region, each inside the one before")
    add("--rank", default="energy", choices=("energy", "area"), help="Table 7: which regions are kept")
    add(
        "--roi-level", type=int, default=16, choices=(8, 16, 32), help="Table 6: stride of F_r, where boxes are cut out"
    )
    add("--weak-level", type=int, default=32, choices=(8, 16, 32), help="Table 6: stride of F_w, under the weak maps")
    add("--schedule", choices=("step", "one-cycle"), help="learning rate: x0.1 at 30 and 40 of 50 epochs, or one cycle")
    add(
        "--save-embeddings",
        action="store_true",
        help="Fig. 4: embeddings.npz, of the test images' selected true classes",
    )
    args = common.parse(parser, argv, RECIPE, "energy_roi")

    flag = "--{}".format
    wrong = [flag(n.replace("_", "-")) for n in LOCAL_FLAGS + ("save_embeddings",) if n in args.given]
    own = [n for n in ("no_local", "no_global_attention") if n in args.given]
    if args.baseline and (wrong or own):
        parser.error(
            f"{(wrong + [flag(n.replace('_', '-')) for n in own])[0]} has no effect: --baseline is the plain backbone"
        )
    wrong = [name for name in wrong if name != "--no-weak"]
    if args.no_local and wrong:
        parser.error(f"{wrong[0]} has no effect: --no-local leaves no regions")
    args.no_weak = args.no_weak or args.no_local
    if args.tie_weak_head and args.weak_level != 32:
        parser.error(f"--tie-weak-head shares weights that read F32; --weak-level {args.weak_level} is another map")
    if args.weights == "none" and not args.init_from and not args.resume:
        args.pretrained_lr = 1.0  # nothing is pretrained
    return args


def build(args, classes):
    """The network of the command line. Pretrained weights are read unless a checkpoint brings them."""
    weights = "none" if args.checkpoint or args.resume else args.weights
    backbone = common.Backbone(args.backbone, weights, last_stride=args.last_stride)
    if args.baseline:
        return GAP(backbone, len(classes))
    switches = {"ga": not args.no_global_attention, "ca": not args.no_cross_attention, "local": not args.no_local}
    switches |= {"weak": not args.no_weak, "tied": args.tie_weak_head, "rank": args.rank}
    levels = {"roi_level": args.roi_level, "weak_level": args.weak_level}
    return EnergyROI(backbone, len(classes), args.ks, args.ke, args.kr, **switches, **levels)


def main(args):
    env = common.start(args)
    if args.predict or args.export:
        return common.apply(args, env, build, draw_regions, global_branch)
    train, test = common.load_data(args, env)
    with common.first_process_first(env):
        model = build(args, test.classes)
    run = common.Run(args, env, model, train, test)
    if args.evaluate:
        record = run.evaluate()
    else:
        groups = {True: [], False: []}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[name.startswith(("backbone.", "transform."))].append(p)
        rates = [args.lr * args.pretrained_lr, args.lr]
        groups = [{"params": groups[old], "lr": rate} for old, rate in zip((True, False), rates, strict=True)]
        if args.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=args.weight_decay)
        else:
            optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)
        if args.schedule == "step":
            drops = [round(part * run.total_steps) for part in DROPS]  # after 30 and 40 of 50 epochs
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= d for d in drops))
            run.say(f"learning rate x0.1 after steps {drops[0]} and {drops[1]}")
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, rates, max(run.total_steps, 2), cycle_momentum=False
            )
        net = run.prepare(optimizer, schedule, clip=CLIP)
        record = None
        for epoch in run.epochs():
            for images, labels in run.batches(epoch):
                y = data.targets(labels, args.difficult_train)  # (B, C) bool
                with run.autocast():
                    logits, local, z, top, valid = net(images)
                losses, seen = {"L_global": nnf.binary_cross_entropy_with_logits(logits, y.float())}, {}  # Eq. 1, D1
                if model.local:
                    losses["L_local"] = nnf.binary_cross_entropy_with_logits(local, y.float())  # Eq. 5, D1
                    if not args.no_weak:
                        losses["L_weak"] = weak_loss(z, y)  # Eq. 2
                    seen = regions_seen(z, top, valid, y)
                run.update(sum(losses.values()), **losses, **seen)  # Eq. 6
            record = run.finish_epoch(epoch)
        record = record or run.test()  # resumed after the last epoch
    if env.first:
        (run.out / "figures").mkdir(exist_ok=True)
        if model.local:
            draw_regions(run.show(), run.out / "figures" / "regions.png")
        if args.save_embeddings:
            save_embeddings(run, run.out / "embeddings.npz")
        if not args.evaluate:
            common.draw_curves(run.out / "log.jsonl", run.out / "figures" / "curves.png")
    run.report(record)
    return record


if __name__ == "__main__":
    arguments = parse()
    common.launch(main, arguments)
