"""Multi-label metrics, as functions of logits and ternary labels, and the command line that compares score files.

    python eval.py score runs/a/scores.npz runs/b/scores.npz --per-class --min-positives 9
    python eval.py voc12 RUN/scores.npz                         what PASCAL's evaluation server scores
    python eval.py cost                                         parameters, MACs, times, memory of the four methods

Two definitions of average precision are in use, and two of CF1; every table here prints both.
  points   mean of the precision at each positive (ML-GCN, ASL, CSRA, scikit-learn)
  area     the same after the monotone envelope (VOC2010 and later, SSGRL, Query2Label, SADCL)
  11point  VOC2007: mean of the best precision at recall >= 0, 0.1, ..., 1
  CF1      harmonic mean of CP and CR (ML-GCN and most); CF1_macro: mean of the classes' own F1 (SSGRL, ASL, SADCL)
On the same predictions they may differ by points, so name the one you quote.

Shapes: scores (N, C) logits, labels (N, C) in {1 present, 0 absent, -1 ignore}. A cell of -1 counts neither as
predicted nor as true. Scores are ranked as float32, ties by the order of the rows: bf16 probabilities tie often.
"""

import argparse
import copy
import csv
import importlib
import json
import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

import data
from data import UserError, normalise, targets, write_atomically

KINDS = ("points", "area", "11point")
F1_NAMES = ("CP", "CR", "CF1", "CF1_macro", "OP", "OR", "OF1")


def precision_at_positives(scores, positive):
    """Precision at the rank of each positive of one class, best ranked first: scores (N,), positive (N,) bool.

    Only the positives need their rank, so one value sort and a binary search replace the argsort of everything.
    """
    ranked, found = np.sort(scores), np.sort(scores[positive])[::-1]
    first, last = np.searchsorted(ranked, found, "left"), np.searchsorted(ranked, found, "right")
    if (last - first > 1).any():  # a positive ties with something: rows decide, which needs the stable order
        hits = positive[np.argsort(-scores, kind="stable")]
        rank = np.flatnonzero(hits) + 1
    else:
        rank = len(scores) - first
    return np.arange(1, len(found) + 1) / rank


def precisions(scores, labels):
    """One array per class: the precision at each of its positives, best ranked first. See `average_precision`."""
    scores, labels = check(scores, labels)
    for score, label in zip(scores.T.copy(), labels.T.copy(), strict=True):
        seen = label >= 0
        if not seen.all():
            score, label = score[seen], label[seen]
        yield precision_at_positives(score, label == 1)


def mean_precision(precision, kind):
    """AP in [0, 1] of one class from its precision at each positive; NaN when there is none."""
    if not len(precision):
        return math.nan
    if kind != "points":  # envelope: the best precision at this recall or a higher one
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if kind == "11point":
        recall = np.arange(1, len(precision) + 1) / len(precision)
        precision = precision[np.searchsorted(recall, np.arange(0, 1.1, 0.1).clip(max=1))]
    return precision.mean()


def average_precision(scores, labels, kind="points"):
    """AP per class in [0, 1], float64 (C,); NaN for a class without positives. kind: "points", "area" or "11point".

    ValueError for another kind, other shapes than two equal ones of rank 2, or scores that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    return np.array([mean_precision(p, kind) for p in precisions(scores, labels)], np.float64)


def precision_recall_f1(scores, labels, threshold=0.5, top=None):
    """CP CR CF1 CF1_macro OP OR OF1 in [0, 1] (SRDL's Eqs. 14 to 16) of the predictions score >= logit(threshold).

    top=3: a prediction must also be among the image's three highest scores of all classes. Per-class means leave out
    classes without positives; a class that is never predicted has precision 0.
    """
    scores, labels = check(scores, labels)
    threshold = np.float32(-np.inf if threshold <= 0 else np.inf if threshold >= 1 else -np.log(1 / threshold - 1))
    predicted = scores >= threshold
    if top is not None and top < scores.shape[1]:
        rest, among = scores.copy(), np.zeros_like(predicted)
        rows = np.arange(len(scores))
        for _ in range(top):  # argmax takes the first of equal scores
            best = rest.argmax(1)
            among[rows, best], rest[rows, best] = True, -np.inf
        predicted &= among
    true = labels == 1
    hits = (predicted & true).sum(0)  # N^c, N^p, N^g of Eqs. 14 and 15
    guesses, truths = (predicted & (labels >= 0)).sum(0), true.sum(0)
    if not truths.any():
        return dict.fromkeys(F1_NAMES, math.nan)
    precision, recall = hits / guesses.clip(1), hits / truths.clip(1)
    known = truths > 0
    cp, cr = precision[known].mean(), recall[known].mean()
    op, recall_all = hits.sum() / max(guesses.sum(), 1), hits.sum() / truths.sum()
    macro = harmonic(precision[known], recall[known]).mean()
    values = (cp, cr, harmonic(cp, cr), macro, op, recall_all, harmonic(op, recall_all))
    return {name: float(value) for name, value in zip(F1_NAMES, values, strict=True)}


def harmonic(a, b):
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / np.maximum(a + b, 1e-300)


def check(scores, labels):
    """Both as NumPy arrays (float32, int8) of one shape (N, C); ValueError otherwise."""
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape}: expected two equal shapes (N, C)")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
    return scores, labels


def apply_difficult(labels, policy):
    """Ternary labels under the policy: "ignore" keeps -1, "negative" makes it 0, "positive" 1."""
    return labels if policy == "ignore" else np.asarray(targets(labels, policy), np.int8)


def summary(scores, labels, threshold=0.5, min_positives=1, eleven_point=False):
    """Every number of a table, in percent: map_points map_area CP ... OF1 top3_CP ... top3_OF1, and counts.

    The means over AP take the classes with at least `min_positives` positives.
    """
    counted = (np.asarray(labels) == 1).sum(0) >= max(min_positives, 1)
    curves = [p for p, known in zip(precisions(scores, labels), counted, strict=True) if known]
    row = {}
    for kind in KINDS[: 3 if eleven_point else 2]:
        aps = [mean_precision(p, kind) for p in curves]
        row[f"map_{kind}"] = 100 * float(np.mean(aps)) if aps else math.nan
    for prefix, top in (("", None), ("top3_", 3)):
        values = precision_recall_f1(scores, labels, threshold, top)
        row |= {prefix + name: 100 * value for name, value in values.items()}
    return row | {"classes": int(counted.sum()), "classes_left_out": int((~counted).sum()), "images": len(scores)}


# ---------------------------------------------------------------------------------------------------------------------
# Scoring a model


@torch.inference_mode()
def predict(model, loader, device, autocast):
    """Logits (N, C) float32 of every image of `loader` (a test data.Loader), rows in the table's order.

    `model(images)` gives logits (B, C); it is in eval mode meanwhile. With several processes each scores whole batches
    of the one-process order and the sum over processes, of which all but one are zero in any row, restores the table.
    """
    table, was_training = loader.images.table, model.training
    model.eval()
    scores = torch.zeros(len(table), len(table.classes), device=device)
    for batch in loader.epoch():
        with autocast:
            logits = model(normalise(batch.images.to(device, non_blocking=True), batch.inside))
        scores[batch.index.to(device)] = logits.float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(scores)
    model.train(was_training)
    return scores.cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Score files


def save_scores(path, scores, table, difficult, threshold=0.5):
    """scores.npz: scores, labels (ternary), images, classes, and the difficult policy and threshold of the run."""
    with write_atomically(path) as file:
        np.savez_compressed(
            file,
            scores=np.asarray(scores, np.float32),
            labels=table.labels,
            images=np.array(table.names),
            classes=np.array(table.classes),
            difficult=np.array(difficult),
            threshold=np.array(threshold),
        )


def load_scores(path):
    """scores.npz -> dict of its arrays; UserError where the file is missing or no score file."""
    try:
        with np.load(path) as file:
            content = {name: file[name] for name in ("scores", "labels", "images", "classes")}
            content |= {name: file[name].item() for name in ("difficult", "threshold") if name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: not a score file ({error}); expected the scores.npz of a run") from None
    return {"difficult": "ignore", "threshold": 0.5} | content


def per_class(scores, labels, classes):
    """Rows (class, positives, AP points, AP area) with AP in percent."""
    return [
        (str(name), len(p), *(100 * float(mean_precision(p, kind)) for kind in ("points", "area")))
        for name, p in zip(classes, precisions(scores, labels), strict=True)
    ]


def save_per_class(path, scores, labels, classes):
    """per_class.csv: class, positives, ap_points, ap_area in percent, empty where there is no positive."""
    with write_atomically(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "positives", "ap_points", "ap_area"))
        for name, positives, *aps in per_class(scores, labels, classes):
            writer.writerow((name, positives, *("" if math.isnan(ap) else f"{ap:.4f}" for ap in aps)))


def table_text(rows, columns, first="", digits=2):
    """Rows (name, values) under `columns` as aligned text; NaN prints as a dash."""
    texts = [[first, *columns]] + [[name, *(cell_text(v, digits) for v in values)] for name, values in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  ".join(t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    )


def cell_text(value, digits):
    if isinstance(value, str | int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def short_names(paths):
    """The part of each path that tells it from the others."""
    parts = [str(path).split("/") for path in paths]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return [p[-1] for p in parts]


def score(args):
    """`eval.py score`: one column per file, mean and deviation over three or more, difference between two."""
    if args.shifts and (args.json or not args.per_class):
        raise UserError("--shifts adds columns to the table of --per-class, without --json")
    if (args.root or args.split) and not args.shifts:
        raise UserError("--root and --split say where the objects of --shifts are")
    results, rows, names = [], [], short_names(args.files)
    for path in args.files:
        content = load_scores(path)
        policy = args.difficult or content["difficult"]
        labels = apply_difficult(content["labels"], policy)
        threshold = args.threshold if args.threshold is not None else content["threshold"]
        try:
            numbers = summary(content["scores"], labels, threshold, args.min_positives, args.eleven_point)
            classes = per_class(content["scores"], labels, content["classes"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        results.append({"file": str(path), "difficult": policy, "threshold": threshold} | numbers)
        rows.append({c[0]: c[1:] for c in classes if c[1] >= args.min_positives})
    if args.json:
        if args.per_class:
            for result, table in zip(results, rows, strict=True):
                result["per_class"] = {
                    name: {"positives": n, "ap_points": points, "ap_area": area}
                    for name, (n, points, area) in table.items()
                }
        print(json.dumps(plain(results), indent=1))
        return
    print(f"percent; difficult: {', '.join(r['difficult'] for r in results)}; means over AP take ", end="")
    print(", ".join(f"{r['classes']} classes ({r['classes_left_out']} left out)" for r in results))
    keys = [key for key in results[0] if key.startswith(("map_", *F1_NAMES, "top3_"))]
    print(table_text(*with_statistics(names, [(k, [r[k] for r in results]) for k in keys])))
    if args.per_class:
        shared = [name for name in rows[0] if all(name in other for other in rows)]
        print("\nAP per class (points)")
        lines, columns = with_statistics(names, [(name, [row[name][1] for row in rows]) for name in shared])
        lines = [(name, [rows[0][name][0], *v]) for name, v in lines]
        if args.shifts:
            variances = shift_variances(args.shifts, args.root, args.split)
            lines = [(name, [*v, *variances.get(name, ("-", "-"))]) for name, v in lines]
            columns = [*columns, "var dx", "var dy"]
        print(table_text(lines, ["positives", *columns]))


def shift_variances(name, root, split):
    """Class -> texts of the variance of its objects' shift from the image's centre along x and y (OASS Figs. 2, 6)."""
    root = root or data.default_root(name)
    table = data.load_split(name, root, split or data.default_splits(name)[0], boxes=True)
    sizes, broken = data.image_sizes([table], 4)
    if broken:
        raise UserError(broken[0])
    return {row[0]: row[4:] for row in data.shifts({"": table}, sizes)}


def with_statistics(columns, lines):
    """(lines, columns) with the difference of two columns, or mean and standard deviation of three or more."""
    if len(columns) == 2:
        return [(n, [*v, f"{v[1] - v[0]:+.2f}".replace("+nan", "-")]) for n, v in lines], [*columns, "difference"]
    if len(columns) > 2:
        return [(n, [*v, float(np.mean(v)), float(np.std(v, ddof=1))]) for n, v in lines], [*columns, "mean", "std"]
    return lines, columns


def plain(value):
    """NaN -> None, recursively: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def voc12(args):
    """`eval.py voc12`: a text file per class, a line `<image id> <confidence>` per image, as PASCAL's server wants it.

    comp2: trained on other data too, which ImageNet's weights are. The confidence is the logit: it ranks as the
    probability does, without its ties near 1.
    """
    content = load_scores(args.file)
    classes = [str(name) for name in content["classes"]]
    if sorted(classes) != sorted(data.VOC_CLASSES):
        raise UserError(f"{args.file}: has the classes {', '.join(classes)}; the server wants VOC's 20")
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); choose another") from None
    for name, scores in zip(classes, content["scores"].T, strict=True):
        with write_atomically(folder / f"comp2_cls_test_{name}.txt", "w") as file:
            file.writelines(f"{i} {score:.9g}\n" for i, score in zip(content["images"], scores, strict=True))
    print(f"{folder}: 20 files comp2_cls_test_<class>.txt of {len(content['images']):,} images")
    wanted = data.KNOWN_SIZES["voc2012", "test"][0]
    if len(content["images"]) != wanted:
        print(f"WARNING: VOC2012's test split has {wanted:,} images: --data voc2012 --test-split test", file=sys.stderr)
    print("the server takes a .tar.gz of the folder results/VOC2012/Main with these files in it")


# ---------------------------------------------------------------------------------------------------------------------
# What a method costs beside its own plain backbone, `--baseline`, which has the same strides and frozen layers

COSTS = {  # row: script, flags
    "srdl": ("srdl", ["--glove", "hash"]),
    "sadcl stage 1": ("sadcl", ["--stage", "1"]),
    "sadcl stage 2": ("sadcl", ["--stage", "2"]),
    "energy_roi": ("energy_roi", []),
    "oass": ("oass", []),
}
PAPERS = """the papers, ResNet-101, 80 classes, 448 px:
  SRDL, Table 3, RTX 3070: inference of one image 31.54 ms, with SRDL 32.58 ms (x 1.033)
  Global Meets Local, Table 8: 31.39 G MACs and 44.55 M parameters, with it 35.98 G (x 1.146) and 74.42 M (x 1.671)"""


def training_loss(script, args, model, device):
    """A function (images (B, 3, S, S), y (B, C) bool) -> the loss of a training step as the script's main has it, after
    any ramp; and one to call after the optimizer step."""
    method, bce = importlib.import_module(script), nnf.binary_cross_entropy_with_logits

    def entropies(outputs, y):
        return sum(bce(logits, y.float()) for logits in outputs if logits is not None)

    bank = teacher = None
    if hasattr(model, "prototypes"):
        bank = model.prototypes.detach().repeat(args.batch_size, 1, 1)
    if script == "oass" and args.keypoint != "none" and not args.shared_teacher:
        teacher = copy.deepcopy(model.backbone).eval().requires_grad_(False)

    def srdl(images, y):
        return entropies(model(images), y)

    def sadcl(images, y):
        logits, h = model(images)
        if bank is None:
            return method.asymmetric_loss(logits, y.float(), args.gamma_neg)
        terms = method.contrast(model, h, bank, y, args)
        method.update_bank(bank, h, logits, y)
        contrast = args.lambda_s * terms["L_SSCL"] + args.lambda_p * terms["L_PSCL"]
        return method.LAMBDA_BCE * bce(logits, y.float()) + contrast

    def energy_roi(images, y):
        logits, local, z, _, _ = model(images)
        return entropies((logits, local), y) + (0 if local is None else method.weak_loss(z, y))

    def oass(images, y):
        logits, instances, cam, cam_re, image, cls = model(images, y, teacher=teacher)
        loss = entropies((logits, instances), y)
        if cam_re is not None:
            l_p, l_re = method.puzzle_losses(cam, cam_re, y, image, cls)
            loss = loss + args.alpha_p * l_p + args.alpha_re * l_re
        return loss

    def after():
        if teacher:
            method.update_teacher(teacher, model.backbone, 0.999)

    return {"srdl": srdl, "sadcl": sadcl, "energy_roi": energy_roi, "oass": oass}[script], after


def measure_alone(script, flags, options):
    """`measure` in a process of its own, so that the peak memory is its own; a dict with "error" if that fails."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(script, flags, options, queue))
    process.start()
    process.join()  # the dict is small: putting it does not wait for us
    if queue.empty():
        why = "; out of memory?" if process.exitcode == -9 else ""
        return {"error": f"its process ended with code {process.exitcode}{why}"}
    return queue.get()


def measure(script, flags, options, queue):
    """Put the numbers of one case into the queue, a dict: parameters, macs, inference_1 and inference_<batch> and
    training_step in seconds, images_per_second, peak_memory_mb; or error."""
    import common

    try:
        device, size, batch = torch.device(options["device"]), options["size"], options["batch"]
        shared = ["--data", "coco", "--weights", "none", "--backbone", options["backbone"], "--image-size", str(size)]
        method = importlib.import_module(script)
        args = method.parse([*shared, "--batch-size", str(batch), *flags])
        torch.manual_seed(0)
        names = [f"class {i}" for i in range(options["classes"])]
        model = method.build(args, names, *([int(args.stage)] if script == "sadcl" else []))
        model.to(device, memory_format=torch.channels_last)
        images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        y = torch.rand(batch, len(names), device=device) < 2.9 / 80  # COCO's labels an image
        dtype = common.DTYPES[options["amp"]]
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        row = {"parameters": sum(p.numel() for p in model.parameters())}

        trained = [p for p in model.parameters() if p.requires_grad]
        model.eval().requires_grad_(False)  # the counter cannot do with inference_mode alone
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images[:1])
        row["macs"] = counter.get_total_flops() // 2
        for name, part in (("inference_1", images[:1]), (f"inference_{batch}", images)):
            with torch.inference_mode(), autocast:
                row[name] = median_seconds(lambda part=part: model(part), device, options["repeats"])

        model.train()
        for p in trained:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, 1e-6, fused=True)  # the same for all rows
        loss, after = training_loss(script, args, model, device)

        def step():
            with autocast:
                value = loss(images, y)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after()

        row["training_step"] = median_seconds(step, device, options["repeats"])
        row["images_per_second"] = batch / row["training_step"]
        row["peak_memory_mb"] = common.peak_memory(device)
        queue.put(row)
    except torch.OutOfMemoryError:
        queue.put({"error": "out of memory"})
    except BaseException as error:
        queue.put({"error": f"{type(error).__name__}: {error}"})
        raise


def median_seconds(work, device, repeats):
    """Median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def cost(args):
    """`eval.py cost`: a table and a JSON file of each method and its own baseline."""
    wanted = args.methods.split(",")
    unknown = [name for name in wanted if name not in {script for script, _ in COSTS.values()}]
    if unknown:
        raise UserError(f"--methods {unknown[0]}: expected some of srdl,sadcl,energy_roi,oass")
    if not all(size.isdigit() and int(size) for size in args.sizes.split(",")) or min(args.batch, args.classes) < 1:
        raise UserError("--sizes, --batch and --classes: expected whole numbers from 1 on, sizes with commas between")
    out, device = Path(args.out), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use; take --device cpu")
    options = {"device": device, "backbone": args.backbone, "classes": args.classes, "batch": args.batch}
    options |= {"amp": args.amp or ("bf16" if device == "cuda" else "off")}
    options |= {"repeats": args.repeats or (20 if device == "cuda" else 3)}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; {' '.join(f'{k}={v}' for k, v in options.items())}", flush=True)
    rows = []
    for size in map(int, args.sizes.split(",")):
        for script in dict.fromkeys(script for script, _ in COSTS.values() if script in wanted):
            names = [name for name, (owner, _) in COSTS.items() if owner == script]
            flags = {f"{script} --baseline": ["--baseline"]} | {name: COSTS[name][1] for name in names}
            for name, flag in flags.items():
                row = measure_alone(script, flag, options | {"size": size})
                rows.append({"row": name, "size": size} | row)
                print(f"{name}, {size} px: {row.get('error', 'measured')}", file=sys.stderr, flush=True)
    print(cost_table(rows, args.batch))
    print("x: beside the --baseline of the same script. MACs of one image, torch's count of matrix products")
    if args.backbone == "resnet101":
        print(PAPERS)
    with write_atomically(out, "w") as file:
        json.dump({"device": where, "torch": torch.__version__, "options": options, "rows": rows}, file, indent=1)
    print(f"in {out}: all numbers")


def cost_table(rows, batch):
    """Rows of `measure` as text, each number with its ratio to the baseline above it."""
    columns = {"parameters": ("M param.", 1e-6), "macs": ("G MACs", 1e-9), "inference_1": ("1 image, ms", 1e3)}
    columns |= {f"inference_{batch}": (f"{batch} images, ms", 1e3), "training_step": ("training step, ms", 1e3)}
    columns |= {"images_per_second": ("images/s", 1), "peak_memory_mb": ("peak MiB", 1)}
    lines, baseline = [], {}
    for row in rows:
        if row["row"].endswith("--baseline"):
            baseline = row
        values = [row["size"]]
        for key, (_, scale) in columns.items():
            values += [row.get(key, math.nan) * scale, row.get(key, math.nan) / baseline.get(key, math.nan)]
        lines.append((row["row"], values))
    return table_text(lines, ["px", *(text for name, _ in columns.values() for text in (name, "x"))])


def arguments():
    """Parser of `python eval.py`."""
    parser = argparse.ArgumentParser(description="Metrics of score files; what the methods cost.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("score", help="metrics of one or more scores.npz, side by side", allow_abbrev=False)
    command.set_defaults(run=score)
    command.add_argument("files", nargs="+", metavar="FILE.npz", help="scores.npz of a run")
    command.add_argument("--per-class", action="store_true", help="also the AP of every class, and its difference")
    command.add_argument(
        "--min-positives", type=int, default=1, metavar="N", help="AP means over classes with at least N (default: 1)"
    )
    command.add_argument(
        "--difficult", choices=("ignore", "negative", "positive"), help="what -1 counts as (default: as in the run)"
    )
    command.add_argument("--threshold", type=float, help="probability from which a class is predicted (default: run's)")
    command.add_argument("--eleven-point", action="store_true", help="also VOC2007's 11-point AP")
    command.add_argument("--json", action="store_true", help="print JSON; a value without positives is null")
    command.add_argument(
        "--shifts", metavar="SET", type=data.set_name, help="with --per-class: object shifts of this data set (Fig. 6)"
    )
    command.add_argument("--root", metavar="DIR", help="of --shifts: its folder (default: datasets/SET)")
    command.add_argument("--split", help="of --shifts: its split (default: the training split)")
    command = commands.add_parser("voc12", help="scores as the VOC2012 server's text files", allow_abbrev=False)
    command.set_defaults(run=voc12)
    command.add_argument("file", metavar="FILE.npz", help="scores.npz of a run with --data voc2012 --test-split test")
    command.add_argument(
        "--out", default="runs/voc12/results/VOC2012/Main", metavar="DIR", help="where to write (default: %(default)s)"
    )
    command = commands.add_parser("cost", help="parameters, MACs, times and memory of the methods", allow_abbrev=False)
    command.set_defaults(run=cost)
    add = command.add_argument
    add("--methods", default="srdl,sadcl,energy_roi,oass", help="some of %(default)s (default: all)")
    add("--backbone", default="resnet101", help="of all methods (default: %(default)s)")
    add("--sizes", default="448", metavar="224,448", help="sides of the input in pixels (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="images a training step (default: %(default)s)")
    add("--classes", type=int, default=80, metavar="N", help="number of classes (default: %(default)s)")
    add("--amp", choices=("off", "bf16", "fp16"), help="precision (default: bf16 on a GPU, off on a CPU)")
    add("--device", choices=("cpu", "cuda"), help="where (default: the first GPU, else the CPU)")
    add("--repeats", type=int, metavar="N", help="timed calls, of which the median counts (default: GPU 20, CPU 3)")
    add("--out", default="runs/cost.json", metavar="FILE", help="all numbers as JSON (default: %(default)s)")
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
