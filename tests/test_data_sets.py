"""data.py: COCO, NUS-WIDE, VG500 and a .csv in miniature, with the quirks of the real ones; check, show, download."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import energy_roi
import oass
import sadcl
import srdl
from data import UserError

QUICK = "--backbone resnet18 --weights none --image-size 64 -b 2 --epochs 1 -j 0 --amp off --gpus cpu"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


def photo(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_json(images, annotations):
    """Category ids have gaps and come in any order; box (x, y, w, h)."""
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 4, "name": "motorcycle"}]
    listed = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in images]
    rows = [
        {"id": k, "image_id": i, "category_id": c, "bbox": [4, 3, 20, 10], "iscrowd": crowd, "segmentation": []}
        for k, (i, c, crowd) in enumerate(annotations)
    ]
    return {"images": listed, "categories": categories, "annotations": rows}


@pytest.fixture
def coco(tmp_path):
    """Root of a COCO folder: 4 training images, one without a label, one with a crowd only; 2 to test; a folder that
    is a symbolic link; a name that is not ASCII."""
    root = tmp_path / "coco"
    train = [(9, "grün_009.jpg"), (3, "003.jpg"), (5, "005.jpg"), (7, "007.jpg")]
    val = [(1, "001.jpg"), (2, "002.jpg")]
    for folder, images in (("elsewhere", train), ("val2014", val)):
        for i, name in images:
            photo(root / folder / name, i)
    (root / "train2014").symlink_to(root / "elsewhere")
    (root / "annotations").mkdir()
    content = {
        "train2014": coco_json(train, [(3, 18, 0), (9, 1, 1), (3, 1, 0), (3, 18, 0), (7, 4, 0)]),
        "val2014": coco_json(val, [(1, 18, 0), (2, 4, 0)]),
    }
    for name, value in content.items():
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(value))
    return root


@pytest.fixture
def nuswide(tmp_path):
    """Root of a NUS-WIDE folder: backslashes and CRLF in the lists, an image without a label."""
    root = tmp_path / "nuswide"
    concepts = ["airport", "dog", "water"]
    columns = {"Train": ["101", "010", "000", "001"], "Test": ["100", "011"]}
    for kind, rows in columns.items():
        names = [f"actor {kind}\\{i:04d}_7.jpg" for i in range(len(rows))]
        for i, name in enumerate(names):
            photo(root / "Flickr" / name.replace("\\", "/"), i)
        for path, text in [(f"ImageList/{kind}Imagelist.txt", "\r\n".join(names))] + [
            (f"Groundtruth/TrainTestLabels/Labels_{c}_{kind}.txt", "\n".join(row[j] for row in rows) + "\n")
            for j, c in enumerate(concepts)
        ]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(text.encode())
    (root / "Concepts81.txt").write_text("\n".join(concepts))
    return root


@pytest.fixture
def vg500(tmp_path):
    root = tmp_path / "vg500"
    labels = {"2.jpg": [0, 499], "3.jpg": [7], "5.jpg": [499], "8.jpg": []}
    for i, name in enumerate(labels):
        photo(root / "VG_100K" / name, i)
    (root / "train_list_500.txt").write_text("2.jpg\r\n5.jpg\r\n8.jpg")
    (root / "test_list_500.txt").write_text("3.jpg\n")
    (root / "vg_category_500_labels_index.json").write_text(json.dumps(labels))
    return root


@pytest.fixture
def own_csv(tmp_path):
    """A .csv with a BOM, a quoted comma and a name that is not ASCII, four training and two validation images."""
    path = tmp_path / "own" / "birds.csv"
    rows = ["image,split,labels", 'img/a.jpg,train,"crow, black|grey heron"', "img/b.jpg,train,"]
    rows += ["img/ç.jpg,train,grey heron", "img/d.jpg,train,dog", "img/e.jpg,val,dog|grey heron", "img/f.jpg,val,dog"]
    for i, name in enumerate("abçdef"):
        photo(path.parent / "img" / f"{name}.jpg", i)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_coco_classes_follow_the_category_ids_and_crowds_count(coco):
    table = data.load_split("coco", str(coco), "train", boxes=True)
    assert table.classes == ("person", "motorcycle", "dog")
    assert table.names == ["grün_009", "003", "005", "007"]
    assert table.labels.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert [len(boxes) for boxes in table.boxes] == [1, 3, 0, 1]
    assert table.boxes[1].tolist() == [[2, 4, 3, 24, 13], [0, 4, 3, 24, 13], [2, 4, 3, 24, 13]]
    labelled = data.load_split(
        "coco", str(coco), "train", coco_images="labelled", classes=["dog", "person"], boxes=True
    )
    assert labelled.labels.tolist() == [[0, 1], [1, 1], [0, 0]] and labelled.boxes[1][:, 0].tolist() == [0, 1, 0]


def test_coco_2017_names_serve_as_well(coco):
    for split in ("train", "val"):
        (coco / f"{split}2014").rename(coco / f"{split}2017")
        (coco / "annotations" / f"instances_{split}2014.json").rename(
            coco / "annotations" / f"instances_{split}2017.json"
        )
    assert len(data.load_split("coco", str(coco), "val")) == len(data.load_split("coco", str(coco), "val2017")) == 2


def test_labels_are_parsed_once_until_the_file_changes(coco, tmp_path, monkeypatch):
    first = data.load_split("coco", str(coco), "val", boxes=True)
    path, before = coco / "annotations" / "instances_val2014.json", sorted(coco.rglob("*"))
    assert list((tmp_path / "cache" / "multilabel").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(json, "load", lambda file: pytest.fail("parsed again"))
        again = data.load_split("coco", str(coco), "val", boxes=True)
    assert again.files == first.files and again.classes == first.classes and np.array_equal(again.labels, first.labels)
    assert all(np.array_equal(a, b) for a, b in zip(again.boxes, first.boxes, strict=True))
    assert sorted(coco.rglob("*")) == before
    time.sleep(0.01)
    path.write_text(path.read_text().replace('"category_id": 18', '"category_id": 1 '))  # of the same size
    assert data.load_split("coco", str(coco), "val").labels.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_labels_are_read_without_a_place_to_keep_them(coco, tmp_path, capsys):
    (tmp_path / "cache").write_text("")
    assert len(data.load_split("coco", str(coco), "val")) == 2
    assert "WARNING: its labels could not be kept" in capsys.readouterr().err


def test_nuswide_drops_images_without_a_label(nuswide):
    table = data.load_split("nuswide", str(nuswide), "train")
    assert table.names == [f"actor Train/{i:04d}_7.jpg" for i in (0, 1, 3)]
    assert table.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]] and table.lines == [1, 2, 4]


def test_vg500_reads_indices(vg500):
    table = data.load_split("vg500", str(vg500), "train")
    assert [np.flatnonzero(row).tolist() for row in table.labels] == [[0, 499], [499], []]
    assert len(table.classes) == 500


def test_a_csv_needs_three_columns(own_csv):
    train, val = (data.load_split(str(own_csv), None, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("crow, black", "dog", "grey heron")
    assert train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert val.labels.tolist() == [[0, 1, 1], [0, 1, 0]] and train.names[2] == "img/ç.jpg"


def test_a_class_list_may_name_what_a_csv_does_not(own_csv, capsys):
    table = data.load_split(str(own_csv), None, "val", classes=["grey heron", "cat"])
    assert table.classes == ("grey heron", "cat") and table.labels.tolist() == [[1, 0], [0, 0]]
    assert "never names cat" in capsys.readouterr().err
    with pytest.raises(UserError, match="'dog' is named twice"):
        data.load_split(str(own_csv), None, "val", classes=["dog", "dog"])


def break_csv(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_csv("split", "part"), r"birds\.csv, line 1: no column 'split'; expected image,split,labels"),
        (break_csv("dog|grey", "dog||grey"), r"birds\.csv, line 6: an empty label in 'dog\|\|grey heron'"),
        (break_csv("img/d.jpg", "img/a.jpg"), r"line 5: image img/a\.jpg was already listed in line 2"),
        (break_csv("b.jpg,train", "b.jpg,tran"), r"line 3: unknown split 'tran'; expected train, val, test"),
        (break_csv("img/d.jpg", "img/../../d.jpg"), r"line 5: image img/../../d\.jpg is outside the file's folder"),
        (break_csv("img/d.jpg", "/img/d.jpg"), r"line 5: image /img/d\.jpg is outside the file's folder"),
        (break_csv("img/d.jpg,train,dog", "img/d.jpg"), r"line 5: expected three columns"),
        (break_csv("img/d.jpg", "img/x.jpg"), r"birds\.csv, line 5: no image .*img/x\.jpg \(1 of 4 missing\)"),
        (break_csv(",train,", ",test,"), r"no image of split 'train'; the splits there are: test, val"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), r"birds\.csv: not a UTF-8 CSV file"),
        (lambda path: path.unlink(), r"birds\.csv: no such file"),
    ],
)
def test_a_broken_csv_is_named_with_its_line(own_csv, change, message):
    change(own_csv)
    with pytest.raises(UserError, match=message):
        data.load_split(str(own_csv), None, "train")


def replace(path, old, new):
    return lambda root: (root / path).write_text((root / path).read_text().replace(old, new))


JSON = "annotations/instances_train2014.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace(JSON, '"image_id": 7', '"image_id": 8'),
            r"train2014\.json: annotation 4 is of image 8, which the",
        ),
        (replace(JSON, '"category_id": 4', '"category_id": 5'), r"annotation 4 is of category 5, which the file does"),
        (replace(JSON, '"annotations"', '"other"'), r"not COCO's instances \(KeyError: 'annotations'\)"),
        (lambda root: os.truncate(root / JSON, 300), r"train2014\.json: not a whole JSON file"),
        (lambda root: (root / "elsewhere" / "005.jpg").unlink(), r"no image .*train2014/005\.jpg \(1 of 4 missing\)"),
        (lambda root: shutil.rmtree(root / "annotations"), r"Expected:\n  .*/train2014/\*\.jpg"),
    ],
)
def test_broken_coco_files_are_named(coco, change, message):
    change(coco)
    with pytest.raises(UserError, match=message):
        data.load_split("coco", str(coco), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace("ImageList/TrainImagelist.txt", "\n", "\nx\\y.jpg\n"),
            r"Labels_airport_Train\.txt has 4 labels, .* 7",
        ),
        (
            replace("Groundtruth/TrainTestLabels/Labels_dog_Train.txt", "1", "2"),
            r"Labels_dog_Train\.txt, line 2",
        ),
        (lambda root: (root / "Groundtruth/TrainTestLabels/Labels_dog_Train.txt").unlink(), r"Labels_dog_.*: no such"),
        (lambda root: (root / "Concepts81.txt").unlink(), r"no .*Concepts81\.txt\. Expected:"),
    ],
)
def test_broken_nuswide_files_are_named(nuswide, change, message):
    change(nuswide)
    with pytest.raises(UserError, match=message):
        data.load_split("nuswide", str(nuswide), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace("vg_category_500_labels_index.json", "499]", "500]"),
            r"index\.json: 2\.jpg has class 500; expected 0",
        ),
        (
            replace("vg_category_500_labels_index.json", "5.jpg", "4.jpg"),
            r"_list_500\.txt, line 2: .* no labels of 5",
        ),
        (replace("vg_category_500_labels_index.json", "}", ""), r"index\.json: not a whole JSON file"),
        (lambda root: (root / "vg_category_500_labels_index.json").unlink(), r"VG_100K/\*\.jpg"),
    ],
)
def test_broken_vg500_files_are_named(vg500, change, message):
    change(vg500)
    with pytest.raises(UserError, match=message):
        data.load_split("vg500", str(vg500), "train")


# ---------------------------------------------------------------------------------------------------------------------
# Used by the scripts


@pytest.mark.parametrize("name", ["coco", "nuswide", "vg500", "own_csv"])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        (srdl, ["--glove", "hash"]),
        (sadcl, ["--stop-after", "1", "1"]),
        (energy_roi, ["--rank", "area"]),
        (oass, ["--keypoint", "ctopk-w", "--csi"]),
    ],
    ids=["srdl", "sadcl", "energy_roi", "oass"],
)
def test_every_script_trains_on_every_set(name, method, flags, request, tmp_path, monkeypatch):
    picture = {energy_roi: "draw_regions", oass: "draw_keypoints"}.get(method, "draw_attention")
    monkeypatch.setattr(method, picture, lambda run, path: path.touch())
    place = request.getfixturevalue(name)
    where = ["--data", str(place)] if name == "own_csv" else ["--data", name, "--root", str(place)]
    args = method.parse([*where, *QUICK.split(), *flags, "--out", str(tmp_path / "run")])
    assert args.recipe == (name if name in method.RECIPE else "coco")
    vars(args).update(width=32)  # of sadcl's transformer: seconds
    record = method.main(args)
    assert np.isfinite(record["loss"]) and record["map_points"] > 0
    state = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert len(state["classes"]) == (500 if name == "vg500" else 3)


def test_fine_tuning_on_a_csv_keeps_the_rows_of_shared_classes(coco, own_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(srdl, "draw_attention", lambda run, path: path.touch())
    quick = [*QUICK.split(), "--glove", "hash"]
    srdl.main(srdl.parse(["--data", "coco", "--root", str(coco), *quick, "--out", str(tmp_path / "old")]))
    flags = ["--init-from", str(tmp_path / "old"), "--data", str(own_csv), "--lr", "0", "--weight-decay", "0"]
    srdl.main(srdl.parse([*flags, *quick, "--out", str(tmp_path / "new")]))
    assert "copied by class name: head.nodes" in capsys.readouterr().out
    old, new = (common.load_checkpoint(tmp_path / run / "last.pt")["model"] for run in ("old", "new"))
    assert torch.equal(new["head.classifier.weight"][1], old["head.classifier.weight"][2])  # dog
    assert not torch.isin(new["head.classifier.weight"][0], old["head.classifier.weight"]).any()


def test_a_class_without_a_word_vector_says_what_is_wanted(own_csv, tmp_path):
    np.savez(tmp_path / "glove.npz", names=["dog", "grey"], vectors=np.ones((2, 300)))
    args = srdl.parse(["--data", str(own_csv), *QUICK.split(), "--glove", str(tmp_path / "glove.npz")])
    with pytest.raises(UserError, match=r"no vector for 'crow,' of class 'crow, black'.*--glove hash"):
        srdl.build(args, ["crow, black", "dog"])


def test_a_csv_takes_no_root_and_other_sets_no_id_lists(own_csv, coco, tmp_path, capsys):
    with pytest.raises(SystemExit):
        srdl.parse(["--data", str(own_csv), "--root", str(tmp_path)])
    assert "--root has no effect with a .csv" in capsys.readouterr().err
    with pytest.raises(UserError, match="--val-list work for toy, voc2007, voc2012; coco has none"):
        data.load(srdl.parse(["--data", "coco", "--root", str(coco), "--val-list", "ids.txt"]))


# ---------------------------------------------------------------------------------------------------------------------
# check, show, download


def test_check_says_everything_that_is_wrong(coco, capsys):
    assert data.main(["check", "coco", "--root", str(coco), "--split", "train2014"]) == 1  # a miniature
    text = capsys.readouterr().out
    assert "PROBLEM: coco train2014 has 3 labelled images, the published split 82,081" in text
    assert "train2014: 4 images, 4 positive and 0 difficult-only labels, 1.00 positive an image, 1 images" in text
    (coco / "elsewhere" / "003.jpg").write_bytes(b"\xff\xd8 no image")
    (coco / "elsewhere" / "007.jpg").unlink()
    os.truncate(coco / "val2014" / "002.jpg", 700)
    assert data.main(["check", "coco", "--root", str(coco)]) == 1
    text = capsys.readouterr().out
    for name in ("elsewhere/003", "elsewhere/007", "val2014/002"):
        assert name.replace("elsewhere", "train2014") in text
    assert "val2014: 2 images" in text and text.count("PROBLEM") == 7


def test_check_accepts_a_sound_set_and_measures_the_shift(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "KNOWN_SIZES", {})
    data.draw_toy(tmp_path / "toy", 30, 5)
    assert data.main(["check", "toy", "--root", str(tmp_path / "toy")]) == 0
    text = capsys.readouterr().out
    assert "nothing wrong" in text and "train: 30 images" in text
    tables = {"train": data.load_split("toy", str(tmp_path / "toy"), "train", boxes=True).take([4, 7])}
    sizes = {tables["train"].files[0]: (100, 50), tables["train"].files[1]: (512, 512)}
    tables["train"].boxes = [np.array([[2, 0, 0, 50, 50]]), np.array([[2, 256, 256, 512, 512]])]
    row = list(data.shifts(tables, sizes))[2]  # dx: -25 * 5.12 = -128 and 128; dy: 0 and 128
    assert row == ["red triangle", "2", "128", "64", "16384", "4096"]


def test_check_finds_images_in_two_splits(own_csv, nuswide, monkeypatch, capsys):
    monkeypatch.setattr(data, "KNOWN_SIZES", {})
    assert data.main(["check", str(own_csv)]) == 0
    lists = nuswide / "ImageList"
    (lists / "TestImagelist.txt").write_text("actor Train\\0000_7.jpg\nactor Test\\0001_7.jpg")
    assert data.main(["check", "nuswide", "--root", str(nuswide)]) == 1
    assert "1 images are both in train and in test" in capsys.readouterr().out
    assert data.main(["check", "voc2007", "--root", "nowhere"]) == 1
    assert "PROBLEM: --data voc2007: no images below --root nowhere" in capsys.readouterr().out


@pytest.mark.parametrize("view", ["multi-scale", "canvas"])
def test_show_draws_a_grid(toy, tmp_path, view):
    out = tmp_path / "grid.png"
    assert data.main(["show", "toy", "--root", toy, "--view", view, "--count", "2", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (1000, 428)
    yellow = (np.asarray(Image.open(out)) == (255, 255, 0)).all(2)
    assert yellow.sum() > 100  # boxes


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A file server; server.put(name, files) packs an archive there. `server.count` requests were answered."""
    folder = tmp_path / "served"
    folder.mkdir()
    count = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            count.append(args)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def put(name, member, text):
        if name.endswith("zip"):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(member, text)
        else:
            (tmp_path / "member").write_text(text)
            with tarfile.open(folder / name, "w") as archive:
                archive.add(tmp_path / "member", member)
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    put.url, put.count, put.folder = f"http://127.0.0.1:{httpd.server_port}", count, folder
    yield put
    httpd.shutdown()
    httpd.server_close()


def test_download_fetches_what_is_not_whole_and_no_more(server, tmp_path, monkeypatch, capsys):
    root = tmp_path / "voc"
    md5 = [server(f"{n}.tar", f"VOCdevkit/VOC2007/{n}.txt", n) for n in ("a", "b")]
    found = [(f"{server.url}/{n}.tar", m) for n, m in zip("ab", md5, strict=True)]
    monkeypatch.setattr(data, "archives", lambda name: (found, "the terms"))
    whole = (server.folder / "b.tar").read_bytes()
    (server.folder / "b.tar").write_bytes(whole[:-700])  # broken on its way
    with pytest.raises(SystemExit, match=r"b\.tar came broken; it is kept as .*b\.tar\.part"):
        data.main(["download", "voc2007", "--root", str(root)])
    assert sorted(p.name for p in root.iterdir()) == ["VOCdevkit", "a.tar", "a.tar.unpacked", "b.tar.part"]
    (server.folder / "b.tar").write_bytes(whole)
    requests = len(server.count)
    assert data.main(["download", "voc2007", "--root", str(root)]) == 0
    assert len(server.count) == requests + 1
    assert (root / "VOCdevkit/VOC2007/a.txt").read_text() + (root / "VOCdevkit/VOC2007/b.txt").read_text() == "ab"
    assert data.main(["download", "voc2007", "--root", str(root)]) == 0 and len(server.count) == requests + 1
    text = capsys.readouterr().out
    assert "terms: the terms" in text and f"done: --data voc2007 --root {root}" in text


def test_download_without_a_server_says_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "archives", lambda name: ([(f"{server.url}/none.zip", None)], ""))
    with pytest.raises(SystemExit, match=r"none\.zip could not be fetched into .*: HTTP Error 404"):
        data.main(["download", "coco", "--root", str(tmp_path / "x")])


def test_the_archives_are_the_published_ones():
    for name in ("voc2007", "voc2012", "coco"):
        found, pages = data.archives(name)
        assert all(url.startswith("http") and url.endswith((".tar", ".zip")) for url, _ in found) and "http" in pages
        assert all(md5 and len(md5) == 32 for _, md5 in found) or name == "coco"
