"""Files of studies: what they say, their typos, the runs and the tables that follow from them."""

import itertools
import statistics
from pathlib import Path

import pytest
import yaml

import compare
from datasets.benchmarks import Splits
from datasets.folder import LabelledImages
from engine import build, study_results, study_table
from engine.study import ROOT, load
from engine.study_evaluation import guessing
from engine.study_runs import run_of
from tests.studies import PLACES, STUDIES, TINY, study_file
from utils import cli, config
from utils.errors import InputError


@pytest.mark.parametrize(
    ("typo", "sentence"),
    [
        (("base:", "bsae:"), "there is no 'bsae'. Did you mean base?"),
        (("size: 64", "sise: 64"), "there is no 'sise'. Did you mean size?"),
        (("class_cue: 0.5", "class_cue: 7"), "data small: The synthetic set's class_cue is 7"),
        (("train: 48, ", ""), "train must be a number of images"),
        (
            ("TRAIN: {EPOCHS", "TRAIN: {EPOHCS"),
            "no option 'TRAIN.EPOHCS'. Did you mean TRAIN.EPOCHS",
        ),
        (("LOSS.OBJECTIVE: esvit", "LOSS.OBJECTVE: x"), "cell esvit: there is no option"),
        (("LOSS.OBJECTIVE: esvit", "LOSS.OBJECTIVE: esvti"), "cell esvit: LOSS.OBJECTIVE must be"),
        (("LOSS.OBJECTIVE: esvit", "data: smal"), "there is no 'smal'. Did you mean small?"),
        (("LOSS.OBJECTIVE: esvit", "SEED: 3"), "SEED is set for each run"),
        (("  esvit:", "  random:"), "not begin with 'random'"),
        (("  esvit:", "  es/vit:"), "must be of letters"),
        (("  esvit:", "  cmd:"), "cmd is there twice"),
        (("k: 5", "kk: 5"), "there is no 'kk'. Did you mean k?"),
        (("k: 5", "k: 0"), "k must be a whole number from 1"),
        (("mil]", "mill]"), "there is no 'mill'. Did you mean mil?"),
        (("baseline: esvit", "baseline: esvt"), "Did you mean esvit?"),
        (("baseline: esvit", "baseline: [cmd, esvit]"), "one baseline, not several"),
        (("seeds: [0, 1]", "seeds: [0, x]"), "seeds must be a list of whole numbers"),
        (("seeds:", "order: [[cmd, cmd]]\nseeds:"), "a cell is there twice"),
        (("smoke.yaml", "smok.yaml"), "there is no such file"),
        (("data:\n", "data: [\n"), "is not a YAML file"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_typo_is_one_sentence(typo, sentence, tmp_path):
    assert TINY.count(typo[0]) >= 1
    with pytest.raises(InputError) as caught:
        load(study_file(tmp_path, TINY.replace(*typo, 1)))
    assert sentence in str(caught.value)
    assert "tiny.yaml" in str(caught.value)


def test_options_are_laid_over_each_other_in_order(tmp_path):
    study = load(study_file(tmp_path)).overlaid([("TRAIN.BASE_LR", "0.5"), ("CMD.LT", "none")])
    cfg = study.config("cmd", 7)
    assert (cfg.SEED, cfg.TRAIN.BASE_LR, cfg.CMD.LT, cfg.TRAIN.EPOCHS) == (7, 0.5, "none", 5)
    assert cfg.MODEL.EMBED_DIM == 16  # the base's
    assert study.config("esvit").LOSS.OBJECTIVE == "esvit"


def test_groups_of_the_order_run_seed_by_seed(tmp_path):
    text = TINY.replace("seeds:", "order: [[esvit]]\nseeds:")
    study = load(study_file(tmp_path, text))
    assert list(study.runs(["cmd", "esvit"], [0, 1])) == [
        ("esvit", 0), ("esvit", 1), ("cmd", 0), ("cmd", 1),
    ]  # fmt: skip
    study = load(study_file(tmp_path))
    assert list(study.runs(["cmd", "esvit"], [0, 1])) == [
        ("cmd", 0), ("esvit", 0), ("cmd", 1), ("esvit", 1),
    ]  # fmt: skip
    assert list(study.runs(["esvit"], [1])) == [("esvit", 1)]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_written_study_gives_main_cmd_the_options_it_says(path):
    study = load(path)
    assert set(study.protocol.baselines) == set(study.data)
    built = set()

    assert sorted(study.runs(study.cells, study.seeds)) == sorted(
        itertools.product(study.cells, study.seeds)
    )
    for cell, seed in study.runs(study.cells, study.seeds):
        run = run_of(study, cell, seed, PLACES, Path("/out"))
        assert run.command[1].endswith("main_cmd.py")
        typed = cli.parse("", run.command[2:]).cfg
        given = ("OUTPUT_DIR", "DATA.PATH")
        given += ("EVAL",) if study.protocol.knn_every else ()
        assert config.differing(typed, study.config(cell, seed), given) == []
        assert typed.DATA.PATH == "/data/train"
        assert run.folder == Path(typed.OUTPUT_DIR) == Path("/out/runs", cell, f"seed{seed}")
        kind = (typed.MODEL.ARCH, typed.LOSS.OBJECTIVE)
        if kind not in built:  # crops, architecture and objective go together
            typed.HEAD.OUT_DIM = 2
            build.networks(typed)
            built.add(kind)


def test_several_processes_are_started_by_torchrun(tmp_path):
    run = run_of(load(study_file(tmp_path)), "cmd", 0, PLACES, tmp_path, processes=3)
    assert run.command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc_per_node=3" in run.command


def test_the_studies_are_those_asked_for():
    names = {path.stem for path in STUDIES}
    assert names >= {"objectives", "ablation", "flowers", "flowers_cpu"}
    ablation = load(ROOT / "experiments/studies/ablation.yaml")
    assert len(ablation.cells) <= 13
    assert {data.images.background_identity for data in ablation.data.values()} == {0.0, 1.0}
    objectives = load(ROOT / "experiments/studies/objectives.yaml")
    found = {objectives.config(cell).LOSS.OBJECTIVE for cell in objectives.cells}
    assert found == {"dino", "esvit", "cmd", "released", "moco_v2", "lcr"}
    for path in STUDIES:
        assert yaml.safe_load(path.read_text())["seeds"] == [0, 1]


# --- tables ---------------------------------------------------------------------------


def test_rows_and_paired_differences_are_those_computed_by_hand(tmp_path):
    study = load(study_file(tmp_path))
    values = {("cmd", 0): 61.0, ("cmd", 1): 64.0, ("esvit", 0): 60.0, ("esvit", 1): 58.0}
    found = {
        key: {"figures": {"knn_default": value}, "zeros": {"knn_default": 10.0}}
        for key, value in values.items()
    }
    randoms = study_results.random_rows(study)
    rows = {row.name: row for row in study_table.rows_of(study, "small", randoms, found, [0, 1])}
    assert rows["cmd"].figures["knn_default"]["mean"] == 62.5
    assert rows["cmd"].figures["knn_default"]["std"] == pytest.approx(4.5**0.5)  # n - 1
    assert rows["chance random"].figures["knn_default"]["mean"] == 10
    (less,) = study_table.differences(study, "small", found, [0, 1])
    assert less.name == "cmd"
    assert less.figures["knn_default"]["values"] == [1.0, 6.0]
    assert study_table.difference(less.figures["knn_default"]) == "+3.50 (+1.00, +6.00)"
    # A seed that only one of them has is in no difference, and the row says so.
    del found["esvit", 1]
    (less,) = study_table.differences(study, "small", found, [0, 1])
    assert study_table.difference(less.figures["knn_default"]) == "+1.00"
    rows = study_table.rows_of(study, "small", randoms, found, [0, 1])
    assert rows[-1].title == "esvit (seed 0)"


def test_seconds_come_from_the_speeds_in_the_log_over_all_resumes():
    lines = [
        {"step": 1, "images_per_second": 8.0},
        {"step": 4, "images_per_second": 16.0},
        {"step": 4, "knn_top1": 50.0},
        {"step": 5, "images_per_second": 4.0},  # after a resume
    ]
    assert compare.seconds_of_steps(lines, 8) == 1 + 1.5 + 2


def test_chance_is_the_mean_over_all_orders():
    train = LabelledImages("", list("abcde"), [0, 0, 0, 1, 1], ["round_a", "slim_b"])
    test = LabelledImages("", list("xyz"), [0, 0, 1], train.classes)
    splits = Splits("", train, test, [])
    names = ["knn_mil", "linear", "rank1", "map", "coarse_map"]
    found = guessing(splits, names, knows_coarse=True)
    precisions, firsts = [], []
    for label in test.labels:
        for order in itertools.permutations(train.labels):
            places = [place for place, other in enumerate(order, 1) if other == label]
            precisions.append(statistics.fmean(n / p for n, p in enumerate(places, 1)))
            firsts.append(order[0] == label)
    assert found["map"] == pytest.approx(100 * statistics.fmean(precisions))
    assert found["coarse_map"] == pytest.approx(found["map"])
    assert found["rank1"] == pytest.approx(100 * statistics.fmean(firsts))
    assert found["knn_mil"] == found["linear"] == 50
