"""common.py: command line, backbones, processes, precision, checkpoints, the run folder and its accidents."""

import contextlib
import errno
import gc
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL
from torch import nn
from torch.nn import functional as nnf

import common
import data
import energy_roi
import eval as metrics
import oass
import sadcl
import srdl
from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_a_flag_beats_the_recipe_which_depends_on_the_data():
    assert (srdl.parse([]).lr, srdl.parse([]).backbone) == (srdl.RECIPE["toy"]["lr"], "resnet18")
    voc = srdl.parse(["--data", "voc2007"])
    assert (voc.lr, voc.backbone, voc.train_split, voc.test_split) == (1e-5, "resnet101", "trainval", "test")
    assert srdl.parse(["--lr", "0.3", "--data", "voc2007", "--test-split", "val"]).lr == 0.3
    nearest = srdl.parse(["--data", "voc2012"])
    assert (nearest.recipe, nearest.lr, nearest.train_split) == ("voc2007", 1e-5, "train")


def test_help_prints_the_defaults_of_the_data_set(capsys):
    for flags, batch, rate in (([], "32", "0.002"), (["--data", "voc2007"], "16", "1e-05")):
        with pytest.raises(SystemExit):
            srdl.parse([*flags, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"over all processes (default: {batch})" in text and f"learning rate (default: {rate})" in text
        assert "(default: None)" not in text


@pytest.mark.parametrize("script", ["srdl.py", "sadcl.py", "energy_roi.py", "oass.py"])
def test_every_flag_has_help_and_is_read(script):
    parser = common.arguments("")
    source = "".join(Path(name).read_text() for name in (script, "common.py", "data.py"))
    used = set(re.findall(r"args\.(\w+)", source))
    for action in parser._actions[1:]:
        assert action.help and action.dest in used, action.dest
    for dest in re.findall(r'add\("--([\w-]+)"', Path(script).read_text()):
        assert dest.replace("-", "_") in used, dest


@pytest.mark.parametrize(
    "flags",
    ["--back resnet18", "--epochs 0", "--workers -1", "--ema-decay 1", "--data imagenet", "--evaluate", "--lr -1"]
    + ["--checkpoint x.pt", "--resume nowhere", "--evaluate --checkpoint nowhere.pt", "--threshold 1.5"]
    + ["--gpus gpu", "--gpus 0,0", "--gpus 0,cpu"],
)
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        srdl.parse(flags.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_three_parts_are_torchvisions_network(name, tmp_path):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    ours = common.Backbone(name, str(tmp_path / "weights.pth")).eval()
    images = torch.randn(2, 3, 64, 96)
    f8, f16, f32 = ours(images)
    assert [f.shape[1:] for f in (f8, f16, f32)] == [
        (c, 64 // s, 96 // s) for c, s in zip(ours.channels, (8, 16, 32), strict=True)
    ]
    features = net.features if name == "mobilenet_v2" else nn.Sequential(*list(net.children())[:-2])
    assert torch.equal(f32, features(images))


@pytest.mark.parametrize("name", common.BACKBONES)
def test_the_last_stage_may_keep_its_stride(name):
    with torch.device("meta"):
        shapes = [f.shape for f in common.Backbone(name, last_stride=1)(torch.empty(1, 3, 64, 64))]
        assert [s[1] for s in shapes] == list(common.Backbone(name).channels)
    assert [s[2] for s in shapes] == [8, 4, 4]


def test_frozen_parts_get_no_gradient_and_keep_their_statistics():
    torch.manual_seed(0)
    net = common.Backbone("resnet18", frozen=("to8.conv1", "to8.bn1", "to8.layer1", "to16")).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))[2].sum().backward()
    still = ("to8.conv1", "to8.bn1", "to8.layer1", "to16")
    for name, p in net.named_parameters():
        assert (p.grad is None) == name.startswith(still), name
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert "to8.layer2.0.bn1.running_mean" in moved and not any(n.startswith(still) for n in moved)
    frozen = common.Backbone("resnet18", frozen_bn=True).train()
    assert not any(m.training or m.weight.requires_grad for m in frozen.modules() if isinstance(m, nn.BatchNorm2d))


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, weights, message in (
        ("mobilenet_v2", "r18.pth", "r18.pth: not loaded .* expected the state dict of torchvision's mobilenet_v2"),
        ("resnet18", "text.pth", "text.pth"),
        ("resnet18", "list.pth", "list.pth"),
        ("resnet18", "none.pth", "none.pth: not loaded .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            common.Backbone(name, str(tmp_path / weights))
    with pytest.raises(UserError, match="resnet18 has none; there are IMAGENET1K_V1"):
        common.Backbone("resnet18", "v2")
    with pytest.raises(UserError, match="resnext101_32x8d only"):
        common.Backbone("resnet18", "swsl")


def test_pretrained_weights_are_torchvisions_of_that_version(monkeypatch):
    torch.manual_seed(0)
    states = {v: torchvision.models.resnet50(weights=None).state_dict() for v in ("IMAGENET1K_V1", "IMAGENET1K_V2")}
    monkeypatch.setattr(
        torchvision.models.ResNet50_Weights, "get_state_dict", lambda self, *a, **k: states[self.name], raising=True
    )
    for flag, version in (("v1", "IMAGENET1K_V1"), ("v2", "IMAGENET1K_V2")):
        net = common.Backbone("resnet50", flag)
        assert torch.equal(net.to8.conv1.weight, states[version]["conv1.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation, precision, EMA: on a tiny network in place of SRDL's


class Tiny(nn.Module):
    """Mean colour -> classes; no BatchNorm, so parts of a batch equal the batch."""

    class_dims = {"head.weight": 1, "head.bias": 1}

    def __init__(self, classes=12):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, classes)

    def forward(self, images):
        self.calls += self.training
        return self.head(self.body(images.mean((2, 3))).tanh())


def train_tiny(toy, out, *flags, rate=0.1, clip=None):
    args = srdl.parse(["--root", toy, *SMALL, "--out", str(out), *flags])
    env = common.start(args)
    train, test = common.load_data(args, env)
    run = common.Run(args, env, Tiny(), train, test)
    optimizer = torch.optim.SGD(run.model.parameters(), rate)
    net = run.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), clip=clip)
    history = []
    for epoch in run.epochs():
        for images, labels in run.batches(epoch):
            with run.autocast():
                logits = net(images)
            run.update(nnf.binary_cross_entropy_with_logits(logits.float(), (labels == 1).float()))
            history.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
        run.finish_epoch(epoch)
    return run, history


def close(a, b, **tolerance):
    return all(torch.allclose(a[n], b[n], **tolerance) for n in a)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(toy, tmp_path, parts):
    whole, _ = train_tiny(toy, tmp_path / "a", "--epochs", "3")
    split, _ = train_tiny(toy, tmp_path / "b", "--epochs", "3", "--accumulate", str(parts))
    assert whole.step == split.step == 6
    assert close(
        whole.model.state_dict() | {"calls": 0 * whole.model.calls},
        split.model.state_dict() | {"calls": 0 * split.model.calls},
        atol=1e-6,
    )
    assert whole.optimizer.param_groups[0]["lr"] == split.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_ema_is_the_running_mean_with_a_horizon_that_fits_the_run(toy, tmp_path):
    run, history = train_tiny(toy, tmp_path / "a", "--epochs", "10", "--ema-decay", "0.999")
    decay = 1 - 1 / (run.total_steps / 5)  # horizon: a fifth of 20 steps
    average = history[0]  # the first update copies
    for weights in history[1:]:
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in weights}
    assert close(average, dict(run.ema.module.named_parameters()), atol=1e-6)
    assert run.reported is run.ema.module and run.ema.module.calls.dtype == torch.long
    record = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    assert {"map_points", "raw_map_points", "raw_top3_OF1"} <= set(record)


def test_a_run_may_go_on_in_another_precision(toy, tmp_path):
    train_tiny(toy, tmp_path / "a")
    run, _ = train_tiny(toy, tmp_path / "a", "--resume", str(tmp_path / "a"), "--amp", "fp16")
    assert run.scaler.is_enabled() and run.epoch == 1


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_and_fp16_scales_the_loss(toy, tmp_path, amp):
    run, history = train_tiny(toy, tmp_path / amp, "--amp", amp)
    assert run.precision == amp and run.scaler.is_enabled() == (amp == "fp16")
    _, expected = train_tiny(toy, tmp_path / "full")
    assert close(history[-1], expected[-1], atol=5e-3) and not close(history[-1], expected[-1], atol=0)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_clipping_bounds_the_step_whatever_the_loss_is_scaled_by(toy, tmp_path, amp):
    start = {n: p.detach().clone() for n, p in train_tiny(toy, tmp_path / "still", rate=0)[0].model.named_parameters()}
    _, free = train_tiny(toy, tmp_path / "free", "--amp", amp, "--limit", "4", rate=0.5)
    _, clipped = train_tiny(toy, tmp_path / "clipped", "--amp", amp, "--limit", "4", rate=0.5, clip=0.01)
    moved = [torch.stack([(h[-1][n] - start[n]).square().sum() for n in start]).sum().sqrt() for h in (free, clipped)]
    assert len(free) == 1 and moved[0] > 0.02 and moved[1] == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_auto_precision_tries_both_and_leaves_no_trace(toy, tmp_path, capsys):
    run, history = train_tiny(toy, tmp_path / "a", "--amp", "auto")
    assert run.precision in ("off", "bf16") and "--amp auto: float32" in capsys.readouterr().out
    assert int(run.model.calls) == 2  # the trial ran on a copy
    _, expected = train_tiny(toy, tmp_path / "b", "--amp", run.precision)
    assert close(history[-1], expected[-1], atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def same_run(a, b):
    """Two run folders hold the same states, scores and log, up to times and names."""
    for name in ("last.pt", "best.pt"):
        one, two = (common.load_checkpoint(folder / name) for folder in (a, b))
        for state in (one, two):
            state["config"] = {k: v for k, v in state["config"].items() if k not in common.PER_CALL}
        assert all(states_equal(one[k], two[k]) for k in one), [k for k in one if not states_equal(one[k], two[k])]
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (a, b)]
    timing = ("seconds", "images_per_second", "peak_memory_mb", "test_seconds")
    epochs = [[{k: v for k, v in r.items() if k not in timing} for r in log if "epoch" in r] for log in logs]
    assert epochs[0] == epochs[1]
    assert np.array_equal(*(metrics.load_scores(f / "scores.npz")["scores"] for f in (a, b)))


def stop_in_epoch(monkeypatch, number, error):
    """Raise `error` in the middle of an epoch, once."""
    real = common.Run.update

    def update(self, loss, **terms):
        if self.epoch == number and self.parts == 2:
            raise error
        real(self, loss, **terms)

    monkeypatch.setattr(common.Run, "update", update)


@pytest.mark.parametrize(
    ("epoch", "flags"),
    [(1, []), (0, ["--ema-decay", "0.9"]), (2, ["--ema-decay", "0.9", "--schedule", "step", "-j", "1"])],
)
def test_resume_equals_the_straight_run(run, tmp_path, monkeypatch, epoch, flags):
    _, straight = run("--epochs", "3", *flags, out="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, epoch, KeyboardInterrupt)
        run("--epochs", "3", *flags, out="broken")
    with open(tmp_path / "broken" / "log.jsonl", "a") as log:
        log.write('{"epoch": 2, "cut o')  # what a kill may leave
    args = srdl.parse(["--resume", str(tmp_path / "broken")])
    assert (args.epochs, args.root, args.out) == (3, args.root, str(tmp_path / "broken"))
    srdl.main(args)
    same_run(straight, tmp_path / "broken")
    assert "resumed_after_epoch" in (tmp_path / "broken" / "log.jsonl").read_text()


def test_kill_9_loses_at_most_the_current_epoch(toy, tmp_path):
    flags = ["--root", toy, *SMALL, "--epochs", "3", "--limit", "16", "--lr", "1e-3"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "srdl.py", *flags, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = out / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and '"epoch": 1' in log.read_text()):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= common.load_checkpoint(out / "last.pt")["epoch"] or '"epoch": 1' in log.read_text()
    srdl.main(srdl.parse(["--resume", str(out), "--gpus", "cpu"]))
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    srdl.main(srdl.parse([*flags, "--out", str(tmp_path / "straight")]))
    same_run(tmp_path / "straight", out)


def test_a_finished_run_resumes_to_its_report(run):
    record, folder = run()
    again = srdl.main(srdl.parse(["--resume", str(folder / "last.pt")]))
    assert again["map_points"] == record["map_points"]


def test_resume_auto_starts_afresh_or_takes_the_newest(run, toy, tmp_path, monkeypatch, capsys):
    _, folder = run("--resume", out="a")
    assert "nothing" not in capsys.readouterr().err and (folder / "last.pt").exists()
    assert srdl.parse(["--resume", "auto", "--out", str(folder)]).resume == str(folder / "last.pt")
    assert srdl.parse(["--resume", "auto", "--out", str(tmp_path / "b")]).resume is None
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("new", "old")):
        shutil.copytree(folder, tmp_path / "runs" / "srdl" / "toy" / name)
        os.utime(tmp_path / "runs" / "srdl" / "toy" / name / "last.pt", (9e8 - i, 9e8 - i))
    assert srdl.parse(["--resume"]).out == os.path.join("runs", "srdl", "toy", "new")


def test_resume_with_another_batch_size_keeps_epoch_and_rate(run, monkeypatch, tmp_path):
    flags = ("--epochs", "4", "--schedule", "step", "--lr", "1e-3")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 3, KeyboardInterrupt)
        run(*flags, out="a")
    srdl.main(srdl.parse(["--resume", str(tmp_path / "a"), "-b", "2"]))
    state = common.load_checkpoint(tmp_path / "a" / "last.pt")
    assert (state["epoch"], state["step"]) == (4, 16)  # 4 steps an epoch instead of 2
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records if "epoch" in r] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_only_one_source_of_weights(run, tmp_path, capsys):
    _, folder = run()
    for flags in (
        ["--resume", str(folder), "--out", str(tmp_path / "elsewhere")],
        ["--resume", str(folder), "--init-from", str(folder)],
        ["--evaluate", "--checkpoint", str(folder), "--init-from", str(folder)],
    ):
        with pytest.raises(SystemExit):
            srdl.parse(flags)
        assert "init-from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "resnet34"], "backbone resnet18; resnet34 is asked for"),
        (["--epochs", "9"], "epochs 1; 9 is asked for"),
        (["--no-gcn"], "no-gcn False; True is asked for"),
    ],
)
def test_resume_refuses_what_would_not_take_effect(run, flags, message, capsys):
    _, folder = run()
    with pytest.raises(SystemExit):
        srdl.parse(["--resume", str(folder), *flags])
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Evaluating and foreign checkpoints


def test_evaluate_scores_as_training_did(run, toy, tmp_path):
    record, folder = run("--ema-decay", "0.5")
    args = srdl.parse(["--evaluate", "--checkpoint", str(folder), "--out", str(tmp_path / "test")])
    again = srdl.main(args)
    assert all(again[k] == record[k] for k in ("map_points", "map_area", "OF1", "top3_CF1"))
    scores = [metrics.load_scores(f / "scores.npz")["scores"] for f in (folder, tmp_path / "test")]
    assert np.array_equal(*scores)


def test_a_foreign_checkpoint_is_refused_showing_both_values(run, toy, tmp_path, capsys):
    _, folder = run()
    classes = tmp_path / "classes.txt"
    classes.write_text("red star\nblue star\n")
    checkpoint = ["--evaluate", "--checkpoint", str(folder / "last.pt"), "--out", str(tmp_path / "t")]
    args = srdl.parse([*checkpoint, "--classes", str(classes)])
    with pytest.raises(UserError, match="red ring.*\\['red star', 'blue star'\\] is asked for"):
        srdl.main(args)
    with pytest.raises(SystemExit):
        srdl.parse([*checkpoint, "--backbone", "resnet50"])
    assert "backbone resnet18; resnet50 is asked for" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit these flags: .*head.graph"):
        srdl.main(srdl.parse([*checkpoint, "--no-gcn"]))
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"method": "sadcl"}, tmp_path / "other.pt")
    torch.save({"weights": torch.ones(3)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (
        ("other", "method sadcl; srdl is asked for"),
        ("plain", "not a checkpoint"),
        ("text", "not a"),
    ):
        with pytest.raises(SystemExit):
            srdl.parse(["--evaluate", "--checkpoint", str(tmp_path / f"{name}.pt")])
        assert message in capsys.readouterr().err


def test_init_from_copies_rows_by_class_name(run, tmp_path, capsys):
    _, folder = run(out="a")
    classes = tmp_path / "classes.txt"
    classes.write_text("blue star\nred ring\ngreen star\n")
    _, other = run("--init-from", str(folder), "--classes", str(classes), "--lr", "0", "--weight-decay", "0", out="b")
    text = capsys.readouterr().out
    assert "copied by class name: head.nodes" in text and "fresh: nothing" in text
    old, new = (common.load_checkpoint(f / "last.pt")["model"] for f in (folder, other))
    rows = [data.TOY_CLASSES.index(c) for c in ("blue star", "red ring", "green star")]
    assert torch.equal(new["head.classifier.weight"], old["head.classifier.weight"][rows])
    assert torch.equal(new["head.graph.adjacency"], old["head.graph.adjacency"][rows][:, rows])
    assert torch.equal(new["head.f_sa.weight"], old["head.f_sa.weight"])


def test_init_from_takes_coco_and_voc_spelling_as_one():
    old, new = Tiny(3), Tiny(2)
    start = {n: t.clone() for n, t in new.state_dict().items()}
    weights = old.state_dict() | {"body.bias": torch.zeros(9)}
    lists = common.init_from(new, weights, ["cat", "airplane", "dining table"], ["aeroplane", "dragon"])
    assert lists == (["calls", "body.weight"], ["head.weight", "head.bias"], ["body.bias"])
    assert torch.equal(new.head.weight[0], old.head.weight[1])
    assert torch.equal(new.head.weight[1], start["head.weight"][1]) and torch.equal(new.body.bias, start["body.bias"])
    lists = common.init_from(new, weights, ["x", "y", "z"], ["aeroplane", "dragon"])
    assert lists[2] == ["body.bias", "head.weight", "head.bias"]


# ---------------------------------------------------------------------------------------------------------------------
# Accidents


def test_a_folder_in_use_is_refused(run, toy, tmp_path):
    _, folder = run()
    with pytest.raises(UserError, match=r"holds a run already; choose another folder, or --resume"):
        run()
    train_tiny(toy, tmp_path / "busy")
    args = srdl.parse(["--resume", str(folder)])
    with open(folder / "log.jsonl", "a") as log:
        common.fcntl.flock(log, common.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing there"):
            srdl.main(args)


def test_a_failed_start_leaves_the_folder_free(run, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        run("--init-from", str(tmp_path / "nowhere"))
    run()


def test_no_write_permission_is_named(run, tmp_path, toy):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        run(out="file/run")
    with pytest.raises(UserError, match="cannot draw the toy set"):
        data.load(srdl.parse(["--root", str(tmp_path / "file" / "toy")]))


def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(UserError, match=f"no GPU 99: this machine has {torch.cuda.device_count()}"):
        common.start(srdl.parse(["--gpus", "99"]))


def test_sync_bn_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="--sync-bn works on GPUs only"):
        common.start(srdl.parse(["--gpus", "cpu", "--sync-bn"]))


def test_a_loss_that_is_not_finite_stops_and_names_its_terms(run, tmp_path):
    with pytest.raises(UserError, match=r"not finite in step \d+ .*L_era.*last\.pt") as stop:
        run("--epochs", "3", "--lr", "1e30", "--limit", "16")
    assert "L_ori nan" in str(stop.value)
    _, folder = run("--epochs", "1", "--lr", "1e-4", "--limit", "16", "--init-from", str(tmp_path / "run"), out="again")
    assert f"--init-from {tmp_path / 'run'} starts from these" in str(stop.value) and folder.name == "again"
    assert f"--resume {tmp_path / 'run'} --amp off" in str(stop.value)
    assert srdl.parse(["--resume", str(tmp_path / "run"), "--amp", "off"]).resume
    state = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(t.isfinite().all() for t in state["model"].values())


def test_weights_that_the_last_step_of_an_epoch_destroyed_are_not_kept(run, toy, tmp_path):
    one_step, kept = ["--limit", "4", "--epochs", "2"], ".*last.pt holds the last good epoch"
    with pytest.raises(UserError, match=f"test scores are not finite.{kept}"):
        run(*one_step, "--lr", "1e30")
    with pytest.raises(UserError, match=f"weights are not finite after step 1.{kept}"):
        train_tiny(toy, tmp_path / "untested", *one_step, "--eval-every", "2", rate=float("nan"))
    for folder in (tmp_path / "run", tmp_path / "untested"):
        assert common.load_checkpoint(folder / "last.pt")["epoch"] == 0
        assert not (folder / "scores.npz").exists()


def test_ctrl_c_waits_for_what_must_not_be_broken_off():
    done = []
    with pytest.raises(KeyboardInterrupt), common.uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("written")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_in_any_write_loses_nothing(toy, tmp_path, monkeypatch):
    flags, real, real_write, left = ["--epochs", "2", "--resume", "auto"], data.write_atomically, common.Run.write, 0
    train_tiny(toy, tmp_path / "straight", *flags)

    def due():
        nonlocal left
        left -= 1
        return left == 0

    @contextlib.contextmanager
    def write_atomically(path, mode="wb"):
        with real(path, mode) as file:
            yield file
            if due():
                raise KeyboardInterrupt

    def write(self, record):
        if due():
            self.log_file.write(json.dumps(metrics.plain(record))[:40])
            raise KeyboardInterrupt
        real_write(self, record)

    for module in (common, metrics):
        monkeypatch.setattr(module, "write_atomically", write_atomically)
    monkeypatch.setattr(common.Run, "write", write)
    for stop in itertools.count(1):
        left, out = stop, tmp_path / str(stop)
        with contextlib.suppress(KeyboardInterrupt):
            train_tiny(toy, out, *flags)
            break
        train_tiny(toy, out, *flags)
        same_run(tmp_path / "straight", out)
    assert stop == 3 + 2 * 4 + 1 + 1  # config, header, last.pt; scores, table, record, last.pt an epoch; best.pt; none


def test_a_full_disk_is_named_and_loses_nothing(toy, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--resume", "auto"]
    train_tiny(toy, tmp_path / "straight", *flags)
    for name in ("config.json", "log.jsonl", "scores.npz", "per_class.csv", "best.pt", "last.pt"):
        out = tmp_path / name.replace(".", "_")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_in_epoch(patch, 0, KeyboardInterrupt)
            train_tiny(toy, out, *flags)
        (out / f"{name}.tmp").symlink_to("/dev/full")
        with pytest.raises(UserError, match=f"{name}: cannot be written .No space left on device"):
            train_tiny(toy, out, *flags)
        gc.collect()  # the error holds the run, and that its log
        assert common.load_checkpoint(out / "last.pt")["epoch"] == 0
        train_tiny(toy, out, *flags)
        same_run(tmp_path / "straight", out)


def stops(error, args):
    """What common.launch says of an error."""

    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        common.launch(main, args)
    return stop.value.code


def test_a_stop_names_the_way_on(toy, tmp_path, capsys):
    args = srdl.parse(["--root", toy, "--out", str(tmp_path / "run")])
    assert stops(KeyboardInterrupt(), args) == "\nstopped"
    train_tiny(toy, tmp_path / "run")
    way = f"; continue with: python srdl.py --resume {tmp_path}/run"
    assert stops(KeyboardInterrupt(), args) == f"\nstopped{way}"
    full = OSError(errno.ENOSPC, "No space left on device")  # while a line of the log or a picture is written
    assert stops(full, args) == f"srdl.py: {tmp_path}/run: No space left on device{way}"
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError) as stop, data.write_atomically(tmp_path / "last.pt") as file:
        file.write(b"x")
    assert stops(stop.value, args) == 2
    assert f"last.pt: cannot be written (No space left on device){way}\n" in capsys.readouterr().err
    assert stops(UserError("no image"), args) == 2 and way not in capsys.readouterr().err
    for error in (OSError(errno.EIO, ""), RuntimeError("Caught RuntimeError in DataLoader worker process 0.")):
        with pytest.raises(type(error)):  # nothing that is known: the traceback is of use
            stops(error, args)


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), UserError)]
)
def test_what_breaks_off_a_checkpoint_is_not_hidden_by_torch(toy, tmp_path, monkeypatch, error, seen):
    run, _ = train_tiny(toy, tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()

    class Stopped(io.BytesIO):
        def write(self, content):
            if self.tell() > 2000:
                raise error
            return super().write(content)

    @contextlib.contextmanager
    def write_atomically(path):
        with data.write_atomically(path):
            yield Stopped()

    monkeypatch.setattr(common, "write_atomically", write_atomically)
    with pytest.raises(seen):
        run.save()
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_loader_that_dies_is_named_with_the_way_on(toy, tmp_path, monkeypatch, how):
    flags = ["--root", toy, *SMALL, "--epochs", "2", "--out", str(tmp_path / "run"), "-j", "1"]
    here, real = os.getpid(), data.read_image

    def read_image(path):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(1)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(data, "read_image", read_image)
        with pytest.raises(SystemExit, match=r"^srdl.py: DataLoader worker \(pid.*continue with: .* -j 0$") as stop:
            common.launch(srdl.main, srdl.parse(flags))
    command = stop.value.code.split("continue with: python srdl.py ")[1]
    assert srdl.parse(command.split()).workers == 0
    assert common.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 0


def test_a_loader_that_outlives_its_run_leaves_the_folder_free(toy, tmp_path):
    run, _ = train_tiny(toy, tmp_path / "run")
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    process = fork.Process(target=lambda: (begun.set(), time.sleep(60)))
    process.start()
    try:
        assert begun.wait(60)
        run.log_file.close()  # as when this process is killed
        train_tiny(toy, tmp_path / "run", "--resume", str(tmp_path / "run"))
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("damage", ["cut", "zeros", "bit"])
def test_a_damaged_checkpoint_is_named_and_best_goes_on(toy, tmp_path, capsys, damage):
    train_tiny(toy, tmp_path / "straight", "--epochs", "3", "--eval-every", "2")
    out, last = tmp_path / "run", tmp_path / "run" / "last.pt"
    shutil.copytree(tmp_path / "straight", out)
    state, content = common.load_checkpoint(last), bytearray(last.read_bytes())
    at = content.index(state["model"]["body.weight"].numpy().tobytes())
    if damage == "cut":
        del content[at:]
    elif damage == "zeros":
        content[at : at + 60] = bytes(60)
    else:
        content[at + 7] ^= 1
    del state
    last.unlink()  # the tensors are mapped from the old file
    last.write_bytes(content)
    epoch = common.load_checkpoint(out / "best.pt")["epoch"]
    for flags in (["--resume", str(out)], ["--evaluate", "--checkpoint", str(out)]):
        with pytest.raises(SystemExit) as stop:
            srdl.parse(flags)
        text = capsys.readouterr().err
        assert stop.value.code == 2 and f"{last}: damaged" in text
        assert f"{out}/best.pt of epoch {epoch} is whole: give that file instead" in text
    with pytest.raises(UserError, match="best.pt of epoch"):
        train_tiny(toy, tmp_path / "new", "--init-from", str(out))
    train_tiny(toy, out, "--epochs", "3", "--eval-every", "2", "--resume", str(out / "best.pt"))
    same_run(tmp_path / "straight", out)
    (out / "best.pt").unlink()
    last.write_bytes(b"")
    with pytest.raises(UserError) as error:
        common.load_checkpoint(last)
    assert "damaged" in str(error.value) and "best.pt" not in str(error.value)


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"good")
    with pytest.raises(RuntimeError), data.write_atomically(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_errors_leave_the_script_as_one_line(toy, tmp_path):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    names = (root / "VOCdevkit/TOY/ImageSets/Main/train.txt").read_text().split()
    for name in names:
        (root / f"VOCdevkit/TOY/JPEGImages/{name}.jpg").write_bytes(b"\xff\xd8 cut")
    command = [sys.executable, "srdl.py", "--root", str(root), *SMALL, "-j", "1", "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"srdl\.py: .*/\d+\.jpg: cannot be decoded", result.stderr)
    assert (tmp_path / "run" / "last.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def script(*flags, launcher=(sys.executable,)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums over channels depend on the number of threads
    result = subprocess.run([*launcher, "srdl.py", *flags], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_evaluate_as_one_to_the_last_digit(run, toy, tmp_path):
    _, folder = run("--limit", "21")  # 6 batches of 4: one short
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = ["--evaluate", "--checkpoint", str(folder), "--out"]
    torch.set_num_threads(1)
    srdl.main(srdl.parse([*flags, str(tmp_path / "one"), "--gpus", "cpu"]))
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    for name, launcher in (("two", [sys.executable]), ("torchrun", torchrun)):
        text = script(*flags, str(tmp_path / name), "--gpus", "cpu,cpu", launcher=launcher)
        assert text.count("mAP points") == 1
    files = [metrics.load_scores(tmp_path / name / "scores.npz") for name in ("one", "two", "torchrun")]
    assert len(files[0]["scores"]) == 21
    for other in files[1:]:
        assert all(np.array_equal(files[0][k], other[k]) for k in ("scores", "labels", "images"))
    header = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])
    assert header["processes"] == 2


def gradients_of_a_rank(rank, world, rendezvous, out):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), INIT_METHOD=rendezvous)
    args = srdl.parse(["--gpus", ",".join(["cpu"] * world)])
    common.start(args)
    model = srdl.SRDL(common.Backbone("resnet18"), torch.from_numpy(data.word_vectors(data.TOY_CLASSES, "hash")))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    y = (torch.rand(4, 12, generator=generator) > 0.7).float()
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    logits, erased = net(images[part])
    loss = sum(nnf.binary_cross_entropy_with_logits(x, y[part]) for x in (logits, erased))
    loss.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, out)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    for world in (1, 2):
        arguments = (world, f"file://{tmp_path}/{world}", str(tmp_path / f"{world}.pt"))
        torch.multiprocessing.spawn(gradients_of_a_rank, arguments, world)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name
    assert one["head.graph.adjacency"].abs().max() > 1e-6


def test_two_processes_train_and_log_once(toy, tmp_path):
    text = script("--root", toy, *SMALL[:-1], "cpu,cpu", "--accumulate", "2", "--out", str(tmp_path / "run"))
    assert text.count("epoch 1:") == 1
    header, epoch = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert header["processes"] == 2 and epoch["step"] == 2
    # Each process has its own BatchNorm statistics; what was tested is what was saved.
    torch.set_num_threads(1)
    flags = ["--evaluate", "--checkpoint", str(tmp_path / "run"), "--gpus", "cpu", "--out", str(tmp_path / "one")]
    srdl.main(srdl.parse(flags))
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    assert np.array_equal(*(metrics.load_scores(tmp_path / f / "scores.npz")["scores"] for f in ("run", "one")))


def test_an_error_in_all_processes_is_said_once(toy, tmp_path):
    command = [sys.executable, "srdl.py", "--gpus", "cpu,cpu", "--root", toy, "-b", "3"]
    result = subprocess.run([*command, "--out", str(tmp_path / "x")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("--batch-size 3 cannot be divided by 2") == 1
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Log and pictures


def test_the_log_says_what_is_needed_to_run_again(run, toy):
    _, folder = run("--eval-every", "2", "--epochs", "3")
    header, *epochs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert {"command", "config", "git", "versions", "device", "images", "precision"} <= set(header)
    assert header["config"]["root"] == toy and header["images"] == {"train": 8, "test": 8}
    assert ["map_points" in r for r in epochs] == [False, True, True]
    assert json.loads((folder / "config.json").read_text()) == header["config"]
    last = epochs[-1]
    assert {"images_per_second", "peak_memory_mb", "lr", "best_on_test_map_points", "classes_left_out"} <= set(last)
    assert (folder / "per_class.csv").read_text().startswith("class,positives,ap_points,ap_area\nred ring,")


def test_heat_is_blue_where_low_and_red_where_high():
    from PIL import Image

    heat = torch.zeros(4, 4)
    heat[:, 2:] = 1
    pixels = np.asarray(common.heat_overlay(Image.new("RGB", (40, 40)), heat)).astype(int)
    assert (pixels[:, 30:, 0] > pixels[:, 30:, 2]).all() and (pixels[:, :8, 2] > pixels[:, :8, 0]).all()


# ---------------------------------------------------------------------------------------------------------------------
# README


def readme_commands():
    """The commands of README.md's indented blocks: continued lines joined, comments after two spaces cut off, $NAME
    replaced by what NAME="..." says."""
    lines, joined = Path("README.md").read_text(encoding="utf-8").splitlines(), []
    for line in lines:
        if joined and joined[-1].endswith("\\"):
            joined[-1] = joined[-1][:-1] + line.strip()
        elif line.startswith("    "):
            joined.append(line.strip())
    said = dict(match.groups() for match in (re.fullmatch(r'(\w+)="(.*)"', line) for line in joined) if match)
    commands = [re.split(r"\s{2,}", command)[0] for command in joined]
    return [re.sub(r"\$(\w+)", lambda name: said[name[1]], command) for command in commands]


def test_readme_commands_parse(run):
    _, folder = run()
    parsers = {
        "srdl.py": srdl.parse,
        "sadcl.py": sadcl.parse,
        "oass.py": oass.parse,
        "energy_roi.py": energy_roi.parse,
        "eval.py": metrics.arguments().parse_args,
        "data.py": data.arguments().parse_args,
    }
    parsed = []
    for command in readme_commands():
        words = [word.replace("RUN", str(folder)) for word in shlex.split(command)]
        script = next((word for word in words if word in parsers), None)
        if script and words[0] in ("python", "torchrun") and "--help" not in words:
            parsers[script](words[words.index(script) + 1 :])
            parsed.append(script)
    assert set(parsed) == set(parsers) and len(parsed) > 12


def test_readme_csv_is_read(tmp_path):
    lines = [command for command in readme_commands() if command.startswith(("image,", "img/"))]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    train = data.read_split(str(tmp_path / "own.csv"), None, "train")
    assert train.classes == ("dog", "grey heron", "horse") and train.labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_readme_test_command_is_what_ci_runs():
    first, second = (c for c in readme_commands() if c.startswith("python3 -m venv"))
    assert first.endswith("&& .venv/bin/python srdl.py")
    ci = Path(".ci/run").read_text()
    for step in second.split(" && "):
        assert step.replace("venv .venv", "venv --clear .venv").replace("install -r", "install -q -r") in ci
