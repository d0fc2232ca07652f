"""Run by hand: a training step of OASS (max, ctopk-w) beside the plain classifier's and PuzzleCAM's reading, at 1.5
labels an image; and CSI's logits, cheap against every instance held, forward and backward, at D = 2048, 32x32, C = 20.
Each case in a process of its own, so that the peak memory is its own; times are the fastest of the steps.

python tests/bench_oass.py                                                      the paper's step: wants a GPU
python tests/bench_oass.py --device cpu --backbone resnet18 --size 96 --batch 32     the toy recipe's
python tests/bench_oass.py --csi-images 2 --only csi
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as nnf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import oass

STEPS = {
    "plain classifier": ["--baseline"],
    "PuzzleCAM": ["--keypoint", "center", "--shared-teacher"],
    "OASS max": ["--keypoint", "max"],
    "OASS max, CSI": ["--keypoint", "max", "--csi"],
    "OASS ctopk-w": ["--keypoint", "ctopk-w"],
    "OASS ctopk-w, CSI": ["--keypoint", "ctopk-w", "--csi"],
}


class Peak:
    """MiB beyond what was held at the start: allocated on a GPU, resident on a CPU."""

    def __init__(self, device):
        self.device, self.start = device, 0
        self.start = self.now()

    def now(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20 - self.start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - self.start


def timed(work, device, repeats):
    """(seconds of the fastest call, MiB more at the peak) after one call that warms up."""
    peak, times = Peak(device), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:]), peak.now()


def labels_of(batch, classes=20):
    """(B, C): one and two classes an image by turns, 1.5 on average."""
    y = torch.zeros(batch, classes, dtype=torch.bool)
    for i in range(batch):
        y[i, i % classes] = True
        y[i, (i + 7) % classes] |= i % 2 == 1
    return y


def step_case(name, options, queue):
    torch.manual_seed(0)
    device = torch.device(options.device)
    args = oass.parse(["--data", "voc2012", "--weights", "none", "--backbone", options.backbone, *STEPS[name]])
    model = oass.build(args, range(20)).train().to(device, memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images, y = images.contiguous(memory_format=torch.channels_last), labels_of(options.batch).to(device)
    optimizer, teacher = oass.optimizer_of(model, args), None
    if args.keypoint != "none" and not args.shared_teacher:
        teacher = common.Backbone(args.backbone, last_stride=1).eval().requires_grad_(False)
        teacher.to(device, memory_format=torch.channels_last).load_state_dict(model.backbone.state_dict())
    dtype = common.DTYPES[options.amp]

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, instances, cam, cam_re, image, cls = model(images, y, teacher=teacher)
        loss = sum(nnf.binary_cross_entropy_with_logits(x, y.float()) for x in (logits, instances) if x is not None)
        if cam_re is not None:
            loss = loss + sum(oass.puzzle_losses(cam, cam_re, y, image, cls)) / 15
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if teacher:
            oass.update_teacher(teacher, model.backbone, 0.999)

    queue.put(timed(step, options.device, options.steps))


def instances(csi, f, cam):
    """Sec. 2.2 as printed: every M_c f is held."""
    held = csi.mask(cam).permute(0, 3, 1, 2)[..., None] * f[:, None]  # (B, C, h, w, D)
    scores = torch.einsum("bchwd,cd->bhwc", held, csi.score.weight) + csi.score.bias
    return csi.mix(scores).mean((1, 2))


def cheap(csi, f, cam):
    return csi(f, cam)


def csi_case(name, options, queue):
    torch.manual_seed(0)
    csi = oass.CSI(2048, 20).to(options.device)
    f = torch.randn(options.csi_images, 32, 32, 2048, device=options.device).relu().requires_grad_()
    cam = torch.randn(options.csi_images, 32, 32, 20, device=options.device)
    for p in [*csi.parameters(), f]:  # the gradients are not what is compared
        p.grad = torch.empty_like(p).fill_(0)
    way = {"instances held": instances, "cheap": cheap}[name]
    queue.put(timed(lambda: way(csi, f, cam).square().sum().backward(), options.device, options.steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", choices=common.BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--amp", choices=tuple(common.DTYPES), default="bf16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one to warm up")
    parser.add_argument("--csi-images", type=int, default=1)
    parser.add_argument("--only", choices=("step", "csi"))
    options = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    parts = {"step": (step_case, STEPS), "csi": (csi_case, ("cheap", "instances held"))}
    print(f"{options}; {torch.__version__}, {common.device_name(torch.device(options.device))}")
    for part in (options.only,) if options.only else parts:
        case, names = parts[part]
        results = {}
        for name in names:
            queue = context.SimpleQueue()
            process = context.Process(target=case, args=(name, options, queue))
            process.start()
            results[name] = queue.get()
            process.join()
            first = next(iter(results.values()))
            ratios = [f"{a / max(b, 1e-9):.2f}" for a, b in zip(results[name], first, strict=True)]
            seconds, mib = results[name]
            line = f"{name}: {seconds:.4f} s (x {ratios[0]}), {mib:.0f} MiB more at the peak (x {ratios[1]})"
            if "PuzzleCAM" in results and name.startswith("OASS"):
                line += f"; time to PuzzleCAM's {seconds / results['PuzzleCAM'][0]:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
