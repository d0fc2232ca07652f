"""SADCL: Semantic-Aware Dual Contrastive Learning for Multi-label Image Classification.

L. Ma, D. Sun, L. Wang, H. Zhao, B. Luo. ECAI 2023, arXiv 2307.09715.

A transformer decoder gives every image one embedding per class (SARL, stage 1: Query2Label with a ResNet). Stage 2
trains on and pulls the embeddings of a present class towards those of the same class in other images (SSCL) and towards
a learned prototype of the class (PSCL), away from everything else. Contrasting costs nothing at inference.

    python sadcl.py                                                            toy data: both stages, in minutes
    python sadcl.py --data coco --gpus 0,1                                     the paper's recipe, on two GPUs
    python sadcl.py --data coco --image-size 576 --gpus 0,1                    likewise; 512 needs --gpus 0,1,2,3
    python sadcl.py --stage 2 --init-from RUN --lambda-s 0 --lambda-p 0        stage 2 without contrast, from a stage 1
    python sadcl.py --evaluate --checkpoint runs/sadcl/toy/<time>/last.pt      test a trained model

Letters: B images, C classes, D width, H W map size, P = H*W positions, T queries, N active labels (y = 1), E width of
the projections.

| paper (SARL, SSCL, PSCL are its names) | here |
|---|---|
| position encoding; encoder, decoder | position_encoding; Layer |
| label-level representations h | SADCL.embed |
| classification loss, stages 1 and 2 | asymmetric_loss; main: L_BCE |
| projection head; prototypes | SADCL.projection; SADCL.prototypes, class_means |
| memory bank | start_bank, update_bank |
| sample-to-sample contrast SSCL | sscl |
| prototype-to-sample contrast PSCL | pscl |
| rows of the ablation | --baseline, --stage 1 --encoder-layers 0 (SARL*), --stage 1 (SARL), --lambda-p 0 (+SSCL), |
|  | --lambda-s 0 (+PSCL), nothing (both); the missing control --lambda-s 0 --lambda-p 0 |

Differences from the paper. D: it, or its released code, does something else; "unstated": it is silent, and this is what
we chose.
D1  SSCL: the released code masks anchors in another order than they lie in: one counts only if its class is also
    active in image (v B + b) // 2, v its view and b its image, and they are divided by all. We count every anchor,
    with lambda_s 16 for the same size of gradient (not validated by training); --sscl official is theirs, with 100.
D2  The contrast set is the whole batch over all processes. Theirs was the 32 images of a process, for which both
    lambdas were tuned: so all recipes but the toy's have --contrast-chunk 32, on any number of GPUs.
D3  They stop early on the test set; --early-stop does (and then stage 2 starts from the best epoch). By default
    training stops after a fixed part of the cycle, 20 and 12 of 80 epochs, and the last epoch is the number.
D4  PSCL of a class without positives in the batch: we subtract the detached maximum from the first term; same gradient,
    but never negative. A batch without any positive has no contrastive loss.
D5  Their prototypes look like sums over confident samples divided by all positives of the class; ours are means: the
    same direction. A class without confident positives takes the mean over all, one without positives its query.
D6  RandAugment draws from torchvision's 14 operations, theirs from 15; like theirs, each of two is applied with
    probability 1/2, at a magnitude of 1 to 9.
unstated: the asymmetric loss is summed over classes and averaged over images (AdamW hardly sees scale); the start of
    biases; cross-attention maps are the last layer's, averaged over heads; the GAP baseline takes stage 1's recipe; the
    512-wide transformer behind a 1x1 convolution for light backbones; prototypes without --init-from are the queries;
    BatchNorm is frozen in stage 2 too; early stopping's patience of 8 of 80 epochs scales with --epochs.
CF1 of the paper is CF1_macro here. It chooses its best epoch on the test set: see best_on_test_map_points.
The toy recipe (toy data, ResNet-18 from scratch, short cycles, a narrower transformer) is ours.
"""

import argparse
import colorsys
import functools
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as nnf

import common
import data

# unstated in the paper; from its released code unless noted. Pairs are (stage 1, stage 2).
PAPER = {
    "backbone": "resnet101",
    "weights": "v1",
    "image_size": 448,
    "coco_images": "all",
    "batch_size": 64,
    "epochs": 80,  # length of a cycle; both stages end earlier
    "cycle": (1, 1),  # of the stages, in --epochs
    "stop": (20 / 80, 12 / 80),  # D3: part of the cycle after which training stops
    "patience": 8 / 80,  # of --early-stop, in cycles
    "lr": 5e-5,
    "weight_decay": 5e-3,
    "ema_decay": 0.9998,
    "view": ("whole", "multi-scale"),
    "pixels": ("cutout-randaugment", "none"),  # D6
    "interpolation": "bilinear",
    "difficult_train": "negative",
    "difficult_test": "negative",
    "freeze": True,  # all BatchNorm, and the network up to stride 4
    "last_stride": 2,
    "width": 2048,
    "ffn": 4,  # in widths
    "gamma_neg": 4.0,
    "lambda_p": 50.0,
    "contrast_chunk": 32,  # D2
    "confidence": 0.85,  # of the samples that make a prototype
}
LARGE_BATCH = {"batch_size": 128, "lr": 1e-4, "weight_decay": 1e-2, "ema_decay": 0.9997}
COCO_SIZES = {448: {}, 512: LARGE_BATCH | {"gamma_neg": 2.0}, 576: {"gamma_neg": 2.0, "confidence": 0.95}}
RECIPE = {
    "coco": PAPER,
    "nuswide": PAPER | LARGE_BATCH,
    "vg500": PAPER | LARGE_BATCH | {"image_size": 576, "batch_size": 64},
    "voc2007": PAPER,  # with --init-from a run on COCO
    "voc2012": PAPER,
    # ResNet-18 from scratch with 6x6 cells; whole cycles of 2 epochs and of 1
    "toy": PAPER
    | {"backbone": "resnet18", "weights": "none", "image_size": 96, "batch_size": 32, "epochs": 2, "lr": 7e-4}
    | {"cycle": (1, 0.5), "stop": (1, 1), "view": ("resize", "resize"), "pixels": ("none", "none"), "last_stride": 1}
    | {"freeze": False, "width": 512, "ffn": 2, "contrast_chunk": 0},
}
LIGHT, LIGHT_WIDTH = ("resnet18", "resnet34", "mobilenet_v2"), 512  # unstated: a 2048-wide transformer would dwarf them
HEADS, DECODER_LAYERS, DROPOUT = 4, 2, 0.1
BETAS = (0.9, 0.999)  # OneCycle moves the first from 0.95 to 0.85 and back
SSCL_TAU, PSCL_TAU, BANK_CONFIDENCE = 0.2, 0.07, 0.8
LAMBDA_BCE, LAMBDA_S = 1000, {"clean": 16.0, "official": 100.0}  # D1


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


def position_encoding(h, w, d, device=None):
    """2-D sine code (P, D): D/2 numbers for y, then D/2 for x. Positions 1..n are scaled to (0, 2 pi]; frequencies fall
    from 1 to 1/10000; sine and cosine alternate."""
    rate = 10000 ** -(torch.arange(0, d // 2, 2, device=device) / (d // 2))  # (D/4,)

    def axis(n):
        angle = torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) * 2 * math.pi * rate  # (n, D/4)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (n, D/2)

    y, x = axis(h)[:, None].expand(-1, w, -1), axis(w)[None].expand(h, -1, -1)  # (H, W, D/2)
    return torch.cat([y, x], 2).flatten(0, 1)  # (P, D)


class Attention(nn.Module):
    """Multi-head attention: q (B, T, D), k and v (B, P, D) -> (B, T, D); q may be one for all images (1, T, D)."""

    def __init__(self, width, heads=HEADS, dropout=DROPOUT):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.weight = nn.Parameter(torch.empty(3 * width, width))  # of q, k and v: one matrix for Xavier's bounds
        self.bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def split(self, *inputs):
        """q, k (and v) -> projected (B, heads, T or P, D/heads)."""
        parts = zip(inputs, self.weight.chunk(3), self.bias.chunk(3), strict=False)
        return [nnf.linear(x, w, b).unflatten(2, (self.heads, -1)).transpose(1, 2) for x, w, b in parts]

    def forward(self, q, k, v):
        q, k, v = self.split(q, k, v)
        q = q.expand(k.shape[0], -1, -1, -1)
        out = nnf.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def maps(self, q, k):
        """Attention weights (B, T, P), averaged over heads; for pictures."""
        q, k = self.split(q, k)
        return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3).mean(1)


class Layer(nn.Module):
    """Encoder layer (x = memory) and decoder layer without self-attention, post-norm. Positions enter q and k, not v.
    The sum that runs through x (B, T, D) stays float32 under --amp."""

    def __init__(self, width, ffn, **options):
        super().__init__()
        self.attention = Attention(width, **options)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(self.attention.dropout)
        for matrix in (p for p in self.parameters() if p.dim() == 2):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x, x_position, memory, memory_position):
        attended = self.attention(x + x_position, memory + memory_position, memory)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class ClassLinear(nn.Module):
    """One linear unit per class, (B, C, D) -> logits (B, C), float32 throughout: bf16 logits would tie."""

    def __init__(self, classes, width):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(classes, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def forward(self, h):
        return (h * self.weight).sum(2) + self.bias


# ---------------------------------------------------------------------------------------------------------------------
# Losses, in float32 also under --amp


def full(x):
    """Half precision -> float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def asymmetric_loss(logits, y, gamma_neg=4.0, gamma_pos=0.0):
    """Binary cross-entropy (B, C), y (B, C) in {0, 1}, weighted by (1 - p of the true answer)^gamma, through which no
    gradient flows: easy negatives fade. Sum over classes, mean over images. No shift of p (clip 0)."""
    p = logits.detach().sigmoid()
    weight = torch.where(y > 0, (1 - p) ** gamma_pos, p**gamma_neg)
    return (weight * nnf.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum(1).mean()


def sscl(z, y, tau=SSCL_TAU, official=False):
    """Sample-to-sample contrast. z (N, 2, E): projections of the N = y.sum() active labels, in the order of
    y.nonzero(), in two views (batch, bank); y (B, C) bool. Active labels of all classes are each other's contrast.

    L = 1/|I| sum_a -1/|P(a)| sum_{p in P(a)} log( exp(z_a z_p / tau) / sum_{q in A(a)} exp(z_a z_q / tau) )
    """
    image, c = y.nonzero(as_tuple=True)  # (N,) each
    if not len(c):
        return full(z).sum()  # 0, but every parameter still gets its gradient
    with torch.autocast(z.device.type, enabled=False):
        z = nnf.normalize(full(z), dim=2).transpose(0, 1).flatten(0, 1)  # (2N, E), the first view first
        c2 = c.repeat(2)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = z @ z.T / tau  # (2N, 2N)
        log_share = similarity - similarity.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
        partners = (c2[:, None] == c2) & ~itself  # P(a): at least the other view
        anchors = -(log_share * partners).sum(1) / partners.sum(1)  # (2N,)
    if official:  # D1
        row = torch.cat([image, image + len(y)]) // 2
        anchors = anchors * y[row, c2]
    return anchors.mean()


def pscl(s, y):
    """Prototype-to-sample contrast. s (B, C): cosine of each image's class projection and the class's prototype, over
    tau; y (B, C) bool. Images without the class are the negatives of its prototype; other classes play no part.

    L = 1/(sum y) sum_j [ logsumexp_i s_ij - logsumexp_{i: y_ij = 1} s_ij ]
    """
    s, known = full(s), y.any(0)
    own = torch.where(known, s.masked_fill(~y, -math.inf), 0).logsumexp(0)  # (C,)
    own = torch.where(known, own, s.detach().amax(0))  # D4
    count = y.sum()
    return (s.logsumexp(0) - own).sum() / count.clamp(min=1) * (count > 0)


# ---------------------------------------------------------------------------------------------------------------------
# The contrast set: all processes


class Gather(torch.autograd.Function):
    """The processes' rows, one after the other; process r has counts[r] of them. Every process computes the whole loss
    from them, so gradients are summed over processes, and DDP's mean is then the one-process gradient."""

    @staticmethod
    def forward(ctx, rows, counts):
        ctx.counts = counts
        padded = nnf.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


def gather(rows, counts=None):
    """Differentiable concatenation over processes; counts: rows of each process where they differ."""
    if not dist.is_initialized() or (counts and not sum(counts)):
        return rows
    return Gather.apply(rows, counts or [len(rows)] * dist.get_world_size())


def contrast(model, h, bank, y, args):
    """{"L_SSCL", "L_PSCL"}, as far as their lambda is not 0, of this process's h (B, C, D), bank (B, C, D) and y (B, C)
    bool; contrasted over all processes, in chunks of --contrast-chunk images (D2)."""
    y_all = gather(y.byte()).bool()  # (B of all, C)
    chunk = args.contrast_chunk or len(y_all)
    y_parts, z, terms = y_all.split(chunk), model.projection(h), {}  # (B, C, E)
    if args.lambda_s:
        active = y_all.sum(1).tolist()  # labels of each image
        counts, sizes = ([sum(active[i : i + n]) for i in range(0, len(active), n)] for n in (len(y), chunk))
        z_all = gather(torch.stack([z[y], model.projection(bank[y])], 1), counts)  # (N, 2, E)
        pairs = zip(z_all.split(sizes), y_parts, strict=True)
        terms["L_SSCL"] = torch.stack([sscl(*pair, official=args.sscl == "official") for pair in pairs]).mean()
    if args.lambda_p:
        with torch.autocast(z.device.type, enabled=False):
            prototypes = nnf.normalize(model.projection(model.prototypes), dim=1)  # (C, E)
            s_all = gather((nnf.normalize(full(z), dim=2) * prototypes).sum(2) / PSCL_TAU)  # (B of all, C)
        terms["L_PSCL"] = torch.stack([pscl(*pair) for pair in zip(s_all.split(chunk), y_parts, strict=True)]).mean()
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# The network


class GAP(nn.Module):
    """Baseline: global average pooling, linear. images -> logits in eval mode, (logits, None) in training."""

    class_dims = {"classifier.weight": 1, "classifier.bias": 1}

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.classifier = backbone, nn.Linear(backbone.channels[2], classes)

    def forward(self, images):
        f = full(self.backbone(images)[2])  # (B, D, H, W)
        with torch.autocast(f.device.type, enabled=False):
            logits = self.classifier(f.mean((2, 3)))
        return (logits, None) if self.training else logits

    @torch.no_grad()
    def look(self, images):
        """For pictures: probabilities (B, C), class activation maps (B, C, H, W)."""
        f = full(self.backbone(images)[2])
        maps = self.classifier(f.movedim(1, 3)).movedim(3, 1)
        return maps.mean((2, 3)).sigmoid(), maps


class SADCL(nn.Module):
    """images (B, 3, S, S) -> logits (B, C) in eval mode; (logits, h (B, C, D)) in training.

    project: a 1x1 convolution before the transformer (needed where the backbone has another width); contrastive: with
    the projection head and the prototypes of stage 2. The memory bank is no part of the network: see start_bank.
    `class_dims`: tensors whose first dimension belongs to classes, for --init-from.
    """

    class_dims = dict.fromkeys(("query", "classifier.weight", "classifier.bias", "prototypes"), 1)

    def __init__(self, backbone, classes, width, ffn, project=False, encoder_layers=1, contrastive=False, **options):
        super().__init__()
        self.backbone = backbone
        self.project = nn.Conv2d(backbone.channels[2], width, 1) if project else nn.Identity()
        self.encoder = nn.ModuleList(Layer(width, ffn, **options) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(Layer(width, ffn, **options) for _ in range(DECODER_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(classes, width))  # label embeddings
        self.classifier = ClassLinear(classes, width)
        if contrastive:  # one head for samples, bank and prototypes
            self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width // 2))
            self.prototypes = nn.Parameter(self.query.detach().clone())  # not projected: (C, D)

    def memory(self, images):
        """Encoded features (B, P, D), their position encoding (P, D) and the map's size (H, W)."""
        f = self.project(self.backbone(images)[2])  # (B, D, H, W)
        position = position_encoding(*f.shape[2:], f.shape[1], f.device)
        x = full(f.flatten(2).transpose(1, 2))  # (B, P, D)
        for layer in self.encoder:
            x = layer(x, position, x, position)
        return x, position, f.shape[2:]

    def embed(self, images):
        """Label-level representations h (B, C, D), also of classes that are absent."""
        memory, position, _ = self.memory(images)
        h = torch.zeros_like(self.query)[None]  # (1, C, D): the first layer's query is the same for all images
        for layer in self.decoder:
            h = layer(h, self.query, memory, position)
        return self.norm(h)

    def forward(self, images):
        h = self.embed(images)
        logits = self.classifier(h)
        return (logits, h) if self.training else logits

    @torch.no_grad()
    def look(self, images):
        """For pictures: probabilities (B, C) and the last decoder layer's attention (B, C, H, W), mean over heads."""
        memory, position, size = self.memory(images)
        h = torch.zeros_like(self.query)[None]
        for layer in self.decoder:
            maps = layer.attention.maps(h + self.query, memory + position)  # (B, C, P)
            h = layer(h, self.query, memory, position)
        return self.classifier(self.norm(h)).sigmoid(), maps.unflatten(2, size)


# ---------------------------------------------------------------------------------------------------------------------
# Prototypes and memory bank


@torch.no_grad()
def class_means(run, confidence):
    """Prototypes (C, D) and how many are of which kind: each class's mean h over the training images, seen as in tests,
    that have it and where p > confidence; over all that have it where there are none; else its query (D5)."""
    model, args, env = run.model.eval(), run.args, run.env
    images = data.Images(run.train_loader.images.table, args.image_size, run.stage.view, args.interpolation)
    loader = data.Loader(images, args.batch_size, workers=args.workers, rank=env.rank, world=env.world)
    sums = torch.zeros(2, *model.query.shape, device=env.device)  # over the confident and over all, (2, C, D)
    counts = torch.zeros(2, len(model.query), 1, device=env.device)
    for batch in loader.epoch():
        with run.autocast():
            h = model.embed(data.normalise(batch.images.to(env.device)))  # (B, C, D)
        y = data.targets(batch.labels, args.difficult_train).to(h)  # (B, C)
        for kind, w in enumerate((y * (model.classifier(h).sigmoid() > confidence), y)):
            sums[kind] += torch.einsum("bc,bcd->cd", w, h)
            counts[kind] += w.sum(0)[:, None]
    if env.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    means, (sure, some) = sums / counts.clamp(min=1), counts > 0
    kinds = [int(n.sum()) for n in (sure, some & ~sure, ~some)]
    return torch.where(sure, means[0], torch.where(some, means[1], model.query)), kinds


def fill_prototypes(run, trained):
    """Start the prototypes: from what stage 1 has learned, if it was `trained`."""
    if not trained:
        run.say("no stage 1 (--init-from RUN): the prototypes start as the queries")
        return
    means, kinds = class_means(run, run.args.confidence)
    with torch.no_grad():
        run.model.prototypes.copy_(means)
    run.say("prototypes: {} from confident samples, {} from all positives, {} without any".format(*kinds))


def start_bank(run):
    """The memory bank (b, C, D) of this process's b images of a step: the checkpoint's, else the prototypes. It is
    no buffer: DDP would overwrite it with the first process's, the EMA would average it, and a checkpoint's batch size
    would be for good."""
    args, env = run.args, run.env
    stored = run.state["extra"].get("bank") if run.state else None
    if stored is not None and len(stored) == args.batch_size:
        return stored.chunk(env.world)[env.rank].to(env.device, copy=True)
    if stored is not None:
        run.say(f"memory bank: of --batch-size {len(stored)}, started again from the prototypes for {args.batch_size}")
    return run.model.prototypes.detach().repeat(args.batch_size // env.world, 1, 1)


def update_bank(bank, h, logits, y):
    """Overwrite, in place, the slots (B, C, D) whose class is present (y (B, C) bool) and found with p > 0.8."""
    sure = y & (logits.detach().sigmoid() > BANK_CONFIDENCE)
    bank.copy_(torch.where(sure[..., None], h.detach(), bank))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_attention(show, path):
    """Images, each with the decoder's attention for its three most confident classes."""
    legend = "where the decoder looks for a class: blue low, red high"
    common.draw_maps(show, path, show.model.look, legend)


def principal_plane(points):
    """(n, D) -> mean (D,) and the two directions of largest variance (D, 2)."""
    mean = points.mean(0)
    return mean, torch.linalg.eigh((points - mean).T @ (points - mean)).eigenvectors[:, -2:].flip(1)


@torch.no_grad()
def draw_embeddings(run, path, count=2000, side=760):
    """The first `count` label-level embeddings of test images that have the class, in the plane of their largest
    variance, coloured by class; squares: the prototypes of stage 2. 1,000 pixels wide."""
    model, classes = run.reported.eval(), run.classes
    found, owners = [], []
    for batch in run.test_loader.epoch():
        with run.autocast():
            h = model.embed(data.normalise(batch.images.to(run.env.device)))
        y = batch.labels == 1
        found.append(h.float().cpu()[y])
        owners += y.nonzero()[:, 1].tolist()
        if len(owners) >= count:
            break
    points = torch.cat(found)[:count]  # (n, D)
    picture = Image.new("RGB", (1000, side), "white")
    if len(points) > 1:
        mean, axes = principal_plane(points)
        prototypes = model.prototypes.cpu() if hasattr(model, "prototypes") else points[:0]
        at = (torch.cat([points, prototypes]) - mean) @ axes  # (n + C, 2)
        low, high = at.amin(0), at.amax(0)
        at = ((at - low) / (high - low).clamp(min=1e-6) * (side - 40) + 20).tolist()
        colours = [
            tuple(int(255 * v) for v in colorsys.hsv_to_rgb(c / len(classes), 1, (0.85, 0.55)[c % 2]))
            for c in range(len(classes))
        ]
        draw = ImageDraw.Draw(picture)
        for (x, y), c in zip(at, owners[:count], strict=False):
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colours[c])
        for (x, y), colour in zip(at[len(points) :], colours, strict=False):
            draw.rectangle((x - 7, y - 7, x + 7, y + 7), fill=colour, outline="black", width=2)
        for c, name in enumerate(classes[: side // 18 - 1]):
            common.write_text(picture, (side + 10, 8 + 18 * c), str(name), 14, colours[c])
    common.write_text(picture, (6, side - 22), f"{len(points)} label-level embeddings; squares: prototypes", 14)
    picture.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line, training


def parse(argv=None):
    parser = common.arguments(
        "SADCL: a class-wise transformer decoder and two contrasts for multi-label classification."
    )
    add = parser.add_argument_group("SADCL").add_argument
    add("--stage", default="both", choices=("1", "2", "both"), help="1: SARL; 2: contrast, after --init-from RUN")
    add("--encoder-layers", type=common.at_least(0), default=1, metavar="N", help="0: SARL* of the ablation")
    add("--gamma-neg", type=float, help="stage 1: focus of the asymmetric loss on hard negatives")
    add("--lambda-s", type=float, help="stage 2: weight of SSCL, 0: without; clean 16, official 100")
    add("--lambda-p", type=float, help="stage 2: weight of PSCL, 0: without")
    add("--sscl", default="clean", choices=tuple(LAMBDA_S), help="which anchors SSCL counts, see D1")
    add("--contrast-chunk", type=common.at_least(0), metavar="N", help="contrast N images at a time; 0: the batch")
    add(
        "--stop-after", type=common.at_least(1), nargs="+", metavar="N", help="end of each stage in epochs of its cycle"
    )
    add("--early-stop", action="store_true", help="end stages as the authors did, by mAP on the test set")
    argv = sys.argv[1:] if argv is None else list(argv)
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--image-size")
    size = scan.parse_known_args(argv)[0].image_size  # on COCO other numbers belong to other sizes
    coco = PAPER | {str(k): v for k, v in COCO_SIZES.items()}.get(size, {})
    args = common.parse(parser, argv, RECIPE | {"coco": coco}, "sadcl")

    if args.baseline:
        wrong = [n for n in ("encoder_layers", "lambda_s", "lambda_p", "sscl", "contrast_chunk") if n in args.given]
        if wrong or (args.stage != "1" and "stage" in args.given):
            parser.error(f"--baseline has one stage and no --{(wrong or ['stage 2'])[0].replace('_', '-')}")
        args.stage = "1"
    if args.lambda_s is None:
        args.lambda_s = LAMBDA_S[args.sscl]
    for name in ("lambda_s", "lambda_p", "gamma_neg"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    if args.backbone in LIGHT:
        args.width = min(args.width, LIGHT_WIDTH)
    numbers, cycles = stages_of(args), [max(1, round(part * args.epochs)) for part in args.cycle]
    if args.stop_after is None:
        parts = (1, 1) if args.early_stop else args.stop
        args.stop_after = [max(1, round(parts[n - 1] * cycles[n - 1])) for n in numbers]
    if len(args.stop_after) != len(numbers):
        parser.error(f"--stop-after takes a number for each stage; --stage {args.stage} has {len(numbers)}")
    for n, stop in zip(numbers, args.stop_after, strict=True):
        if stop > cycles[n - 1]:
            parser.error(f"--stop-after {stop}: stage {n} has a cycle of {cycles[n - 1]} epochs")
    earlier = Path(args.init_from or ".", "stage1.pt")
    if args.stage == "2" and args.init_from and earlier.is_file():
        args.init_from = str(earlier)  # of a run of both stages: the first
    return args


def stages_of(args):
    return {"1": [1], "2": [2], "both": [1, 2]}[args.stage]


def stage_of(args, number):
    """common.Stage 1 or 2 of this command line."""
    i, cycle = number - 1, max(1, round(args.cycle[number - 1] * args.epochs))
    return common.Stage(number, args.view[i], args.pixels[i], cycle, args.stop_after[stages_of(args).index(number)])


def build(args, classes, number, weights=None):
    """The network of a stage. Pretrained weights are read unless a checkpoint or the stage before brings `weights`."""
    torch.manual_seed(data.mixed_seed(args.seed, number))  # however the stage was reached
    stored = args.checkpoint or args.resume or weights
    names = [f"to8.{i}" for i in (range(4) if args.backbone == "mobilenet_v2" else ("conv1", "bn1", "layer1"))]
    backbone = common.Backbone(
        args.backbone,
        "none" if stored else args.weights,
        last_stride=args.last_stride,
        frozen=names if args.freeze else (),
        frozen_bn=args.freeze,
    )
    if args.baseline:
        return GAP(backbone, len(classes))
    contrastive = number == 2 and bool(args.lambda_s or args.lambda_p)
    options = {"project": args.backbone in LIGHT, "encoder_layers": args.encoder_layers, "contrastive": contrastive}
    model = SADCL(backbone, len(classes), args.width, args.ffn * args.width, **options)
    if contrastive:
        model.prototypes.requires_grad_(args.lambda_p > 0)  # else they only start the bank
    if weights:
        model.load_state_dict(weights, strict=False)  # all but projection head and prototypes
    return model


def tested(run, number):
    """The log's records of a stage's tested epochs."""
    records = map(json.loads, (run.out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [r for r in records if r.get("stage") == number and "map_points" in r]


def past_best(run):
    """--early-stop: whether the better of EMA and raw model had its best epoch too long ago."""
    records = tested(run, run.stage.number) if run.env.first else []
    score = {r["epoch"]: max(r["map_points"], r.get("raw_map_points", 0)) for r in records}
    patience = max(1, round(run.args.patience * run.stage.epochs))
    # the newest epoch must have been tested: its numbers are the report's
    late = run.epoch in score and run.epoch - max(score, key=score.get) > patience
    return common.agree(late)


def main(args):
    env = common.start(args)
    path, run, record = args.resume or args.checkpoint, None, None
    begin = common.load_checkpoint(path)["stage"] if path else stages_of(args)[0]
    if args.predict or args.export:
        return common.apply(args, env, functools.partial(build, number=begin), draw_attention)
    train, test = common.load_data(args, env)
    if args.evaluate:
        run = common.Run(args, env, build(args, test.classes, begin), train, test, stage_of(args, begin))
        record = run.evaluate()
    for number in [] if args.evaluate else [n for n in stages_of(args) if n >= begin]:
        with common.first_process_first(env):  # the first one's files are there, too
            weights = None
            if run:  # stage 1 has ended: its moving average goes on, or its best one
                best = args.early_stop and common.weights_of(common.load_checkpoint(run.out / "best.pt"))
                weights = best or run.reported.state_dict()
            model = build(args, test.classes, number, weights)
        run = common.Run(args, env, model, train, test, stage_of(args, number), follows=run)
        contrastive, bank, record = hasattr(model, "prototypes"), None, None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, args.lr, BETAS, weight_decay=args.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, max(run.total_steps, 6), pct_start=0.2, div_factor=25, final_div_factor=1e4
        )  # of 5 steps torch's phases would have length 0
        run.say(f"stage {number}: " + ("baseline" if args.baseline else ("SARL", "SADCL")[number - 1]))
        fill = functools.partial(fill_prototypes, run, bool(weights or args.init_from)) if contrastive else None
        net = run.prepare(optimizer, schedule, fill)
        if contrastive and args.lambda_s:
            bank = start_bank(run)
        for epoch in run.epochs():
            if args.early_stop and past_best(run):
                break
            for images, labels in run.batches(epoch):
                y = data.targets(labels, args.difficult_train)  # (B, C) bool
                with run.autocast():
                    logits, h = net(images)  # (B, C), (B, C, D)
                    slots = None if bank is None else bank.chunk(args.accumulate)[(run.parts - 1) % args.accumulate]
                    terms = contrast(model, h, slots, y, args) if contrastive else {}
                if number == 1:
                    terms["L_ASL"] = loss = asymmetric_loss(logits, y.float(), args.gamma_neg)
                else:
                    terms["L_BCE"] = nnf.binary_cross_entropy_with_logits(logits, y.float())
                    loss = LAMBDA_BCE * terms["L_BCE"]
                    loss = loss + args.lambda_s * terms.get("L_SSCL", 0) + args.lambda_p * terms.get("L_PSCL", 0)
                run.update(loss, **terms)
                if bank is not None:
                    update_bank(slots, h, logits, y)
            if bank is not None:
                run.extra["bank"] = gather(bank).cpu()  # of the whole batch, so that the number of processes may change
            record = run.finish_epoch(epoch)
        record = record or run.test()  # resumed after the last epoch
        if number == 1 and env.first and not args.baseline:
            run.keep("stage1.pt")
    if env.first:
        (run.out / "figures").mkdir(exist_ok=True)
        draw_attention(run.show(), run.out / "figures" / "attention.png")
        if not args.baseline:
            draw_embeddings(run, run.out / "figures" / "embeddings.png")
        if not args.evaluate:
            common.draw_curves(run.out / "log.jsonl", run.out / "figures" / "curves.png")
    earlier = tested(run, 1) if env.first and args.stage == "both" and not args.evaluate else []
    run.report(record, *earlier[-1:])
    return record


if __name__ == "__main__":
    arguments = parse()
    common.launch(main, arguments)
