"""The plumbing under the four scripts, about which no paper has an opinion: command line, processes, backbone,
precision, checkpoints, the run folder, pictures. The training loop itself stands in each script:

    args = common.parse(parser, argv, RECIPE, "srdl")      # resolved: flag > checkpoint > recipe > default
    common.launch(main, args)                              # one process per device, or torchrun's

    def main(args):
        env = common.start(args)
        train, test = common.load_data(args, env)
        run = common.Run(args, env, model, train, test)
        net = run.prepare(optimizer, schedule)             # DDP, EMA, precision, --init-from, --resume
        for epoch in run.epochs():
            for images, labels in run.batches(epoch):
                with run.autocast(): ...
                run.update(loss, L_one=..., L_two=...)     # backward and, after --accumulate parts, the step
            run.finish_epoch(epoch)                        # test, log.jsonl, last.pt, best.pt
"""

import argparse
import contextlib
import copy
import csv
import datetime
import errno
import fcntl
import functools
import importlib.util
import io
import json
import logging
import math
import multiprocessing.util
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import eval as metrics
from data import UserError, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# Command line

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "mobilenet_v2")


def arguments(description):
    """Parser with the flags that all four scripts share. Defaults that depend on --data come from the RECIPE."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=data.Help)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", type=data.set_name, help=f"{', '.join(data.SPLITS)}, or your own FILE.csv")
    add("--root", metavar="DIR", help="its folder (default: datasets/<data>; toy is drawn there)")
    add("--train-split", help="split to train on")
    add("--test-split", help="split to test on")
    add("--train-list", metavar="FILE", help="train on the image ids in FILE (VOC layout only)")
    add("--val-list", metavar="FILE", help="test on the image ids in FILE (likewise)")
    add("--classes", metavar="FILE", help="use only the classes named in FILE, one a line, in that order")
    add("--difficult-train", choices=("negative", "positive"), help="what difficult objects count as in training")
    add("--difficult-test", choices=("ignore", "negative", "positive"), help="and when testing")
    add("--coco-images", choices=("labelled", "all"), default="labelled", help="of COCO: which images")
    add("--limit", type=at_least(1), metavar="N", help="first N images of train and of test after a seeded shuffle")
    add(
        "-j",
        "--workers",
        type=at_least(0),
        default=default_workers(),
        help="image loading processes per training process",
    )

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, help="network under the head")
    add("--weights", help="v1, v2 or swsl (pretrained, downloaded once), none, or the PATH of a state dict")
    add("--image-size", type=at_least(1), help="side of the square input in pixels")
    add("--baseline", action="store_true", help="the plain backbone (global average pooling, linear) instead")

    add = parser.add_argument_group("training").add_argument
    add("-b", "--batch-size", type=at_least(1), help="images per optimizer step, over all processes")
    add("--accumulate", type=at_least(1), default=1, metavar="N", help="compute a step in N parts, to save memory")
    add("--epochs", type=at_least(1), help="length; schedules given in epochs scale with it")
    add("--lr", type=float, help="learning rate")
    add("--weight-decay", type=float, help="weight decay")
    add("--ema-decay", type=float, default=0.0, help="report a moving average of the weights; 0: none")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision; auto: bf16 where it is fast")
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation")
    add("--eval-every", type=at_least(1), default=1, metavar="N", help="test every N epochs, and after the last")
    add("--threshold", type=float, default=0.5, help="probability from which a class counts as predicted")

    add = parser.add_argument_group("run").add_argument
    add("--gpus", metavar="0,1", help="GPUs, one process each; 'cpu' or 'cpu,cpu' works too (default: the first GPU)")
    add("--sync-bn", action="store_true", help="BatchNorm over all GPUs")
    add("--out", metavar="DIR", help="run folder (default: runs/<method>/<data>/<time>; --predict: .../predict/<time>)")
    add("--resume", nargs="?", const="auto", metavar="RUN", help="continue a run (folder or last.pt; auto: newest)")
    add("--init-from", metavar="RUN", help="start from another run's weights; class rows are matched by name")
    add("--checkpoint", metavar="FILE", help="for the three below: last.pt or best.pt, or the run folder")
    add("--evaluate", action="store_true", help="test it and stop")
    add("--predict", nargs="+", metavar="IMG", help="label images, or those in folders: predictions.csv and pictures")
    add("--export", metavar="FILE", help="write its network to FILE.pt2 (torch.export) or FILE.onnx")
    return parser


def at_least(low):
    """argparse type: an integer from `low`."""

    def integer(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more")
        return int(text)

    return integer


def recipe_of(name, recipe):
    """The set whose recipe serves `name`: its own, voc2007's for voc2012, else coco's."""
    return name if name in recipe else "voc2007" if name == "voc2012" else "coco"


def default_workers():
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def parse(parser, argv, recipe, method):
    """Parse and resolve: a flag beats the checkpoint's configuration, which beats the recipe, which beats the default.

    Adds method, recipe (the data set whose numbers were taken), command, given (flags that were typed). Wrong
    combinations end as argparse errors do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--data", default="toy")
    name = scan.parse_known_args(argv)[0].data
    parser.set_defaults(**recipe[recipe_of(name, recipe)])  # so that --help prints this data set's numbers
    parser.set_defaults(**dict(zip(("train_split", "test_split"), data.default_splits(name), strict=True)))
    flags = [action.dest for action in parser._actions]
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(flags))))
    given = {k: typed[k] for k in flags if typed.get(k) is not None}

    try:
        stored, origin = stored_configuration(method, given)
    except UserError as error:
        parser.error(str(error))
    values = vars(parser.parse_args([])) | stored
    if stored and "data" in given and given["data"] != stored["data"]:  # the checkpoint's place does not serve here
        values |= {"train_split": parser.get_default("train_split"), "test_split": parser.get_default("test_split")}
        values |= dict.fromkeys(("root", "train_list", "val_list", "classes"))
    args = argparse.Namespace(**(values | given))
    if args.data.endswith(".csv") and args.root:
        parser.error("--root has no effect with a .csv: its image paths are relative to the file")
    args.method, args.recipe, args.given = method, recipe_of(args.data, recipe), sorted(given)
    args.command = shlex.join([f"{method}.py", *argv])
    args.resume = str(origin) if origin and args.resume else None
    args.checkpoint = str(origin) if args.checkpoint else None
    if args.resume:
        args.out = args.out or str(origin.parent)
        if Path(args.out).resolve() != origin.parent.resolve():
            parser.error(f"--resume goes on in {origin.parent}; --init-from starts another run from its weights")
    kind = "predict" if args.predict else Path(args.data).stem
    args.out = args.out or str(Path("runs", method, kind, time.strftime("%Y%m%d-%H%M%S")))
    uses = [f"--{name}" for name in ("evaluate", "predict", "export") if getattr(args, name)]
    if len(uses) > 1:
        parser.error(f"{uses[0]} goes without {uses[1]}")
    if bool(uses) != bool(args.checkpoint):
        parser.error(f"{(uses or ['--evaluate, --predict or --export'])[0]} and --checkpoint FILE belong together")
    if len({"resume", "init_from", "checkpoint"} & given.keys()) > 1 and (args.resume or args.checkpoint):
        parser.error("--resume, --init-from and --checkpoint exclude each other: each says where the weights come from")
    if args.export and Path(args.export).suffix not in (".pt2", ".onnx"):
        parser.error(f"--export {args.export}: expected a name that ends in .pt2 or .onnx")
    for flag, good in (
        ("ema_decay", 0 <= args.ema_decay < 1),
        ("threshold", 0 < args.threshold < 1),
        ("lr", args.lr >= 0),
        ("weight_decay", args.weight_decay >= 0),
    ):
        if not good:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")
    devices = (args.gpus or "cpu").split(",")
    if not (set(devices) == {"cpu"} or (all(d.isdigit() for d in devices) and len(set(devices)) == len(devices))):
        parser.error(f"--gpus {args.gpus}: expected GPU numbers, each once, or only cpu")
    return args


# What belongs to a call, not to the model; and what may differ when a run is resumed.
PER_CALL = ("resume", "evaluate", "predict", "export", "checkpoint", "out", "gpus", "command", "given", "init_from")
MAY_CHANGE = (*PER_CALL, "root", "workers", "batch_size", "accumulate", "amp", "eval_every", "threshold", "sync_bn")


def stored_configuration(method, given):
    """(configuration, checkpoint path) that --resume or --checkpoint refers to; ({}, None) for a fresh start.

    UserError for a missing file, another method or backbone, and for a resumed run any flag that would not take effect.
    """
    name = given.get("resume") or given.get("checkpoint")
    if name == "auto":
        folder = Path(given["out"]) if "out" in given else Path("runs", method, Path(given.get("data", "toy")).stem)
        found = folder.glob("last.pt" if "out" in given else "*/last.pt")
        name = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if not name:
        return {}, None
    path = Path(name) / "last.pt" if Path(name).is_dir() else Path(name)
    state = load_checkpoint(path)
    stored = {k: v for k, v in state["config"].items() if k not in PER_CALL}
    refuse_other(path, "method", state["method"], method)
    for flag in ("backbone",) if "checkpoint" in given else [k for k in given if k not in MAY_CHANGE]:
        if flag in given:
            refuse_other(path, flag.replace("_", "-"), stored[flag], given[flag])
    return stored, path


def refuse_other(path, what, stored, wanted):
    if stored != wanted:
        raise UserError(f"{path} has {what} {stored}; {wanted} is asked for (--init-from only takes the weights)")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Env:
    """This process: rank, number of processes, device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def launch(main, args):
    """Run main(args) in one process per entry of --gpus (or in torchrun's), and end with a readable message."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it reports what we explain below
    world, spawned = len((args.gpus or "").split(",")), "INIT_METHOD" in os.environ
    try:
        if world == 1 or "RANK" in os.environ:
            main(args)
            if dist.is_initialized():
                dist.barrier()  # gloo may abort when one process leaves early
                dist.destroy_process_group()
        else:
            with tempfile.TemporaryDirectory() as folder:
                meet = (Path(folder) / "rendezvous").as_uri()
                torch.multiprocessing.start_processes(worker, (main, args, world, meet), world, start_method="spawn")
    except UserError as error:  # raised in a loader's process it carries that traceback in front
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # the first process says the same; let it be heard alone
        hint = go_on(args) if getattr(error.__context__, "errno", None) in DISK_FULL else ""
        print(f"{args.method}.py: {str(error).rsplit('UserError: ', 1)[-1].strip()}{hint}", file=sys.stderr)
        sys.exit(2)
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code or 1)  # that process has said why
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2**30
        sys.exit(
            f"{args.method}.py: out of GPU memory at --batch-size {args.batch_size}, --image-size {args.image_size} "
            f"({peak:.1f} GiB used). Try --accumulate 2 (the same step but for BatchNorm's statistics), --amp bf16, "
            "more --gpus, or a smaller size."
        )
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        words = str(error).split(". ")[0]
        sys.exit(
            f"{args.method}.py: {words}. Perhaps memory or /dev/shm was full: fewer --workers need less, -j 0 none"
            + go_on(args, " -j 0")
        )
    except OSError as error:  # of the log or a picture; write_atomically names its file itself
        if error.errno not in DISK_FULL:
            raise
        sys.exit(f"{args.method}.py: {error.filename or args.out}: {error.strerror}{go_on(args)}")
    except KeyboardInterrupt:
        if spawned or int(os.environ.get("RANK", 0)):
            sys.exit(130)  # the parent or the first process says it
        sys.exit(f"\nstopped{go_on(args)}")


def go_on(args, flags=""):
    """How to continue a run that was stopped, if it has a checkpoint."""
    there = Path(args.out, "last.pt").is_file() and not args.checkpoint
    return f"; continue with: python {args.method}.py --resume {args.out}{flags}" if there else ""


def worker(rank, main, args, world, meet):
    """One spawned process: the variables that torchrun would set, then the same way as everybody else's."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=meet)
    launch(main, args)


def start(args):
    """Device, process group, thread count, seed; returns Env. UserError for a GPU that is not there."""
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    names = args.gpus.split(",") if args.gpus else [str(local) if torch.cuda.is_available() else "cpu"] * (local + 1)
    if local >= len(names):
        raise UserError(f"--gpus {args.gpus} names {len(names)} devices for {local + 1} or more processes")
    name = names[local]
    if name == "cpu":
        device = torch.device("cpu")
        if args.sync_bn:
            raise UserError("--sync-bn works on GPUs only")
        if world > 1:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # processes on this machine
            torch.set_num_threads(max(1, torch.get_num_threads() // here))
    elif int(name) >= torch.cuda.device_count():
        raise UserError(f"no GPU {name}: this machine has {torch.cuda.device_count()}. Choose others by --gpus, or cpu")
    else:
        device = torch.device("cuda", int(name))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=os.environ.get("INIT_METHOD", "env://"),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(hours=1),
        )
    args.out = agree(args.out)
    torch.manual_seed(args.seed)
    return Env(rank, world, device)


def agree(value):
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def first_process_first(env):
    """The first process does it alone (draws, downloads, caches), then the others find it done."""
    if not env.first:
        dist.barrier()
    yield
    if env.first and env.world > 1:
        dist.barrier()


def load_data(args, env, boxes=False):
    """data.load, once everything that must be drawn is drawn."""
    with first_process_first(env):
        return data.load(args, boxes)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


class Backbone(nn.Module):
    """An ImageNet network cut in three: images (B, 3, H, W) -> F8, F16, F32 of `channels` at `strides` 8, 16, 32.

    last_stride=1 keeps the last stage at stride 16. frozen: names of submodules ("to8", "to16", "to8.layer1") that
    get no gradient and keep BatchNorm in eval mode; frozen_bn: all BatchNorm likewise. weights: see `pretrained`.
    """

    def __init__(self, name, weights="none", last_stride=2, frozen=(), frozen_bn=False):
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        load_pretrained(net, name, weights)
        if name == "mobilenet_v2":
            self.to8, self.to16, self.to32 = net.features[:7], net.features[7:14], net.features[14:]
            self.channels = (32, 96, 1280)
            strided = [self.to32[0].conv[1][0]]
        else:
            parts = OrderedDict(net.named_children())
            self.to8 = nn.Sequential(
                OrderedDict((k, parts[k]) for k in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"))
            )
            self.to16 = nn.Sequential(OrderedDict(layer3=net.layer3))
            self.to32 = nn.Sequential(OrderedDict(layer4=net.layer4))
            d = net.fc.in_features
            self.channels = (d // 4, d // 2, d)
            first = net.layer4[0]
            strided = [first.conv2 if hasattr(first, "conv3") else first.conv1, first.downsample[0]]
        for conv in strided if last_stride == 1 else ():
            conv.stride = (1, 1)
        self.strides = (8, 16, 16 * last_stride)
        self.frozen, self.frozen_bn = frozen, frozen_bn
        for module in self.still():
            module.requires_grad_(False)

    def still(self):
        """The modules that do not train."""
        yield from map(self.get_submodule, self.frozen)
        if self.frozen_bn:
            yield from (m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode=True):
        super().train(mode)
        for module in self.still():
            module.eval()
        return self

    def forward(self, images):
        f8 = self.to8(images)
        f16 = self.to16(f8)
        return f8, f16, self.to32(f16)


SWSL = "https://dl.fbaipublicfiles.com/semiweaklysupervision/model_files/semi_weakly_supervised_resnext101_32x8-b4712904.pth"


def load_pretrained(net, name, weights):
    """Fill a torchvision network: weights v1, v2 (torchvision's ImageNet weights), swsl, none, or a state dict's path.

    The two versions are not interchangeable: v2 alone is worth 2.5 to 3 mAP on COCO, and the papers used v1.
    """
    if weights == "none":
        return
    hint = "give the PATH of the file, or --weights none"
    if weights in ("v1", "v2"):
        choices = torchvision.models.get_model_weights(name)
        version = f"IMAGENET1K_{weights.upper()}"
        if version not in choices.__members__:
            raise UserError(f"--weights {weights}: {name} has none; there are {', '.join(choices.__members__)}")
        fetch = functools.partial(choices[version].get_state_dict, progress=True, check_hash=True)
    elif weights == "swsl":
        if name != "resnext101_32x8d":
            raise UserError("--weights swsl: published for --backbone resnext101_32x8d only")
        fetch = functools.partial(torch.hub.load_state_dict_from_url, SWSL, map_location="cpu", check_hash=True)
    else:
        fetch = functools.partial(torch.load, weights, map_location="cpu", weights_only=True)
        hint = f"expected the state dict of torchvision's {name}"
    try:
        net.load_state_dict(fetch())
    except Exception as error:  # no file, no network, no tensors, other tensors: of many classes
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--weights {weights}: not loaded ({type(error).__name__}: {reason}); {hint}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits until this is done: broken off at a wrong moment, torch's writer aborts the process."""
    pressed, before = [], signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def load_checkpoint(path):
    """A checkpoint of any of the four scripts as a dict of plain types and tensors on the CPU. UserError for one that
    is damaged; it names another of the same run that is not."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        return read_checkpoint(path)
    except Exception as error:  # OSError, RuntimeError, EOFError, KeyError and the unpickler's own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        message = f"{path}: damaged, or not a checkpoint of these scripts ({reason})"
    for other in (path.with_name("best.pt"), path.with_name("last.pt")):
        with contextlib.suppress(Exception):
            message += f". {other} of epoch {read_checkpoint(other)['epoch']} is whole: give that file instead"
            break
    raise UserError(message)


def read_checkpoint(path):
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # torch does not look at the check sums
            raise ValueError("wrong check sum")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {"method": state["method"], "config": state["config"]} | state


def weights_of(state):
    """The reported model's state dict: the moving average where there is one."""
    return state["ema"] or state["model"]


def load_weights(model, weights, path):
    """Fill the model with a checkpoint's state dict; UserError when other flags gave it another shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit these flags: {' '.join(str(error).split())[:300]}") from None


def init_from(model, weights, old_classes, classes):
    """Copy what fits from another model's state dict; returns names (copied, copied by class, fresh).

    Tensors of the same name and shape are copied. Those in `model.class_dims` (name -> how many leading dimensions are
    indexed by class) are copied row by row where the class has the same name, COCO's and VOC's spelling taken as one.
    """
    old = {data.COCO_NAME.get(name, name): i for i, name in enumerate(old_classes)}
    pairs = [(i, old[n]) for i, n in enumerate(data.COCO_NAME.get(c, c) for c in classes) if n in old]
    copied, by_class, fresh = [], [], []
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            source, dims = weights.get(name), model.class_dims.get(name, 0)
            if source is not None and dims and pairs and source.dim() == tensor.dim():
                new_rows, old_rows = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
                for dim in range(dims):  # pick the old rows (and columns) of the shared classes
                    source = source.index_select(dim, old_rows)
                where = torch.meshgrid(*[new_rows] * dims, indexing="ij")
                if source.shape[dims:] == tensor.shape[dims:]:
                    tensor[where] = source.to(tensor)
                    by_class.append(name)
                    continue
            elif source is not None and not dims and source.shape == tensor.shape:
                tensor.copy_(source)
                copied.append(name)
                continue
            fresh.append(name)
    return copied, by_class, fresh


def abridged(names):
    """Tensor names by their first two parts: "backbone.to8 (90), graph.w0 (1)"."""
    groups = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return ", ".join(f"{k} ({len(v)})" if len(v) > 1 else v[0] for k, v in groups.items()) or "nothing"


# ---------------------------------------------------------------------------------------------------------------------
# A run


DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Stage:
    """One of several trainings that follow each other in one run: its augmentation (data.VIEWS, data.PIXELS), its
    schedule's length in epochs, and after how many of them it stops. A run without stages is all of --epochs."""

    number: int | None
    view: str
    pixels: str
    epochs: int
    stop: int


class Run:
    """One training or evaluation: its folder and log, its loaders, and everything that a checkpoint must hold.

    stage: see Stage; follows: the run of the stage before, whose folder, log, precision and epoch count go on.
    Attributes for the scripts: classes, train_loader, test_loader, total_steps (of the schedule), out (Path), env,
    model, and extra: a dict of plain types and tensors that the checkpoint carries (state["extra"]).
    """

    def __init__(self, args, env, model, train, test, stage=None, follows=None):
        self.args, self.env, self.classes = args, env, test.classes
        self.stage = stage or Stage(None, args.view, "none", args.epochs, args.epochs)
        self.out, self.step, self.best, self.extra = Path(args.out), 0, -math.inf, {}
        self.model = model.to(env.device, memory_format=torch.channels_last)
        size, seed, pin = args.image_size, args.seed, env.device.type == "cuda"
        options = {"workers": args.workers, "rank": env.rank, "world": env.world, "pin_memory": pin}
        images = data.Images(test, size, self.stage.view, args.interpolation)
        self.test_loader = data.Loader(images, args.batch_size, **options)
        if train is not None:
            images = data.Images(train, size, self.stage.view, args.interpolation, self.stage.pixels, True, seed)
            self.train_loader = data.Loader(images, args.batch_size, accumulate=args.accumulate, **options)
            self.epoch_steps = len(self.train_loader) // args.accumulate
            self.total_steps = self.epoch_steps * self.stage.epochs
        self.dtype, self.ema, self.bar = torch.float32, None, None
        path, self.follows = args.resume or args.checkpoint, follows is not None
        if follows:
            self.state, self.first_epoch, self.dtype = None, follows.epoch, follows.dtype
            self.config, self.sizes, self.log_file = follows.config, follows.sizes, getattr(follows, "log_file", None)
        else:
            self.state = load_checkpoint(path) if path else None
            if path:
                refuse_other(path, "class list", self.state["classes"], list(self.classes))
            self.first_epoch = self.state.get("first_epoch", 0) if path else 0
            self.open_folder(train, test)
        self.epoch, self.last_epoch = self.first_epoch, self.first_epoch + self.stage.stop  # counted over all stages

    # -- folder and log

    def open_folder(self, train, test):
        """Create the folder, or refuse one that is in use; say what this run is."""
        args, log, last = self.args, self.out / "log.jsonl", self.out / "last.pt"
        self.config = {k: v for k, v in vars(args).items() if k != "given"}
        self.sizes = {"train": len(train) if train is not None else 0, "test": len(test)}
        if self.env.first:
            used = last.exists() or (log.exists() and '"epoch": ' in log.read_text(encoding="utf-8"))
            if used and not args.resume:
                hint = f", or --resume {self.out}" if last.exists() else ""
                raise UserError(f"--out {self.out} holds a run already; choose another folder{hint}")
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {self.out}: cannot be made ({error.strerror}); choose another") from None
            self.open_log()
            if not args.resume:
                self.log_file.truncate(0)  # of a start that was killed before its first checkpoint
            with write_atomically(self.out / "config.json", "w") as file:
                json.dump(self.config, file, indent=1)
        self.say(f"{args.command}\nrun folder: {self.out}")
        shown = {k: v for k, v in self.config.items() if k not in ("command", "out", "method") and v is not None}
        self.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in shown.items()), 118, break_on_hyphens=False))
        if args.recipe != args.data:
            self.say(f"no recipe for {args.data}: using {args.recipe}'s")
        if "resume" in args.given and not args.resume:
            self.say("--resume auto: no checkpoint there, starting afresh")
        self.say(
            f"protocol: {args.data}, {self.sizes['train']:,} training and {len(test):,} test images, "
            f"{len(self.classes)} classes; "
            f"{args.backbone} weights {args.weights}, ImageNet normalisation; difficult objects {args.difficult_train} "
            f"in training, {args.difficult_test} in the test; AP by points and by area"
        )

    def open_log(self):
        """Open log.jsonl to append, and hold it: the system lets go when this process ends, however it ends."""
        try:
            self.log_file = open(self.out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror}); choose another") from None
        try:
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: another process is writing there") from None
        # A loader's process may outlive this one for seconds, and would hold the log as long.
        multiprocessing.util.register_after_fork(self.log_file, lambda file: file.close())

    def write_header(self):
        """The log's first record: all that is needed to run this again."""
        versions = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        self.write(
            {"command": self.args.command, "config": self.config, "git": git_revision(), "versions": versions}
            | {"device": device_name(self.env.device), "processes": self.env.world, "precision": self.precision}
            | {"images": self.sizes, "classes": len(self.classes)}
        )

    def write(self, record):
        """Append one record to log.jsonl."""
        if self.env.first:
            self.log_file.write(json.dumps(metrics.plain(record)) + "\n")
            self.log_file.flush()

    def say(self, text):
        """Print from the first process, above the progress bar."""
        if self.env.first:
            tqdm.write(text)

    # -- preparation

    def prepare(self, optimizer, schedule, fill=None, clip=None):
        """Give the run its optimizer and schedule (stepped once an optimizer step); returns the network to train:
        the model, or its DDP wrapper. Applies --init-from, --resume, --amp, --ema-decay, --sync-bn. fill(): called
        unless a checkpoint is resumed, when weights and precision are there, before the first checkpoint is written.
        clip: largest norm of the gradient over all parameters."""
        args, env = self.args, self.env
        self.optimizer, self.schedule, self.clip = optimizer, schedule, clip
        if args.init_from and not self.state and not self.follows:
            path = Path(args.init_from)
            state = load_checkpoint(path / "last.pt" if path.is_dir() else path)
            lists = init_from(self.model, weights_of(state), state["classes"], self.classes)
            for what, names in zip(("copied", "copied by class name", "fresh"), lists, strict=True):
                self.say(f"--init-from {args.init_from}: {what}: {abridged(names)}")
        if self.state:
            load_weights(self.model, self.state["model"], args.resume)
        if not self.follows:
            self.choose_precision()
        # fp16's gradients underflow without a scale; bf16 has float32's range
        self.scaler = torch.amp.GradScaler(env.device.type, enabled=self.dtype == torch.float16)
        if args.ema_decay:
            # On a short run the average must forget its random start: horizon at most a fifth of the steps.
            steps = self.epoch_steps * self.stage.stop
            horizon = min(1 / (1 - args.ema_decay), max(steps / 5, 1))
            average = get_ema_multi_avg_fn(1 - 1 / horizon)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.say(f"EMA horizon: {horizon:.0f} of {steps} steps")
        if self.state:
            self.restore()
        else:
            if env.first and not self.follows:
                self.write_header()
            if fill:
                fill()
            if env.first:
                self.save()  # so that there is something to resume from the first step on
        stop = f", stopping after {self.stage.stop}" if self.stage.stop < self.stage.epochs else ""
        self.say(
            f"{self.total_steps} steps in {self.stage.epochs} epochs{stop}, {str(self.dtype)[6:]} "
            f"on {device_name(env.device)}"
        )
        net = self.model
        if args.sync_bn:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        if env.world > 1:
            net = nn.parallel.DistributedDataParallel(net, [env.device.index] if env.device.type == "cuda" else None)
        self.net = net
        return net

    def restore(self):
        """Continue the checkpoint: optimizer, scaler, moving average, counters, log. The schedule is a function of the
        step, so the step is its state; with another batch size it is the same epoch in this run's steps."""
        state = self.state
        self.epoch, self.best = state["epoch"], state["best"]
        self.step = (self.epoch - self.first_epoch) * self.epoch_steps
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = self.step
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema and state["ema"]:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(self.step)  # 0: the first update copies
        if self.env.first:
            self.cut_log()
            self.write({"resumed_after_epoch": self.epoch, "command": self.args.command, "git": git_revision()})
        self.say(f"resumed {self.args.resume} after epoch {self.epoch}")

    def cut_log(self):
        """Drop what the log says of later epochs than the checkpoint's, and a line cut off by a kill."""
        path, kept = self.out / "log.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line).get("epoch", 0) <= self.epoch:
                    kept.append(line)
        with write_atomically(path, "w") as file:
            file.write("".join(f"{line}\n" for line in kept))
        self.log_file.close()
        self.open_log()

    def choose_precision(self):
        """--amp -> self.dtype. "auto": bf16 on GPUs that have it, fp16 on others; on a CPU one batch is tried in both
        precisions, on a copy of the model, and the faster wins; a resumed run keeps its choice."""
        if self.args.amp != "auto":
            self.dtype = DTYPES[self.args.amp]
        elif self.state:
            self.dtype = DTYPES[self.state["precision"]]
        elif self.env.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if native else torch.float16
        else:
            images = torch.randn(min(16, self.args.batch_size), 3, self.args.image_size, self.args.image_size)
            seconds = {}
            with torch.random.fork_rng(devices=[]):
                for dtype in (torch.float32, torch.bfloat16):
                    trial, self.dtype = copy.deepcopy(self.model).train(), dtype
                    for _ in range(2):  # the first one warms up
                        began = time.perf_counter()
                        with self.autocast():
                            out = trial(images.contiguous(memory_format=torch.channels_last))
                        out = out if isinstance(out, tuple) else (out,)
                        sum(o.float().sum() for o in out if o is not None).backward()
                        seconds[dtype] = time.perf_counter() - began
            self.dtype = agree(min(seconds, key=seconds.get))
            self.say(f"--amp auto: {', '.join(f'{str(k)[6:]} {v:.2f} s a batch' for k, v in seconds.items())}")

    @property
    def precision(self):
        """The name of the precision in use, as --amp has it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def autocast(self):
        return torch.autocast(self.env.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # -- training

    def epochs(self):
        """Epoch numbers that are left, from 0."""
        left = (self.last_epoch - self.epoch) * len(self.train_loader)
        with tqdm(total=left, disable=not self.env.first, mininterval=0.5 if sys.stderr.isatty() else 20) as self.bar:
            yield from range(self.epoch, self.last_epoch)

    def batches(self, epoch):
        """(images (B, 3, S, S) normalised, labels (B, C) ternary) on the device, for one epoch of this process; and the
        boxes (M, 6), see data.box_rows, where the training table has them.

        Everything random is reseeded from (seed, epoch, rank), so a resumed run needs no random state.
        """
        torch.manual_seed(data.mixed_seed(self.args.seed, epoch, self.env.rank))
        self.model.train()
        self.sums, self.parts, self.began = {}, 0, time.perf_counter()
        self.bar.set_description(f"epoch {epoch + 1}/{self.last_epoch}")
        for batch in self.train_loader.epoch(epoch):
            self.parts += 1
            last = self.parts % self.args.accumulate == 0  # gradients are exchanged with the last part only
            with contextlib.nullcontext() if last or self.env.world == 1 else self.net.no_sync():
                images, labels = (t.to(self.env.device, non_blocking=True) for t in batch[:2])
                boxes = () if batch.boxes is None else (data.box_rows(batch.boxes).to(self.env.device),)
                yield data.normalise(images, batch.inside), labels, *boxes
            self.bar.update()

    def update(self, loss, **terms):
        """Backward of the mean over a step's parts and, after the last part, the optimizer step. `terms` are logged."""
        for name, value in {"loss": loss, **terms}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        if self.env.device.type == "cpu" or self.parts % 20 == 0:  # looking costs a GPU a pause
            self.check_finite()
        self.scaler.scale(loss / self.args.accumulate).backward()
        if self.parts % self.args.accumulate == 0:
            if self.clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.lr = self.optimizer.param_groups[0]["lr"]
            self.schedule.step()
            self.step += 1
            if self.ema:
                self.ema.update_parameters(self.model)

    def check_finite(self):
        """Stop, naming the terms, when a loss of this epoch was not finite."""
        means = {k: float(v) / self.parts for k, v in self.sums.items()}
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
        if not all(map(math.isfinite, means.values())):
            terms = ", ".join(f"{k} {v:.4g}" for k, v in means.items())
            raise self.not_finite(f"the loss is not finite in step {self.step + 1} (means of this epoch: {terms})")

    def not_finite(self, what):
        last, advice = self.out / "last.pt", "Try a lower --lr or --amp off."
        if last.exists():
            advice = f"{last} holds the last good epoch. Try --resume {self.out} --amp off, or a lower --lr: a run of "
            advice += f"its own, which --init-from {self.out} starts from these weights."
        return UserError(f"{what}. {advice}")

    def finish_epoch(self, epoch):
        """Test when due, write log, scores and checkpoints. Returns the epoch's record."""
        self.check_finite()
        seconds = time.perf_counter() - self.began
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.not_finite(f"the weights are not finite after step {self.step}")
        names = sorted(self.sums)
        means = torch.stack([torch.as_tensor(self.sums[k]) for k in names]) / self.parts
        if self.env.world > 1:
            dist.all_reduce(means)
            means /= self.env.world
        seen = self.parts * self.args.batch_size / self.args.accumulate
        record = {} if self.stage.number is None else {"stage": self.stage.number}
        record |= {"epoch": epoch + 1, "step": self.step} | dict(zip(names, means.tolist(), strict=True))
        record |= {"lr": self.lr, "seconds": seconds, "images_per_second": seen / seconds}
        record["peak_memory_mb"] = peak_memory(self.env.device)
        line, better = f"epoch {epoch + 1}: loss {record['loss']:.4f}", False
        if (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.last_epoch:
            began = time.perf_counter()
            self.share_buffers()
            record |= self.test()
            if self.ema:
                record |= {f"raw_{k}": v for k, v in self.test(self.model).items()}
            record["test_seconds"] = time.perf_counter() - began
            better = record["map_points"] > self.best
            self.best = record["map_points"] if better else self.best
            record["best_on_test_map_points"] = self.best
            line += f", mAP {record['map_points']:.2f} (area {record['map_area']:.2f}), OF1 {record['OF1']:.2f}"
        self.say(f"{line}, {seconds:.0f} s, {record['images_per_second']:.0f} images/s")
        self.epoch = epoch + 1
        if self.env.first:
            self.write(record)
            if better:
                self.save("best.pt")  # before last.pt, which says that this is done
            self.save()
        return record

    def keep(self, name):
        """Copy last.pt to another name."""
        with open(self.out / "last.pt", "rb") as last, write_atomically(self.out / name) as copy:
            shutil.copyfileobj(last, copy)

    def share_buffers(self):
        """Give every process the first one's BatchNorm statistics: each has seen other images, and all test a part."""
        if self.env.world > 1:
            for model in (self.model, self.ema.module) if self.ema else (self.model,):
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def save(self, name="last.pt"):
        """Write a checkpoint: a temporary file, then a rename."""
        state = {
            "method": self.args.method,
            "config": self.config,
            "classes": list(self.classes),
            "normalisation": {"mean": list(data.MEAN), "std": list(data.STD)},
            "stage": self.stage.number,
            "first_epoch": self.first_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "precision": self.precision,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "extra": self.extra,
        }
        with uninterrupted(), write_atomically(self.out / name) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # about the half archive; its context says why: a full disk, ctrl-C
                raise (error.__context__ or error) from None

    # -- testing

    @property
    def reported(self):
        """The model whose numbers count: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def show(self, count=8, images=None):
        """Show with some test images, chosen by the seed; or with some of other `images` (data.Images)."""
        images = images or self.test_loader.images
        chosen = np.random.default_rng(self.args.seed).permutation(len(images.table))[:count]
        samples = []
        for index in chosen:
            image, labels, _, boxes, inside = images[0, index]
            boxes = None if boxes is None else torch.from_numpy(boxes)
            samples.append(Sample(str(images.table.names[index]), image, inside, image, torch.as_tensor(labels), boxes))
        return Show(self.args, self.classes, self.reported.eval(), self.env.device, self.dtype, samples)

    def test(self, model=None):
        """Metrics in percent of `model` on the test split; the reported model's scores are written to the folder."""
        table = self.test_loader.images.table
        scores = metrics.predict(model or self.reported, self.test_loader, self.env.device, self.autocast())
        if not np.isfinite(scores).all():
            raise self.not_finite("the test scores are not finite")
        unlabelled = (table.labels == -1).all()  # VOC2012's test split: every number is left blank
        labels = metrics.apply_difficult(table.labels, "ignore" if unlabelled else self.args.difficult_test)
        if model is None and self.env.first:
            metrics.save_scores(self.out / "scores.npz", scores, table, self.args.difficult_test, self.args.threshold)
            metrics.save_per_class(self.out / "per_class.csv", scores, labels, table.classes)
        return metrics.summary(scores, labels, self.args.threshold)

    def evaluate(self):
        """--evaluate --checkpoint: the stored model's metrics, in a folder of their own."""
        load_weights(self.model, weights_of(self.state), self.args.checkpoint)
        self.choose_precision()
        self.write_header()
        record = {"checkpoint": str(self.args.checkpoint), "epoch": self.state["epoch"]} | self.test()
        self.write(record)
        return record

    def report(self, record, earlier=None):
        """Print the closing table, above it that of an `earlier` stage, and what lies in the run folder."""
        names = [k for k in record if k.startswith(("map_", "top3_", *metrics.F1_NAMES))]
        rows, columns = [], [k.replace("map_", "mAP ") for k in names if not k.startswith("top3_")]
        for stage, r in (("stage 1 ", earlier), ("stage 2 ", record)) if earlier else (("", record),):
            rows.append((f"{stage}all", [r[k] for k in names if not k.startswith("top3_")]))
            rows.append((f"{stage}top 3", [math.nan] * 2 + [r[f"top3_{k}"] for k in metrics.F1_NAMES]))
        self.say("\n" + metrics.table_text(rows, columns, "percent"))
        if record["classes_left_out"]:
            self.say(f"mAP over {record['classes']} classes; {record['classes_left_out']} have no positive image")
        if self.env.first:
            self.say(f"in {self.out}: {', '.join(sorted(p.name for p in self.out.iterdir()))}")


def git_revision():
    """{"revision", "dirty"} of the checkout that this file lies in; None outside one."""
    here, text = Path(__file__).resolve().parent, {"capture_output": True, "text": True, "check": True}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, **text).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, **text).stdout
        return {"revision": revision, "dirty": bool(changes.strip())}


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Peak memory of this process so far in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**10 if sys.platform != "darwin" else kib / 2**20


# ---------------------------------------------------------------------------------------------------------------------
# A trained network in use: --predict and --export. The checkpoint alone suffices


def apply(args, env, build, draw, part=None):
    """Do what --predict or --export asks of --checkpoint.

    build(args, classes): the method's network; draw(show, path): its picture; part(model): what of it can be exported,
    if not all of it is: (module, a line that says so).
    """
    if env.world > 1:
        raise UserError("--predict and --export run in one process; give one device in --gpus")
    state = load_checkpoint(args.checkpoint)
    refuse_other(args.checkpoint, "normalisation", state["normalisation"], {"mean": [*data.MEAN], "std": [*data.STD]})
    model = build(args, state["classes"])
    load_weights(model, weights_of(state), args.checkpoint)
    model.eval().requires_grad_(False)
    if args.export:
        return export(args, model, state["classes"], part)
    model.to(env.device, memory_format=torch.channels_last)
    return predict(Show(args, state["classes"], model, env.device, DTYPES.get(args.amp, torch.float32), []), draw)


PHOTOS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def photos_in(names):
    """Paths of images; a folder stands for the images that lie in it, by name."""
    for path in map(Path, names):
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTOS) if path.is_dir() else [path]
        if not found:
            print(f"{path}: no image in it ({' '.join(PHOTOS)})", file=sys.stderr)
        yield from found


def predict(show, draw):
    """Label images: a line on the terminal each, a picture in pictures/, all probabilities in predictions.csv. Images
    that cannot be read are named and skipped; UserError where none can. Returns name -> probabilities (C,)."""
    args, out, rows, used = show.args, Path(show.args.out), {}, set()
    table = out / "predictions.csv"
    if table.exists():
        raise UserError(f"--out {out} holds predictions already; choose another folder")
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another") from None
    view = data.VIEWS[args.view if isinstance(args.view, str) else args.view[0]][1]
    print(f"{args.checkpoint}: {args.method}, {args.backbone}, {args.image_size} px, {len(show.classes)} classes")
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "labels", *show.classes))
        for path in photos_in(args.predict):
            try:
                source = data.read_photo(path)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            box = view(source.shape[2], source.shape[1], args.image_size)
            image, inside = data.apply_view(source, box, args.image_size, args.interpolation)
            photo, _ = data.apply_view(source, box, max(448, args.image_size))
            show.samples = [Sample(path.name[-34:], image, inside, photo)]
            with torch.no_grad(), show.autocast():
                p = show.model(show.batch(show.samples[0]))[0].float().sigmoid().cpu()
            best = [f"{show.classes[c]} {p[c]:.2f}" for c in p.argsort(descending=True).tolist()]
            found = [c for c, v in zip(show.classes, p, strict=True) if v >= args.threshold]
            said = ", ".join(best[: len(found)]) or f"nothing from {args.threshold} on; highest: {best[0]}"
            print(f"{path}: {said}", flush=True)
            writer.writerow((path, "|".join(found), *(f"{v:.6f}" for v in p)))
            file.flush()
            name = path.stem
            while name in used:
                name += "_"
            used.add(name)
            draw(show, out / "pictures" / f"{name}.jpg")
            rows[str(path)] = p
    if not rows:
        table.unlink()
        raise UserError(f"--predict {' '.join(args.predict)}: no image could be read")
    print(f"in {out}: predictions.csv, pictures/ ({len(used)})")
    return rows


EXPORT_TORCH = (2, 9)  # 2.6 fails on SRDL's .pt2 and on every .onnx
EXPORTS = {".pt2": (), ".onnx": ("onnx", "onnxscript")}  # the packages they need beside torch


def export(args, model, classes, part=None):
    """Write the network, float32, for any batch size, to FILE.pt2 or FILE.onnx, and beside it (model.onnx.json) what
    its user must know. Returns the largest difference between its logits and the network's on batches of 1 and 7; None
    where nothing is installed that runs the file."""
    path, size = Path(args.export), args.image_size
    if tuple(map(int, torch.__version__.split(".")[:2])) < EXPORT_TORCH:
        raise UserError("--export needs torch {}.{} or newer".format(*EXPORT_TORCH) + f"; this is {torch.__version__}")
    missing = [name for name in EXPORTS[path.suffix] if not importlib.util.find_spec(name)]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"--export {path}: needs {names}: pip install onnx onnxscript (onnxruntime to check it)")
    model, note = part(model) if part else (model, "")
    images = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch, content = {"images": {0: torch.export.Dim("batch", max=2**16)}}, io.BytesIO()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (), {"images": images[:2]}, dynamic_shapes=batch, strict=False)
        if path.suffix == ".pt2":
            torch.export.save(program, content)
        else:
            names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": batch}
            program = torch.onnx.export(program, kwargs={"images": images[:2]}, dynamo=True, **names)
            content.write(program.model_proto.SerializeToString())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--export {path}: its folder cannot be made ({error.strerror}); choose another") from None
    with write_atomically(path) as file:
        file.write(content.getbuffer())
    difference = None
    if run := exported(path):
        with torch.no_grad():
            difference = max(float((run(x) - model(x)).abs().max()) for x in (images[:1], images))
    view = "the whole image, resized to the square with antialiasing"
    if args.view == "canvas":
        view = "the image in the top left corner, shrunk only where it is longer than the square; padding 0 as input"
    about = {"method": args.method, "checkpoint": args.checkpoint, "note": note, "classes": list(classes)}
    about |= {"input": f"images (batch, 3, {size}, {size}) float32: RGB in [0, 1], minus mean, over std"}
    about |= {"view": view, "interpolation": args.interpolation, "mean": data.MEAN, "std": data.STD}
    about |= {"output": "logits (batch, classes) float32; probability = 1 / (1 + exp(-logit))"}
    with write_atomically(f"{path}.json", "w") as file:
        json.dump(about | {"largest_difference": difference}, file, indent=1)
    size = content.getbuffer().nbytes / 2**20
    print(f"{path}: {args.method}, {len(classes)} classes, {size:.0f} MiB" + f"; {note}" * bool(note))
    checked = "not checked: pip install onnxruntime"
    if difference is not None:
        checked = f"its logits differ from the network's by {difference:.1g} at most, on batches of 1 and 7"
    print(f"{checked}; classes and normalisation: {path}.json")
    return difference


def exported(path):
    """A function images -> logits that runs an exported file; None for .onnx without onnxruntime."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda images: program(images=images)
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

HEAT = torch.tensor([[48, 18, 59], [33, 144, 200], [60, 200, 130], [240, 220, 60], [220, 50, 20]], dtype=torch.float)


def heat_overlay(image, heat, strength=0.55):
    """RGB PIL image with a map (h, w) in [0, 1] blended over it, low blue to high red."""
    at = heat.detach().float().cpu().clamp(0, 1) * (len(HEAT) - 1)
    low = at.floor().clamp(max=len(HEAT) - 2).long()
    colours = torch.lerp(HEAT[low], HEAT[low + 1], (at - low).unsqueeze(-1)).byte().numpy()
    return Image.blend(image, Image.fromarray(colours).resize(image.size, Image.BICUBIC), strength)


def write_text(picture, xy, text, size=15, colour="black"):
    """Draw text with the font that comes with Pillow, at most as wide as the space to the right edge."""
    ImageDraw.Draw(picture).text(xy, text, fill=colour, font=ImageFont.load_default(size))


class Sample(NamedTuple):
    """An image to draw: its name, what the network sees (3, S, S) uint8, the rectangle of it that is no padding, the
    same picture to look at (3, n, n) uint8, and its ternary labels (C,) or boxes (n, 5), None where unknown."""

    name: str
    image: torch.Tensor
    inside: tuple | None
    photo: torch.Tensor
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None

    def tile(self, side):
        """The picture as a PIL image."""
        return Image.fromarray(self.photo.permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC)


@dataclass
class Show:
    """What the scripts' pictures are drawn from: a network in eval mode and some images."""

    args: argparse.Namespace
    classes: list
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    samples: list

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, sample):
        """The sample as the network's input (1, 3, S, S)."""
        inside = sample.inside and torch.tensor([sample.inside])
        return data.normalise(sample.image[None].to(self.device), inside)

    def captions(self, sample, p):
        """What is predicted of probabilities (C,), and what is true where that is known: (text, colour) each."""
        found = [n for n, v in zip(self.classes, p, strict=True) if v >= self.args.threshold]
        lines = [(f"predicted: {', '.join(found) or 'nothing'}", (30, 60, 200))]
        if sample.labels is not None:
            names = zip(self.classes, sample.labels, strict=True)
            true = [n + " (difficult)" * int(y < 0) for n, y in names if y]
            lines.append((f"true: {', '.join(true) or 'nothing'}", "black"))
        return lines


def draw_maps(show, path, look, legend, tile=242):
    """The samples, each with the map of its three most confident classes, scaled to the range that is written below,
    and what is predicted and true; 1,000 pixels wide.

    look(images): probabilities (B, C), maps (B, C, H, W) and maybe rectangles, bool (B, C, H, W), drawn in white.
    """
    picture = Image.new("RGB", (4 * (tile + 8), 26 + len(show.samples) * (tile + 70)), "white")
    write_text(picture, (6, 2), legend)
    for row, sample in enumerate(show.samples):
        with show.autocast():
            seen = look(show.batch(sample))
        p, maps, *boxes = (x[0].float().cpu() for x in seen if x is not None)
        photo = sample.tile(tile)
        tiles = [(photo, sample.name)]
        for c in p.argsort(descending=True)[:3].tolist():
            low, high = maps[c].min(), maps[c].max()
            shown = heat_overlay(photo, (maps[c] - low) / (high - low).clamp(min=1e-6))
            if boxes and boxes[0][c].any():
                inside = boxes[0][c]
                cell = tile / inside.shape[0], tile / inside.shape[1]
                ys, xs = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
                box = (xs[0] * cell[1], ys[0] * cell[0], (xs[-1] + 1) * cell[1] - 1, (ys[-1] + 1) * cell[0] - 1)
                ImageDraw.Draw(shown).rectangle([float(v) for v in box], outline="white", width=3)
            tiles.append((shown, f"{show.classes[c]} {p[c]:.2f}, map {low:.2g} to {high:.2g}"))
        top = 26 + row * (tile + 70)
        for column, (shown, text) in enumerate(tiles):
            picture.paste(shown, (column * (tile + 8) + 4, top))
            write_text(picture, (column * (tile + 8) + 6, top + tile + 2), text, 13)
        for line, (text, colour) in enumerate(show.captions(sample, p)):
            write_text(picture, (6, top + tile + 22 + 20 * line), text, 14, colour)
    picture.save(path)


def draw_labels(show, path, tile=448):
    """For a network without a view of its own: the samples with what is predicted and true."""
    picture = Image.new("RGB", (1000, len(show.samples) * (tile + 70)), "white")
    for row, sample in enumerate(show.samples):
        with show.autocast(), torch.no_grad():
            p = show.model(show.batch(sample))[0].float().sigmoid().cpu()
        top = row * (tile + 70)
        picture.paste(sample.tile(tile), (4, top + 4))
        write_text(picture, (6, top + tile + 6), sample.name, 13)
        for line, (text, colour) in enumerate(show.captions(sample, p)):
            write_text(picture, (6, top + tile + 24 + 20 * line), text, 14, colour)
    picture.save(path)


def draw_curves(log, path):
    """Learning curves from log.jsonl: loss terms on the left, mAP and OF1 on the right, a row for each stage; 1,000
    pixels wide."""
    rows = {}
    for record in map(json.loads, Path(log).read_text(encoding="utf-8").splitlines()):
        if "loss" in record:
            rows.setdefault(record.get("stage"), []).append(record)
    picture = Image.new("RGB", (1000, 360 * len(rows)), "white")
    for row, records in enumerate(rows.values()):
        top, bottom = 360 * row + 40, 360 * row + 310
        losses = [k for k in records[0] if k.startswith("L_")]
        if "stage" not in records[0] or not losses:  # a stage's weights may be large and would flatten the terms
            losses = ["loss", *losses]
        shares = ["map_points", "map_area", "OF1", "raw_map_points"]
        draw_chart(picture, (70, top, 470, bottom), records, losses, "loss")
        draw_chart(picture, (570, top, 970, bottom), records, shares, "percent")
    picture.save(path)


def draw_chart(picture, box, records, names, title, key="epoch"):
    """Lines of the named values (at most five) over the records' key inside box (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw, colours = ImageDraw.Draw(picture), ("black", (200, 60, 40), (40, 90, 200), (30, 140, 60), (170, 90, 190))
    points = {n: [(r[key], r[n]) for r in records if r.get(n) is not None] for n in names}
    points = {n: p for n, p in points.items() if p}
    values = [v for p in points.values() for _, v in p] or [0.0]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = (f(r[key] for r in records) for f in (min, max))
    draw.rectangle(box, outline="grey")
    for i in range(5):
        y = bottom - i * (bottom - top) / 4
        draw.line((left, y, right, y), fill=(225, 225, 225))
        write_text(picture, (left - 58, y - 9), f"{low + i * (high - low) / 4:.3g}", 14)
    write_text(picture, (left, bottom + 8), f"{title} by {key}, {first} to {last}", 14)
    for k, (name, line) in enumerate(points.items()):
        xy = [
            (
                left + (e - first) / max(last - first, 1) * (right - left),
                bottom - (v - low) / (high - low) * (bottom - top),
            )
            for e, v in line
        ]
        draw.line(xy, fill=colours[k % 5], width=2)
        for x, y in xy:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colours[k % 5])
        write_text(picture, (left + 90 * k, top - 24), name, 14, colours[k % 5])
