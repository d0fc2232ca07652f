"""Run by hand: what each method costs beside its own --baseline as classes, image size and batch grow, one at a time;
eval.py's measure in a process for each case. Writes FILE.json (every number) and FILE.png (time of a training step and
peak memory, which on a CPU is the whole process's, as multiples of the baseline's at the same setting).

python tests/bench_scaling.py --out runs/scaling                                             a GPU: ResNet-101, 448 px
python tests/bench_scaling.py --device cpu --backbone resnet18 --size 224 --batch 4 --out runs/scaling
python tests/bench_scaling.py --draw runs/scaling.json                                       the picture again
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import eval as metrics

CLASSES = (20, 80, 500)
PARTS = {"training_step": "training step", "peak_memory_mb": "peak memory"}  # rows of the picture


def cases(options):
    """{axis: [(its value, options of measure)]}; on the middle one of each the other axes are measured."""
    fixed = {"device": options.device, "backbone": options.backbone, "amp": options.amp, "repeats": options.repeats}
    fixed |= {"classes": CLASSES[1], "size": options.size, "batch": options.batch}
    values = {"classes": CLASSES, "size": [options.size * k // 7 for k in (4, 7, 10)]}
    values["batch"] = [max(1, options.batch * k // 4) for k in (1, 4, 16)]
    return {axis: [(value, fixed | {axis: value}) for value in those] for axis, those in values.items()}


def sweep(options):
    """Numbers by axis, value and row; a setting that lies on several axes is measured once."""
    done, rows = {}, []
    for axis, settings in cases(options).items():
        for value, case in settings:
            for name, (script, flags) in metrics.COSTS.items():
                for row, flag in ((f"{script} --baseline", ["--baseline"]), (name, flags)):
                    key = (row, *case.items())
                    if key not in done:
                        done[key] = metrics.measure_alone(script, flag, case)
                        text = done[key].get("error") or f"{done[key]['training_step']:.3f} s a step"
                        print(f"{row}, {axis} {value}: {text}", flush=True)
                    rows.append({"axis": axis, "value": value, "row": row} | done[key])
    return rows


def ratios(rows, axis, part):
    """A record for each value on the axis: every method's number over its baseline's, as draw_chart wants them."""
    table = {(r["value"], r["row"]): r[part] for r in rows if r["axis"] == axis and part in r}
    records = []
    for value in dict.fromkeys(r["value"] for r in rows if r["axis"] == axis):
        record = {axis: value}
        for name, (script, _) in metrics.COSTS.items():
            pair = table.get((value, name)), table.get((value, f"{script} --baseline"))
            if all(pair):
                record[name.replace("stage ", "")] = pair[0] / pair[1]
        records.append(record)
    return records


def draw(rows, path):
    """1,500 pixels wide: a column for each axis, a row for each of PARTS."""
    picture = Image.new("RGB", (1500, 360 * len(PARTS)), "white")
    names = [name.replace("stage ", "") for name in metrics.COSTS]
    for line, (part, title) in enumerate(PARTS.items()):
        for column, axis in enumerate(("classes", "size", "batch")):
            box = (500 * column + 70, 360 * line + 40, 500 * column + 470, 360 * line + 310)
            common.draw_chart(picture, box, ratios(rows, axis, part), names, f"{title} / baseline's", axis)
    picture.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", choices=common.BACKBONES, default="resnet101")
    parser.add_argument(
        "--size", type=int, default=448, help="pixels, when another axis is measured; also x 4/7 and 10/7"
    )
    parser.add_argument("--batch", type=int, default=16, help="images, likewise; also a quarter and four times as many")
    parser.add_argument("--amp", choices=tuple(common.DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, of which the median counts")
    parser.add_argument("--out", default="runs/scaling", metavar="FILE", help="without .json, .png")
    parser.add_argument("--draw", metavar="FILE.json", help="do not measure")
    options = parser.parse_args()
    if options.draw:
        path, rows = Path(options.draw), json.loads(Path(options.draw).read_text())["rows"]
    else:
        path, rows = Path(f"{options.out}.json"), sweep(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        device = common.device_name(torch.device(options.device))
        about = {"device": device, "torch": torch.__version__, "options": vars(options)}
        path.write_text(json.dumps(about | {"rows": rows}, indent=1))
    draw(rows, path.with_suffix(".png"))
    for axis in ("classes", "size", "batch"):
        for part, title in PARTS.items():
            for record in ratios(rows, axis, part):
                texts = [f"{name} {x:.2f}" for name, x in list(record.items())[1:]]
                print(f"{title}, {axis} {record[axis]}: {', '.join(texts)}")


if __name__ == "__main__":
    main()
