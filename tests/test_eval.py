"""eval.py: metrics against scikit-learn and literal transcriptions, degenerate inputs, score files."""

import json

import numpy as np
import pytest

import data
import eval as metrics
from data import Table, UserError


def random_case(rng, n=83, c=7, ignore=0.1, ties=False):
    scores = rng.normal(size=(n, c)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    labels = (rng.random((n, c)) < 0.3).astype(np.int8)
    labels[rng.random((n, c)) < ignore] = -1
    return scores, labels


def ranked_hits(scores, labels, c):
    """Labels of class c without ignored cells, best score first, ties by row."""
    seen = labels[:, c] >= 0
    return labels[seen, c][np.argsort(-scores[seen, c], kind="stable")] == 1


def devkit_ap(hits, kind):
    """The VOC devkit's rule, transcribed line by line from its description."""
    tp, fp = np.cumsum(hits), np.cumsum(~hits)
    rec, prec = tp / tp[-1], tp / (tp + fp)
    if kind == "11point":
        ap = 0.0
        for t in np.arange(0, 1.1, 0.1):
            p = prec[rec >= min(t, 1.0)]
            ap += (p.max() if len(p) else 0) / 11
        return ap
    mrec, mpre = np.concatenate([[0], rec, [1]]), np.concatenate([[0], prec, [0]])
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)))


def test_points_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(20):
        scores, labels = random_case(np.random.default_rng(seed))
        ours = metrics.average_precision(scores, labels, "points")
        for c in range(scores.shape[1]):
            seen = labels[:, c] >= 0
            assert ours[c] == pytest.approx(
                sklearn.average_precision_score(labels[seen, c], scores[seen, c]), abs=1e-12
            )


@pytest.mark.parametrize("kind", ["area", "11point"])
@pytest.mark.parametrize("ties", [False, True])
def test_area_and_11_point_equal_the_devkit_rule(kind, ties):
    for seed in range(20):
        scores, labels = random_case(np.random.default_rng(seed), n=60 + seed, ties=ties)
        ours = metrics.average_precision(scores, labels, kind)
        for c in range(scores.shape[1]):
            assert ours[c] == pytest.approx(devkit_ap(ranked_hits(scores, labels, c), kind), abs=1e-12)


def test_ties_are_ranked_by_row():
    for seed in range(50):
        scores, labels = random_case(np.random.default_rng(seed), n=41, ties=True)
        ours = metrics.average_precision(scores, labels)
        for c in range(scores.shape[1]):
            hits = ranked_hits(scores, labels, c)
            assert ours[c] == pytest.approx((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean(), abs=1e-12)
    scores, labels = np.zeros((4, 1)), np.array([[0], [1], [0], [1]])
    assert metrics.average_precision(scores, labels)[0] == (1 / 2 + 2 / 4) / 2


def test_a_class_without_positives_is_nan_and_left_out():
    scores, labels = random_case(np.random.default_rng(0), ignore=0)
    labels[:, 2] = 0
    labels[:, 4] = -1
    for kind in metrics.KINDS:
        assert np.flatnonzero(np.isnan(metrics.average_precision(scores, labels, kind))).tolist() == [2, 4]
    row = metrics.summary(scores, labels)
    assert (row["classes"], row["classes_left_out"]) == (5, 2)
    kept = [0, 1, 3, 5, 6]
    assert row["map_points"] == pytest.approx(metrics.summary(scores[:, kept], labels[:, kept])["map_points"])


def test_ignored_cells_count_nowhere():
    rng = np.random.default_rng(1)
    scores, labels = random_case(rng, ignore=0.3)
    moved = np.where(labels == -1, rng.normal(size=scores.shape) * 9, scores)
    for kind in metrics.KINDS:
        assert np.array_equal(
            metrics.average_precision(scores, labels, kind), metrics.average_precision(moved, labels, kind)
        )
    assert metrics.precision_recall_f1(scores, labels) == metrics.precision_recall_f1(moved, labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (5, 1)])
def test_degenerate_shapes(shape):
    ones = np.ones(shape, np.int8)
    assert (metrics.average_precision(np.zeros(shape), ones) == 1).all()
    values = metrics.precision_recall_f1(np.ones(shape), ones)
    assert all(value == 1 for value in values.values())
    empty = metrics.summary(np.zeros(shape), 0 * ones)
    assert np.isnan(empty["map_points"]) and np.isnan(empty["CF1"]) and empty["classes"] == 0


def naive_f1(scores, labels, threshold, top):
    """Counts cell by cell, in Python."""
    n, c = scores.shape
    hits, guesses, truths = np.zeros(c), np.zeros(c), np.zeros(c)
    for i in range(n):
        best = sorted(range(c), key=lambda j: (-scores[i, j], j))[: top or c]
        for j in range(c):
            guess = 1 / (1 + np.exp(-np.float64(scores[i, j]))) >= threshold and j in best
            if labels[i, j] >= 0:
                hits[j] += guess and labels[i, j] == 1
                guesses[j] += guess
                truths[j] += labels[i, j] == 1
    p = [hits[j] / guesses[j] if guesses[j] else 0 for j in range(c) if truths[j]]
    r = [hits[j] / truths[j] for j in range(c) if truths[j]]
    f1 = [2 * a * b / (a + b) if a + b else 0 for a, b in zip(p, r, strict=True)]
    cp, cr, op, o = np.mean(p), np.mean(r), hits.sum() / max(guesses.sum(), 1), hits.sum() / truths.sum()
    return cp, cr, 2 * cp * cr / (cp + cr), np.mean(f1), op, o, 2 * op * o / (op + o)


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_f1s_equal_a_cell_by_cell_count(top, threshold):
    for seed in range(5):
        scores, labels = random_case(np.random.default_rng(seed), ties=seed % 2 == 1)
        labels[:, 1] = 0
        ours = metrics.precision_recall_f1(scores, labels, threshold, top)
        assert list(ours) == ["CP", "CR", "CF1", "CF1_macro", "OP", "OR", "OF1"]
        assert list(ours.values()) == pytest.approx(naive_f1(scores, labels, threshold, top), abs=1e-12)


def test_the_two_cf1_differ_and_a_class_never_predicted_has_precision_zero():
    scores = np.array([[1.0, -1], [1, -1], [-1, -1], [-1, -1]])
    labels = np.array([[1, 1], [1, 0], [0, 0], [0, 1]])
    values = metrics.precision_recall_f1(scores, labels)
    assert (values["CP"], values["CR"], values["CF1"], values["CF1_macro"]) == (0.5, 0.5, 0.5, 0.5)
    labels[3, 0] = 1
    values = metrics.precision_recall_f1(scores, labels)
    assert values["CF1"] == pytest.approx(2 * 0.5 * (1 / 3) / (5 / 6)) and values["CF1_macro"] == pytest.approx(0.4)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_thresholds_predict_everything_or_nothing(threshold):
    values = metrics.precision_recall_f1(*random_case(np.random.default_rng(3)), threshold)
    assert values["OR"] == (1.0 if threshold == 0 else 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y: metrics.average_precision(s, y, "voc"), "kind 'voc'"),
        (lambda s, y: metrics.average_precision(s, y[:-1]), "shapes"),
        (lambda s, y: metrics.average_precision(s[:, 0], y[:, 0]), "shapes"),
        (lambda s, y: metrics.precision_recall_f1(s * np.inf, y), "not finite"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case(np.random.default_rng(0)))


# ---------------------------------------------------------------------------------------------------------------------
# Score files


@pytest.fixture
def score_files(tmp_path):
    paths = []
    for seed in range(3):
        scores, labels = random_case(np.random.default_rng(seed), n=30, c=4)
        _, labels = random_case(np.random.default_rng(9), n=30, c=4)
        labels[:, 3] = 0
        names = [f"{i}" for i in range(30)]
        path = tmp_path / f"seed{seed}" / "scores.npz"
        path.parent.mkdir()
        metrics.save_scores(path, scores, Table(names, names, labels, ("a", "b", "c", "d e")), "negative", 0.4)
        paths.append(str(path))
    return paths


def test_score_prints_json_with_null_for_a_class_without_positives(score_files, capsys):
    metrics.main(["score", score_files[0], "--json", "--per-class", "--eleven-point"])
    (result,) = json.loads(capsys.readouterr().out)
    content = metrics.load_scores(score_files[0])
    labels = np.where(content["labels"] == -1, 0, content["labels"])  # the file's own policy
    assert result["difficult"] == "negative" and result["threshold"] == 0.4
    assert result["map_points"] == pytest.approx(
        100 * np.nanmean(metrics.average_precision(content["scores"], labels)), abs=1e-9
    )
    assert {"map_area", "map_11point", "top3_OF1"} <= set(result) and list(result["per_class"]) == ["a", "b", "c"]
    metrics.main(["score", score_files[0], "--json", "--per-class", "--min-positives", "0"])
    assert json.loads(capsys.readouterr().out)[0]["per_class"]["d e"]["ap_area"] is None


def test_score_compares_two_files_and_averages_three(score_files, capsys):
    metrics.main(["score", *score_files[:2], "--per-class"])
    text = capsys.readouterr().out
    assert "seed0" in text and "difference" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("map_points"))
    assert float(row[3]) == pytest.approx(float(row[2]) - float(row[1]), abs=0.011)
    metrics.main(["score", *score_files])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("OF1"))
    values = [float(v) for v in row[1:4]]
    assert float(row[4]) == pytest.approx(np.mean(values), abs=0.01)
    assert float(row[5]) == pytest.approx(np.std(values, ddof=1), abs=0.01)


def test_difficult_and_min_positives_change_the_means(score_files, capsys):
    found = {}
    for flags in ([], ["--difficult", "ignore"], ["--difficult", "positive"], ["--min-positives", "9"]):
        metrics.main(["score", score_files[1], "--json", *flags])
        found[" ".join(flags)] = json.loads(capsys.readouterr().out)[0]
    assert len({r["map_points"] for r in found.values()}) >= 3
    content = metrics.load_scores(score_files[1])
    assert found["--min-positives 9"]["classes"] == ((content["labels"] == 1).sum(0) >= 9).sum()


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04 cut off"])
def test_a_missing_or_broken_score_file_is_named(tmp_path, content):
    path = tmp_path / "scores.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"scores\.npz"):
        metrics.load_scores(path)
    with pytest.raises(SystemExit, match=r"eval\.py: .*scores\.npz"):
        metrics.main(["score", str(path)])


def test_per_class_differences_stand_beside_the_shifts_of_the_objects(toy, tmp_path, capsys):
    table, paths = data.load_split("toy", toy, "val", boxes=True), []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.npz"))
        metrics.save_scores(paths[-1], np.random.default_rng(seed).normal(size=(24, 12)), table, "positive")
    metrics.main(["score", *paths, "--per-class", "--shifts", "toy", "--root", toy, "--split", "val"])
    head, *rows = capsys.readouterr().out.split("AP per class (points)")[1].strip().splitlines()
    assert head.split()[-5:] == ["difference", "var", "dx", "var", "dy"]
    found = {" ".join(row.split()[:2]): row.split()[2:] for row in rows}
    x = []
    for file, boxes in zip(table.files, table.boxes, strict=True):
        height, width = data.read_image(file).shape[1:]
        own = boxes[boxes[:, 0] == 0]
        x += ((own[:, 1] + own[:, 3] - width) / 2 * 512 / max(width, height)).tolist()
    assert int(found["red ring"][4]) == round(np.var(x)) and len(x) > 1
    assert float(found["red ring"][3]) == pytest.approx(
        float(found["red ring"][2]) - float(found["red ring"][1]), abs=0.011
    )
    for flags in (["--shifts", "toy"], ["--root", toy], ["--shifts", "toy", "--per-class", "--json"]):
        with pytest.raises(SystemExit, match="--shifts"):
            metrics.main(["score", *paths, *flags])


def test_voc12_writes_what_the_server_reads(tmp_path, capsys):
    rng, names = np.random.default_rng(0), [f"2008_{i:06d}" for i in range(7)]
    scores, classes = rng.normal(0, 30, (7, 20)).astype(np.float32), data.VOC_CLASSES[::-1]
    path, out = tmp_path / "scores.npz", tmp_path / "results" / "VOC2012" / "Main"
    metrics.save_scores(path, scores, Table(names, names, np.full((7, 20), -1, np.int8), classes), "positive")
    metrics.main(["voc12", str(path), "--out", str(out)])
    assert "WARNING: VOC2012's test split has 10,991 images" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {f"comp2_cls_test_{c}.txt" for c in data.VOC_CLASSES}
    for c, column in zip(classes, scores.T, strict=True):
        lines = (out / f"comp2_cls_test_{c}.txt").read_text().splitlines()
        assert [line.split(" ")[0] for line in lines] == names
        assert (np.array([line.split(" ")[1] for line in lines], np.float32) == column).all()  # to the last bit
    metrics.save_scores(path, scores[:, :2], Table(names, names, np.ones((7, 2), np.int8), ("cat", "emu")), "positive")
    with pytest.raises(SystemExit, match="has the classes cat, emu; the server wants VOC's 20"):
        metrics.main(["voc12", str(path), "--out", str(out)])
    (tmp_path / "file").write_text("")
    metrics.save_scores(path, scores, Table(names, names, np.ones((7, 20), np.int8), classes), "positive")
    with pytest.raises(SystemExit, match="cannot be made"):
        metrics.main(["voc12", str(path), "--out", str(tmp_path / "file" / "x")])
