"""Run by hand: accidents of every kind, for real, on a tiny run on a CPU. After each one nothing may be lost: last.pt
loads, the run goes on, and in the end log, scores.npz, best.pt and last.pt are those of a run without accidents, bit
for bit; and what a person reads is one clear message, no traceback.

python tests/endurance.py [--times 100] [--kinds kill disk ...] [--method srdl] > results/endurance.txt

Importing torch takes seconds, so the trainings are forked from this process, which imports it and computes nothing.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import data

SMALL = "--image-size 64 --limit 16 -b 4 -j 0 --amp off --gpus cpu --backbone mobilenet_v2".split()
LENGTH = {"sadcl": "--epochs 2 --stop-after 2 1".split()}  # the others: 3 epochs
TIMING = ("seconds", "images_per_second", "peak_memory_mb", "test_seconds")


def training(method, flags, text):
    """In the forked process: the script, its words in the file `text`."""
    os.setsid()  # so that ctrl-C can be sent to it and its loader's processes, as a terminal does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    module = importlib.import_module(method)
    common.launch(module.main, module.parse(flags))


class Toy:
    """A tiny run of `method`, and the folder of one without accidents."""

    def __init__(self, method, folder):
        self.method, self.folder, self.text = method, Path(folder), Path(folder, "text")
        with contextlib.redirect_stdout(sys.stderr):
            data.draw_toy(str(self.folder / "toy"), 40, 24)
        self.flags = ["--root", str(self.folder / "toy"), *SMALL, *LENGTH.get(method, ["--epochs", "3"])]
        self.straight = self.folder / "straight"
        began = time.perf_counter()
        self.finish(self.straight)
        self.seconds = time.perf_counter() - began

    def start(self, out, *flags):
        """The same command for a first start and for going on."""
        flags = [*self.flags, "--out", str(out), "--resume", "auto", *flags]
        process = multiprocessing.get_context("fork").Process(target=training, args=(self.method, flags, self.text))
        process.start()
        return process

    def words(self):
        return self.text.read_text(errors="replace")

    def finish(self, out, *flags):
        """Go on to the end."""
        process = self.start(out, *flags)
        process.join()
        need(process.exitcode == 0, f"it did not go on:\n{self.words()}")

    def message(self, process, *expected, code=(1, 2)):
        """It ended with words, not with a traceback."""
        process.join()
        text = self.words()
        need(process.exitcode in code, f"exit code {process.exitcode}:\n{text}")
        for word in ("Traceback", "Exception ignored"):
            need(word not in text, f"{word}:\n{text}")
        for word in expected:
            need(word in text, f"no {word!r}:\n{text}")

    def whole(self, out, epoch=-1):
        """last.pt and best.pt load, last.pt is not older than it was, and the log's lines are whole but for the last
        one, their epochs in order. Returns last.pt's epoch, -1 where there is none yet."""
        if not (out / "last.pt").exists():
            need(epoch < 0, "last.pt is gone")
            return -1
        now = common.load_checkpoint(out / "last.pt")["epoch"]
        need(now >= epoch, f"last.pt went back from epoch {epoch} to {now}")
        if (out / "best.pt").exists():
            common.load_checkpoint(out / "best.pt")
        lines = (out / "log.jsonl").read_text().splitlines()
        epochs = [r["epoch"] for r in map(json.loads, lines[:-1]) if "epoch" in r]
        need(epochs == [*range(1, len(epochs) + 1)], f"the log has epochs {epochs}")
        return now

    def same(self, out):
        """The finished run equals the straight one."""
        need(not list(out.glob("*.tmp")), "a half file was left")
        need((out / "scores.npz").read_bytes() == (self.straight / "scores.npz").read_bytes(), "other scores")
        logs = [[json.loads(line) for line in (f / "log.jsonl").open()] for f in (out, self.straight)]
        epochs = [[{k: v for k, v in r.items() if k not in TIMING} for r in log if "epoch" in r] for log in logs]
        need(epochs[0] == epochs[1], "another log")
        for name in ("last.pt", "best.pt"):
            one, two = (common.load_checkpoint(f / name) for f in (out, self.straight))
            for key in ("epoch", "step", "best", "model", "ema", "optimizer", "extra"):
                need(equal(one[key], two[key]), f"another {key} in {name}")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return np.array_equal(a.float().numpy(), b.float().numpy())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def need(good, what):
    if not good:
        raise AssertionError(what)


def wait(process, ready):
    """Until ready(), or the process has ended; whether it was ready."""
    while process.is_alive():
        if ready():
            return True
        time.sleep(0.0002)
    return False


def moment(toy, process, out, writing):
    """Let the process live until a random moment; if `writing`, one at which it writes a file."""
    if writing:
        names = ["last.pt", "last.pt", "best.pt", "scores.npz"] + ["log.jsonl"] * (out / "last.pt").exists()
        wait(process, (out / f"{random.choice(names)}.tmp").exists)
        time.sleep(random.choice((0, 0.03 * random.random())))
    else:
        process.join(toy.seconds * random.random())


def half_files(out, since):
    """Whether a write was broken off."""
    return any(path.stat().st_mtime > since for path in out.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# The kinds: kind(toy, out, times) -> what was done; `out` is a run folder, not there yet


def kill(toy, out, times):
    """kill -9 at random moments, half of them in a write; after the last epoch another run begins"""
    done = writing = runs = 0
    while done < times:
        epoch, runs = -1, runs + 1
        while done < times:
            process, began = toy.start(out, "-j", random.choice("01")), time.time()
            moment(toy, process, out, done % 2)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            done, writing = done + 1, writing + half_files(out, began)
            epoch = toy.whole(out, epoch)
        toy.finish(out)
        toy.whole(out, epoch)
        toy.same(out)
        shutil.rmtree(out)
    return f"{done} kills, {writing} of which left half a file; runs that came to their end: {runs}"


def disk(toy, out, times):
    """a small disk fills up at a random moment, half of them in a write"""
    out.mkdir()
    size = sum(4 * path.stat().st_size for path in toy.straight.glob("*.pt"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)]
    if subprocess.run(command, capture_output=True).returncode:
        return "NOT RUN: mounting a tmpfs is not allowed here"
    stopped, place, filler, out = 0, out, out / "filler", out / "run"
    try:
        for i in range(times):
            process = toy.start(out)
            moment(toy, process, out, i % 2)
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            process.join()
            if process.exitcode:
                way_on = f"--resume {out}" if (out / "last.pt").exists() else ""
                toy.message(process, "No space left on device", way_on)
                stopped += 1
            epoch = toy.whole(out)
            filler.unlink()
            toy.finish(out)
            toy.whole(out, epoch)
            toy.same(out)
            shutil.rmtree(out)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return f"{times} disks, {stopped} of which stopped the run"


def corrupt(toy, out, times):
    """last.pt is cut off, a block of it zero, or a bit wrong: refused; best.pt, which the message names, goes on"""
    harmless = 0
    for i in range(times):
        process = toy.start(out)
        wait(process, lambda: (out / "best.pt").exists() and '"epoch": 2' in (out / "log.jsonl").read_text())
        process.kill()
        process.join()
        content = bytearray((out / "last.pt").read_bytes())
        at = random.randrange(len(content))
        if i % 3 == 0:
            del content[at:]
        elif i % 3 == 1:
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        else:
            content[at] ^= 1 << random.randrange(8)
        (out / "last.pt").write_bytes(content)
        process = toy.start(out)
        process.join()
        if process.exitcode:
            toy.message(process, f"{out}/last.pt: damaged", f"{out}/best.pt of epoch")
            toy.finish(out, "--resume", str(out / "best.pt"))
        else:
            harmless += 1
        toy.same(out)
        shutil.rmtree(out)
    return f"{times} files, {harmless} of which hit where nothing is stored"


def loaders_of(process):
    """Process ids of its loaders."""
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def worker(toy, out, times):
    """a loader's process is killed at a random moment"""
    done = 0
    while done < times:
        process = toy.start(out, "-j", "1")
        wait(process, (out / "last.pt").exists)
        wait(process, lambda p=process: loaders_of(p))
        time.sleep(toy.seconds / 4 * random.random())
        if found := loaders_of(process):  # one for training, one for testing
            os.kill(random.choice(found), signal.SIGKILL)
        process.join()
        if process.exitcode:  # else it was at its end
            toy.message(process, "DataLoader worker", f"--resume {out} -j 0")
            done += 1
        epoch = toy.whole(out)
        toy.finish(out)
        toy.whole(out, epoch)
        toy.same(out)
        shutil.rmtree(out)
    return f"{done} killed"


def nan(toy, out, times):
    """the loss becomes NaN (--lr 1e30), in the middle of an epoch and with its last step"""
    for i in range(times):
        process = toy.start(out, "--lr", "1e30", "--limit", ("16", "4")[i % 2])
        toy.message(process, "not finite", f"{out}/last.pt holds the last good epoch", code=[2])
        weights = common.load_checkpoint(out / "last.pt")["model"].values()
        need(all(np.isfinite(t.float().numpy()).all() for t in weights), "last.pt is not finite")
        shutil.rmtree(out)
    return f"{times} runs"


def ctrl_c(toy, out, times):
    """ctrl-C at random moments, half of them in a write, to the run and its loader's process"""
    done = 0
    while done < times:
        process = toy.start(out, "-j", "1")
        wait(process, (out / "last.pt").exists)
        moment(toy, process, out, done % 2)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGINT)
            process.join()
            if process.exitcode:  # else it was at its end
                toy.message(process, "stopped", f"--resume {out}")
                done += 1
            epoch = toy.whole(out)
            toy.finish(out)
            toy.whole(out, epoch)
        toy.same(out)
        shutil.rmtree(out)
    return f"{done} times"


def two(toy, out, times):
    """a run is started in the folder of another that is going"""
    for _ in range(times):
        process, text = toy.start(out), toy.text
        time.sleep(toy.seconds / 2 * random.random())
        toy.text = toy.folder / "second"
        second = toy.start(out)
        process.join()
        second.join()
        codes, words = (process.exitcode, second.exitcode), (text.read_text(), toy.words())
        need(sorted(codes) == [0, 2], f"exit codes {codes}:\n{words}")
        said = words[codes.index(2)]
        need(f"{out}: another process is writing there" in said or f"{out} holds a run already" in said, said)
        need("Traceback" not in said, said)
        toy.text = text
        toy.same(out)
        shutil.rmtree(out)
    return f"{times} pairs"


KINDS = {"kill": kill, "disk": disk, "corrupt": corrupt, "worker": worker, "nan": nan, "ctrl-c": ctrl_c, "two": two}


def main():
    parser = argparse.ArgumentParser(description="Accidents of every kind, on a tiny run on a CPU.")
    parser.add_argument("--times", type=int, default=100, help="kills; of the other kinds a fifth (default: 100)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--method", default="srdl", choices=("srdl", "sadcl", "energy_roi", "oass"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(args.seed)
    git, failed, folder = common.git_revision(), 0, tempfile.mkdtemp(prefix="endurance-")
    print(f"$ python tests/endurance.py {' '.join(sys.argv[1:])}")
    print(f"{git['revision'][:7]}{' and changes' * git['dirty']}, " if git else "", end="")
    print(f"{platform.system()}, python {platform.python_version()}, torch {torch.__version__}", flush=True)
    toy = Toy(args.method, folder)
    print(f"{args.method} without accidents: {toy.seconds:.1f} s a run", flush=True)
    for name in args.kinds:
        kind, times, began = KINDS[name], args.times if name == "kill" else -(-args.times // 5), time.perf_counter()
        try:
            result = kind(toy, toy.folder / name, times)
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            failed, result = failed + 1, f"FAILED: {what}"
        each = (time.perf_counter() - began) / times
        print(f"\n{name}: {kind.__doc__}\n    {result}; {each:.1f} s each", flush=True)
    if failed:
        sys.exit(f"{failed} kinds failed; what they left: {folder}")
    shutil.rmtree(folder)
    print("\nNothing was lost.")


if __name__ == "__main__":
    main()
