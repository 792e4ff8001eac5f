"""k-NN against scikit-learn and plain loops, its ties, and labels of both folders alike."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from engine.evaluation import knn, retrieval, similarity
from engine.evaluation.features import gallery_and_queries
from engine.evaluation.similarity import Blocks
from tests.evaluation.runs import blobs, tied, write_data
from utils.errors import InputError


@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_top1_is_scikit_learns(block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", block)
    gallery, gallery_labels = blobs(1, 300)
    queries, query_labels = blobs(2, 80)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (gallery, queries)]
    for k in (1, 5, 50, 300):
        # On the sphere the squared distance is 2 - 2 cos.
        theirs = KNeighborsClassifier(
            k, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)
        ).fit(unit[0], gallery_labels)
        ours = knn.rankings(gallery, gallery_labels, queries, [k], 0.07, classes=7)[k]
        expected = 100 * (theirs.predict(unit[1]) == query_labels.numpy()).mean()
        assert knn.accuracy(ours, query_labels)[0] == pytest.approx(expected)


def test_a_k_above_the_gallery_and_fewer_than_five_classes_work():
    gallery, labels = blobs(1, 6, classes=2)
    ranked = knn.rankings(gallery, labels, gallery, [1, 6, 1000], 0.07, classes=2)
    assert knn.accuracy(ranked[1], labels) == (100, 100)
    assert torch.equal(ranked[1000], ranked[6])


def test_equal_neighbours_come_in_gallery_order():
    draw = np.random.default_rng(0)
    cosines = torch.from_numpy(draw.integers(0, 4, (200, 30)).astype(np.float32))
    for k in (1, 7, 30):
        values, places = similarity.nearest(cosines, k)
        whole = cosines.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, whole.values[:, :k])
        assert torch.equal(places, whole.indices[:, :k])


def slow_ranking(gallery, labels, queries, k: int, classes: int, temperature: float) -> list:
    """Five best classes by plain loops; exact for `tied` features."""
    found = []
    for query in queries:
        cosines = [float(query @ image) / 16 for image in gallery]
        order = sorted(range(len(gallery)), key=lambda place: (-cosines[place], place))
        votes = [torch.tensor(0.0) for _ in range(classes)]
        for place in order[:k]:
            vote = torch.exp(torch.tensor(cosines[place] - cosines[order[0]]) / temperature)
            votes[labels[place]] = votes[labels[place]] + vote
        ranking = sorted(range(classes), key=lambda index: (-float(votes[index]), index))
        found.append([index if votes[index] > 0 else -1 for index in ranking[:5]])
    return found


@pytest.mark.parametrize(
    ("block", "room"),
    # In so many bytes are 8 of the gallery's 60 images at once, for 4 queries.
    [(1, None), (333, None), (2**24, None), (2**24, 2560)],
)
@pytest.mark.parametrize("classes", [1, 2, 9])
def test_rankings_of_tied_features_are_those_of_plain_loops(block, room, classes, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", block)
    (gallery, labels), (queries, _) = tied(1, 60, classes), tied(2, 12)
    ks = [1, 4, 20, 60, 99]
    assert room is None or Blocks.that_fit(60, 16, knn.EACH, room) == (4, 8)
    ranked = knn.rankings(gallery, labels, queries, ks, 0.5, classes, room=room)
    for k in ks:
        assert ranked[k].dtype == torch.int64
        assert ranked[k].tolist() == slow_ranking(gallery, labels, queries, k, classes, 0.5)
        one = knn.rankings(gallery, labels, queries[:1], [k], temperature=0.5, classes=classes)
        assert torch.equal(one[k], ranked[k][:1])


def test_blocks_fit_into_the_room_of_a_device():
    """The gallery whole where half of the room holds it; figures of a GPU, and of a CPU."""
    gib = 2**30
    for each in (knn.EACH, retrieval.EACH):
        for gallery, width in ((50_000, 768), (1_281_167, 768), (2_700_000, 1536)):
            for room in (gib, 10 * gib, 70 * gib, 130 * gib):
                queries, part = Blocks.that_fit(gallery, width, each, room)
                held = 4 * part * width * (1 if part == gallery else 2)
                assert held <= room / 2
                assert each * queries * part <= room / 2
                assert (part == gallery) == (4 * gallery * width <= room // 2)
                assert queries == similarity.MOST_QUERIES or 4 * each * queries * part > room / 2
    imagenet = 1_281_167, 768
    assert Blocks.that_fit(*imagenet, knn.EACH, 70 * gib) == (1024, 1_281_167)
    assert Blocks.that_fit(*imagenet, knn.EACH, 71 * gib) == (1024, 1_281_167)
    assert Blocks.that_fit(*imagenet, knn.EACH, None) == (13, 1_281_167)
    assert Blocks.that_fit(10, 768, knn.EACH, 1000) == (16, 1)  # one at least


def test_a_small_temperature_is_the_nearest_neighbour():
    (gallery, labels), (queries, _) = blobs(1, 300), blobs(2, 40)
    ranked = knn.rankings(gallery, labels, queries, [1, 200], 1e-3, 7)
    assert torch.equal(ranked[200][:, 0], ranked[1][:, 0])


def test_classes_without_a_vote_are_no_answers():
    gallery = torch.eye(3)
    labels = torch.tensor([4, 2, 6])
    ranked = knn.rankings(gallery, labels, gallery[1:2], [1, 2, 9], 0.07, classes=8)
    assert ranked[1].tolist() == [[2, -1, -1, -1, -1]]
    assert ranked[2].tolist() == [[2, 4, -1, -1, -1]]
    assert ranked[9].tolist() == [[2, 4, 6, -1, -1]]
    # With one neighbour of ten classes, top-5 is top-1, not the first four classes besides.
    own = torch.arange(10)
    ranked = knn.rankings(torch.eye(10), own, torch.eye(10), [1], 0.07, classes=10)
    assert knn.accuracy(ranked[1], own.roll(3)) == (0, 0)


def leaning(seed: int, n: int) -> torch.Tensor:
    """Classes about a strong common direction, as networks give them."""
    return 3 + blobs(seed, n, classes=20, width=64, noise=0.7)[0]


def places_found(gallery: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Each query's four nearest [m, 4]: every image is a class of its own."""
    own = torch.arange(len(gallery))
    return knn.rankings(gallery, own, queries, [4], 0.07, len(gallery))[4][:, :4]


def test_copies_in_the_gallery_are_neighbours_in_its_order():
    image = leaning(1, 1)
    gallery = torch.cat([leaning(2, 300), image, leaning(3, 500), image.repeat(3, 1)])
    assert places_found(gallery, 5 * image).tolist() == [[300, 801, 802, 803]]


def test_half_precision_features_rank_as_their_float32_values():
    gallery, queries = leaning(1, 200).half(), leaning(2, 30).half()
    half = places_found(gallery, queries)
    assert torch.equal(half, places_found(gallery.float(), queries.float()))


def test_the_features_given_stay_as_they_are():
    gallery, queries = leaning(1, 50), leaning(2, 5)
    before = gallery.clone(), queries.clone()
    places_found(gallery, queries)
    assert torch.equal(gallery, before[0])
    assert torch.equal(queries, before[1])


def test_queries_are_numbered_by_the_gallerys_classes_and_have_no_other(tmp_path):
    gallery, queries = (write_data(tmp_path, 3, 1, 1) / split for split in ("train", "val"))
    (queries / "class0" / "1.jpg").unlink()
    splits = gallery_and_queries(gallery, queries)
    assert splits.train.labels.tolist() == [0, 1, 2]
    assert splits.test.labels.tolist() == [1, 2]
    with pytest.raises(InputError, match="lacks: class0"):
        gallery_and_queries(queries, gallery)
