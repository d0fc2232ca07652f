"""Run by hand: break lines of mathematics one by one, in a copy, and see which test notices first.

python tests/mutations.py                    all, a quarter of an hour
python tests/mutations.py oass sadcl         those of some files
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# file: (line as it is, broken, what is broken)
BROKEN = {
    "srdl": [
        (
            "noise = torch.empty(classes, classes).uniform_(-1 / classes, 1 / classes)",
            "noise = torch.rand(classes, classes)",
            "D4: adjacency from U(0, 1)",
        ),
        (
            "nodes = nnf.leaky_relu(v_hat @ nodes @ weight, 0.2)",
            "nodes = nnf.leaky_relu(self.adjacency @ nodes @ weight, 0.2)",
            "Eq. 3: without normalisation",
        ),
        (
            "score_c.copy_(torch.mul(u[:, None], w_c[:, None], out=t).tanh_() @ v)",
            "score_c.copy_(torch.mul(u[:, None], w_c[:, None], out=t) @ v)",
            "Eq. 5: without tanh",
        ),
        ("slope = t.square_().neg_().add_(1)", "slope = t.neg_().add_(1)", "Eq. 5: derivative of tanh"),
        (
            "self.scale = 0.5 if channel_attention and spatial_attention else 1.0",
            "self.scale = 1.0",
            "Eq. 6: without its half",
        ),
        (
            "pooled = self.f_ca(f.max(1).values).to(w)",
            "pooled = self.f_ca(f.mean(1)).to(w)",
            "Eq. 4: mean instead of maximum",
        ),
        (
            "x = longest_peak_run(sa.amax(-2), alpha)",
            "x = longest_peak_run(sa.mean(-2), alpha)",
            "Eq. 7: mean instead of maximum",
        ),
        (
            "/ torch.where(span > 0, span, 1) >= alpha) & (span > 0)",
            "/ torch.where(span > 0, span, 1) > alpha) & (span > 0)",
            "Eq. 9: > instead of >=",
        ),
        ("sum(terms.values()), **terms)  # Eq. 13", 'terms["L_ori"], **terms)', "Eq. 13: without L_era"),
    ],
    "sadcl": [
        (
            "rate = 10000 ** -(torch.arange(0, d // 2, 2, device=device) / (d // 2))",
            "rate = 10000 ** -(torch.arange(0, d // 2, 2, device=device) / d)",
            "position code: frequencies",
        ),
        (
            "weight = torch.where(y > 0, (1 - p) ** gamma_pos, p**gamma_neg)",
            "weight = torch.where(y > 0, (1 - p) ** gamma_neg, p**gamma_neg)",
            "ASL: focus on positives too",
        ),
        (
            "similarity.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)",
            "similarity.logsumexp(1, keepdim=True)",
            "SSCL: an anchor is its own contrast",
        ),
        (
            "anchors = -(log_share * partners).sum(1) / partners.sum(1)",
            "anchors = -(log_share * partners).sum(1)",
            "SSCL: sum over partners",
        ),
        (
            "return (s.logsumexp(0) - own).sum() / count.clamp(min=1)",
            "return (s.logsumexp(1).sum() - own.sum()) / count.clamp(min=1)",
            "PSCL: over classes instead of images",
        ),
        (
            "sure = y & (logits.detach().sigmoid() > BANK_CONFIDENCE)",
            "sure = logits.detach().sigmoid() > BANK_CONFIDENCE",
            "bank: absent classes too",
        ),
        ("loss = LAMBDA_BCE * terms", "loss = terms", "stage 2: weight of the cross-entropy"),
        (
            "return torch.where(sure, means[0]",
            "return torch.where(sure, means[1]",
            "prototypes: of all instead of the confident",
        ),
        ("dist.all_reduce(grad)\n        return", "return", "contrast over processes: gradient of the own rows only"),
    ],
    "energy_roi": [
        ("absent = (~y).to(z)", "absent = torch.ones_like(y).to(z)", "Eq. 2: present classes too"),
        ("score = d - c - b + a", "score = d - c - b", "energy of a rectangle"),
        (
            "smaller, left = strongest_rectangles((z - zeta * step).relu() * inside, 1)",
            "smaller, left = strongest_rectangles((z - zeta * step).relu(), 1)",
            "Eq. 8: boxes that do not nest",
        ),
        ("(z - zeta * step).relu() * inside", "(z - step).relu() * inside", "Eq. 8: zeta"),
        (
            "score.sort(dim=1, descending=True, stable=True)\n    found",
            "score.sort(dim=1, stable=True)\n    found",
            "the weakest regions",
        ),
        ("self.scale = key_width**-0.5 if scaled else 1.0", "self.scale = 1.0", "Eq. 3: 1/sqrt(d)"),
        (
            "score = score.masked_fill(~valid[:, None], -math.inf)",
            "pass",
            "Eq. 4: slots without a region are attended to",
        ),
        (
            "return torch.logaddexp(s(a), s(b)) - torch.logaddexp(s(-a), s(-b))",
            "return (a + b) / 2",
            "mean of logits instead of probabilities",
        ),
        ('losses["L_weak"] = weak_loss(z, y)', 'losses["L_weak"] = 0.5 * weak_loss(z, y)', "Eq. 6: weight of L_weak"),
    ],
    "oass": [
        (
            "cells = cells_of(first_peak(cam.amax(1)), w)",
            "cells = cells_of(first_peak(cam.mean(1)), w)",
            "Eq. 1: mean over classes",
        ),
        ("value if weighted else (value > 0).double()", "(value > 0).double()", "cTopk-w: without weights"),
        ("(maps > 0) & (maps == nnf.max_pool2d", "(maps == nnf.max_pool2d", "local maxima: negative ones too"),
        (
            "source = ((at - new_begin + 0.5).double() * size / new_size - 0.5).clamp(min=0)",
            "source = ((at - new_begin).double() * size / new_size).clamp(min=0)",
            "resizing: align_corners",
        ),
        (
            "stretch(images, STRIDE * cells, middle_of(images, len(cells)))",
            "stretch(images, STRIDE * cells.flip(1), middle_of(images, len(cells)))",
            "patches: x and y exchanged",
        ),
        (
            "((cam - cam_re).abs() * y[..., None, None]).mean()",
            "(cam - cam_re).abs().mean()",
            "L_re: absent classes too",
        ),
        (
            "weight = y[image, cls] / y.sum(1).clamp(min=1)[image] / len(y)",
            "weight = y[image, cls] / len(y)",
            "D2: sum over an image's classes",
        ),
        (
            "return min(1 - 1 / (step + 1), 1 - 1 / horizon)",
            "return 1 - 1 / horizon",
            "teacher: decay of the first steps",
        ),
        ("positive = cam.detach().relu()", "positive = cam.relu()", "CSI: gradient through the mask"),
        ("share = ramp(run.step, rise)", "share = 1", "losses without their ramp"),
    ],
}


def main():
    wanted, home = sys.argv[1:] or list(BROKEN), Path(__file__).resolve().parents[1]
    caught = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(home, copy, ignore=shutil.ignore_patterns(".*", "runs", "datasets", "__pycache__"))
        for name in wanted:
            path = copy / f"{name}.py"
            source = path.read_text()
            for line, broken, what in BROKEN[name]:
                if source.count(line) != 1:
                    raise SystemExit(f"{name}.py: {source.count(line)} times: {line}")
                path.write_text(source.replace(line, broken))
                command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"tests/test_{name}.py"]
                output = subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout
                found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.M)
                print(f"{name}.py, {what}: {found[1] if found else 'NOT NOTICED'}", flush=True)
                caught, total = caught + bool(found), total + 1
            path.write_text(source)
    print(f"{caught} of {total} noticed")


if __name__ == "__main__":
    main()
