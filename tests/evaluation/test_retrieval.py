"""Retrieval against scikit-learn and plain loops; k-NN and retrieval by several processes and
in bounded memory."""

import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from engine.evaluation import knn, retrieval, similarity
from tests.evaluation.runs import blobs, tied
from tests.processes import found_by_each, run_python
from tests.runs import assert_same_bits
from utils.distributed import ALONE, World

FIGURES = ("rank1", "rank5", "map", "map_at_100_released", "queries_without_positives")


def slow_measure(gallery, gallery_labels, queries, query_labels, first: int = 10) -> dict:
    """The definitions by plain loops; exact for `tied` features."""
    rank1, rank5, whole, released, without, places = [], [], [], [], 0, []
    for query, target in zip(queries, query_labels, strict=True):
        cosines = [float(query @ image) for image in gallery]
        order = sorted(range(len(gallery)), key=lambda place: (-cosines[place], place))
        hits = [bool(gallery_labels[place] == target) for place in order]
        precision = [sum(hits[: rank + 1]) / (rank + 1) for rank in range(len(hits)) if hits[rank]]
        early = precision[: sum(hits[:100])]
        rank1.append(any(hits[:1]))
        rank5.append(any(hits[:5]))
        whole.append(sum(precision) / len(precision) if precision else 0.0)
        released.append(sum(early) / len(early) if early else 0.0)
        without += not any(hits)
        places.append(order[:first])
    return {
        "rank1": 100 * np.mean(rank1),
        "rank5": 100 * np.mean(rank5),
        "map": 100 * np.mean(whole),
        "map_at_100_released": 100 * np.mean(released),
        "queries_without_positives": without,
        "average_precision": whole,
        "first": places,
    }


def assert_is(ours: retrieval.Ranked, expected: dict) -> None:
    for name in FIGURES:
        assert getattr(ours, name) == pytest.approx(expected[name], rel=1e-12), name
    assert ours.average_precision.dtype == torch.float64
    assert ours.average_precision.tolist() == pytest.approx(expected["average_precision"])
    assert ours.first.tolist() == expected["first"]


def test_average_precision_is_scikit_learns():
    gallery, gallery_labels = blobs(1, 120)
    queries, query_labels = blobs(2, 30)
    ours = retrieval.retrieve(gallery, gallery_labels, queries, query_labels)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (gallery, queries)]
    # No two cosines that float32 could take for each other.
    assert (unit[1] @ unit[0].T).sort(dim=1).values.diff(dim=1).min() > 3e-7
    theirs = [
        average_precision_score(gallery_labels == label, unit[0] @ query)
        for query, label in zip(unit[1], query_labels, strict=True)
    ]
    assert 20 < ours.map < 80
    assert ours.average_precision.tolist() == pytest.approx(theirs, abs=1e-9)
    assert ours.map == pytest.approx(100 * np.mean(theirs))


@pytest.mark.parametrize(
    ("block", "room"),
    # In so many bytes are 8 of the gallery's 150 images at once, for 2 queries.
    [(1, None), (1001, None), (2**24, None), (2**24, 2560)],
)
@pytest.mark.parametrize("images", [1, 3, 7, 150])
def test_tied_features_are_measured_as_by_plain_loops(images, block, room, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(retrieval, "SORTED_ELEMENTS", max(1, block // 2))
    gallery, queries = tied(1, images), tied(2, 20, classes=6)
    ours = retrieval.retrieve(*gallery, *queries, room=room)
    assert ours.queries_without_positives > 0
    assert_is(ours, slow_measure(*gallery, *queries))


def test_one_query_of_one_class_in_half_precision():
    gallery, queries = tied(1, 40, classes=1), tied(2, 1, classes=1)
    ours = retrieval.retrieve(gallery[0].half(), gallery[1], queries[0].half(), queries[1], first=3)
    assert_is(ours, slow_measure(*gallery, *queries, first=3))
    assert ours.map == 100


def test_copies_in_the_gallery_come_in_its_order():
    image = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    gallery, _ = blobs(1, 50, width=8)
    gallery[[7, 30, 31]] = image
    ours = retrieval.retrieve(gallery, torch.arange(50), 3 * image, torch.tensor([31]), first=3)
    assert ours.first.tolist() == [[7, 30, 31]]
    assert ours.map == pytest.approx(100 / 3)
    assert (ours.rank1, ours.rank5) == (0, 100)


def test_a_cosine_of_minus_zero_ties_with_zero():
    similarity_row = torch.tensor([[0.0, -0.0, 0.5, -0.5, -0.0, 1e-40, -1e-40]])
    order = retrieval.order_keys(similarity_row, 0).argsort(dim=1)
    assert order.tolist() == [[2, 5, 0, 1, 4, 6, 3]]


def test_the_released_figure_leaves_out_what_comes_after_100_places():
    # The query's positives are at ranks 1 and 201.
    angle = torch.linspace(0, 1, 201)
    gallery = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.zeros(201).long()
    labels[[0, 200]] = 1
    ours = retrieval.retrieve(gallery, labels, gallery[:1], torch.tensor([1]))
    assert ours.map_at_100_released == 100
    assert ours.map == pytest.approx(100 * (1 + 2 / 201) / 2)


def found_by(world: World) -> dict:
    """All results on features in 9 blocks, and on 2 queries, which are one block."""
    similarity.BLOCK_ELEMENTS, before = 700 * 23, similarity.BLOCK_ELEMENTS
    gallery, queries = blobs(1, 700, width=96), blobs(2, 200, width=96)
    found = {}
    try:
        for count in (200, 2):
            some = queries[0][:count], queries[1][:count]
            found["rankings", count] = knn.rankings(*gallery, some[0], [1, 20, 200], 0.07, 7, world)
            own = torch.arange(700)  # every image a class: the neighbours themselves
            found["places", count] = knn.rankings(gallery[0], own, some[0], [5], 0.07, 700, world)
            found["retrieval", count] = vars(retrieval.retrieve(*gallery, *some, world=world))
    finally:
        similarity.BLOCK_ELEMENTS = before
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_finds_the_same_bits(size):
    processes = found_by_each(size, found_by)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = found_by(ALONE)
    torch.set_num_threads(threads)
    assert len(alone["rankings", 200][20]) == 200
    for found in processes:
        assert_same_bits(found, alone)


MEASURED = """
import resource, sys, torch
from engine.evaluation import knn, retrieval
draw = torch.Generator().manual_seed(0)
gallery, queries = (torch.randn(n, 16, generator=draw) for n in (20000, int(sys.argv[2])))
labels = torch.arange(20000) % 100
few = queries[:10], labels[:10]
run = {
    "knn": lambda q, y: knn.rankings(gallery, labels, q, [20], 0.07, 100),
    "retrieval": lambda q, y: retrieval.retrieve(gallery, labels, q, y),
}[sys.argv[1]]
run(*few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(queries, labels[: len(queries)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(("what", "queries"), [("knn", 20000), ("retrieval", 8000)])
def test_memory_is_that_of_a_block(what, queries):
    """All similarities at once would be 1.6 GB and 640 MB of float32."""
    done = run_python("-c", MEASURED, what, queries)
    assert int(done.stdout) < 300 * 1024
