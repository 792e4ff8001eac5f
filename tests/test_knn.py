"""k-NN against scikit-learn, its ties, and labels that mean the same in both folders."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from engine import knn
from engine.features import gallery_and_queries
from utils.errors import InputError


def features(seed: int, n: int, classes: int = 7, width: int = 12):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    centres = np.random.default_rng(0).standard_normal((classes, width))
    return centres[labels] + 1.5 * draw.standard_normal((n, width)), labels


@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_top1_is_scikit_learns(block, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK_ELEMENTS", block)
    gallery, gallery_labels = features(1, 300)
    queries, query_labels = features(2, 80)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gallery, queries)]
    for k in (1, 5, 50, 300):
        # On the sphere the squared distance is 2 - 2 cos.
        theirs = KNeighborsClassifier(
            k, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)
        ).fit(unit[0], gallery_labels)
        ours = knn.knn_accuracy(
            *map(torch.from_numpy, (gallery, gallery_labels, queries, query_labels)), [k]
        )
        expected = 100 * (theirs.predict(unit[1]) == query_labels).mean()
        assert ours[k][0] == pytest.approx(expected)


def test_a_k_above_the_gallery_and_fewer_than_five_classes_work():
    gallery, labels = features(1, 6, classes=2)
    inputs = (torch.from_numpy(gallery), torch.from_numpy(labels))
    accuracy = knn.knn_accuracy(*inputs, *inputs, [1, 1000])
    assert accuracy[1] == (100, 100)
    assert accuracy[1000] == knn.knn_accuracy(*inputs, *inputs, [6])[6]


def test_equal_neighbours_come_in_gallery_order():
    draw = np.random.default_rng(0)
    similarity = torch.from_numpy(draw.integers(0, 4, (200, 30)).astype(np.float32))
    for k in (1, 7, 30):
        values, places = knn.nearest(similarity, k)
        whole = similarity.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, whole.values[:, :k])
        assert torch.equal(places, whole.indices[:, :k])


def folder(root, classes):
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (80 * place, 90, 200)).save(root / name / "0.png")
    return root


def test_queries_are_numbered_by_the_gallerys_classes(tmp_path):
    gallery = folder(tmp_path / "gallery", ["ant", "bee", "cat"])
    queries = folder(tmp_path / "queries", ["bee", "cat"])
    first, second = gallery_and_queries(gallery, queries, 16)
    assert first.labels == [0, 1, 2]
    assert second.labels == [1, 2]
    assert [label for _, label in second] == [1, 2]


def test_a_class_that_the_gallery_lacks_is_an_error(tmp_path):
    gallery = folder(tmp_path / "gallery", ["ant", "bee"])
    queries = folder(tmp_path / "queries", ["bee", "cat"])
    with pytest.raises(InputError, match="lacks: cat"):
        gallery_and_queries(gallery, queries, 16)
