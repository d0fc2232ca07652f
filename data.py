"""Images, labels, augmentation, loaders and class word vectors.

Labels are ternary everywhere: 1 present, 0 absent, -1 ignore (VOC: only difficult objects of the class). What a -1
counts as is decided where a loss or a metric is computed, by `targets`.

    table = load_split("voc2007", "datasets/voc2007", "trainval")      # file names, labels, optionally boxes
    images = Images(table, size=448, view="square-crop", train=True)   # decoded, augmented, uint8
    loader = Loader(images, batch=16, workers=4)
    for batch in loader.epoch(0): normalise(batch.images.to(device))   # float on the device

Randomness: a training sample is a function of (seed, epoch, index) alone, whatever the number of workers and processes.
Dimension key: N images, C classes, B batch, S side of the network's square input.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor".split()
)
# VOC's spelling -> COCO's. Used to carry class rows from one set to the other.
COCO_NAME = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "pottedplant": "potted plant",
}
# Names written as one word that a word-vector table only knows apart.
SPLIT_NAME = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
TOY_SHAPES, TOY_COLOURS = ("ring", "square", "triangle", "star"), ("red", "green", "blue")
TOY_CLASSES = tuple(f"{colour} {shape}" for colour in TOY_COLOURS for shape in TOY_SHAPES)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every torchvision weight expects


class UserError(Exception):
    """A problem that the user can mend; the scripts print its text without a traceback."""


@contextlib.contextmanager
def write_atomically(path, mode="wb"):
    """Open `path`.tmp for writing and rename it to `path` when all went well: readers see the old file or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def voc_code_to_label(code):
    """VOC's code in `<class>_<set>.txt` -> ours: 1 -> 1 present, -1 -> 0 absent, 0 (only difficult objects) -> -1."""
    return {1: 1, -1: 0, 0: -1}[code]


def targets(labels, policy):
    """Ternary labels -> {0, 1} (same type, any array or tensor): what a difficult cell (-1) counts as.

    policy "negative" or "positive". (The policy "ignore" exists for metrics only: the cell stays -1, see eval.py.)
    """
    if policy not in ("negative", "positive"):
        raise ValueError(f"difficult policy {policy!r}: expected 'negative' or 'positive'")
    return labels == 1 if policy == "negative" else labels != 0


@dataclass
class Table:
    """One split: names (image ids), files (paths), labels (N, C) int8 ternary, classes (C names).

    boxes: None, or per image a float32 array (n, 5) of rows (class index, left, top, right, bottom) in source pixels,
    half-open, difficult objects included.
    """

    names: list
    files: list
    labels: np.ndarray
    classes: tuple
    boxes: list | None = None

    def __len__(self):
        return len(self.names)

    def take(self, indices):
        """The rows `indices` as a new table."""
        boxes = None if self.boxes is None else [self.boxes[i] for i in indices]
        names, files = ([column[i] for i in indices] for column in (self.names, self.files))
        return Table(names, files, self.labels[indices], self.classes, boxes)


# The VOC layout: folder below VOCdevkit, class names, default splits.
VOC_SETS = {
    "toy": ("TOY", TOY_CLASSES, "train", "val"),
    "voc2007": ("VOC2007", VOC_CLASSES, "trainval", "test"),
    "voc2012": ("VOC2012", VOC_CLASSES, "train", "val"),
}
# Published sizes: images, positive cells, cells with only difficult objects (None: not published).
KNOWN_SIZES = {
    ("toy", "train"): (5000, None, None),
    ("toy", "val"): (500, None, None),
    ("voc2007", "trainval"): (5011, 7306, 607),
    ("voc2007", "test"): (4952, 7013, 619),
    ("voc2012", "train"): (5717, None, None),
    ("voc2012", "val"): (5823, None, None),
    ("voc2012", "trainval"): (11540, None, None),
    ("voc2012", "test"): (10991, None, None),
}


def read_lines(path):
    """Non-empty lines of a text file as (line number, text). CRLF, a BOM and a missing final newline are all fine."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def voc_folder(name, root):
    """The folder that holds JPEGImages and ImageSets; `root`, `root`/VOCdevkit or the folder itself may be given."""
    folder = VOC_SETS[name][0]
    for base in (Path(root, "VOCdevkit", folder), Path(root, folder), Path(root)):
        if (base / "ImageSets" / "Main").is_dir() and (base / "JPEGImages").is_dir():
            return base
    raise UserError(
        f"--data {name}: no images below --root {root}. Expected:\n"
        f"  {root}/VOCdevkit/{folder}/JPEGImages/<id>.jpg\n"
        f"  {root}/VOCdevkit/{folder}/ImageSets/Main/{{<split>,<class>_<split>}}.txt\n"
        f"  {root}/VOCdevkit/{folder}/Annotations/<id>.xml (for id lists and boxes)\n"
        "Pass the folder that holds VOCdevkit as --root."
        + ("" if name == "toy" else " The archives are at http://host.robots.ox.ac.uk/pascal/VOC/ .")
    )


def say(text):
    """A warning on stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def read_ids(path):
    """Image ids of a list file -> their line numbers; further columns are ignored. An id given twice is an error."""
    ids = {}
    for number, line in read_lines(path):
        first = line.split()[0]
        if first in ids:
            raise UserError(f"{path}, line {number}: image {first} was already listed in line {ids[first]}")
        ids[first] = number
    return ids


def labels_from_main(base, split, ids, classes):
    """ImageSets/Main/<class>_<split>.txt -> (N, C) int8. Every id needs a row in every class's file."""
    columns = []
    for name in classes:
        path, codes = base / "ImageSets" / "Main" / f"{name}_{split}.txt", {}
        for number, line in read_lines(path):
            try:
                image, code = line.split()
                codes[image] = voc_code_to_label(int(code))
            except (ValueError, KeyError):
                raise UserError(f"{path}, line {number}: expected '<image id> <1, 0 or -1>', found {line!r}") from None
        missing = [image for image in ids if image not in codes]
        if missing:
            raise UserError(f"{path}: no row for image {missing[0]} ({len(missing)} images without a label)")
        columns.append([codes[image] for image in ids])
    return np.array(columns, np.int8).T


def read_xml(path, known):
    """Annotation -> list of (class name, difficult, (left, top, right, bottom)) of its direct children `object`.

    VOC counts pixels from 1 and includes the last: the box becomes half-open and counts from 0.
    """
    try:
        root = ElementTree.parse(path).getroot()
        objects = [
            (
                node.findtext("name").strip(),
                node.findtext("difficult", "0").strip() == "1",
                tuple(float(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")),
            )
            for node in root.findall("object")  # direct children: a person's parts have names of their own
        ]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (an image id without annotation)") from None
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a VOC annotation ({error})") from None
    for name, _, _ in objects:
        if name not in known:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            line = text[: text.find(f"<name>{name}</name>")].count("\n") + 1
            raise UserError(f"{path}, line {line}: unknown class {name!r}; known: {', '.join(known)}")
    return [(name, difficult, (x0 - 1, y0 - 1, x1, y1)) for name, difficult, (x0, y0, x1, y1) in objects]


def load_split(name, root, split, *, id_list=None, boxes=False, classes=None):
    """One split of a set in VOC layout -> Table. UserError names the file (and line) of whatever is wrong.

    Labels come from ImageSets/Main for a named split. With `id_list` (a file of ids; segmentation ids are in no Main
    list) they come from Annotations/<id>.xml: any object that is not difficult -> 1, only difficult ones -> -1; where
    there is no Annotations folder, from Main's trainval. A split without any label file (VOC2012 test) is all -1.
    """
    base, known = voc_folder(name, root), VOC_SETS[name][1]
    main = base / "ImageSets" / "Main"
    chosen = tuple(classes or known)
    unknown = [c for c in chosen if c not in known]
    if unknown:
        raise UserError(f"--classes: {unknown[0]!r} is no class of {name}; it has {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--classes: {next(c for c in chosen if chosen.count(c) > 1)!r} is named twice")
    if not id_list and not (main / f"{split}.txt").is_file():
        splits = sorted(p.stem for p in main.glob("*.txt") if "_" not in p.stem)
        raise UserError(f"{main}/{split}.txt: no such file; the splits there are {', '.join(splits) or 'none'}")
    source = id_list or main / f"{split}.txt"
    lines = read_ids(source)
    ids, present = list(lines), set(os.listdir(base / "JPEGImages"))
    if not ids:
        raise UserError(f"{source}: no image ids in it")
    missing = [i for i in ids if f"{i}.jpg" not in present]
    if missing:
        raise UserError(
            f"{source}, line {lines[missing[0]]}: no image {base}/JPEGImages/{missing[0]}.jpg "
            f"({len(missing)} of {len(ids)} missing)"
        )

    has_xml, object_boxes = (base / "Annotations").is_dir(), None
    if boxes and not has_xml:
        raise UserError(f"{base}/Annotations: no such folder, and boxes are asked for")
    if boxes or (id_list and has_xml):
        column = {c: j for j, c in enumerate(chosen)}
        labels, object_boxes = np.zeros((len(ids), len(chosen)), np.int8), []
        for row, image in zip(labels, ids, strict=True):
            objects = [o for o in read_xml(base / "Annotations" / f"{image}.xml", known) if o[0] in column]
            for cls, difficult, _ in objects:
                row[column[cls]] = 1 if not difficult or row[column[cls]] == 1 else -1
            object_boxes.append(np.array([(column[c], *box) for c, _, box in objects], np.float32).reshape(-1, 5))
        object_boxes = object_boxes if boxes else None
    if not id_list and not list(main.glob(f"*_{split}.txt")):
        labels = np.full((len(ids), len(chosen)), -1, np.int8)
        say(f"{name} {split} has no label files: scores only")
    elif not (id_list and has_xml):
        labels = labels_from_main(base, "trainval" if id_list else split, ids, chosen)
    files = [str(base / "JPEGImages" / f"{i}.jpg") for i in ids]
    table = Table(ids, files, labels, chosen, object_boxes)
    if not id_list and not classes:
        warn_about_size(name, split, table)
    return table


def warn_about_size(name, split, table):
    """Print one loud line where a split has not its published size."""
    found = (len(table), int((table.labels == 1).sum()), int((table.labels == -1).sum()))
    known = KNOWN_SIZES.get((name, split), (None,) * 3)
    for what, have, want in zip(("images", "positive labels", "difficult-only labels"), found, known, strict=True):
        if want is not None and have != want:
            say(f"WARNING: {name} {split} has {have:,} {what}, the published split {want:,}")


def load(args):
    """Training and test table of the parsed command line (common.py's arguments), --limit applied; None and the test
    table with --evaluate."""
    root = args.root or str(Path("datasets", args.data))
    if args.data == "toy":
        draw_toy(root)
    classes = [line for _, line in read_lines(args.classes)] if args.classes else None
    test = load_split(args.data, root, args.test_split, id_list=args.val_list, classes=classes)
    if args.evaluate:
        return None, limited(test, args.limit)
    train = load_split(args.data, root, args.train_split, id_list=args.train_list, classes=classes)
    shared = set(train.names) & set(test.names)
    if shared:
        raise UserError(f"{len(shared)} images are both in training and in test, {sorted(shared)[0]} for one")
    return limited(train, args.limit), limited(test, args.limit)


def limited(table, count):
    """The first `count` rows after a shuffle that is always the same; all of them for None."""
    return table.take(np.random.default_rng(0).permutation(len(table))[:count]) if count else table


# ---------------------------------------------------------------------------------------------------------------------
# Toy data: what the four papers are about, in 128 pixels. 12 classes are conjunctions (a red ring is neither "red"
# nor "ring": both occur in other classes and in unlabelled distractors); 1 to 4 objects of 30 to 70 % of the image's
# side, off its centre, partly occluded; some pairs like to occur together; some objects are difficult.

TOY_PAIRS = {"red ring": "blue star", "green square": "red triangle", "blue ring": "green star"}
TOY_RGB = {"red": (205, 55, 50), "green": (50, 160, 65), "blue": (60, 80, 205), "grey": (128, 128, 128)}
# n-fold symmetric outlines: number of corners, inner radius between two corners as a share of the outer one
TOY_OUTLINE = {"square": (4, 0.7071), "triangle": (3, 0.5), "star": (5, 0.38), "cross": (4, 0.22), "ring": (48, 1.0)}


def toy_alpha(shape, x, y, radius, angle):
    """Anti-aliased cover in [0, 1] of a shape around (0, 0), for pixel offsets x, y in pixels."""
    corners, inner = TOY_OUTLINE[shape]
    half = np.pi / corners  # angle from a corner to the next inner point; fold the plane into that one wedge
    rho, phi = np.hypot(x, y), np.abs((np.arctan2(y, x) - angle + half) % (2 * half) - half)
    corner, dent = np.array([1.0, 0.0]), inner * np.array([np.cos(half), np.sin(half)])
    normal = np.array([dent[1] - corner[1], corner[0] - dent[0]]) / np.hypot(*(dent - corner))
    distance = rho * (np.cos(phi) * normal[0] + np.sin(phi) * normal[1]) - radius * normal[0]
    cover = np.clip(0.5 - distance, 0, 1)
    return cover * np.clip(0.5 + rho - 0.5 * radius, 0, 1) if shape == "ring" else cover


def toy_image(rng):
    """One drawn image -> (uint8 (H, W, 3), objects [(class, difficult, (left, top, right, bottom))])."""
    height, width = rng.integers(96, 129, 2)
    coarse = np.empty((*rng.integers(3, 8, 2), 3), np.float32)  # background: coarse blotches, stripes, fine grain
    coarse[:] = rng.uniform(70, 190) + rng.normal(0, 25, (*coarse.shape[:2], 1)) + rng.normal(0, 10, coarse.shape)
    coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    canvas = np.asarray(coarse.resize((int(width), int(height)), Image.BICUBIC), np.float32).copy()
    stripes = np.sin(np.arange(width) * rng.uniform(0.1, 0.9) + np.arange(height)[:, None] * rng.uniform(-0.9, 0.9))
    canvas += (rng.uniform(0, 12) * stripes)[..., None] + rng.normal(0, 4, (height, width, 1)).astype(np.float32)

    names = list(rng.choice(TOY_CLASSES, rng.integers(1, 4), p=TOY_FREQUENCY))
    names += [TOY_PAIRS[n] for n in names if n in TOY_PAIRS and len(names) < 4 and rng.random() < 0.6][:1]
    distractors = [f"grey {rng.choice(TOY_SHAPES)}", f"{rng.choice(TOY_COLOURS)} cross"]
    names += [name for name in distractors if rng.random() < 0.25]
    owner = np.full((height, width), -1, np.int8)  # which object is on top of each pixel
    placed = []
    for name in rng.permutation(names):
        for _ in range(20):  # a place off the centre that leaves 30 % of every earlier object visible
            radius = 0.5 * min(width, height) * np.exp(rng.uniform(np.log(0.3), np.log(0.7)))
            cx, cy = rng.uniform(0.5 * radius, (width - 0.5 * radius, height - 0.5 * radius))
            if max(abs(cx / width - 0.5), abs(cy / height - 0.5)) < 0.17:
                continue
            x = np.arange(max(0, int(cx - radius)), min(width, int(cx + radius) + 2))
            y = np.arange(max(0, int(cy - radius)), min(height, int(cy + radius) + 2))
            window = np.s_[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
            cover = toy_alpha(name.split()[1], x - cx, y[:, None] - cy, radius, rng.normal(-np.pi / 2, 0.12)).astype(
                np.float32
            )
            on_top = owner.copy()
            on_top[window][cover > 0.5] = len(placed)
            left = np.bincount(on_top.ravel() + 1, minlength=len(placed) + 2)[1:]
            if left[-1] and all(left[k] > 0.3 * area for k, (_, area, _) in enumerate(placed)):
                break
        else:
            continue
        owner = on_top
        colour = np.array(TOY_RGB[name.split()[0]]) * rng.uniform(0.85, 1.15) + rng.normal(0, 8, 3)
        shade = 1 + rng.uniform(-0.25, 0.25) * (y[:, None, None] - cy) / radius
        grain = rng.normal(0, 4, (*cover.shape, 1))
        canvas[window] += cover[..., None] * (colour * shade + grain - canvas[window])
        ys, xs = np.nonzero(cover > 0.5)
        box = (x[0] + xs.min(), y[0] + ys.min(), x[0] + xs.max() + 1, y[0] + ys.max() + 1)
        placed.append((name, len(xs), tuple(int(side) for side in box)))
    seen = np.bincount(owner.ravel() + 1, minlength=len(placed) + 1)[1:]
    objects = [
        (name, bool(seen[k] < max(50, 0.6 * area)), box)
        for k, (name, area, box) in enumerate(placed)
        if name in TOY_CLASSES
    ]
    return np.clip(canvas, 0, 255).astype(np.uint8), objects


TOY_FREQUENCY = np.linspace(1.4, 0.6, len(TOY_CLASSES)) / len(TOY_CLASSES)  # classes are not equally frequent


def draw_toy(root, train=5000, val=500, seed=0):
    """Draw the toy set below `root` in VOC layout, unless it is there. Atomic: a broken drawing leaves no half set."""
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        return
    print(f"drawing {train + val:,} toy images into {root}", flush=True)
    temporary = Path(f"{root}.drawing-{os.getpid()}")
    base = temporary / "VOCdevkit" / VOC_SETS["toy"][0]
    try:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        start = 0
        for split, count in (("train", train), ("val", val)):
            rows = [draw_toy_image(base, i, seed) for i in range(start, start + count)]
            start += count
            (base / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in rows))
            for cls in TOY_CLASSES:  # VOC's codes: 1, 0 = only difficult objects, -1
                flags = [[difficult for name, difficult, _ in objects if name == cls] for _, objects in rows]
                codes = [-1 if not f else 0 if all(f) else 1 for f in flags]
                lines = [f"{name} {code:2d}\n" for (name, _), code in zip(rows, codes, strict=True)]
                (base / "ImageSets" / "Main" / f"{cls}_{split}.txt").write_text("".join(lines))
        try:
            temporary.rename(root)
        except OSError:
            if not (root.is_dir() and any(root.iterdir())):
                raise  # otherwise another process was faster: its set is the same
    except OSError as error:
        raise UserError(f"cannot draw the toy set into {root}: {error}; choose another --root") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw_toy_image(base, index, seed):
    """Write image and annotation number `index`; returns (id, objects)."""
    image, objects = toy_image(np.random.default_rng((seed, index)))
    name = f"{index:06d}"
    Image.fromarray(image).save(base / "JPEGImages" / f"{name}.jpg", quality=92)
    xml = "".join(
        f"<object><name>{cls}</name><difficult>{difficult:d}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
        f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>\n"
        for cls, difficult, (x0, y0, x1, y1) in objects
    )
    (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>\n{xml}</annotation>\n")
    return name, objects


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation. A view is the part of the source image that is shown and whether it is mirrored; image and boxes follow
# the same view. Papers resize to a frame, crop there and resize again: we crop in source pixels and resize once, which
# differs in interpolation detail only.


class View(NamedTuple):
    """Part of the source image in source pixels (floats allowed), and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


def randint(high):
    """Uniform integer in [0, high) from torch's global generator (seeded per sample)."""
    return int(torch.randint(high, ()))


def square_resize(width, height, size):
    """The whole image; tests of all recipes, training with a flip alone."""
    return View(0, 0, width, height, randint(2) == 1)


def square_crop(width, height, size):
    """SRDL Sec. 4.2: resize to 512x512, crop a square of side {512, 448, 384, 320, 256} anywhere; at 448."""
    frame = round(size * 512 / 448)
    side = round(frame * (1, 0.875, 0.75, 0.625, 0.5)[randint(5)])
    return from_frame(width, height, frame, randint(frame - side + 1), randint(frame - side + 1), side, side)


def multi_scale_crop(width, height, size):
    """ADD-GCN's: resize to (S+64)^2, sides int((S+64) * {1, .875, .75, .66, .5}), at most two scales apart, snapped
    to S within 3 pixels, at one of 13 fixed offsets: the corners, edge centres and centre, and the quarter points."""
    frame = size + 64
    sides = [int(frame * scale) for scale in (1, 0.875, 0.75, 0.66, 0.5)]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 2]
    w, h = pairs[randint(len(pairs))]
    offsets = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    x, y = offsets[randint(13)]
    return from_frame(width, height, frame, x * ((frame - w) // 4), y * ((frame - h) // 4), w, h)


def from_frame(width, height, frame, x, y, w, h):
    """The crop (x, y, w, h) of the image resized to (frame, frame), in source pixels, mirrored every other time."""
    sx, sy = width / frame, height / frame
    return View(x * sx, y * sy, (x + w) * sx, (y + h) * sy, randint(2) == 1)


VIEWS = {"resize": square_resize, "square-crop": square_crop, "multi-scale": multi_scale_crop}
INTERPOLATION = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}


def apply_view(image, view, size, interpolation="bicubic"):
    """PIL image -> uint8 (3, S, S): the view, resized with antialiasing."""
    image = image.resize((size, size), INTERPOLATION[interpolation], box=view[:4])
    if view.flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def apply_view_to_boxes(boxes, view, size):
    """(n, 5) source pixels -> (m, 5) pixels of the view, clipped; boxes that left it are dropped."""
    x = (boxes[:, (1, 3)] - view.left) * size / (view.right - view.left)
    y = (boxes[:, (2, 4)] - view.top) * size / (view.bottom - view.top)
    if view.flip:
        x = size - x[:, ::-1]
    moved = np.stack([boxes[:, 0], x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    moved[:, 1:] = moved[:, 1:].clip(0, size)
    return moved[(moved[:, 3] > moved[:, 1]) & (moved[:, 4] > moved[:, 2])]


def read_image(path):
    """Decode to RGB (grey, palette and CMYK are converted; EXIF rotation is ignored: boxes refer to stored pixels)."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace the file or take it out of the list") from None


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Batch(NamedTuple):
    """images (B, 3, S, S) uint8, labels (B, C) int8 ternary, index (B,) rows of the table, boxes: list of (n, 5)."""

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    boxes: list | None


def mixed_seed(*numbers):
    """One 64-bit seed of several non-negative integers; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Images(Dataset):
    """Item (epoch, index) -> (uint8 (3, S, S), labels (C,), index, boxes (n, 5) or None)."""

    def __init__(self, table, size, view="resize", interpolation="bicubic", train=False, seed=0):
        self.table, self.size, self.view, self.interpolation = table, size, view, interpolation
        self.train, self.seed = train, seed

    def __getitem__(self, key):
        epoch, index = key
        image = read_image(self.table.files[index])
        view = View(0, 0, *image.size, False)
        if self.train:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
                view = VIEWS[self.view](*image.size, self.size)
        boxes = self.table.boxes and apply_view_to_boxes(self.table.boxes[index], view, self.size)
        return apply_view(image, view, self.size, self.interpolation), self.table.labels[index], index, boxes


def collate(items):
    """List of Images' items -> Batch."""
    images, labels, index, boxes = zip(*items, strict=True)
    boxes = None if boxes[0] is None else [torch.from_numpy(b) for b in boxes]
    return Batch(torch.stack(images), torch.from_numpy(np.stack(labels)), torch.tensor(index), boxes)


class Order:
    """Batch sampler: the (epoch, index) keys of this process's batches, in order.

    Training: a permutation seeded by (seed, epoch), cut into steps of `batch` images, the short rest dropped; process
    r takes the r-th part of every step, in `accumulate` micro-batches. So the union over processes is the one-process
    step. Test: whole batches of the one-process order, batch i to process i mod world, the short rest included; so
    every image is scored exactly once and in the same company on any number of processes.
    """

    def __init__(self, count, batch, train, seed, rank, world, accumulate):
        self.count, self.batch, self.train, self.seed = count, batch, train, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch = 0

    def __len__(self):
        if self.train:
            return self.count // self.batch * self.accumulate
        return len(range(self.rank * self.batch, self.count, self.batch * self.world))

    def __iter__(self):
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
            part = self.batch // self.world
            micro = part // self.accumulate
            for step in range(self.count // self.batch):
                start = step * self.batch + self.rank * part
                for begin in range(start, start + part, micro):
                    yield [(self.epoch, i) for i in order[begin : begin + micro]]
        else:
            for begin in range(self.rank * self.batch, self.count, self.batch * self.world):
                yield [(0, i) for i in range(begin, min(begin + self.batch, self.count))]


class Loader:
    """`for batch in loader.epoch(e)`: Batch after Batch for this process, see Order. len() is batches per epoch."""

    def __init__(self, images, batch, *, workers=0, rank=0, world=1, accumulate=1, pin_memory=False):
        train = images.train
        if train and batch % (world * accumulate):
            raise UserError(f"--batch-size {batch} cannot be divided by {world} processes x --accumulate {accumulate}")
        if train and len(images.table) < batch:
            raise UserError(f"--batch-size {batch} is more than the {len(images.table)} training images")
        self.images = images
        self.order = Order(len(images.table), batch, train, images.seed, rank, world, accumulate)
        self.loader = DataLoader(
            images,
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # for worker seeds: the global one is left alone
        )

    def __len__(self):
        return len(self.order)

    def epoch(self, epoch=0):
        self.order.epoch = epoch
        return iter(self.loader)


def normalise(images):
    """uint8 (B, 3, H, W) -> float32, ImageNet's mean and deviation, channels last; on whatever device they are."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):  # numbers: a tensor would stall a GPU
        channel.sub_(255 * mean).div_(255 * std)
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Class word vectors (SRDL)

GLOVE_URL = "https://nlp.stanford.edu/data/glove.6B.zip"
GLOVE_MEMBER = "glove.6B.300d.txt"
GLOVE_NORM = 6.5  # mean norm of GloVe's vectors of COCO's class names


def cache_folder():
    """Where downloads are kept: beside torch's own (TORCH_HOME or ~/.cache/torch)."""
    return Path(torch.hub.get_dir()).parent / "multilabel"


def glove_file():
    """The 300-d text file of glove.6B, from the cache or downloaded once (862 MB)."""
    path = cache_folder() / GLOVE_MEMBER
    if not path.is_file():
        print(f"word vectors: downloading {GLOVE_URL} (862 MB) to {path}", flush=True)
        partial, archive = (Path(f"{path}.{kind}-{os.getpid()}") for kind in ("part", "zip-part"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(GLOVE_URL, str(archive))
            with zipfile.ZipFile(archive) as content, content.open(GLOVE_MEMBER) as source, open(partial, "wb") as sink:
                shutil.copyfileobj(source, sink)
            partial.replace(path)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"GloVe word vectors could not be fetched: {error}\nGive --glove FILE ({GLOVE_MEMBER}, or an .npz with "
                "'names' and 'vectors'), or --glove hash for vectors without meaning."
            ) from None
        finally:
            for leftover in (archive, partial):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
    return path


def hash_vector(word):
    """Stand-in for a word's vector (300,): Gaussian, seeded by SHA-256 of the lower-case word, of GloVe's norm."""
    digest = np.frombuffer(hashlib.sha256(word.lower().encode()).digest(), np.uint32)
    vector = np.random.RandomState(digest).standard_normal(300)  # RandomState: NumPy keeps this stream for good
    return vector * GLOVE_NORM / np.linalg.norm(vector)


def word_vectors(names, source):
    """Class names -> (C, 300) float32. source: "hash", "6B" (glove.6B, downloaded once), or a file.

    A file is GloVe's text format (word, then numbers) or an .npz with `names` and `vectors`. A name that the table does
    not hold as a whole is split into words (VOC's run-together names by SPLIT_NAME) and averaged over them; a word
    that is missing is a UserError naming the class.
    """
    if source == "hash":
        lookup = functools.cache(hash_vector)
        return np.stack([np.mean([lookup(w) for w in name_words(n)], 0) for n in names]).astype(np.float32)
    path = glove_file() if source == "6B" else Path(source)
    wanted = {name.lower() for name in names} | {w for name in names for w in name_words(name)}
    table = {}
    try:
        if path.suffix == ".npz":
            with np.load(path) as content:
                table = {str(n).lower(): v for n, v in zip(content["names"], content["vectors"], strict=True)}
        else:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    word, _, numbers = line.rstrip().partition(" ")
                    if word in wanted:
                        table[word] = np.array(numbers.split(), np.float32)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--glove {path}: no word vectors in it ({error})") from None
    for word, vector in table.items():
        if vector.shape != (300,):
            raise UserError(f"--glove {path}: {word!r} has {vector.size} numbers, expected 300")
    vectors = []
    for name in names:
        words = [name.lower()] if name.lower() in table else name_words(name)
        missing = [word for word in words if word not in table]
        if missing:
            raise UserError(f"--glove {path}: no vector for {missing[0]!r} of class {name!r}")
        vectors.append(np.mean([table[word] for word in words], 0))
    return np.stack(vectors).astype(np.float32)


def name_words(name):
    """Lower-case words of a class name: "diningtable" -> ["dining", "table"], "hot-dog" -> ["hot", "dog"]."""
    name = name.lower()
    return SPLIT_NAME.get(name, name).replace("-", " ").replace("_", " ").split()
