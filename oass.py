"""OASS: Object-Aware Self-Supervised Multi-Label Learning.

K. Xu, L. Liu, Z. Zhao, Z. Zeng, B. Veeravalli. ICASSP 2022.

The image is cut into four patches at a keypoint that lies on an object: the peak of the class activation maps (CAM).
The patches are seen alone by a moving average of the encoder, their maps are tiled together, and the tiled CAM must
look like the CAM of the whole image and must classify it (OASS). PuzzleCAM does so with the image's centre and shared
weights. A second head (CSI) classifies the features once more, for each class where its CAM is. At inference nothing of
this costs anything but CSI's two small layers.

    python oass.py                                                          toy data, minutes on two CPU cores
    python oass.py --data voc2012 --gpus 0,1 --train-list train_aug.txt --val-list seg_val.txt   the paper's recipe
    python oass.py --keypoint center --shared-teacher                       PuzzleCAM; theirs with --recipe puzzlecam
    python oass.py --evaluate --checkpoint runs/oass/toy/<time>/last.pt     test a trained model

Letters: B images, C classes, D channels, h w map size, H W = 16 (h, w) the image's, n pairs of an image and a keypoint,
k local maxima. A cell (y, x) of the map is the point 16 (y, x) of the image; patches meet there.

| paper | here |
|---|---|
| CAM, s = 16 | OASS.cam; common.Backbone with last_stride 1 |
| Eq. 1, Max | first_peak of the maximum over all classes |
| cMax, cTopk, cTopk-w, gt-bbox | first_peak, top_k_centre, box_centre |
| four patches; tiling | patches_of, tiled |
| EMA teacher | update_teacher |
| L_cls, L_p-cls, L_re | main, puzzle_losses, ramp |
| CSI (Sec. 2.2) | CSI |
| Table 3 | --keypoint gt-bbox, max, cmax, ctopk, ctopk-w; each with --csi |

Differences from the paper. D: it prints something else; "unstated": it is silent, and this is what we chose.
D1  cTopk-w: an extra 1/k stands before weights that already sum to one; it would pull every keypoint towards (0, 0).
D2  The loss of the channel-wise strategies divides by the size of a set of truth values, at most 2; we divide by the
    number of present classes, at least 1.
D3  Sec. 2.1 says that L_p-cls makes the encoder better. But its patches are seen by the teacher, which has no gradient,
    so L_p-cls trains the head g alone and L_re the student's f and g. --shared-teacher lets both branches learn.
D4  Table 1's images are the segmentation split's (10,582 / 1,449): --train-list, --val-list. Without them it is Main's.
D5  Ramp and EMA horizon scale with --epochs. The teacher's horizon of 1,000 steps is at most a fifth of a short run.
D6  L_re is printed as ||A^s - A^re||_1 of features. As in PuzzleCAM, whose terms the paper says it preserves, it is a
    mean over the CAMs, and maps of absent classes have no part in it.
unstated: Max's total, L_cls + a_p L_p-cls + a_re L_re; a local maximum equals the maximum of its 3x3 neighbourhood and
    is > 0; k = 3; fewer than k: those there are; a class without one takes its largest cell; of equal cells the first
    counts; half cells round to even; cells are clamped to [1, h-1], so that no patch is empty; several boxes of a
    class: the mean of their centres, no visible box: the image's centre; patches are resized bilinearly without
    antialiasing; the teacher's decay min(1 - 1/(step + 1), 0.999), in eval mode, with its BatchNorm statistics averaged
    too, and the head g live; CSI's mask is the CAM without its negative part, divided by its maximum, detached; the
    loss with CSI is L_cls + L_csi, its scores are CSI's; difficult objects are positives; the longer side is resized,
    and placed anywhere on the canvas, in tests in its corner and only shrunk; 100 epochs, batch 32, lr 1e-4 and 1e-3
    for new layers, poly 0.9, weight decay 1e-4 but for biases and BatchNorm.
At equal a_re a class's share of L_re is about C / n_pos times larger in the channel-wise strategies than in Max: one
is a mean over all C maps, the other over the present ones. Kept, for the paper has one a_re.
PuzzleCAM with its own recipe: a_p 1 without ramp, a_re to 4 over half the run, SGD with effectively no momentum (its
weight decay stands in the momentum's place), all weights decayed, biases not but at twice the rate, 15 epochs.
The toy recipe (toy data, ResNet-18 from scratch, one-cycle learning rate, ramp over half the run) is ours.
"""

import argparse
import contextlib
import copy
import sys

import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as nnf
from torch.optim.swa_utils import get_ema_multi_avg_fn

import common
import data
from common import UserError

PAPER = {
    "backbone": "resnet50",  # Sec. 3.1, from here on
    "weights": "v1",  # unstated: its version
    "image_size": 512,
    "view": "canvas",  # longer side 320 to 640, flipped, placed on a zero-padded canvas
    "interpolation": "bicubic",  # unstated: the kind
    "optimizer": "adam",
    "alpha_p": 1 / 15,
    "alpha_re": 1 / 15,
    "ramp": 100 / 100,  # part of the run; at most 100 epochs
    "ramp_p": True,
    "epochs": 100,  # unstated, from here on
    "batch_size": 32,
    "lr": 1e-4,
    "new_lr": 10,  # times lr: of all layers but the backbone
    "weight_decay": 1e-4,
    "schedule": "poly",
    "top_k": 3,
    "keypoint": "max",  # Table 1's best
    "shared_teacher": False,
    "teacher_chunk": 32,  # pairs: 128 patches of 256x256. Memory, not values
    "difficult_train": "positive",
    "difficult_test": "positive",
}
# Their released run, see the header
PUZZLECAM = {"optimizer": "sgd", "lr": 0.1, "epochs": 15, "alpha_p": 1.0, "ramp_p": False, "alpha_re": 4.0, "ramp": 0.5}
PUZZLECAM |= {"keypoint": "center", "shared_teacher": True, "batch_size": 32, "weight_decay": 1e-4, "new_lr": 10}
PUZZLECAM |= {"schedule": "poly"}
RECIPE = {
    "voc2012": PAPER,
    "voc2007": PAPER,
    "coco": PAPER,
    # ResNet-18 from scratch with 6x6 cells
    "toy": PAPER
    | {"backbone": "resnet18", "weights": "none", "image_size": 96, "batch_size": 32, "epochs": 2, "lr": 2e-3}
    | {"new_lr": 1, "schedule": "one-cycle", "view": "resize", "ramp": 0.5},
}
BETAS = (0.9, 0.999)
SGD_MOMENTUM = 1e-4  # PuzzleCAM's; 0.9 would need a tenth of the learning rate
POLY = 0.9
TEACHER_DECAY = 0.999
STRIDE = 16
STRATEGIES = ("none", "center", "max", "cmax", "ctopk", "ctopk-w", "gt-bbox")
PER_IMAGE = ("center", "max")  # the others have a keypoint for every present class


# ---------------------------------------------------------------------------------------------------------------------
# Keypoints (Sec. 2.1). Maps are float32 and detached; nothing is read back from the device but the number of pairs.


def first_peak(maps):
    """Maps (n, h, w) -> linear index (n,) of the largest cell; of equal ones the first."""
    return maps.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, 0]


def local_maxima(maps):
    """Maps (n, h, w) -> bool (n, h, w): cells > 0 that equal the maximum of their 3x3 neighbourhood."""
    return (maps > 0) & (maps == nnf.max_pool2d(maps[:, None], 3, 1, 1)[:, 0])


def top_k_centre(maps, k, weighted):
    """Maps (n, h, w) -> cells (n, 2): rounded mean of the k highest local maxima, or of those there are; `weighted` by
    their value (D1). Without any (no cell > 0): the largest cell."""
    value, place = maps.flatten(1).where(local_maxima(maps).flatten(1), 0).sort(dim=1, descending=True, stable=True)
    value, place = value[:, :k].double(), place[:, :k]  # (n, k); 0: no maximum. In float64 halves are exact
    none = value[:, :1] == 0
    weight = torch.where(none, 1, value if weighted else (value > 0).double())[..., None]  # (n, k, 1)
    cells = cells_of(torch.where(none, first_peak(maps)[:, None], place), maps.shape[2])  # (n, k, 2)
    return ((weight * cells).sum(1) / weight.sum(1)).round().long()


def cells_of(place, width):
    """Linear index (...) -> (y, x) (..., 2)."""
    return torch.stack([place // width, place % width], -1)


def box_centre(boxes, image, cls, classes, size):
    """Boxes (M, 6) of data.box_rows -> cells (n, 2) nearest to the mean centre of the boxes of class cls (n,) in image
    (n,); without a visible box the centre of the map of `size` (h, w)."""
    boxes = boxes.double()
    key = boxes[:, 0].long() * classes + boxes[:, 1].long()  # (M,)
    centres = torch.stack([boxes[:, 3] + boxes[:, 5], boxes[:, 2] + boxes[:, 4], torch.full_like(boxes[:, 0], 2)], 1)
    own = key == (image * classes + cls)[:, None]  # (n, M)
    y, x, count = (own.double() @ centres / 2).unbind(1)  # (n,)
    h, w = size
    y, x = (torch.where(count > 0, s / count.clamp(min=1) / STRIDE, n / 2) for s, n in ((y, h), (x, w)))
    return torch.stack([y, x], 1).round().long()


def keypoints(cam, y, strategy, top_k=3, boxes=None):
    """CAM (B, C, h, w), labels y (B, C) bool -> image (n,), class (n,) or None, cells (n, 2), where the patches meet.

    One for each image, or for each present class; then a batch without any has one pair, whose class is absent.
    """
    cam = cam.detach()
    b, c, h, w = cam.shape
    image, cls = torch.arange(b, device=cam.device), None
    if strategy == "center":
        cells = middle_of(cam, b)
    elif strategy == "max":
        cells = cells_of(first_peak(cam.amax(1)), w)  # Eq. 1: over all classes, present or not
    else:
        image, cls = y.nonzero().T  # (n,)
        if not len(image):
            image, cls = torch.zeros(2, 1, dtype=torch.long, device=cam.device)
        if strategy == "gt-bbox":
            cells = box_centre(boxes, image, cls, c, (h, w))
        elif strategy == "cmax":
            cells = cells_of(first_peak(cam[image, cls]), w)
        else:
            cells = top_k_centre(cam[image, cls], top_k, strategy == "ctopk-w")
    y, x = cells.unbind(1)
    return image, cls, torch.stack([y.clamp(1, h - 1), x.clamp(1, w - 1)], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Patches and tiling (Sec. 2.1). The patches have another size for every keypoint, but resized to (H/2, W/2) they are
# the quarters of an image whose two parts along each axis were stretched to half of it. Tiling is the way back. Both
# are products with one small matrix for each axis, on the device where the keypoints are.


def axis_weights(length, cut, onto):
    """Cuts (n,), onto (n,) -> (n, L, L) float64: resizes [0, cut) of an axis to [0, onto) and [cut, L) to [onto, L),
    bilinearly, without antialiasing, align_corners False; no part reads across the cut. cut = onto: the identity."""
    at = torch.arange(length, device=cut.device)
    second = at >= onto[:, None]  # (n, L)
    begin, size = second * cut[:, None], torch.where(second, length - cut[:, None], cut[:, None])
    new_begin, new_size = second * onto[:, None], torch.where(second, length - onto[:, None], onto[:, None])
    source = ((at - new_begin + 0.5).double() * size / new_size - 0.5).clamp(min=0)
    low = source.long()
    high, share = torch.minimum(low + 1, size - 1), source - low
    weights = torch.zeros(len(cut), length, length, dtype=torch.double, device=cut.device)
    index = torch.stack([begin + low, begin + high], 2)  # (n, L, 2)
    return weights.scatter_add_(2, index, torch.stack([1 - share, share], 2))


def stretch(x, cut, onto):
    """x (n, K, H, W), its parts at cut (n, 2) resized to meet at onto (n, 2). In x's precision, also under autocast."""
    rows, columns = (axis_weights(x.shape[2 + i], cut[:, i], onto[:, i]).to(x) for i in (0, 1))
    with torch.autocast(x.device.type, enabled=False):
        x = torch.einsum("nij,nkjl->nkil", rows, x)  # (n, K, H, W)
        return torch.einsum("nkil,nml->nkim", x, columns)


def middle_of(x, n):
    """(H/2, W/2) of x (..., H, W), n times: (n, 2)."""
    return torch.stack([torch.full((n,), side // 2, device=x.device) for side in x.shape[2:]], 1)


def patches_of(images, cells):
    """Images (n, 3, H, W), cells (n, 2) -> patches (4n, 3, H/2, W/2): all top left ones, top right, bottom left, bottom
    right."""
    images = stretch(images, STRIDE * cells, middle_of(images, len(cells)))
    quarters = [part for half in images.chunk(2, 2) for part in half.chunk(2, 3)]
    return torch.cat(quarters).contiguous(memory_format=torch.channels_last)


def tiled(maps, cells):
    """Maps of the patches (4n, C, h/2, w/2) -> (n, C, h, w), each resized to its own patch's cells."""
    tl, tr, bl, br = maps.tensor_split(4)
    whole = torch.cat([torch.cat([tl, tr], 3), torch.cat([bl, br], 3)], 2)  # (n, C, h, w)
    return stretch(whole, middle_of(whole, len(cells)), cells)


# ---------------------------------------------------------------------------------------------------------------------
# Losses (Sec. 2.1)


def puzzle_losses(cam, cam_re, y, image, cls=None):
    """CAM (B, C, h, w), its tiled one for each pair (n, C, h, w), labels y (B, C) -> L_p-cls, L_re, means over images.

    With one keypoint for each image, L_re is over the maps of all classes, 0 where absent (D6). With one for each pair
    of an image and a present class cls (n,), L_re is over the map of cls, and both are means over an image's pairs
    (D2).
    """
    y = y.to(cam)
    p_cls = nnf.binary_cross_entropy_with_logits(cam_re.mean((2, 3)), y[image], reduction="none").mean(1)  # (n,)
    if cls is None:
        return p_cls.mean(), ((cam - cam_re).abs() * y[..., None, None]).mean()
    weight = y[image, cls] / y.sum(1).clamp(min=1)[image] / len(y)  # (n,); 0: no class is present
    own = cam_re[torch.arange(len(cls), device=cam.device), cls]  # (n, h, w)
    return (weight * p_cls).sum(), (weight * (cam[image, cls] - own).abs().mean((1, 2))).sum()


def ramp(step, steps):
    """0 before the first step, linearly up to 1 after `steps`; without steps 1 at once."""
    return min(step / steps, 1.0) if steps else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The EMA teacher


def teacher_decay(step, total):
    """Decay of the teacher after `step` finished steps of `total`: 0.5 after the first, then the mean of all students
    seen, at last a horizon of 1,000 steps, or a fifth of a short run (D5)."""
    horizon = min(1 / (1 - TEACHER_DECAY), max(total / 5, 2))
    return min(1 - 1 / (step + 1), 1 - 1 / horizon)


@torch.no_grad()
def update_teacher(teacher, student, decay):
    """Move the teacher's parameters and float buffers towards the student's; copy its integer buffers."""
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*averaged, strict=True)), None)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


# ---------------------------------------------------------------------------------------------------------------------
# The network


class CSI(nn.Module):
    """Class-specific instances: features (B, h, w, D), CAM (B, h, w, C) -> logits (B, C) (Sec. 2.2).

    Class c's instance is M_c f, and its 1x1 convolution has one output. M_c is one number per position, so
    w_c (M_c f) + b_c = M_c (w_c f) + b_c, and the B C D h w numbers of the instances are never held.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.score = nn.Linear(width, classes)  # a row for each class
        self.mix = nn.Linear(classes, classes)

    def forward(self, f, cam):
        scores = self.mask(cam) * nnf.linear(f, self.score.weight) + self.score.bias  # (B, h, w, C)
        return self.mix(scores).mean((1, 2))

    @staticmethod
    def mask(cam):
        """M in [0, 1], without gradient; 0 for a class without a cell > 0, which plain division would make NaN."""
        positive = cam.detach().relu()
        return positive / positive.amax((1, 2), keepdim=True).clamp(min=1e-5)


class OASS(nn.Module):
    """images (B, 3, H, W) -> logits (B, C) in eval mode. In training, with labels y (B, C) bool, boxes for gt-bbox and
    the teacher (None: this network is its own): logits, CSI's or None, CAM (B, C, h, w), tiled CAM (n, C, h, w) or
    None, and its image (n,) and class (n,) or None.

    chunk: pairs that the teacher sees at once. `class_dims`: see common.init_from.
    """

    class_dims = {"head.weight": 1, "csi.score.weight": 1, "csi.score.bias": 1, "csi.mix.weight": 2, "csi.mix.bias": 1}

    def __init__(self, backbone, classes, keypoint="max", top_k=3, csi=False, chunk=32):
        super().__init__()
        self.backbone, width = backbone, backbone.channels[2]
        self.head = nn.Linear(width, classes, bias=False)  # g, the 1x1 convolution
        self.csi = CSI(width, classes) if csi else None
        self.keypoint, self.top_k, self.chunk = keypoint, top_k, chunk

    def cam(self, features):
        """Features (B, D, h, w) -> CAM (B, h, w, C), and the features as float32 (B, h, w, D). Always in float32, and a
        matrix product, not a convolution, which a GPU would do in TF32: bf16 moves the peaks of 6 % of the maps."""
        with torch.autocast(features.device.type, enabled=False):
            f = features.permute(0, 2, 3, 1).float()
            return self.head(f), f

    def patch_cam(self, images, image, cells, teacher):
        """Tiled CAM (n, C, h, w) of the patches of images[image] at cells: g of the teacher's features. g goes first:
        it and resizing commute, and C channels are far fewer than D."""
        encoder, parts = teacher or self.backbone, []
        chunk = self.chunk if teacher else len(image)  # shared weights: BatchNorm must see all at once
        for some, at in zip(image.split(chunk), cells.split(chunk), strict=True):
            with torch.no_grad() if teacher else contextlib.nullcontext():  # D3
                features = encoder(patches_of(images[some], at))[2]  # (4n, D, h/2, w/2)
            parts.append(tiled(self.cam(features)[0].permute(0, 3, 1, 2), at))
        return torch.cat(parts)

    def forward(self, images, y=None, boxes=None, teacher=None):
        cam, f = self.cam(self.backbone(images)[2])
        logits, instances = cam.mean((1, 2)), None  # (B, C)
        if self.csi:
            with torch.autocast(f.device.type, enabled=False):
                instances = self.csi(f, cam)  # (B, C)
        if not self.training:
            return logits if instances is None else instances
        cam, cam_re, image, cls = cam.permute(0, 3, 1, 2), None, None, None  # (B, C, h, w)
        if y is not None and self.keypoint != "none":
            image, cls, cells = keypoints(cam, y, self.keypoint, self.top_k, boxes)
            cam_re = self.patch_cam(images, image, cells, teacher)
        return logits, instances, cam, cam_re, image, cls

    @torch.no_grad()
    def look(self, images):
        """For pictures: probabilities (B, C), CAM (B, C, h, w)."""
        return self(images).sigmoid(), self.cam(self.backbone(images)[2])[0].permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Picture (Figs. 1, 4, 5)


def draw_keypoints(show, path, tile=242):
    """Images, each with the CAM, its local maxima, the keypoint and the cut lines of up to three classes that are
    present or predicted; 1,000 pixels wide. gt-bbox: without keypoints where boxes are unknown."""
    args, strategy = show.args, show.args.keypoint
    if strategy == "gt-bbox" and any(sample.boxes is None for sample in show.samples):
        strategy = "none"
    picture = Image.new("RGB", (4 * (tile + 8), 26 + len(show.samples) * (tile + 70)), "white")
    legend = "CAM without its negative part: blue low, red high; dots: local maxima"
    common.write_text(picture, (6, 2), legend + "; diamond and lines: keypoint, cuts" * (strategy != "none"))
    for row, sample in enumerate(show.samples):
        with show.autocast():
            p, cam = (x.float().cpu() for x in show.model.look(show.batch(sample)))
        p = p[0]
        predicted, present = p >= args.threshold, torch.zeros(len(p), dtype=torch.bool)
        if sample.labels is not None:
            present = data.targets(sample.labels, args.difficult_train)
        order = (p + present.float() + (present | predicted).float()).argsort(descending=True)[:3].tolist()
        shown = [c for c in order if present[c] or predicted[c]] or order[:1]
        y = torch.zeros(1, len(p), dtype=torch.bool)
        y[0, shown] = True
        points = {}
        if strategy != "none":
            boxes = data.box_rows([sample.boxes]) if strategy == "gt-bbox" else None
            _, cls, cells = keypoints(cam, y, strategy, args.top_k, boxes)
            owners = shown if cls is None else cls.tolist()
            points = dict(zip(owners, cells.expand(len(owners), 2).tolist(), strict=True))
        photo, top = sample.tile(tile), 26 + row * (tile + 70)
        picture.paste(photo, (4, top))
        common.write_text(picture, (6, top + tile + 2), sample.name, 13)
        for column, c in enumerate(shown, 1):
            heat = CSI.mask(cam.permute(0, 2, 3, 1))[0, ..., c]  # (h, w)
            drawn = mark(common.heat_overlay(photo, heat), cam[0, c], points.get(c))
            picture.paste(drawn, (column * (tile + 8) + 4, top))
            text = f"{show.classes[c]} {p[c]:.2f}, CAM up to {cam[0, c].max():.2g}"
            common.write_text(picture, (column * (tile + 8) + 6, top + tile + 2), text, 13)
        for line, (text, colour) in enumerate(show.captions(sample, p)):
            common.write_text(picture, (6, top + tile + 22 + 20 * line), text, 14, colour)
    picture.save(path)


def mark(picture, cam, cell=None):
    """Draw the local maxima of a CAM (h, w) on the picture that shows it, and a keypoint (y, x) with its cut lines."""
    draw, (h, w), (width, height) = ImageDraw.Draw(picture), cam.shape, picture.size
    if cell is not None:
        x, y = cell[1] * width / w, cell[0] * height / h
        for at in range(0, max(width, height), 10):
            draw.line((at, y, at + 5, y), fill="white", width=2)
            draw.line((x, at, x, at + 5), fill="white", width=2)
    for i, j in local_maxima(cam[None])[0].nonzero().tolist():
        at = ((j + 0.5) * width / w, (i + 0.5) * height / h)
        draw.ellipse((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4), fill="white", outline="black", width=2)
    if cell is not None:
        draw.regular_polygon((x, y, 9), 4, rotation=45, fill=(40, 90, 255), outline="black")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Command line, training


def parse(argv=None):
    parser = common.arguments("OASS: self-supervision on patches around objects for multi-label classification.")
    add = parser.add_argument_group("OASS").add_argument
    add("--keypoint", choices=STRATEGIES, help="Table 3: where the image is cut; center: PuzzleCAM, none: --baseline")
    add("--top-k", type=common.at_least(1), metavar="K", help="of ctopk and ctopk-w: local maxima")
    add("--csi", action="store_true", help="Table 3: classify class-specific instances too, and score by them")
    add("--shared-teacher", action="store_true", help="the network sees the patches itself, with gradient (PuzzleCAM)")
    add("--teacher-chunk", type=common.at_least(1), metavar="N", help="keypoints the teacher sees at a time: memory")
    add("--alpha-p", type=float, help="weight of L_p-cls")
    add("--alpha-re", type=float, help="weight of L_re")
    add("--ramp-epochs", type=float, help="both weights rise linearly so long; not given: the recipe's part of the run")
    add("--schedule", choices=("poly", "one-cycle"), help="learning rate: (1 - step/steps)^0.9, or one cycle")
    add("--recipe", dest="numbers", choices=("oass", "puzzlecam"), default="oass", help="puzzlecam: their released run")
    add("--test-teacher", action="store_true", help="with --evaluate: the teacher's encoder instead of the student's")
    argv = sys.argv[1:] if argv is None else list(argv)
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--recipe")
    theirs = PUZZLECAM if scan.parse_known_args(argv)[0].recipe == "puzzlecam" else {}
    args = common.parse(parser, argv, {name: numbers | theirs for name, numbers in RECIPE.items()}, "oass")

    if args.baseline:
        if args.csi or ("keypoint" in args.given and args.keypoint != "none"):
            wrong = "--csi" if args.csi else f"--keypoint {args.keypoint}"
            parser.error(f"--baseline is --keypoint none without CSI; {wrong} contradicts it")
        args.keypoint = "none"
    useless = {
        "top_k": not args.keypoint.startswith("ctopk"),
        "teacher_chunk": args.keypoint == "none" or args.shared_teacher,
        **dict.fromkeys(("shared_teacher", "alpha_p", "alpha_re", "ramp_epochs"), args.keypoint == "none"),
    }
    for name in args.given:
        if useless.get(name):
            why = "one call, for BatchNorm" * (name == "teacher_chunk" and args.shared_teacher)
            why = why or f"--keypoint {args.keypoint}"
            parser.error(f"--{name.replace('_', '-')} has no effect with {why}")
    args.shared_teacher = args.shared_teacher and args.keypoint != "none"
    if args.ramp_epochs is None:
        args.ramp_epochs = min(100, args.ramp * args.epochs)
    for name in ("alpha_p", "alpha_re", "ramp_epochs"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    if args.image_size % (2 * STRIDE) and args.keypoint != "none":
        parser.error(f"--image-size {args.image_size}: expected a multiple of {2 * STRIDE}, so that halves have cells")
    if args.keypoint == "gt-bbox" and args.data not in (*data.VOC_SETS, "coco") and not args.checkpoint:
        parser.error(f"--keypoint gt-bbox needs boxes, and {args.data} has none; choose another keypoint")
    if args.test_teacher and not args.evaluate:
        parser.error("--test-teacher belongs to --evaluate")
    return args


def build(args, classes):
    """The network of the command line. Pretrained weights are read unless a checkpoint brings them."""
    stored = args.checkpoint or args.resume
    backbone = common.Backbone(args.backbone, "none" if stored else args.weights, last_stride=1)
    return OASS(backbone, len(classes), args.keypoint, args.top_k, args.csi, args.teacher_chunk)


def optimizer_of(model, args):
    """Adam (L2 weight decay, none on biases and BatchNorm) or PuzzleCAM's SGD; new layers learn faster."""
    groups = {}
    for name, p in model.named_parameters():
        rate, bias = args.lr * (1 if name.startswith("backbone.") else args.new_lr), name.endswith("bias")
        sgd = args.optimizer == "sgd"
        key = (rate * (2 if sgd and bias else 1), args.weight_decay if (not bias if sgd else p.dim() > 1) else 0.0)
        groups.setdefault(key, []).append(p)
    groups = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, SGD_MOMENTUM, nesterov=True)
    return torch.optim.Adam(groups, args.lr, BETAS, fused=True)


def schedule_of(optimizer, args, total):
    """Learning rate as a function of the step."""
    if args.schedule == "poly":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, 1 - step / max(total, 1)) ** POLY)
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, max(total, 1), cycle_momentum=False)


def protocol(args):
    """Lines that say what of Table 1's protocol is missing (D4)."""
    lists = {"--train-list": args.evaluate or args.train_list, "--val-list": args.val_list}
    missing = [flag for flag, given in lists.items() if not given]
    if args.data == "voc2012" and missing:
        yield f"WARNING: NOT TABLE 1's PROTOCOL, which needs {' and '.join(missing)} (ids, one a line):"
        yield "  training: train_aug, 10,582 images, SBD's and VOC2012's segmentation ones without the test images'"
        yield "  test: VOC2012's ImageSets/Segmentation/val.txt, 1,449 images"
        yield f"  here: {args.train_list or args.train_split} and {args.val_list or args.test_split}"


def main(args):
    env = common.start(args)
    if args.predict or args.export:
        return common.apply(args, env, build, draw_keypoints)
    train, test = common.load_data(args, env, boxes=args.keypoint == "gt-bbox")
    with common.first_process_first(env):
        model = build(args, test.classes)
    run = common.Run(args, env, model, train, test)
    for line in protocol(args):
        run.say(line)
    if args.evaluate:
        if args.test_teacher:
            run.state["model"] |= teacher_weights(run.state, args)
            run.state["ema"] = None
        record = run.evaluate()
    else:
        optimizer = optimizer_of(model, args)
        teacher = None

        def start_teacher(stored=None):
            nonlocal teacher
            if args.keypoint != "none" and not args.shared_teacher:
                teacher = copy.deepcopy(model.backbone).eval().requires_grad_(False)
                if stored:
                    teacher.load_state_dict(stored)
                run.extra["teacher"] = teacher.state_dict()  # the tensors themselves, so that checkpoints are in time

        net = run.prepare(optimizer, schedule_of(optimizer, args, run.total_steps), start_teacher)
        if run.state:
            start_teacher(run.state["extra"].get("teacher"))
        rise = round(args.ramp_epochs * run.epoch_steps)
        if args.keypoint != "none":
            run.say(f"weights of L_p-cls and L_re: full after {rise} of {run.total_steps} steps")
        if teacher:
            horizon = 1 / (1 - teacher_decay(run.total_steps, run.total_steps))
            run.say(f"teacher's horizon: up to {horizon:.0f} of {run.total_steps} steps")
        record = None
        for epoch in run.epochs():
            for images, labels, *boxes in run.batches(epoch):
                y = data.targets(labels, args.difficult_train)  # (B, C) bool
                with run.autocast():
                    logits, instances, cam, cam_re, image, cls = net(images, y, *boxes, teacher=teacher)
                terms = {"L_cls": nnf.binary_cross_entropy_with_logits(logits, y.float())}
                if instances is not None:
                    terms["L_csi"] = nnf.binary_cross_entropy_with_logits(instances, y.float())
                loss = sum(terms.values())
                if cam_re is not None:
                    share = ramp(run.step, rise)
                    terms["L_p"], terms["L_re"] = puzzle_losses(cam, cam_re, y, image, cls)
                    loss = loss + args.alpha_p * (share if args.ramp_p else 1) * terms["L_p"]
                    loss = loss + args.alpha_re * share * terms["L_re"]
                run.update(loss, **terms)
                if teacher and run.parts % args.accumulate == 0:
                    update_teacher(teacher, model.backbone, teacher_decay(run.step, run.total_steps))
            record = run.finish_epoch(epoch)
        record = record or run.test()  # resumed after the last epoch
    if env.first:
        (run.out / "figures").mkdir(exist_ok=True)
        images = None  # boxes come with training images only
        if args.keypoint == "gt-bbox" and not args.evaluate:
            images = data.Images(train, args.image_size, args.view, args.interpolation)
        draw_keypoints(run.show(images=images), run.out / "figures" / "keypoints.png")
        if not args.evaluate:
            common.draw_curves(run.out / "log.jsonl", run.out / "figures" / "curves.png")
    run.report(record)
    return record


def teacher_weights(state, args):
    """The teacher's encoder in a checkpoint, by the network's names."""
    if "teacher" not in state["extra"]:
        raise UserError(f"--test-teacher: {args.checkpoint} has no teacher (--keypoint none or --shared-teacher)")
    return {f"backbone.{name}": tensor for name, tensor in state["extra"]["teacher"].items()}


if __name__ == "__main__":
    arguments = parse()
    common.launch(main, arguments)
