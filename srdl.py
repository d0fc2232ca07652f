"""SRDL: Semantic Representation and Dependency Learning for Multi-Label Image Recognition.

T. Pu, M. Sun, H. Wu, T. Chen, L. Tian, L. Lin. Neurocomputing 2023, arXiv 2204.03795.

Every class gets its own view of the feature map: a small graph network over word vectors makes one embedding per class,
which steers a channel attention and a spatial attention (CAR); the maximum of the attended map is the class's feature.
In training the most attended rectangle of the most confident classes is erased and the image is classified once more
(OE), so that each class must also be found from its context. Erasing costs nothing at inference.

    python srdl.py                                                          toy data, minutes on two CPU cores
    python srdl.py --data coco --gpus 0,1 --sync-bn                         the paper's recipe, on two GPUs
    python srdl.py --evaluate --checkpoint runs/srdl/toy/<time>/last.pt     test a trained model

Letters: B images, C classes, D channels, H W map size, P = H*W positions, K erased classes.

| paper | here |
|---|---|
| Eq. 1, feature map | SRDL.features: common.Backbone's F32 |
| Eq. 3, graph | ClassGraph |
| Eq. 4, 5, channel and spatial attention | CAR.attend, tanh_score |
| Eq. 6 and its global max pooling | class_features |
| Eq. 2, classifier | ClassLinear |
| Eq. 7 to 10, object erasing | longest_peak_run, erased_rectangle, erased_logits |
| Eq. 11 to 13, loss | main: L_ori + L_era |
| Eq. 14 to 16, metrics | eval.precision_recall_f1 |
| Table 6, rows SD and SAM | SD, SAM |

Differences from the paper. D: it prints something else; "unstated": it is silent, and this is what we chose.
D1  Eqs. 11, 12 lack the minus sign and sum over images and classes; we take the mean binary cross-entropy. The scale
    matters, because Adam's weight decay is L2.
D2  f_s is printed as 2048 -> 2048; an attention per position needs one number: 2048 -> 1.
D3  The graph G = {V, A} has A for its nodes and V for its adjacency; here they are `nodes` and `adjacency`.
D4  "randomly initialised" adjacency: U(0, 1) makes all class embeddings equal (cosine 1.000), so nothing could be
    class-specific. Here V = I + U(-1/C, 1/C), and Vhat = D^-1/2 V D^-1/2 with D the row sums of |V|.
unstated: two graph layers; LeakyReLU slope 0.2; W^l ~ U(+-1/sqrt(300)); no bias in f_ca, f_sa, f_w, biases in f_c, f_s;
    f_w shared by Eqs. 4 and 5; a linear unit for each class in Eq. 2; without CA or SA (Table 6) Eq. 6 has no 0.5;
    features stay at 14x14 (FEATURE_POOL); layer4 and the head are trained, the rest is frozen with its BatchNorm in
    eval mode (--train-backbone), as in the group's other code; VOC's difficult objects are negatives; ImageNet V1
    weights; GloVe 6B, the mean of a name's words; bicubic resizing; a flat marginal erases nothing; of equally wide
    runs the first; means over classes leave out those without positives.
Training crops are cut in whole source pixels and resized once, where the paper resizes twice: interpolation detail.
The toy recipe (toy data, ResNet-18 from scratch, one-cycle learning rate) is ours.
"""

import torch
from torch import nn
from torch.nn import functional as nnf

import common
import data
from common import UserError

PAPER = {
    "backbone": "resnet101",  # Sec. 4.2, from here on
    "weights": "v1",  # unstated: its version
    "image_size": 448,
    "batch_size": 16,
    "epochs": 20,
    "lr": 1e-5,
    "weight_decay": 5e-4,
    "schedule": "step",  # x 0.1 every 10 of 20 epochs
    "view": "square-crop",  # 512, crop a side of {512, 448, 384, 320, 256}, resize to 448
    "interpolation": "bicubic",  # unstated: the kind
    "top_k": 3,  # Fig. 6
    "alpha": 0.5,  # Fig. 6
    "glove": "6B",
    "train_backbone": "layer4",  # unstated: what is trained
    "difficult_train": "negative",  # unstated: what difficult objects are
    "difficult_test": "negative",  # unstated: likewise
    "last_stride": 2,
}
RECIPE = {
    "coco": PAPER,
    "voc2007": PAPER,
    # ResNet-18 from scratch with 6x6 cells
    "toy": PAPER
    | {"backbone": "resnet18", "weights": "none", "image_size": 96, "batch_size": 32, "epochs": 2, "lr": 2e-3}
    | {"schedule": "one-cycle", "view": "resize", "glove": "hash", "train_backbone": "all", "last_stride": 1},
}
BETAS = (0.9, 0.999)  # Sec. 4.2
FEATURE_POOL = 1  # unstated: 2 would average layer4's 14x14 map to 7x7, as other code of the group does
WORD_WIDTH = 300  # d' of Eq. 3
SD_WIDTH = 1024  # SSGRL's and ADD-GCN's intermediate width (rows SD and SAM of Table 6)
# Numbers of a (B, c, P, D) product held at once; changes memory and speed, not values. A CPU likes what fits its
# caches, a GPU few launches.
HELD = {"cpu": 2**21, "cuda": 2**25}


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 3: class embeddings from a graph over word vectors


class ClassGraph(nn.Module):
    """Word vectors (C, 300) -> class embeddings x (C, 300) by A^{l+1} = LeakyReLU(Vhat A^l W^l), two layers (Eq. 3)."""

    def __init__(self, classes, width=WORD_WIDTH, layers=2):
        super().__init__()
        noise = torch.empty(classes, classes).uniform_(-1 / classes, 1 / classes)
        self.adjacency = nn.Parameter(torch.eye(classes) + noise)  # D3, D4
        bound = width**-0.5
        self.weights = nn.ParameterList(torch.empty(width, width).uniform_(-bound, bound) for _ in range(layers))

    def forward(self, nodes):
        degree = self.adjacency.abs().sum(1).rsqrt()  # (C,)
        v_hat = degree[:, None] * self.adjacency * degree[None, :]  # (C, C)
        for weight in self.weights:
            nodes = nnf.leaky_relu(v_hat @ nodes @ weight, 0.2)  # (C, 300)
        return nodes


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. 5 and 6 have one number per image, class, position and channel: (B, C, P, D), 1.9 GiB per temporary on COCO. Only
# sums over D and maxima over P are kept of it, so it is computed for a few classes at a time and never stored.


# Whether --export is at work, which leaves the batch's size open. (torch 2.6 has no such function, and no --export.)
exporting = getattr(torch.compiler, "is_exporting", bool)


def class_chunks(f, *tensors):
    """Yield a few classes' parts of each tensor (classes: its last dimension but one), and first a buffer (B, c, P, D)
    to compute in. It is one piece of memory: on a CPU, fresh temporaries of this size cost more than the arithmetic."""
    chunk = 1 if exporting() else min(max(1, HELD[f.device.type] // f.numel()), tensors[0].shape[-2])
    buffer = f.new_empty(f.shape[0], chunk, *f.shape[1:])
    for parts in zip(*(t.split(chunk, -2) for t in tensors), strict=True):
        yield buffer[:, : parts[0].shape[-2]], *parts


class TanhScore(torch.autograd.Function):
    """score[b, c, p] = sum_d v_d tanh(u[b, p, d] w[c, d]), recomputed in the backward pass; see tanh_score."""

    @staticmethod
    def forward(ctx, u, w, v):
        ctx.save_for_backward(u, w, v)
        score = u.new_empty(u.shape[0], w.shape[0], u.shape[1])
        for t, w_c, score_c in class_chunks(u, w, score):
            score_c.copy_(torch.mul(u[:, None], w_c[:, None], out=t).tanh_() @ v)
        return score

    @staticmethod
    def backward(ctx, grad):
        u, w, v = ctx.saved_tensors
        du, dw, dv, t = torch.zeros_like(u), torch.zeros_like(w), torch.zeros_like(v), torch.empty_like(u)
        for c, w_c in enumerate(w):
            torch.mul(u, w_c, out=t).tanh_()  # (B, P, D)
            dv += grad[:, c].flatten() @ t.flatten(0, 1)
            slope = t.square_().neg_().add_(1).mul_(grad[:, c, :, None])  # (1 - tanh^2) dL/dscore; v follows below
            du.addcmul_(slope, w_c)
            dw[c] = slope.mul_(u).sum((0, 1))
        return du * v, dw * v, dv


def tanh_score(u, w, v):
    """u (B, P, D), w (C, D), v (D,) -> sum_d v_d tanh(u_pd w_cd) (B, C, P), without holding (B, C, P, D)."""
    with torch.autocast(u.device.type, enabled=False):
        return TanhScore.apply(u, w, v)


def class_features(f, sa, ca):
    """F (B, P, D), SA (B, C, P), CA (B, C, D) -> max_p F_p (SA_cp + CA_c) (B, C, D): Eq. 6 and GMP, but for the 0.5.

    SA depends on the position and CA on the channel, so the maximum does not factor; but its place needs no gradient.
    It is found first, and F and SA are then read there with gradient. Ties go to the first position (as `.max(dim)`;
    `.amax` would split the gradient); give float32, bf16 ties often.
    """
    wanted = f.requires_grad or sa.requires_grad or ca.requires_grad
    best = torch.empty(ca.shape, dtype=torch.long if wanted else f.dtype, device=f.device)  # (B, C, D)
    with torch.no_grad():
        for maps, sa_c, ca_c, best_c in class_chunks(f, sa, ca, best):
            torch.add(sa_c[..., None], ca_c[:, :, None], out=maps).mul_(f[:, None])  # (B, c, P, D)
            best_c.copy_(maps.max(2).indices if wanted else maps.amax(2))  # without the place: four times as fast
    return f.gather(1, best) * (sa.gather(2, best) + ca) if wanted else best


class ClassLinear(nn.Module):
    """Eq. 2: one linear unit per class, (B, C, D) -> logits (B, C); with `classes` (B, K) for those rows only."""

    def __init__(self, classes, width):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(classes, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def forward(self, features, classes=None):
        if classes is None:
            return (features * self.weight).sum(-1) + self.bias
        weight = nnf.embedding(classes, self.weight)  # (B, K, D); weight[classes] adds gradients in random order
        return (features * weight).sum(-1) + self.bias.expand(len(classes), -1).gather(1, classes)


class CAR(nn.Module):
    """Category-specific attentional regions: F (B, P, D) -> SA (B, C, P), CA (B, C, D) and logits (Sec. 3.2)."""

    def __init__(self, width, nodes, gcn=True, channel_attention=True, spatial_attention=True):
        super().__init__()
        classes = len(nodes)
        self.register_buffer("nodes", nodes)  # word vectors (C, 300)
        self.graph = ClassGraph(classes) if gcn else None
        self.f_w = nn.Linear(WORD_WIDTH, width, bias=False)
        self.f_ca = nn.Linear(width, width, bias=False) if channel_attention else None
        self.f_c = nn.Linear(width, width) if channel_attention else None
        self.f_sa = nn.Linear(width, width, bias=False) if spatial_attention else None
        self.f_s = nn.Linear(width, 1) if spatial_attention else None  # Eq. 5, D2
        self.classifier = ClassLinear(classes, width)
        self.scale = 0.5 if channel_attention and spatial_attention else 1.0  # Eq. 6's, without a partner dropped
        self.kept, self.kept_for = None, None

    def train(self, mode=True):
        self.kept_for = None  # fused optimizers change parameters without counting it in their _version
        return super().train(mode)

    def class_weights(self):
        """w = f_w(x_c) (C, D). It does not depend on the image: inference keeps it until train(), eval() or an in-place
        change of a parameter."""
        if torch.is_grad_enabled() or exporting():
            return self.embed()
        sources = [self.nodes, self.f_w.weight, *(self.graph.parameters() if self.graph else ())]
        versions = [(t.data_ptr(), t._version) for t in sources]
        if self.kept_for != versions:
            self.kept, self.kept_for = self.embed(), versions
        return self.kept

    def embed(self):
        with torch.autocast(self.nodes.device.type, enabled=False):
            return self.f_w(self.graph(self.nodes) if self.graph else self.nodes)  # (C, D)

    def attend(self, f):
        """F (B, P, D) -> SA (B, C, P) (Eq. 5) and CA (B, C, D) (Eq. 4); zeros where the attention is switched off."""
        w = self.class_weights()  # (C, D)
        (b, p, d), c = f.shape, len(w)
        sa, ca = f.new_zeros(b, c, p), f.new_zeros(b, c, d)
        if self.f_sa:
            score = tanh_score(self.f_sa(f).to(w), w, self.f_s.weight[0])  # (B, C, P)
            sa = (score + self.f_s.bias).sigmoid()
        if self.f_ca:
            pooled = self.f_ca(f.max(1).values).to(w)  # (B, D)
            ca = self.f_c((pooled[:, None] * w).tanh()).to(w).sigmoid()  # (B, C, D)
        return sa, ca

    def classify(self, f, sa, ca, classes=None):
        """Logits (B, C), or (B, K) of the given classes (B, K)."""
        return self.classifier(self.scale * class_features(f, sa, ca), classes)


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. 7 to 10: object erasing


def longest_peak_run(marginal, alpha):
    """Marginal (..., L) -> bool (..., L): the run of positions >= alpha to erase (Eqs. 9, 10), after min-max scaling.

    Runs that contain the global maximum compete; the widest wins, then the first. A flat marginal has none.
    """
    low, high = marginal.amin(-1, keepdim=True), marginal.amax(-1, keepdim=True)
    span = high - low
    hot = ((marginal - low) / torch.where(span > 0, span, 1) >= alpha) & (span > 0)
    begins = hot & ~nnf.pad(hot, (1, 0))[..., :-1]
    run = begins.long().cumsum(-1) * hot  # 1, 2, ... inside runs, 0 between them
    shape = (*run.shape[:-1], run.shape[-1] + 1)
    width = torch.zeros(shape, dtype=torch.long, device=run.device).scatter_add_(-1, run, torch.ones_like(run))
    peaks = torch.zeros_like(width).scatter_reduce_(-1, run, (marginal == high).long(), "amax")
    score = width * peaks
    score[..., 0] = -1  # the space between runs
    return hot & (run == score.argmax(-1, keepdim=True))


def erased_rectangle(sa, alpha):
    """SA (..., H, W) -> bool (..., H, W), True inside the rectangle to erase; empty where SA is flat along an axis."""
    x = longest_peak_run(sa.amax(-2), alpha)  # Eq. 7: over columns
    y = longest_peak_run(sa.amax(-1), alpha)  # Eq. 8: over rows
    return y[..., :, None] & x[..., None, :]


def erased_logits(head, f, sa, ca, logits, size, top_k, alpha):
    """Logits (B, C) with those of the K most confident classes replaced by what is left after erasing (Sec. 3.3).

    The classes are the most confident by prediction, not by label. SA is set to 0 inside the rectangle and CA is kept
    (text and Fig. 4), so erasing is soft: the channel attention still sees what the spatial attention lost.
    """
    if top_k > logits.shape[1]:
        raise ValueError(f"top_k {top_k} is more than the {logits.shape[1]} classes")
    top = logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]  # (B, K)
    sa, ca = (x.gather(1, top[..., None].expand(-1, -1, x.shape[2])) for x in (sa, ca))  # (B, K, P), (B, K, D)
    gone = erased_rectangle(sa.detach().unflatten(2, size), alpha).flatten(2)  # (B, K, P)
    return logits.scatter(1, top, head.classify(f, sa.masked_fill(gone, 0), ca, top))


# ---------------------------------------------------------------------------------------------------------------------
# The other rows of Table 6


class GAP(nn.Module):
    """Baseline: global average pooling, linear."""

    def __init__(self, width, classes):
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, f):
        with torch.autocast(f.device.type, enabled=False):  # bf16 logits would tie
            return self.classifier(f.mean(1))

    def maps(self, f):
        """Class activation maps (B, C, P)."""
        return self.classifier(f).to(f).transpose(1, 2)


class SD(nn.Module):
    """SSGRL's semantic decoupling: per class a softmax over positions, scored against the raw word vector."""

    def __init__(self, width, nodes):
        super().__init__()
        self.register_buffer("nodes", nodes)
        self.fc1 = nn.Linear(width, SD_WIDTH, bias=False)
        self.fc2 = nn.Linear(WORD_WIDTH, SD_WIDTH, bias=False)
        self.fc3 = nn.Linear(SD_WIDTH, SD_WIDTH, bias=False)  # its bias and fc_a's would cancel in the softmax
        self.fc_a = nn.Linear(SD_WIDTH, 1, bias=False)
        self.classifier = ClassLinear(len(nodes), width)

    def maps(self, f):
        v = (self.fc_a.weight @ self.fc3.weight)[0]  # the last two layers are one linear map of the tanh
        return tanh_score(self.fc1(f).to(f), self.fc2(self.nodes).to(f), v.to(f)).softmax(2)  # (B, C, P)

    def forward(self, f):
        return self.classifier((self.maps(f) @ f).to(f))  # (B, C)


class SAM(nn.Module):
    """ADD-GCN's semantic attention: a sigmoid mask per class, masked sums of transformed features."""

    def __init__(self, width, classes):
        super().__init__()
        self.mask = nn.Linear(width, classes)
        self.transform = nn.Linear(width, SD_WIDTH)
        self.classifier = ClassLinear(classes, SD_WIDTH)

    def maps(self, f):
        return self.mask(f).to(f).sigmoid().transpose(1, 2)  # (B, C, P)

    def forward(self, f):
        return self.classifier((self.maps(f) @ self.transform(f)).to(f))


# ---------------------------------------------------------------------------------------------------------------------
# The network


class SRDL(nn.Module):
    """images (B, 3, S, S) -> logits (B, C) in eval mode; (logits, erased logits or None) in training.

    head: "car", "gap", "sd" or "sam"; nodes: word vectors (C, 300); top_k 0: no erasing. `class_dims`: tensors whose
    first dimension, or first two, belong to classes, for --init-from.
    """

    class_dims = {
        "head.graph.adjacency": 2,
        "head.nodes": 1,
        "head.classifier.weight": 1,
        "head.classifier.bias": 1,
        "head.mask.weight": 1,
        "head.mask.bias": 1,
    }

    def __init__(self, backbone, nodes, head="car", top_k=3, alpha=0.5, **car_options):
        super().__init__()
        self.backbone, width = backbone, backbone.channels[2]
        self.top_k, self.alpha = top_k, alpha
        if head == "car":
            self.head = CAR(width, nodes, **car_options)
        elif head == "sd":
            self.head = SD(width, nodes)
        else:
            self.head = {"gap": GAP, "sam": SAM}[head](width, len(nodes))

    def features(self, images):
        """Eq. 1: F (B, P, D) and the map's size (H, W)."""
        f = self.backbone(images)[2]  # (B, D, H, W)
        if FEATURE_POOL > 1:
            f = nnf.avg_pool2d(f, FEATURE_POOL)
        # Linear layers follow --amp; sums over D, maxima and logits are float32 from here on, so that they do not tie.
        return f.flatten(2).transpose(1, 2).float(), f.shape[2:]

    def forward(self, images):
        f, size = self.features(images)
        if not isinstance(self.head, CAR):
            logits, erased = self.head(f), None
        else:
            sa, ca = self.head.attend(f)
            logits, erased = self.head.classify(f, sa, ca), None
            if self.training and self.top_k:
                erased = erased_logits(self.head, f, sa, ca, logits, size, self.top_k, self.alpha)
        return (logits, erased) if self.training else logits

    @torch.no_grad()
    def look(self, images):
        """For pictures: probabilities (B, C), maps (B, C, H, W), erased rectangles (B, C, H, W) or None."""
        f, size = self.features(images)
        if isinstance(self.head, CAR):
            sa, ca = self.head.attend(f)
            logits, maps = self.head.classify(f, sa, ca), sa.unflatten(2, size)
        else:
            logits, maps = self.head(f), self.head.maps(f).unflatten(2, size)
        return logits.sigmoid(), maps, erased_rectangle(maps, self.alpha) if self.top_k else None


# ---------------------------------------------------------------------------------------------------------------------
# Picture (Fig. 5)


def draw_attention(show, path):
    """Images, each with the map of its three most confident classes and, where objects are erased in training, the
    rectangle."""
    if show.args.no_spatial_attention:
        common.draw_labels(show, path)
    else:
        legend = "map: blue low, red high" + "; white: the rectangle that training erases" * bool(show.model.top_k)
        common.draw_maps(show, path, show.model.look, legend)


# ---------------------------------------------------------------------------------------------------------------------
# Command line, training


def parse(argv=None):
    parser = common.arguments("SRDL: attention per category and object erasing for multi-label classification.")
    add = parser.add_argument_group("SRDL").add_argument
    add("--head", default="car", choices=("car", "gap", "sd", "sam"), help="Table 6: ours, baseline, SD, SAM")
    add("--no-erase", action="store_true", help="Table 5 line 2: CAR without object erasing")
    add("--no-gcn", action="store_true", help="Table 6: class embeddings are the word vectors themselves")
    add("--no-channel-attention", action="store_true", help="Table 6: w/o CA")
    add("--no-spatial-attention", action="store_true", help="Table 6: w/o SA; nothing is left to erase")
    add("--top-k", type=common.at_least(1), metavar="K", help="Fig. 6: erase the K most confident classes")
    add("--alpha", type=float, help="Fig. 6: erase where the scaled marginal is at least this")
    add("--glove", metavar="FILE", help="word vectors: glove text file or .npz; 6B: downloaded once; hash: stand-in")
    add("--train-backbone", choices=("layer4", "all"), help="train the last stage, or everything")
    add("--schedule", choices=("step", "one-cycle"), help="learning rate: x0.1 at half the run, or one cycle")
    args = common.parse(parser, argv, RECIPE, "srdl")

    if args.baseline and "head" in args.given and args.head != "gap":
        parser.error(f"--baseline is --head gap; --head {args.head} contradicts it")
    args.head = "gap" if args.baseline else args.head
    inner = [n for n in ("no_gcn", "no_channel_attention", "no_spatial_attention") if getattr(args, n)]
    if args.head != "car" and inner:
        parser.error(f"--{inner[0].replace('_', '-')} is a part of CAR; --head {args.head} has none")
    if args.no_channel_attention and args.no_spatial_attention:
        parser.error("--no-channel-attention and --no-spatial-attention leave no attention; use --baseline")
    args.no_erase = args.no_erase or args.head != "car" or args.no_spatial_attention
    erasing = [f"--{n.replace('_', '-')}" for n in ("top_k", "alpha") if n in args.given]
    if args.no_erase and erasing:
        parser.error(f"{erasing[0]} has no effect: nothing is erased with this head or these switches")
    if not 0 < args.alpha < 1:
        parser.error(f"--alpha {args.alpha}: expected a number in (0, 1)")
    return args


def build(args, classes):
    """The network of the command line. Pretrained weights and word vectors are read unless a checkpoint brings them."""
    stored = args.checkpoint or args.resume
    backbone = common.Backbone(
        args.backbone,
        "none" if stored else args.weights,
        last_stride=args.last_stride,
        frozen=() if args.train_backbone == "all" else ("to8", "to16"),
    )
    nodes = torch.zeros(len(classes), WORD_WIDTH)
    if args.head in ("car", "sd") and not stored:
        nodes = torch.from_numpy(data.word_vectors(classes, args.glove))
    if not args.no_erase and not stored and args.top_k > len(classes):
        raise UserError(f"--top-k {args.top_k} is more than the {len(classes)} classes of {args.data}")
    options = {}
    if args.head == "car":
        options = {"gcn": not args.no_gcn, "channel_attention": not args.no_channel_attention}
        options["spatial_attention"] = not args.no_spatial_attention
    return SRDL(backbone, nodes, args.head, 0 if args.no_erase else args.top_k, args.alpha, **options)


def main(args):
    env = common.start(args)
    if args.predict or args.export:
        return common.apply(args, env, build, draw_attention)
    train, test = common.load_data(args, env)
    with common.first_process_first(env):
        model = build(args, test.classes)
    run = common.Run(args, env, model, train, test)
    if args.evaluate:
        record = run.evaluate()
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        # Adam's own weight decay is L2, not AdamW's
        optimizer = torch.optim.Adam(trained, args.lr, BETAS, weight_decay=args.weight_decay, fused=True)
        if args.schedule == "step":
            drop = (run.total_steps + 1) // 2  # after 10 of 20 epochs
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step // max(drop, 1)))
            run.say(f"learning rate x0.1 after step {drop}")
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, args.lr, max(run.total_steps, 1), cycle_momentum=False
            )
        net = run.prepare(optimizer, schedule)
        record = None
        for epoch in run.epochs():
            for images, labels in run.batches(epoch):
                y = data.targets(labels, args.difficult_train).float()  # (B, C)
                with run.autocast():
                    logits, erased = net(images)  # (B, C) each
                terms = {"L_ori": nnf.binary_cross_entropy_with_logits(logits, y)}  # Eq. 11, D1
                if erased is not None:
                    terms["L_era"] = nnf.binary_cross_entropy_with_logits(erased, y)  # Eq. 12, D1; over all classes
                run.update(sum(terms.values()), **terms)  # Eq. 13
            record = run.finish_epoch(epoch)
        record = record or run.test()  # resumed after the last epoch
    if env.first:
        (run.out / "figures").mkdir(exist_ok=True)
        if not args.no_spatial_attention:
            draw_attention(run.show(), run.out / "figures" / "attention.png")
        if not args.evaluate:
            common.draw_curves(run.out / "log.jsonl", run.out / "figures" / "curves.png")
    run.report(record)
    return record


if __name__ == "__main__":
    arguments = parse()
    common.launch(main, arguments)
