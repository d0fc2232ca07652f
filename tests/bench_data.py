"""Run by hand: images per second and core of the input pipeline, beside plain Pillow and torchvision; labels of a
COCO-sized annotation file.

python tests/bench_data.py [images | labels]
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def generate(folder, count=128, size=(500, 375)):
    """JPEGs of about 75 kB: blotches and grain."""
    files = []
    for i in range(count):
        rng = np.random.default_rng(i)
        blotches = Image.fromarray(rng.normal(128, 40, (12, 16, 3)).clip(0, 255).astype(np.uint8))
        pixels = np.asarray(blotches.resize(size, Image.BICUBIC)) + rng.normal(0, 12, (size[1], size[0], 3))
        files.append(f"{folder}/{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def plain(train):
    """The usual transforms: two resizes, float on the CPU."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crops = [transforms.RandomCrop(side) for side in (512, 448, 384, 320, 256)]
    geometry = [transforms.Resize((512, 512), bicubic), transforms.RandomChoice(crops)] if train else []
    geometry += [transforms.Resize((448, 448), bicubic)]
    geometry += [transforms.RandomHorizontalFlip()] if train else []
    last = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    return transforms.Compose([lambda file: Image.open(file).convert("RGB"), *geometry, *last])


def rate(call, files, batch=16, repeats=3):
    """Images per second of call(files of a batch), the best of some passes."""
    best = 0
    for _ in range(repeats):
        began = time.perf_counter()
        for i in range(0, len(files), batch):
            call(range(i, min(i + batch, len(files))))
        best = max(best, len(files) / (time.perf_counter() - began))
    return best


def images():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = generate(folder)
        table = data.Table(files, files, np.zeros((len(files), 80), np.int8), tuple(map(str, range(80))))
        for name, train in (("training (square-crop)", True), ("test (resize)", False)):
            usual, ours = plain(train), data.Images(table, 448, "square-crop", train=train)
            first = rate(lambda batch, f=usual: torch.stack([f(files[i]) for i in batch]), files)
            second = rate(lambda batch, f=ours: data.collate([f[0, i] for i in batch]), files)
            third = rate(lambda batch, f=ours: data.normalise(data.collate([f[0, i] for i in batch]).images), files)
            print(f"{name}: plain {first:.0f} images/s, ours {second:.0f} ({second / first:.1f} times), ", end="")
            print(f"with normalisation on this core too {third:.0f} ({third / first:.1f} times)")
        seen = [(plain(False)(files[i]), data.Images(table, 448)[0, i][0]) for i in range(16)]
        levels = [(p.mul(torch.tensor(data.STD)[:, None, None]).add(torch.tensor(data.MEAN)[:, None, None]) * 255, q)
                  for p, q in seen]  # fmt: skip
        difference = torch.stack([(p - q).abs() for p, q in levels])
        print(f"test pixels: mean difference {difference.mean():.4f} grey levels, largest {difference.max():.0f}")


def labels(images=118_287, annotations=860_001):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_HOME"] = f"{folder}/cache"
        path = Path(folder, "annotations", "instances_train2017.json")
        path.parent.mkdir()
        polygons = [",".join(f"{v:.2f}" for v in rng.uniform(0, 640, 64)) for _ in range(100)]
        with open(path, "w") as file:
            rows = (f'{{"id": {i}, "file_name": "{i:012d}.jpg", "width": 640, "height": 480}}' for i in range(images))
            file.write(f'{{"images": [{", ".join(rows)}], "categories": [')
            file.write(", ".join(f'{{"id": {k}, "name": "class {k}"}}' for k in range(1, 81)) + '], "annotations": [')
            places, kinds = rng.integers(0, images, annotations), rng.integers(1, 81, annotations)
            rows = (
                f'{{"id": {k}, "image_id": {i}, "category_id": {c}, "iscrowd": 0, "area": 702.1057499999998, '
                f'"bbox": [473.07, 395.93, 38.65, 28.67], "segmentation": [[{polygons[k % 100]}]]}}'
                for k, (i, c) in enumerate(zip(places, kinds, strict=True))
            )
            file.write(", ".join(rows) + "]}")
        print(f"{path.stat().st_size / 1e6:.0f} MB, {images:,} images, {annotations:,} annotations")
        for what in ("parsed", "from the cache"):
            began = time.perf_counter()
            table = data.coco_split(folder, "train2017", boxes=True)
            print(f"{what}: {time.perf_counter() - began:.2f} s for {table.labels.shape} labels")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("images", "labels"):
        {"images": images, "labels": labels}[name]()
