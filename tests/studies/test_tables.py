"""Random rows, tables and chance: what follows from a study and the results that there are."""

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compare
from engine import build
from engine.evaluation import table
from engine.evaluation.source import image_size
from engine.studies import tables
from engine.studies.evaluation import guessing
from engine.studies.results import StudyResults, misfit
from engine.studies.spec import load
from engine.studies.zeros import untrained_rows, untrained_source
from models.registry import build_backbone
from tests.studies.studies import TINY, study_file
from utils.config import eval_size


def rows_and_identities(tmp_path, cells: str) -> tuple[list, list[dict]]:
    """The random rows of a study of these cells, and their identities."""
    head, _, tail = TINY.partition("cells:\n")
    text = f"{head}cells:\n{cells}{tail[tail.index('evaluate') :]}".replace("baseline: esvit", "")
    study = load(study_file(tmp_path, text))
    done = StudyResults(study, tmp_path)
    return [*done.untrained.values()], [done.identity(name, 0) for name in done.untrained]


@pytest.mark.parametrize(
    "option", ["EVAL.SIZE: 32", "EVAL.RESIZE: 96", "LINEAR.C: [0.1]", "EVAL.PRECISION: bf16"]
)
def test_cells_that_are_judged_otherwise_have_a_random_row_of_their_own(option, tmp_path):
    rows, identities = rows_and_identities(tmp_path, f"  a: {{}}\n  b: {{{option}}}\n")
    assert [row.cells for row in rows] == [("a",), ("b",)]
    assert identities[0] != identities[1]
    # Nothing of the kind: one row for both.
    rows, _ = rows_and_identities(tmp_path, "  a: {}\n  b: {TRAIN.EPOCHS: 2, HEAD.OUT_DIM: 8}\n")
    assert [row.cells for row in rows] == [("a", "b")]


def test_what_adds_or_shapes_a_random_row_s_attention_makes_it_another(tmp_path):
    esvit, lcr = "LOSS.OBJECTIVE: esvit", "LOSS.OBJECTIVE: lcr"
    cells = [
        f"  a: {{{esvit}}}\n",
        f"  a: {{{esvit}}}\n  b: {{}}\n",
        f"  a: {{{esvit}}}\n  b: {{HEAD.POOL_HIDDEN: 8}}\n",
        f"  a: {{{esvit}}}\n  b: {{HEAD.BOTTLENECK_DIM: 8}}\n",
        f"  a: {{{esvit}}}\n  b: {{{lcr}}}\n",
        f"  a: {{{esvit}}}\n  b: {{{lcr}, LCR.CHANNELS: 8}}\n",
    ]
    found = []
    for text in cells:
        rows, identities = rows_and_identities(tmp_path, text)
        assert len(rows) == 1
        found.append(json.loads(json.dumps(identities[0])))
        assert found[-1] == identities[0]  # as it is read from its file
    for one, other in itertools.combinations(found, 2):
        assert misfit(one, other, Path("x.json"))
    # What shapes a head that no figure comes from does not.
    changed = cells[0].replace("esvit", "esvit, HEAD.POOL_HIDDEN: 8")
    assert rows_and_identities(tmp_path, changed)[1][0] == found[0]


def test_a_random_row_has_the_parts_of_any_cell_that_has_them(tmp_path):
    text = TINY.replace("  esvit: {", "  lcr: {LOSS.OBJECTIVE: lcr, LCR.CHANNELS: 7}\n  esvit: {")
    study = load(study_file(tmp_path, text))
    (row,) = untrained_rows(study).values()
    for cells, poolings in ((("esvit", "cmd", "lcr"), {"mil", "lcr"}), (("esvit", "cmd"), {"mil"})):
        source = untrained_source(study, replace(row, cells=cells), 1)
        assert {*source.poolings()} == {"default", "mean"} | poolings
        start = build.networks(study.config("esvit", 1))[1].backbone.state_dict()
        own = source.network.backbone.state_dict()
        assert all(torch.equal(own[name], value) for name, value in start.items())
    assert untrained_source(study, row, 0).network.rationale.channels == 7


def test_cells_from_weights_are_judged_beside_those_weights(tmp_path):
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    spec = build.backbone_spec(load(study_file(tmp_path)).config("cmd"))
    states = []
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        states.append(build_backbone(spec).state_dict())
        torch.save(states[-1], file)
    cells = f"  a: {{INIT.WEIGHTS: {files[0]}}}\n  b: {{INIT.WEIGHTS: {files[1]}}}\n  c: {{}}\n"
    rows, identities = rows_and_identities(tmp_path, cells)
    assert [(row.name, row.cells, row.is_start) for row in rows] == [
        ("random", ("a", "b", "c"), False),
        ("start-a", ("a",), True),
        ("start-b", ("b",), True),
    ]
    assert misfit(identities[1], identities[2], Path("x.json"))
    study = load(tmp_path / "tiny.yaml")
    for row, state in zip(rows[1:], states, strict=True):
        source = untrained_source(study, row, 0)
        own = source.network.backbone.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items())
        assert image_size(source) == eval_size(study.config(row.cells[0]))
    # One row in the table, whatever seeds there are.
    found = {("start-a", 0): {"figures": {"knn_default": 50.0}, "zeros": {}}}
    (row,) = tables.rows_of(study, "small", rows, found, [0, 1])
    assert (row["title"], row["figures"]["knn_default"]["mean"]) == ("starting weights (a)", 50.0)


def test_rows_and_paired_differences_are_those_computed_by_hand(tmp_path):
    study = load(study_file(tmp_path))
    values = {("cmd", 0): 61.0, ("cmd", 1): 64.0, ("esvit", 0): 60.0, ("esvit", 1): 58.0}
    found = {
        key: {"figures": {"knn_default": value}, "zeros": {"knn_default": 10.0}}
        for key, value in values.items()
    }
    randoms = untrained_rows(study).values()
    rows = {row["name"]: row for row in tables.rows_of(study, "small", randoms, found, [0, 1])}
    assert rows["cmd"]["figures"]["knn_default"]["mean"] == 62.5
    assert rows["cmd"]["figures"]["knn_default"]["std"] == pytest.approx(4.5**0.5)  # n - 1
    assert rows["chance random"]["figures"]["knn_default"]["mean"] == 10
    (less,) = tables.differences(study, "small", found, [0, 1])
    assert less["name"] == "cmd"
    assert less["figures"]["knn_default"]["values"] == [1.0, 6.0]
    assert table.difference(less["figures"]["knn_default"]) == "+3.50 (+1.00, +6.00)"
    # A seed that only one of them has is in no difference, and the row says so.
    del found["esvit", 1]
    (less,) = tables.differences(study, "small", found, [0, 1])
    assert table.difference(less["figures"]["knn_default"]) == "+1.00"
    rows = tables.rows_of(study, "small", randoms, found, [0, 1])
    assert rows[-1]["title"] == "esvit (seed 0)"


def test_seconds_come_from_the_speeds_in_the_log_over_all_resumes():
    lines = [
        {"step": 1, "images_per_second": 8.0},
        {"step": 4, "images_per_second": 16.0},
        {"step": 4, "knn_top1": 50.0},
        {"step": 5, "images_per_second": 4.0},  # after a resume
    ]
    assert compare.seconds_of_steps(lines, 8) == 1 + 1.5 + 2


def test_chance_is_the_mean_over_all_orders():
    train, test = [0, 0, 0, 1, 1], [0, 0, 1]
    found = guessing(torch.tensor(train), torch.tensor(test), 2)
    precisions, firsts = [], []
    for label in test:
        for order in itertools.permutations(train):
            places = [place for place, other in enumerate(order, 1) if other == label]
            precisions.append(statistics.fmean(n / p for n, p in enumerate(places, 1)))
            firsts.append(order[0] == label)
    assert found["map"] == pytest.approx(100 * statistics.fmean(precisions))
    assert found["rank1"] == pytest.approx(100 * statistics.fmean(firsts))
    assert found["linear"] == 50
