"""Run by hand: every metric of a COCO-sized score table, beside scikit-learn, on one thread.

python tests/bench_metrics.py
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as metrics


def best_of(repeats, call):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - began)
    return min(times), result


def main():
    rng = np.random.default_rng(0)
    n, c = 40137, 80
    frequency = np.minimum(0.55, 0.3 / np.arange(1, c + 1))  # one class in half of the images, a long tail
    labels = (rng.random((n, c)) < frequency).astype(np.int8)
    scores = (rng.normal(size=(n, c)) + 2 * labels).astype(np.float32)

    seconds, _ = best_of(5, lambda: metrics.summary(scores, labels))
    points = metrics.average_precision(scores, labels)
    print(f"{n:,} x {c}: both APs and all F1s (all, top 3): {seconds:.3f} s")
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        print("scikit-learn is not installed: nothing to compare with")
        return
    other, sklearn = best_of(3, lambda: [average_precision_score(labels[:, j], scores[:, j]) for j in range(c)])
    print(f"scikit-learn, one AP only: {other:.3f} s ({other / seconds:.1f} times ours)")
    print(f"largest difference of an AP: {np.abs(points - sklearn).max():.1e}")


if __name__ == "__main__":
    main()
