"""Run by hand: SADCL's sample-to-sample contrast and its gradient at a COCO batch (B = 32, C = 80, width 1,024), over
all 2BC slots with masks against sadcl.py's over the active ones; each case in a process of its own, so that the peak
memory is its own.

python tests/bench_sadcl.py
"""

import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as nnf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sadcl


def dense(z, y, tau=sadcl.SSCL_TAU):
    """z (B, C, 2, E): every slot against every other, inactive ones masked."""
    z = nnf.normalize(z, dim=3).permute(2, 0, 1, 3).flatten(0, 2)  # (2BC, E)
    active = y.flatten().repeat(2)
    c = torch.arange(y.shape[1]).repeat(2 * len(y))
    seen = active[None] & ~torch.eye(len(z), dtype=torch.bool)
    similarity = z @ z.T / tau  # (2BC, 2BC)
    log_share = similarity - similarity.masked_fill(~seen, -math.inf).logsumexp(1, keepdim=True)
    partners = (c[:, None] == c) & seen
    return -((log_share * partners).sum(1) / partners.sum(1).clamp(min=1))[active].mean()


def ours(z, y):
    return sadcl.sscl(z[y], y)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def case(way, queue):
    torch.manual_seed(0)
    y = torch.rand(32, 80) < 2.9 / 80  # COCO's 2.9 labels an image
    z = torch.randn(32, 80, 2, 1024, requires_grad=True)
    z.grad = torch.empty_like(z).fill_(0)
    before, times = peak(), []
    for _ in range(3):
        began = time.perf_counter()
        loss = way(z, y)
        loss.backward()
        times.append(time.perf_counter() - began)
    queue.put((min(times), peak() - before, loss.item()))


def main():
    context, results = torch.multiprocessing.get_context("spawn"), []
    for way in (dense, ours):
        queue = context.SimpleQueue()
        process = context.Process(target=case, args=(way, queue))
        process.start()
        results.append(queue.get())
        process.join()
        seconds, mib, loss = results[-1]
        print(f"{way.__name__}: {seconds:.4f} s, {mib:.0f} MiB more at the peak, loss {loss:.6f}")
    ratio = [a / max(b, 1e-9) for a, b in zip(*results, strict=True)]
    print(f"dense / ours: time {ratio[0]:.0f}, memory {ratio[1]:.1f}")


if __name__ == "__main__":
    main()
