"""Run by hand: SRDL's head at the paper's size (C = 80, d = 2048, 14x14), the naive graph against srdl.py's, forward
and backward; each case in a process of its own, so that the peak memory is its own.

python tests/bench_srdl.py [images ...]
"""

import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import srdl


def naive(head, f):
    """Eqs. 2 to 6 as printed: every F_c is held."""
    w = head.class_weights()
    ca = head.f_c((head.f_ca(f.max(1).values)[:, None] * w).tanh()).sigmoid()  # (B, C, D)
    sa = head.f_s((head.f_sa(f)[:, None] * w[:, None]).tanh()).sigmoid()  # (B, C, P, 1)
    attended = 0.5 * f[:, None] * sa + 0.5 * f[:, None] * ca[:, :, None]  # (B, C, P, D)
    return head.classifier(attended.max(2).values)


def ours(head, f):
    return head.classify(f, *head.attend(f))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def case(way, images, queue):
    torch.manual_seed(0)
    head = srdl.CAR(2048, torch.randn(80, 300))
    f = torch.randn(images, 196, 2048).relu().requires_grad_()
    for p in [*head.parameters(), f]:  # the gradients are not what is compared
        p.grad = torch.empty_like(p).fill_(0)  # touches the memory, where zeros_like would not yet
    before, times = peak(), []
    for _ in range(3):
        began = time.perf_counter()
        logits = way(head, f)
        logits.square().sum().backward()
        times.append(time.perf_counter() - began)
    queue.put((min(times), peak() - before, logits.detach().double().sum().item()))


def main():
    context = torch.multiprocessing.get_context("spawn")
    for images in map(int, sys.argv[1:] or (1, 4)):
        results = []
        for way in (naive, ours):
            queue = context.SimpleQueue()
            process = context.Process(target=case, args=(way, images, queue))
            process.start()
            results.append(queue.get())
            process.join()
            seconds, mib, total = results[-1]
            print(f"{images} images, {way.__name__}: {seconds:.3f} s, {mib:.0f} MiB more at the peak, sum {total:.6f}")
        ratio = [a / b for a, b in zip(*results, strict=True)]
        print(f"naive / ours: time {ratio[0]:.2f}, memory {ratio[1]:.1f}")


if __name__ == "__main__":
    main()
