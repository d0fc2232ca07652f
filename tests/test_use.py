"""A trained network in use: --predict, --export, `eval.py cost`, the README's path of a new user and pieces to copy."""

import csv
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, StaysOnTheDevice, fake_gpu
from PIL import Image
from test_common import readme_commands
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import data
import energy_roi
import eval as metrics
import oass
import sadcl
import srdl

SCRIPTS = {"srdl": srdl, "sadcl": sadcl, "energy_roi": energy_roi, "oass": oass}
PICTURES = {"srdl": "draw_attention", "sadcl": "draw_attention", "energy_roi": "draw_regions", "oass": "draw_keypoints"}
SHORT = {"sadcl": ["--stop-after", "1", "1"]}


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """trained("srdl", "--baseline") -> run folder of a run of two steps; made once."""
    folders = {}

    def train(name, *flags):
        if (name, *flags) not in folders:
            folder = tmp_path_factory.mktemp(name) / "run"
            method, real = SCRIPTS[name], getattr(SCRIPTS[name], PICTURES[name])
            setattr(method, PICTURES[name], lambda show, path: path.touch())
            method.main(method.parse(["--root", toy, *SMALL, "--out", str(folder), *flags]))
            setattr(method, PICTURES[name], real)
            folders[(name, *flags)] = folder
        return folders[(name, *flags)]

    return train


def use(name, *flags):
    method = SCRIPTS[name]
    return method.main(method.parse(["--gpus", "cpu", *flags]))


# ---------------------------------------------------------------------------------------------------------------------
# --predict


@pytest.mark.parametrize("name", SCRIPTS)
def test_predict_gives_what_the_test_gave(name, trained, toy, tmp_path, capsys):
    """The same pixels through --predict and through the test: the same probabilities, in every output."""
    run = trained(name)
    scores = metrics.load_scores(run / "scores.npz")
    files = [str(data.voc_folder("toy", toy) / "JPEGImages" / f"{i}.jpg") for i in scores["images"][:3]]
    out = tmp_path / "out"
    rows = use(name, "--predict", *files, "--checkpoint", str(run), "--out", str(out))
    expected = 1 / (1 + np.exp(-scores["scores"][:3].astype(np.float64)))
    assert np.abs(torch.stack(list(rows.values())).numpy() - expected).max() < 1e-5
    written = list(csv.reader((out / "predictions.csv").open()))
    assert written[0] == ["image", "labels", *scores["classes"]] and [line[0] for line in written[1:]] == files
    assert np.abs(np.array([line[2:] for line in written[1:]], float) - expected).max() < 1e-5
    for line, p in zip(written[1:], expected, strict=True):
        assert line[1] == "|".join(c for c, v in zip(scores["classes"], p, strict=True) if v >= 0.5)
    text = capsys.readouterr().out
    best = scores["classes"][expected[0].argmax()]
    assert f"{best} {expected[0].max():.2f}" in text.split(files[0])[1].splitlines()[0]
    pictures = sorted((out / "pictures").iterdir())
    assert [p.stem for p in pictures] == sorted(Path(f).stem for f in files)
    assert all(Image.open(p).width == 1000 for p in pictures)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_predict_on_a_gpu_gives_what_a_cpu_gives(name, trained, tmp_path):
    Image.new("RGB", (90, 40), "blue").save(tmp_path / "a.png")
    found = []
    for device in ("cpu", "0"):
        flags = ["--checkpoint", str(trained(name)), "--gpus", device, "--out", str(tmp_path / device)]
        found += use(name, "--predict", str(tmp_path / "a.png"), *flags).values()
    assert torch.allclose(*found, atol=1e-2)


def test_predict_needs_nothing_but_the_checkpoint(tmp_path, monkeypatch, toy):
    """A model of the user's own classes, at its own size; afterwards table, images and run folder are gone."""
    monkeypatch.setattr(srdl, "draw_attention", lambda show, path: path.touch())
    own, photo = tmp_path / "own", tmp_path / "photo.png"
    own.mkdir()
    lines = ["image,split,labels"]
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 99, 0)).save(own / f"{i}.png")
        lines.append(f"{i}.png,{'train' if i < 6 else 'val'},{('newt', 'owl|newt')[i % 2]}")
    (own / "own.csv").write_text("\n".join(lines))
    run = tmp_path / "run"
    small = ["--image-size", "64", "-b", "4", "--epochs", "1", "-j", "0", "--amp", "off", "--gpus", "cpu"]
    flags = ["--backbone", "resnet18", "--weights", "none", "--glove", "hash", "--top-k", "1"]
    srdl.main(srdl.parse(["--data", str(own / "own.csv"), *small, *flags, "--out", str(run)]))
    checkpoint = (run / "best.pt").rename(tmp_path / "model.pt")
    for path in (*own.iterdir(), *(p for p in run.rglob("*") if p.is_file())):
        path.unlink()
    Image.new("RGB", (50, 20), "red").save(photo)
    rows = use("srdl", "--predict", str(photo), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"))
    assert list(rows) == [str(photo)] and rows[str(photo)].shape == (2,)


def test_folders_are_read_and_what_is_no_image_is_named(trained, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.JPG", "a.png"):
        Image.new("RGB", (30, 20), "green").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    asked = [str(folder), str(tmp_path / "a.png"), str(tmp_path / "missing.jpg")]
    rows = use("oass", "--predict", *asked, "--checkpoint", str(trained("oass")), "--out", str(out))
    assert [Path(name).name for name in rows] == ["a.png", "b.JPG", "a.png"]
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["a.jpg", "a_.jpg", "b.jpg"]  # none is overwritten
    said = capsys.readouterr().err
    assert "broken.jpg: cannot be read" in said and "missing.jpg: cannot be read" in said and "notes" not in said
    with pytest.raises(data.UserError, match="holds predictions already"):
        use("oass", "--predict", *asked, "--checkpoint", str(trained("oass")), "--out", str(out))
    with pytest.raises(data.UserError, match="no image could be read"):
        other = str(tmp_path / "other")
        use("oass", "--predict", str(folder / "deeper"), "--checkpoint", str(trained("oass")), "--out", other)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_a_photo_of_any_mode_shows_the_same_picture(mode, tmp_path):
    """Left half black, right half white, whatever the mode; 16 bits keep their upper 8."""
    grey = np.zeros((8, 10), np.uint8)
    grey[:, 5:] = 255
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    else:
        image = image.convert("L" if mode in ("1", "P", "I", "F") else "RGB").convert(mode)
    path = tmp_path / ("photo.jpg" if mode in ("CMYK", "YCbCr") else "photo.tif")
    image.save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))
    pixels = data.read_photo(path)
    assert pixels.shape == (3, 8, 10) and pixels.dtype == torch.uint8
    assert (pixels.float() - torch.from_numpy(grey)).abs().max() <= 8


def test_a_photo_is_turned_and_its_transparent_parts_are_white(tmp_path):
    image = Image.new("RGB", (10, 6), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_photo(tmp_path / "turned.jpg").shape == (3, 10, 6)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 6, 10)  # data sets: stored pixels
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (data.read_photo(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize("name, flags", [("energy_roi", "--baseline"), ("srdl", "--no-spatial-attention")])
def test_a_network_without_a_view_of_its_own_shows_the_labels(name, flags, trained, tmp_path):
    Image.new("RGB", (90, 40), "blue").save(tmp_path / "a.png")
    run = trained(name, flags)
    use(name, "--predict", str(tmp_path / "a.png"), "--checkpoint", str(run), "--out", str(tmp_path / "out"))
    assert np.asarray(Image.open(tmp_path / "out" / "pictures" / "a.jpg")).std() > 10


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--predict a.jpg", "--checkpoint FILE belong together"),
        ("--export a.onnx --evaluate --checkpoint {}", "without --export"),
        ("--export a.bin --checkpoint {}", "ends in .pt2 or .onnx"),
        ("--predict a.jpg --checkpoint {} --backbone resnet50", "backbone resnet18"),
        ("--predict a.jpg --checkpoint {} --resume", "exclude each other"),
    ],
)
def test_wrong_uses_end_with_a_message(flags, words, trained, capsys):
    with pytest.raises(SystemExit):
        srdl.parse(flags.format(trained("srdl")).split())
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_method_or_two_devices_are_refused(trained, capsys):
    with pytest.raises(SystemExit):
        oass.parse(["--predict", "a.jpg", "--checkpoint", str(trained("srdl"))])
    assert "has method srdl; oass is asked for" in capsys.readouterr().err
    args = srdl.parse(["--predict", "a.jpg", "--checkpoint", str(trained("srdl"))])
    with pytest.raises(data.UserError, match="one process"):
        common.apply(args, common.Env(0, 2, torch.device("cpu")), srdl.build, srdl.draw_attention)


def test_evaluate_scores_another_split(trained, toy, tmp_path):
    flags = ["--checkpoint", str(trained("srdl")), "--out", str(tmp_path / "out"), "--limit", "100"]
    record = use("srdl", "--evaluate", *flags, "--test-split", "train")
    scores, table = metrics.load_scores(tmp_path / "out" / "scores.npz"), data.load_split("toy", toy, "train")
    assert record["images"] == len(table) == 40 and set(scores["images"]) == set(table.names)
    labels = metrics.apply_difficult(scores["labels"], "negative")
    assert record["map_points"] == metrics.summary(scores["scores"], labels)["map_points"]


# ---------------------------------------------------------------------------------------------------------------------
# --export


old_torch = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="torch is too old")


@old_torch
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_exported_network_gives_the_same_logits(name, kind, trained, tmp_path, capsys):
    """Read the file back as a stranger would, on batches of 1 and 7 that the export has not seen."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    few = tmp_path.parent / "classes.txt"
    few.write_text("red ring\nblue star\ngreen square\n")
    flags = ["--classes", str(few)] if name == "srdl" else []  # its program grows with them
    run, path = trained(name, *flags), tmp_path / "to" / f"model.{kind}"
    assert use(name, "--export", str(path), "--checkpoint", str(run)) < 1e-4
    about = json.loads(Path(f"{path}.json").read_text())
    args = SCRIPTS[name].parse(["--export", str(path), "--checkpoint", str(run)])
    state = common.load_checkpoint(run / "last.pt")
    extra = [state["stage"]] if name == "sadcl" else []
    model = SCRIPTS[name].build(args, state["classes"], *extra).eval()
    model.load_state_dict(common.weights_of(state))
    if name == "energy_roi":
        assert "global branch only" in about["note"] and "global branch only" in capsys.readouterr().out
        model = energy_roi.GlobalBranch(model)
    for batch in (1, 7):
        images = torch.randn(batch, 3, 64, 64)
        if kind == "pt2":
            found = torch.export.load(path).module()(images=images)
        else:
            session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            expected = model(images)
        assert found.shape == (batch, len(about["classes"])) and (found - expected).abs().max() < 1e-4
        assert expected.std() > 1e-3  # there is something to agree on
    assert about["classes"] == state["classes"] and about["mean"] == list(data.MEAN)


def test_export_says_what_it_needs(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "EXPORT_TORCH", (99, 1))
    with pytest.raises(data.UserError, match=r"needs torch 99.1 or newer; this is \d"):
        use("srdl", "--export", str(tmp_path / "a.pt2"), "--checkpoint", str(trained("srdl")))
    monkeypatch.setattr(common, "EXPORT_TORCH", (2, 6))
    monkeypatch.setitem(common.EXPORTS, ".onnx", ("no_such_package",))
    with pytest.raises(data.UserError, match="needs no_such_package: pip install onnx onnxscript"):
        use("srdl", "--export", str(tmp_path / "a.onnx"), "--checkpoint", str(trained("srdl")))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# eval.py cost


@pytest.mark.parametrize("row", metrics.COSTS)
def test_cost_times_the_step_that_main_takes(row, toy, tmp_path, monkeypatch):
    """Its loss is main's on the same batch and network, weights of a ramp aside."""
    name, flags = metrics.COSTS[row]
    method, seen = SCRIPTS[name], {}
    monkeypatch.setattr(method, PICTURES[name], lambda show, path: path.touch())
    monkeypatch.setattr(common.Run, "finish_epoch", lambda self, epoch: dict.fromkeys(metrics.F1_NAMES, 0.0))
    monkeypatch.setattr(common.Run, "report", lambda self, record, *more: None)
    monkeypatch.setattr(common, "draw_curves", lambda log, path: None)
    batches = common.Run.batches

    def one(self, epoch):
        images, labels = next(batches(self, epoch))
        seen.update(
            images=images.clone(), labels=labels, weights={k: v.clone() for k, v in self.model.state_dict().items()}
        )
        torch.manual_seed(5)  # dropout
        yield images, labels

    monkeypatch.setattr(common.Run, "batches", one)
    monkeypatch.setattr(common.Run, "update", lambda self, loss, **terms: seen.update(loss=loss.item()))
    small = ["--root", toy, *SMALL, *(["--ramp-epochs", "0"] if name == "oass" else []), *flags]
    args = method.parse([*small, "--out", str(tmp_path / "run")])
    method.main(args)
    model = method.build(args, [f"class {i}" for i in range(12)], *([int(args.stage)] if name == "sadcl" else []))
    model.load_state_dict(seen["weights"])
    loss, after = metrics.training_loss(name, args, model.train(), torch.device("cpu"))
    torch.manual_seed(5)
    value = loss(seen["images"], data.targets(seen["labels"], args.difficult_train))
    after()
    assert value.item() == pytest.approx(seen["loss"], rel=1e-5)


@fake_gpu
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(
    ("row", "flags", "waits"),
    [
        ("srdl", "", 0),
        ("srdl", "--head sd --no-erase", 0),
        ("srdl", "--head sam --no-erase", 0),
        ("sadcl stage 1", "", 0),
        ("sadcl stage 2", "", 7),  # the labels of each of 4 images; two choices by y; SSCL's y.nonzero()
        ("energy_roi", "", 1),  # the valid regions
        ("energy_roi", "--tie-weak-head --rank area", 1),
        ("oass", "", 0),
        ("oass", "--keypoint center --csi", 0),
        ("oass", "--keypoint ctopk-w", 1),  # the present classes
    ],
)
def test_a_training_loss_on_a_fake_gpu(row, flags, waits, monkeypatch):
    """Forward, on fake tensors: nothing is left on the CPU, and the program waits for the GPU where it is said only."""
    script, more = metrics.COSTS[row]
    more, shared = [*more, *flags.split()], "--data coco --weights none --backbone resnet18 --image-size 64".split()
    args = SCRIPTS[script].parse([*shared, "--batch-size", "4", *more])
    model = SCRIPTS[script].build(
        args, [f"class {i}" for i in range(5)], *([int(args.stage)] if script == "sadcl" else [])
    )
    monkeypatch.setattr(metrics.copy, "deepcopy", lambda backbone: backbone)  # fake tensors cannot
    with FakeTensorMode():
        for module in model.train().modules():
            for own in (module._parameters, module._buffers):
                for name, t in own.items():
                    if t is not None:
                        moved = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        own[name] = torch.nn.Parameter(moved, t.requires_grad) if own is module._parameters else moved
        images, y = torch.empty(4, 3, 64, 64, device="cuda"), torch.empty(4, 5, device="cuda", dtype=torch.bool)
        with StaysOnTheDevice(rows=4) as calls:
            loss, _ = metrics.training_loss(script, args, model, torch.device("cuda"))
            assert loss(images, y).shape == () and calls.calls > 100
    assert len(calls.waits) == waits, calls.waits


def measured(script, flags, size):
    """eval.measure in this process: a dict of numbers."""
    rows, options = [], {"device": "cpu", "backbone": "resnet18", "classes": 3, "batch": 2, "amp": "off", "repeats": 1}
    metrics.measure(script, flags, options | {"size": size}, SimpleNamespace(put=rows.append))
    return rows[0]


def test_cost_measures_each_method_beside_its_baseline():
    backbone = sum(p.numel() for p in common.Backbone("resnet18").parameters())
    plain, ours = measured("oass", ["--baseline"], 64), measured("oass", [], 64)
    assert plain["parameters"] == ours["parameters"] == backbone + 3 * 512 and plain["macs"] == ours["macs"] > 1e8
    for row in (plain, ours):
        assert min(row[k] for k in ("inference_1", "inference_2", "training_step", "peak_memory_mb")) > 0
        assert row["images_per_second"] == pytest.approx(2 / row["training_step"])
    with_regions, without = measured("energy_roi", [], 64), measured("energy_roi", ["--baseline"], 64)
    assert with_regions["macs"] > without["macs"] and with_regions["parameters"] > without["parameters"] + 8e6
    rows = [{"row": "energy_roi --baseline", "size": 64} | without, {"row": "energy_roi", "size": 64} | with_regions]
    lines = metrics.cost_table(rows, 2).splitlines()
    cells = dict(zip(re.split(r"\s{2,}", lines[0].strip()), re.split(r"\s{2,}", lines[2])[1:], strict=True))
    assert cells["M param."] == f"{with_regions['parameters'] / 1e6:.2f}"
    assert lines[2].split()[3] == f"{with_regions['parameters'] / without['parameters']:.2f}"


def test_cost_writes_a_table_and_goes_on_after_a_case_that_fails(tmp_path, capsys):
    out = tmp_path / "cost.json"
    flags = ["--methods", "oass", "--backbone", "resnet18", "--sizes", "48", "--batch", "2", "--classes", "3"]
    metrics.main(["cost", *flags, "--repeats", "1", "--device", "cpu", "--out", str(out)])  # 48: no multiple of 32
    plain, ours = json.loads(out.read_text())["rows"]
    assert plain["row"] == "oass --baseline" and plain["training_step"] > 0 and "SystemExit" in ours["error"]
    said = capsys.readouterr()
    assert "oass, 48 px: SystemExit" in said.err and f"{plain['parameters'] / 1e6:.2f}" in said.out


def dies(script, flags, options, queue):
    os._exit(7)


def test_cost_notices_a_process_that_dies_without_a_word(monkeypatch):
    monkeypatch.setattr(metrics, "measure", dies)
    assert metrics.measure_alone("srdl", [], {}) == {"error": "its process ended with code 7"}


@pytest.mark.gpu
def test_cost_on_a_gpu(tmp_path):
    flags = ["--backbone", "resnet18", "--sizes", "64", "--batch", "2", "--classes", "3", "--repeats", "1"]
    metrics.main(["cost", *flags, "--device", "cuda", "--out", str(tmp_path / "cost.json")])
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert len(rows) == 9 and all(row["training_step"] > 0 and row["peak_memory_mb"] > 10 for row in rows)


def test_cost_refuses_what_it_does_not_know(capsys):
    wrong = [("--methods srdl,vgg", "vgg: expected some of"), ("--sizes 64,big", "expected whole numbers")]
    for flags, words in (*wrong, ("--batch 0", "expected whole numbers"), ("--device cuda", "no GPU")):
        if "cuda" in flags and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit, match=words):
            metrics.main(["cost", *flags.split()])


# ---------------------------------------------------------------------------------------------------------------------
# README


def test_the_readmes_pieces_run_on_plain_tensors():
    pieces = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.S)
    assert len(pieces) == 4
    for piece in pieces:
        torch.manual_seed(0)
        names = {}
        exec("import torch\n" + piece, names)
        tensors = [v for v in names.values() if isinstance(v, torch.Tensor)]
        assert len(tensors) >= 3 and all(v.isfinite().all() for v in tensors if v.is_floating_point())
        for shape in re.findall(r"# (?:cells: )?\(([\d, ]+)\)", piece):
            assert any(list(v.shape) == [int(n) for n in shape.split(",") if n.strip()] for v in tensors), shape


@old_torch
def test_a_new_users_path(toy, tmp_path, capsys):
    """The README's commands of "Using a trained network" one after the other, small, as typed."""
    text = Path("README.md").read_text(encoding="utf-8")
    block = text.split("## Using a trained network")[1].split("\n    ", 1)[1].split("\n\n")[0]
    commands = [command for command in readme_commands() if command.split("  ")[0] in block]
    photo = next((data.voc_folder("toy", toy) / "JPEGImages").iterdir())
    done = []
    for command in commands:
        for name, path in (("photo.jpg", photo), ("RUN", tmp_path / "a"), ("OTHER", tmp_path / "b")):
            command = command.replace(name, str(path))
        _, script, *flags = shlex.split(command.replace("model.onnx", str(tmp_path / "model.pt2")))
        if script == "eval.py":
            metrics.main(flags)
        else:
            method = SCRIPTS[script[:-3]]
            extra = [] if "--checkpoint" in flags else ["--root", toy, *SMALL]
            extra += ["--out", str(tmp_path / "p")] if "--predict" in flags else []
            method.main(method.parse([*extra, *flags]))
        done += flags[:1]
    assert {"--predict", "--export", "--evaluate", "score"} <= set(done)
    assert (tmp_path / "p" / "predictions.csv").is_file() and (tmp_path / "model.pt2").is_file()
    assert "difference" in capsys.readouterr().out
