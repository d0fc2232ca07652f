"""Images, labels, augmentation, loaders and class word vectors; and a command line that checks, shows and fetches sets.

    python data.py check coco --root datasets/coco
    python data.py show voc2007 --view multi-scale
    python data.py download voc2007

Labels are ternary everywhere: 1 present, 0 absent, -1 ignore (VOC: only difficult objects of the class). What a -1
counts as is decided where a loss or a metric is computed, by `targets`.

    table = load_split("voc2007", "datasets/voc2007", "trainval")      # file names, labels, optionally boxes
    images = Images(table, size=448, view="square-crop", train=True)   # decoded, augmented, uint8
    loader = Loader(images, batch=16, workers=4)
    for batch in loader.epoch(0): normalise(batch.images.to(device))   # float on the device

Randomness: a training sample is a function of (seed, epoch, index) alone, whatever the number of workers and processes.
Dimension key: N images, C classes, B batch, S side of the network's square input.
"""

import argparse
import contextlib
import csv
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms.v2 import InterpolationMode, RandAugment
from torchvision.transforms.v2.functional import pad, resize
from tqdm import tqdm

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


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


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
    half-open, difficult objects and crowds included. origin: the file that lists the images; lines: where in it.
    """

    names: list
    files: list
    labels: np.ndarray
    classes: tuple
    boxes: list | None = None
    origin: str = ""
    lines: list | None = None

    def __len__(self):
        return len(self.names)

    def take(self, indices):
        """The rows `indices` as a new table."""
        names, files, boxes, lines = (
            column and [column[i] for i in indices] for column in (self.names, self.files, self.boxes, self.lines)
        )
        return Table(names, files, self.labels[indices], self.classes, boxes, self.origin, lines)

    def only(self, classes):
        """The columns `classes` (names), in that order, as a new table."""
        for name in classes:
            if name not in self.classes:
                raise UserError(f"--classes: {name!r} is no class of this set; it has {', '.join(self.classes)}")
            if classes.count(name) > 1:
                raise UserError(f"--classes: {name!r} is named twice")
        columns = [self.classes.index(name) for name in classes]
        boxes = self.boxes
        if boxes is not None:
            new = np.full(len(self.classes), -1)
            new[columns] = range(len(columns))
            boxes = [np.column_stack([new[b[:, 0].astype(int)], b[:, 1:]]).astype(np.float32) for b in boxes]
            boxes = [b[b[:, 0] >= 0] for b in boxes]
        table = Table(self.names, self.files, self.labels[:, columns], tuple(classes), boxes, self.origin, self.lines)
        return table

    def missing(self):
        """Rows whose image file does not exist. Folders are listed once each, which is fast on network disks too."""
        there = {}
        for folder in {os.path.dirname(file) for file in self.files}:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return [i for i, file in enumerate(self.files) if os.path.basename(file) not in there[os.path.dirname(file)]]

    def place(self, i):
        """Where row i is listed, for messages."""
        return f"{self.origin}, line {self.lines[i]}" if self.lines else self.origin


# ---------------------------------------------------------------------------------------------------------------------
# Sets: one function each from (root, split) to a Table

# The VOC layout: folder below VOCdevkit, class names.
VOC_SETS = {"toy": ("TOY", TOY_CLASSES), "voc2007": ("VOC2007", VOC_CLASSES), "voc2012": ("VOC2012", VOC_CLASSES)}
# Default splits to train and to test on; a .csv has CSV_SPLITS.
SPLITS = {
    "toy": ("train", "val"),
    "voc2007": ("trainval", "test"),
    "voc2012": ("train", "val"),
    "coco": ("train", "val"),
    "nuswide": ("train", "test"),
    "vg500": ("train", "test"),
}
CSV_SPLITS = ("train", "val", "test")
# Published sizes: images, positive cells, cells with only difficult objects (None: not published). COCO and NUS-WIDE:
# the images with a label.
KNOWN_SIZES = {
    ("toy", "train"): (5000, None, None),
    ("toy", "val"): (500, None, None),
    ("voc2007", "trainval"): (5011, 7306, 607),
    ("voc2007", "test"): (4952, 7013, 619),
    ("voc2012", "train"): (5717, None, None),
    ("voc2012", "val"): (5823, None, None),
    ("voc2012", "trainval"): (11540, None, None),
    ("voc2012", "test"): (10991, None, None),
    ("coco", "train2014"): (82081, None, None),
    ("coco", "val2014"): (40137, None, None),
    ("coco", "train2017"): (117266, None, None),
    ("coco", "val2017"): (4952, None, None),
    ("nuswide", "train"): (125449, None, None),
    ("nuswide", "test"): (83898, None, None),
    ("vg500", "train"): (82904, None, None),
    ("vg500", "test"): (10000, None, None),
}
COCO_ALL = {"train2014": 82783, "val2014": 40504, "train2017": 118287, "val2017": 5000}  # with those without a label


def set_name(text):
    """argparse type of --data: a set's name, or the path of a .csv file."""
    if text not in SPLITS and not text.endswith(".csv"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(SPLITS)}, or FILE.csv")
    return text


def default_splits(name):
    """(training split, test split) of a set."""
    return SPLITS.get(name, CSV_SPLITS[:2])


def default_root(name):
    """Where a set is looked for without --root; the paths in a .csv are relative to that file."""
    return str(Path("datasets", name)) if name in SPLITS else os.path.dirname(name) or "."


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
        "Pass the folder that holds VOCdevkit as --root"
        + ("." if name == "toy" else f", or fetch it: python data.py download {name} --root {root}")
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


def voc_split(name, root, split, id_list=None, boxes=False):
    """One split of a set in VOC layout -> Table.

    Labels come from ImageSets/Main for a named split. With `id_list` (a file of ids; segmentation ids are in no Main
    list) they come from Annotations/<id>.xml: any object that is not difficult -> 1, only difficult ones -> -1; where
    there is no Annotations folder, from Main's trainval. A split without any label file (VOC2012 test) is all -1.
    """
    base, classes = voc_folder(name, root), VOC_SETS[name][1]
    main = base / "ImageSets" / "Main"
    if not id_list and not (main / f"{split}.txt").is_file():
        raise UserError(f"{main}/{split}.txt: no such file; the splits there are {', '.join(voc_splits(base))}")
    source = id_list or main / f"{split}.txt"
    lines = read_ids(source)
    ids = list(lines)
    files = [str(base / "JPEGImages" / f"{i}.jpg") for i in ids]
    if not ids:
        raise UserError(f"{source}: no image ids in it")

    has_xml, object_boxes = (base / "Annotations").is_dir(), None
    if boxes and not has_xml:
        raise UserError(f"{base}/Annotations: no such folder, and boxes are asked for")
    if boxes or (id_list and has_xml):
        column = {c: j for j, c in enumerate(classes)}
        labels, object_boxes = np.zeros((len(ids), len(classes)), np.int8), []
        for row, image in zip(labels, ids, strict=True):
            objects = read_xml(base / "Annotations" / f"{image}.xml", classes)
            for cls, difficult, _ in objects:
                row[column[cls]] = 1 if not difficult or row[column[cls]] == 1 else -1
            object_boxes.append(np.array([(column[c], *box) for c, _, box in objects], np.float32).reshape(-1, 5))
        object_boxes = object_boxes if boxes else None
    if not id_list and not list(main.glob(f"*_{split}.txt")):
        labels = np.full((len(ids), len(classes)), -1, np.int8)
        say(f"{name} {split} has no label files: scores only")
    elif not (id_list and has_xml):
        labels = labels_from_main(base, "trainval" if id_list else split, ids, classes)
    return Table(ids, files, labels, classes, object_boxes, str(source), list(lines.values()))


def voc_splits(base):
    """Names of the splits in ImageSets/Main."""
    return sorted(p.stem for p in (base / "ImageSets" / "Main").glob("*.txt") if "_" not in p.stem)


def coco_split(root, split, boxes=False):
    """COCO's detection annotations -> Table of all images. split: "train2014" ..., or "train", "val" (2014 first).

    Classes are in the order of their category ids. A class counts as present by any annotation, crowds too.
    """
    names = [split] if split[-4:].isdigit() else [f"{split}2014", f"{split}2017"]
    paths = [Path(root, "annotations", f"instances_{name}.json") for name in names]
    there = [(name, path) for name, path in zip(names, paths, strict=True) if path.is_file()]
    if not there:
        raise UserError(
            f"--data coco: no {' or '.join(map(str, paths))}. Expected:\n  {root}/{names[0]}/*.jpg\n  {paths[0]}\n"
            f"Pass the folder that holds annotations as --root, or fetch it: python data.py download coco --root {root}"
        )
    name, path = there[0]
    content = cached(path, read_coco)
    files = [f"{root}/{name}/{file}" for file in content["files"].tolist()]
    ends = np.cumsum(content["counts"])[:-1]
    rows = np.split(content["boxes"], ends) if boxes else None
    classes = tuple(content["classes"].tolist())
    return Table([Path(f).stem for f in files], files, content["labels"], classes, rows, str(path))


def read_coco(path):
    """instances_*.json -> dict of arrays: files (N,), classes (C,), labels (N, C), boxes (M, 5), counts (N,)."""
    collecting = gc.isenabled()
    gc.disable()  # a million small lists: the collector would go through them again and again
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        column = {category["id"]: j for j, category in enumerate(categories)}
        row = {image["id"]: i for i, image in enumerate(content["images"])}
        files = np.array([image["file_name"] for image in content["images"]], np.str_)
        annotations = content["annotations"]
        at = np.empty((len(annotations), 2), np.int64)
        boxes = np.empty((len(annotations), 5), np.float32)
        for k, annotation in enumerate(annotations):
            image, category = annotation["image_id"], annotation["category_id"]
            if image not in row or category not in column:
                what = f"image {image}" if image not in row else f"category {category}"
                raise UserError(f"{path}: annotation {annotation['id']} is of {what}, which the file does not list")
            x, y, w, h = annotation["bbox"]
            at[k] = row[image], column[category]
            boxes[k] = column[category], x, y, x + w, y + h
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a whole JSON file ({error}); fetch it again") from None
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not COCO's instances ({type(error).__name__}: {error})") from None
    finally:
        if collecting:
            gc.enable()
    labels = np.zeros((len(files), len(categories)), np.int8)
    labels[at[:, 0], at[:, 1]] = 1
    order = at[:, 0].argsort(kind="stable")
    counts = np.bincount(at[:, 0], minlength=len(files))
    classes = np.array([category["name"] for category in categories], np.str_)
    return {"files": files, "classes": classes, "labels": labels, "boxes": boxes[order], "counts": counts}


def cached(path, read):
    """read(path) -> dict of arrays, kept in the user's cache folder for this path, size and time of change."""
    path = Path(path)
    stamp = path.stat()
    key = f"{path.resolve()}|{stamp.st_size}|{stamp.st_mtime_ns}|{read.__name__}|1"
    kept = cache_folder() / f"labels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(kept) as content:
        return dict(content)
    say(f"reading {path} (once)")
    content = read(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(kept) as file:
            np.savez(file, **content)
    except (OSError, UserError) as error:
        say(f"WARNING: its labels could not be kept for the next run: {error}")
    return content


def nuswide_split(root, split):
    """NUS-WIDE's 81 concepts -> Table of the images with a label. split: "train" or "test"."""
    kind = split.capitalize()
    listed = Path(root, "ImageList", f"{kind}Imagelist.txt")
    concepts = Path(root, "Concepts81.txt")
    if not (listed.is_file() and concepts.is_file()):
        raise UserError(
            f"--data nuswide: no {concepts if listed.is_file() else listed}. Expected:\n"
            f"  {root}/Flickr/<folder>/*.jpg\n  {root}/ImageList/{{Train,Test}}Imagelist.txt\n  {root}/Concepts81.txt\n"
            f"  {root}/Groundtruth/TrainTestLabels/Labels_<concept>_{{Train,Test}}.txt"
        )
    lines = read_lines(listed)
    names = [name.replace("\\", "/") for _, name in lines]
    classes = tuple(name for _, name in read_lines(concepts))
    labels = np.empty((len(names), len(classes)), np.int8)
    for j, concept in enumerate(classes):
        path = Path(root, "Groundtruth", "TrainTestLabels", f"Labels_{concept}_{kind}.txt")
        try:
            column = np.array(path.read_bytes().split())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror.lower()}") from None
        if len(column) != len(names):
            raise UserError(f"{path} has {len(column)} labels, {listed} {len(names)} images")
        odd = np.flatnonzero((column != b"0") & (column != b"1"))
        if len(odd):
            found = column[odd[0]].decode(errors="replace")
            raise UserError(f"{path}, line {odd[0] + 1}: expected 0 or 1, found {found!r}")
        labels[:, j] = column == b"1"
    files = [f"{root}/Flickr/{name}" for name in names]
    table = Table(names, files, labels, classes, None, str(listed), [number for number, _ in lines])
    return table.take(np.flatnonzero(labels.any(1)))


def vg500_split(root, split):
    """Visual Genome's 500 most frequent labels -> Table. The files do not name the classes: they are "0" to "499"."""
    listed, index = Path(root, f"{split}_list_500.txt"), Path(root, "vg_category_500_labels_index.json")
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"--data vg500: no {index}. Expected:\n"
            f"  {root}/VG_100K/*.jpg\n  {root}/{{train,test}}_list_500.txt\n  {index}"
        ) from None
    except ValueError as error:
        raise UserError(f"{index}: not a whole JSON file ({error})") from None
    ids = read_ids(listed)
    labels = np.zeros((len(ids), 500), np.int8)
    for row, (name, line) in zip(labels, ids.items(), strict=True):
        if name not in known:
            raise UserError(f"{listed}, line {line}: {index} has no labels of {name}")
        for k in known[name]:
            if not 0 <= k < 500:
                raise UserError(f"{index}: {name} has class {k}; expected 0 to 499")
            row[k] = 1
    files = [f"{root}/VG_100K/{name}" for name in ids]
    return Table(list(ids), files, labels, tuple(map(str, range(500))), None, str(listed), list(ids.values()))


def csv_split(path, split, classes=None):
    """Your own data: a file with the columns image, split, labels -> Table of one split.

    image: a path relative to the file; split: train, val or test; labels: class names joined with "|", or nothing
    where no class is present. The classes are all names that occur in the file, sorted; or `classes`, whether they
    occur or not, and other names count as absent.
    """
    rows, seen, text = [], {}, Path(path)
    try:
        with open(text, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [c for c in ("image", "split", "labels") if c not in (reader.fieldnames or ())]
            if absent:
                raise UserError(f"{path}, line 1: no column {absent[0]!r}; expected image,split,labels")
            for row in reader:
                rows.append((reader.line_num, *(row[c] for c in ("image", "split", "labels"))))
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror.lower()}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file ({error})") from None
    for number, image, part, names in rows:
        where = f"{path}, line {number}"
        if not image or names is None:
            raise UserError(f"{where}: expected three columns image,split,labels")
        if part not in CSV_SPLITS:
            raise UserError(f"{where}: unknown split {part!r}; expected {', '.join(CSV_SPLITS)}")
        if image in seen:
            raise UserError(f"{where}: image {image} was already listed in line {seen[image]}")
        if os.path.isabs(image) or os.path.normpath(image).split(os.sep)[0] == "..":
            raise UserError(f"{where}: image {image} is outside the file's folder; give a path below it")
        if names and not all(name.strip() for name in names.split("|")):
            raise UserError(f"{where}: an empty label in {names!r}")
        seen[image] = number
    labels = [[name.strip() for name in names.split("|") if name] for *_, names in rows]
    found = {name for names in labels for name in names}
    if classes and set(classes) - found:
        say(f"WARNING: {path} never names {', '.join(sorted(set(classes) - found))}")
    classes = tuple(classes or sorted(found))
    chosen = [i for i, row in enumerate(rows) if row[2] == split]
    if not chosen:
        there = ", ".join(sorted({row[2] for row in rows})) or "none"
        raise UserError(f"{path}: no image of split {split!r}; the splits there are: {there}")
    table = np.zeros((len(chosen), len(classes)), np.int8)
    column = {name: j for j, name in enumerate(classes)}
    for row, i in zip(table, chosen, strict=True):
        row[[column[name] for name in labels[i] if name in column]] = 1
    images = [rows[i][1] for i in chosen]
    files = [os.path.join(os.path.dirname(path), image) for image in images]
    return Table(images, files, table, classes, None, str(path), [rows[i][0] for i in chosen])


def read_split(name, root, split, id_list=None, boxes=False, classes=None):
    """One split of any set -> Table with all its classes (a .csv: with `classes`), whether its image files exist or
    not. UserError names the file (and line)."""
    if name in VOC_SETS:
        return voc_split(name, root, split, id_list, boxes)
    if id_list:
        raise UserError(f"--train-list and --val-list work for {', '.join(VOC_SETS)}; {name} has none")
    if name == "coco":
        return coco_split(root, split, boxes)
    if boxes:
        raise UserError(f"{name} has no boxes, and they are asked for")
    if name == "nuswide":
        return nuswide_split(root, split)
    return vg500_split(root, split) if name == "vg500" else csv_split(name, split, classes)


def load_split(name, root, split, *, id_list=None, boxes=False, classes=None, coco_images="all"):
    """One split of any set, every image file there -> Table. UserError names the file (and line) of what is wrong.

    id_list: a file of ids instead of the split (VOC layout); classes: only these, in this order; coco_images:
    "labelled" leaves out COCO's images without an object.
    """
    table = read_split(name, root, split, id_list, boxes, classes)
    missing = table.missing()
    if missing:
        raise UserError(
            f"{table.place(missing[0])}: no image {table.files[missing[0]]} "
            f"({len(missing):,} of {len(table):,} missing)"
        )
    if not id_list:
        for line in unlike_published(name, split, table):
            say(f"WARNING: {line}")
    if name == "coco" and coco_images == "labelled":
        table = table.take(np.flatnonzero(table.labels.any(1)))
    return table.only(classes) if classes else table


def unlike_published(name, split, table):
    """A line for every number of a whole split that is not the published one."""
    rows = (len(table), int((table.labels == 1).sum()), int((table.labels == -1).sum()))
    known = KNOWN_SIZES.get((name, split), (None,) * 3)
    if name == "coco":
        split = Path(table.origin).stem.removeprefix("instances_")
        known = KNOWN_SIZES.get((name, split), (None,))[:1] + (COCO_ALL.get(split),)
        rows = (int(table.labels.any(1).sum()), len(table))
    whats = ("labelled images", "images") if name == "coco" else ("images", "positive labels", "difficult-only labels")
    for what, have, want in zip(whats, rows, known, strict=True):
        if want is not None and have != want:
            yield f"{name} {split} has {have:,} {what}, the published split {want:,}"


def load(args, boxes=False):
    """Training and test table of the parsed command line (common.py's arguments), --limit applied; None and the test
    table with --evaluate. boxes: the training table's objects have them."""
    root = args.root or default_root(args.data)
    if args.data == "toy":
        draw_toy(root)
    options = {"coco_images": args.coco_images}
    if args.classes:
        options["classes"] = [line for _, line in read_lines(args.classes)]
    test = load_split(args.data, root, args.test_split, id_list=args.val_list, **options)
    if args.evaluate:
        return None, limited(test, args.limit)
    train = load_split(args.data, root, args.train_split, id_list=args.train_list, boxes=boxes, **options)
    shared = set(train.files) & set(test.files)
    if shared:
        raise UserError(f"{len(shared)} images are both in training and in test, {min(shared)} for one")
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
# the same view. Papers resize to a frame, crop there and resize again: we cut whole source pixels and resize once,
# which shifts a crop by at most half a source pixel and interpolates once instead of twice.


class View(NamedTuple):
    """Part of the source image in source pixels (floats; outside the image is black), and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


def randint(high):
    """Uniform integer in [0, high) from torch's global generator (seeded per sample)."""
    return int(torch.randint(high, ()))


def whole(width, height, size):
    """The whole image: tests of all recipes but OASS's; SADCL's first stage in training."""
    return View(0, 0, width, height, False)


def whole_or_mirrored(width, height, size):
    """The whole image, mirrored every other time."""
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


def canvas(width, height, size):
    """OASS: longer side resized to a random integer in [320, 640] (at 512), flip, placed anywhere on a square canvas of
    side S: shown whole where it fits, cropped where it is larger."""
    scale = (round(size * 0.625) + randint(round(size * 1.25) - round(size * 0.625) + 1)) / max(width, height)
    x, y = (randint(abs(round(side * scale) - size) + 1) for side in (width, height))
    left = x if width * scale > size else -x
    top = y if height * scale > size else -y
    return View(left / scale, top / scale, (left + size) / scale, (top + size) / scale, randint(2) == 1)


def canvas_corner(width, height, size):
    """OASS's test: unresized in the top left corner of the canvas; shrunk to it when longer."""
    side = max(width, height, size)
    return View(0, 0, side, side, False)


# Name -> view in training, view in testing
VIEWS = {
    "whole": (whole, whole),
    "resize": (whole_or_mirrored, whole),
    "square-crop": (square_crop, whole),
    "multi-scale": (multi_scale_crop, whole),
    "canvas": (canvas, canvas_corner),
}
INTERPOLATION = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def pixel_grid(low, high, length, size):
    """One axis of a view -> (first, end) source pixels to take, (first, end) pixels of the square input to fill."""
    scale, first, end = size / (high - low), max(0, round(low)), min(length, round(high))
    at = [min(max(round((edge - low) * scale), 0), size) for edge in (max(low, 0), min(high, length))]
    first = min(first, length - 1)
    return first, max(end, first + 1), at[0], max(at[1], at[0] + 1)


def apply_view(image, view, size, interpolation="bicubic"):
    """uint8 (3, H, W) -> uint8 (3, S, S): the view, resized with antialiasing as Pillow does it; and its inside, the
    rectangle (left, top, right, bottom) of the output that shows the image. Outside is 0."""
    x0, x1, left, right = pixel_grid(view.left, view.right, image.shape[2], size)
    y0, y1, top, bottom = pixel_grid(view.top, view.bottom, image.shape[1], size)
    shown = resize(image[:, y0:y1, x0:x1], [bottom - top, right - left], INTERPOLATION[interpolation], antialias=True)
    if (left, top, right, bottom) != (0, 0, size, size):
        shown = pad(shown, [left, top, size - right, size - bottom])
    if view.flip:
        return shown.flip(2), (size - right, top, size - left, bottom)
    return shown, (left, top, right, bottom)


def apply_view_to_boxes(boxes, view, size):
    """(n, 5) source pixels -> (m, 5) pixels of the view, clipped; boxes that left it are dropped."""
    x = (boxes[:, (1, 3)] - view.left) * size / (view.right - view.left)
    y = (boxes[:, (2, 4)] - view.top) * size / (view.bottom - view.top)
    if view.flip:
        x = size - x[:, ::-1]
    moved = np.stack([boxes[:, 0], x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    moved[:, 1:] = moved[:, 1:].clip(0, size)
    return moved[(moved[:, 3] > moved[:, 1]) & (moved[:, 4] > moved[:, 2])]


def cutout_and_randaugment(image):
    """SADCL's first stage: a square of half the side in a random colour, its centre anywhere; then twice, each time
    with probability 1/2, one of RandAugment's operations at a magnitude of 1 to 9. uint8 (3, S, S) -> the same."""
    size, image = image.shape[1], image.clone()
    x, y, half = randint(size), randint(size), size // 4
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = torch.randint(256, (3, 1, 1))
    for _ in range(2):
        if randint(2):
            image = RandAugment(num_ops=1, magnitude=1 + randint(9))(image)
    return image


PIXELS = {"none": None, "cutout-randaugment": cutout_and_randaugment}


def read_image(path):
    """Decode to uint8 (3, H, W). Grey, palette and CMYK are converted; EXIF rotation is ignored: boxes refer to stored
    pixels. (torchvision's own decoder is a little faster, but on its way out.)"""
    try:
        with Image.open(path) as image:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace the file or take it out of the list") from None


def read_photo(path):
    """Decode an image of a user's to uint8 (3, H, W): any mode (transparent parts become white, 16-bit grey keeps its
    upper 8), EXIF rotation honoured, the first frame where there are several."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                grey = np.asarray(image, np.float64)
                scale = 256 if image.mode[0] == "I" and grey.max() > 255 else 1
                image = Image.fromarray((grey / scale).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Batch(NamedTuple):
    """images (B, 3, S, S) uint8, labels (B, C) int8 ternary, index (B,) rows of the table, boxes: list of (n, 5) or
    None, inside (B, 4): the rectangle of each input that shows the image, or None where all of them do."""

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    boxes: list | None
    inside: torch.Tensor | None


def mixed_seed(*numbers):
    """One 64-bit seed of several non-negative integers; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Images(Dataset):
    """Item (epoch, index) -> (uint8 (3, S, S), labels (C,), index, boxes (n, 5) or None, inside or None).

    view: a name in VIEWS; pixels: one in PIXELS, for training only, and not with boxes, which would stay behind.
    """

    def __init__(self, table, size, view="resize", interpolation="bicubic", pixels="none", train=False, seed=0):
        if pixels != "none" and table.boxes:
            raise ValueError(f"pixels={pixels!r} moves things, and boxes do not follow")
        self.table, self.size, self.interpolation = table, size, interpolation
        self.view, self.pixels = VIEWS[view][0 if train else 1], PIXELS[pixels] if train else None
        self.train, self.seed = train, seed

    def __getitem__(self, key):
        epoch, index = key
        image = read_image(self.table.files[index])
        height, width = image.shape[1:]
        with torch.random.fork_rng(devices=[]):
            if self.train:
                torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            view = self.view(width, height, self.size)
            image, inside = apply_view(image, view, self.size, self.interpolation)
            if self.pixels:
                image = self.pixels(image)
        boxes = self.table.boxes and apply_view_to_boxes(self.table.boxes[index], view, self.size)
        inside = None if inside == (0, 0, self.size, self.size) else inside
        return image, self.table.labels[index], index, boxes, inside


def collate(items):
    """List of Images' items -> Batch; images in channels-last memory, as they come and as the networks want them."""
    images, labels, index, boxes, inside = zip(*items, strict=True)
    size = images[0].shape[1]
    images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    boxes = None if boxes[0] is None else [torch.from_numpy(b) for b in boxes]
    inside = torch.tensor([i or (0, 0, size, size) for i in inside]) if any(inside) else None
    return Batch(images, torch.from_numpy(np.stack(labels)), torch.tensor(index), boxes, inside)


def box_rows(boxes):
    """List of B tensors (n, 5), a Batch's boxes -> one (M, 6) with the image's place in the batch in front."""
    image = torch.cat([torch.full((len(b), 1), float(i)) for i, b in enumerate(boxes)])
    return torch.cat([image, torch.cat(boxes)], 1)


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


def normalise(images, inside=None):
    """uint8 (B, 3, H, W) -> float32, ImageNet's mean and deviation, channels last; on whatever device they are.

    inside (B, 4): what lies outside these rectangles (left, top, right, bottom) becomes 0, as padding after
    normalisation would be.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):  # numbers: a tensor would stall a GPU
        channel.sub_(255 * mean).div_(255 * std)
    if inside is not None:
        left, top, right, bottom = inside.to(images.device).T[:, :, None]  # (B, 1) each
        x, y = (torch.arange(n, device=images.device) for n in (images.shape[3], images.shape[2]))
        seen = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]  # (B, H, W)
        images.mul_(seen[:, None])
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
            raise UserError(
                f"--glove {path}: no vector for {missing[0]!r} of class {name!r}. Rename the class to words it has, "
                "add a row of 300 numbers for it, or take --glove hash (vectors without meaning)"
            )
        vectors.append(np.mean([table[word] for word in words], 0))
    return np.stack(vectors).astype(np.float32)


def name_words(name):
    """Lower-case words of a class name: "diningtable" -> ["dining", "table"], "hot-dog" -> ["hot", "dog"]."""
    name = name.lower()
    return SPLIT_NAME.get(name, name).replace("-", " ").replace("_", " ").split()


# ---------------------------------------------------------------------------------------------------------------------
# python data.py check NAME: what is wrong with a folder, all of it, before an epoch is lost


def splits_of(name, root):
    """The splits of a set that lie below root."""
    if name in VOC_SETS:
        return voc_splits(voc_folder(name, root))
    if name == "coco":
        found = sorted(p.stem.removeprefix("instances_") for p in Path(root, "annotations").glob("instances_*.json"))
        return found or list(SPLITS[name])
    if name in SPLITS:
        return list(SPLITS[name])
    with open(name, encoding="utf-8-sig", newline="") as file:
        there = {row.get("split") for row in csv.DictReader(file)}
    return [split for split in CSV_SPLITS if split in there] or list(CSV_SPLITS[:1])


def has_boxes(name, root, split):
    """Whether the objects of a split have boxes."""
    if name not in VOC_SETS:
        return name == "coco"
    base = voc_folder(name, root)
    return (base / "Annotations").is_dir() and any((base / "ImageSets" / "Main").glob(f"*_{split}.txt"))


def check(args):
    """Print what lies below --root and everything that is wrong with it; returns 1 if something is, else 0."""
    root, tables, problems = args.root or default_root(args.data), {}, []
    try:
        splits = args.split or splits_of(args.data, root)
    except (UserError, OSError) as error:
        splits, problems = [], [str(error)]
    for split in splits:
        try:
            table = read_split(args.data, root, split, boxes=has_boxes(args.data, root, split))
        except UserError as error:
            problems.append(str(error))
            continue
        present, difficult, tables[split] = table.labels == 1, (table.labels == -1).sum(), table
        print(
            f"{split}: {len(table):,} images, {present.sum():,} positive and {difficult:,} difficult-only labels, "
            f"{present.sum(1).mean():.2f} positive an image, {(~present.any(1)).sum():,} images without any"
        )
        problems += unlike_published(args.data, split, table)
    for a, b in itertools.combinations(tables, 2):
        shared = set(tables[a].files) & set(tables[b].files)
        if shared and {a, b} not in ({"trainval", "train"}, {"trainval", "val"}):
            problems.append(f"{len(shared):,} images are both in {a} and in {b}, {min(shared)} for one")
    if tables:
        rows = next(iter(tables.values())).classes
        print("\npositive images (with only difficult objects) per class")
        print_columns(
            ["class", *tables],
            [
                [name] + [f"{(t.labels[:, j] == 1).sum()} ({(t.labels[:, j] == -1).sum()})" for t in tables.values()]
                for j, name in enumerate(rows)
            ],
        )
        sizes, broken = image_sizes(tables.values(), args.workers)
        problems += broken
        if any(table.boxes for table in tables.values()):
            print("\nshift of the objects' centres from the image's (OASS Fig. 2), pixels at a longer side of 512")
            print_columns(["class", "objects", "mean |dx|", "mean |dy|", "var dx", "var dy"], shifts(tables, sizes))
    print("\n" + "\n".join(f"PROBLEM: {text}" for text in problems) if problems else "\nnothing wrong")
    return int(bool(problems))


def image_sizes(tables, workers):
    """Decode every image -> ({file: (width, height)}, one line for each that is missing or cannot be decoded)."""
    places = {file: table.place(i) for table in tables for i, file in enumerate(table.files)}
    missing = {table.files[i] for table in tables for i in table.missing()}

    def size(file):
        try:
            return None if file in missing else tuple(read_image(file).shape[:0:-1])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:  # decoders leave Python's lock
        found = dict(zip(places, tqdm(pool.map(size, places), "decoding", len(places)), strict=True))
    broken = [f"{places[f]}: no image {f}" if s is None else s for f, s in found.items() if not isinstance(s, tuple)]
    return {f: s for f, s in found.items() if isinstance(s, tuple)}, broken


def shifts(tables, sizes):
    """Rows (class, objects, mean |dx|, mean |dy|, variance of dx, of dy) over the boxes of all tables' images."""
    seen, parts = set(), []
    for table in tables.values():
        for file, boxes in zip(table.files, table.boxes or (), strict=bool(table.boxes)):
            if file in sizes and file not in seen:
                seen.add(file)
                width, height = sizes[file]
                dx, dy = (boxes[:, 1] + boxes[:, 3] - width) / 2, (boxes[:, 2] + boxes[:, 4] - height) / 2
                parts.append(np.column_stack([boxes[:, 0], 512 / max(width, height) * np.column_stack([dx, dy])]))
    rows = np.concatenate([*parts, np.empty((0, 3))])
    for j, name in enumerate(next(iter(tables.values())).classes):
        of = rows[rows[:, 0] == j, 1:]
        values = [*np.abs(of).mean(0), *of.var(0)] if len(of) else [math.nan] * 4
        yield [name, str(len(of)), *(f"{v:.0f}" if v == v else "-" for v in values)]


def print_columns(head, rows):
    """Aligned text: the first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=True))]))


# ---------------------------------------------------------------------------------------------------------------------
# python data.py show NAME: a picture of augmented samples


def show(args):
    """Write a grid: rows are images, the first column as tests see them, the others as training does, with boxes."""
    root = args.root or default_root(args.data)
    if args.data == "toy":
        draw_toy(root)
    split = args.split or default_splits(args.data)[0]
    with_boxes = args.pixels == "none" and has_boxes(args.data, root, split)
    table = limited(load_split(args.data, root, split, boxes=with_boxes), args.count)
    size, tile = args.image_size, 190
    picture = Image.new("RGB", (5 * (tile + 10), len(table) * (tile + 24)), "white")
    for column in range(5):
        images = Images(table, size, args.view, args.interpolation, args.pixels, train=column > 0, seed=args.seed)
        for row in range(len(table)):
            pixels, labels, _, boxes, _ = images[column, row]
            shown, top = Image.fromarray(pixels.permute(1, 2, 0).numpy()), row * (tile + 24)
            for box in boxes if boxes is not None else ():
                ImageDraw.Draw(shown).rectangle([float(v) for v in box[1:]], outline="yellow", width=size // 100 + 1)
            picture.paste(shown.resize((tile, tile), Image.BICUBIC), (column * (tile + 10), top))
            if column == 0:
                names = [n + " (difficult)" * int(y < 0) for n, y in zip(table.classes, labels, strict=True) if y]
                text = f"{table.names[row]}: {', '.join(names) or 'nothing'}"
                ImageDraw.Draw(picture).text((4, top + tile + 2), text, "black", ImageFont.load_default(13))
    with write_atomically(args.out) as file:
        picture.save(file, "PNG")
    print(f"{args.out}: first column as in a test, then four epochs of --view {args.view} --pixels {args.pixels}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# python data.py download NAME


def archives(name):
    """(URL, MD5 sum or None, what to read before use) of a set's archives."""
    if name == "coco":
        pages = "https://cocodataset.org/#termsofuse (annotations CC BY 4.0; images under Flickr's terms)"
        files = ("zips/train2014.zip", "zips/val2014.zip", "annotations/annotations_trainval2014.zip")
        return [(f"http://images.cocodataset.org/{file}", None) for file in files], pages
    keys = ("2007", "2007-test") if name == "voc2007" else ("2012",)
    return [(DATASET_YEAR_DICT[k]["url"], DATASET_YEAR_DICT[k]["md5"]) for k in keys], (
        "http://host.robots.ox.ac.uk/pascal/VOC/ (images under Flickr's terms)"
    )


def download(args):
    """Fetch and unpack a set, archive by archive: what is whole already is not fetched again."""
    if args.data == "glove":
        print("terms: https://nlp.stanford.edu/projects/glove/ (Public Domain Dedication and License)", flush=True)
        print(f"done: {glove_file()}")
        return 0
    root = Path(args.root or default_root(args.data))
    found, pages = archives(args.data)
    print(f"terms: {pages}")
    for url, md5 in found:
        path = root / url.rsplit("/", 1)[1]
        done = root / f"{path.name}.unpacked"
        if done.exists():
            print(f"{path.name}: is unpacked")
            continue
        try:
            root.mkdir(parents=True, exist_ok=True)
            if is_whole(path, md5):
                print(f"{path.name}: is here")
            else:
                partial = f"{path}.part"
                torch.hub.download_url_to_file(url, partial)
                if not is_whole(partial, md5):
                    raise UserError(f"{url} came broken; it is kept as {partial}. Try again later")
                os.replace(partial, path)
            print(f"unpacking {path}", flush=True)
            extract_archive(str(path), str(root))
            done.touch()
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise UserError(f"{url} could not be fetched into {root}: {error}") from None
    print(f"done: --data {args.data} --root {root}   (the archives there may be deleted)")
    return 0


def is_whole(path, md5):
    """Whether an archive is there and complete: by its checksum where one is published, else by its index, which a zip
    has at its end."""
    if md5:
        return check_integrity(str(path), md5)
    return zipfile.is_zipfile(path)


def arguments():
    """Parser of `python data.py`."""
    parser = argparse.ArgumentParser(description="Check, show and fetch data sets.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(run, help, kind=set_name, **options):
        sub = commands.add_parser(run.__name__, help=help, allow_abbrev=False, formatter_class=Help)
        sub.add_argument("data", metavar="NAME", type=kind, help=options.pop("names", "set, or FILE.csv"), **options)
        sub.add_argument("--root", metavar="DIR", help="its folder (default: datasets/NAME)")
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(check, "count, decode and compare everything; exit code 1 if something is wrong")
    add("--split", nargs="+", help="only these splits (default: all that are there)")
    add("-j", "--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    add = command(show, "picture of augmented samples with their boxes")
    add("--split", help="split to take them from (default: the one to train on)")
    add("--view", default="square-crop", choices=tuple(VIEWS), help="geometry, as in the recipes")
    add("--pixels", default="none", choices=tuple(PIXELS), help="and colours (then without boxes)")
    add("--interpolation", default="bicubic", choices=tuple(INTERPOLATION), help="of the resizing")
    add("--image-size", type=int, default=448, help="side of the network's input")
    add("--count", type=int, default=6, help="number of images")
    add("--seed", type=int, default=0, help="of the augmentation")
    add("--out", default="samples.png", help="the picture")
    fetched = ("voc2007", "voc2012", "coco", "glove")
    command(download, f"fetch {', '.join(fetched)}", str, choices=fetched, names=", ".join(fetched))
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
