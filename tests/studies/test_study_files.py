"""Files of studies: what they say, their typos, the runs and the tables that follow from them.

The runs here are real processes, of one line each; test_study.py has those of main_cmd.py.
"""

import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import compare
from datasets.benchmarks import Splits
from datasets.folder import LabelledImages
from engine import build
from engine.studies import study_results, study_table
from engine.studies.study import ROOT, load
from engine.studies.study_evaluation import guessing, random_source
from engine.studies.study_runs import IDENTITY, LOCK, Run, locked, pretrained, run_of
from tests.studies.studies import PLACES, STUDIES, TINY, study_file
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
        (("LOSS.OBJECTIVE: esvit", "base: x.yaml"), "cell esvit: base names"),
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


def test_a_cell_may_have_a_base_of_its_own_under_the_same_options(tmp_path):
    own = "lcr: {base: experiments/lcr.yaml, MOCO.QUEUE: 8}"
    text = TINY.replace("esvit: {LOSS.OBJECTIVE: esvit}", own)
    study = load(study_file(tmp_path, text.replace("baseline: esvit", "baseline: lcr")))
    cfg = study.config("lcr")
    assert (cfg.LOSS.OBJECTIVE, cfg.MODEL.ARCH) == ("lcr", "resnet50")  # its base's
    assert cfg.TRAIN.MOMENTUM_TEACHER == 0.999
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.BATCH_SIZE_PER_GPU, cfg.MOCO.QUEUE) == (0.05, 8, 8)
    assert study.config("cmd").MODEL.EMBED_DIM == 16  # the study's
    typed = cli.parse("", run_of(study, "lcr", 0, PLACES, tmp_path).command[2:]).cfg
    assert differing_but(typed, cfg, ("OUTPUT_DIR", "DATA.PATH")) == []


def test_photographs_give_the_contrastive_objectives_their_own_recipes():
    study = load(ROOT / "experiments/studies/flowers.yaml")
    for cell in ("lcr", "moco_v2"):
        cfg, recipe = study.config(cell), config.defaults()
        config.merge_file(recipe, ROOT / f"experiments/{cell}.yaml")
        given = ("AUG.GLOBAL_CROPS_SIZE", "DATA", "CKPT", "MOCO.QUEUE", "INIT.CHECKPOINT_KEY")
        given += ("TRAIN.EPOCHS", "TRAIN.BATCH_SIZE_PER_GPU")
        assert differing_but(cfg, recipe, given) == []
        same = ("LOSS", "MODEL", "HEAD", "MOCO", "AUG", "TRAIN", "INIT.CHECKPOINT_KEY")
        assert differing_but(cfg, study.config("cmd"), same) == []


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


def differing_but(a: config.Node, b: config.Node, given: tuple[str, ...]) -> list[str]:
    """Options in which two runs differ beside these options and sections."""
    return [name for name in config.differing(a, b) if not name.startswith(given)]


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
        assert differing_but(typed, study.config(cell, seed), given) == []
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


# --- random networks ------------------------------------------------------------------


def random_rows(tmp_path, cells: str) -> tuple[list, list[dict]]:
    """The random rows of a study of these cells, and their identities."""
    head, _, tail = TINY.partition("cells:\n")
    text = f"{head}cells:\n{cells}{tail[tail.index('evaluate') :]}".replace("baseline: esvit", "")
    study = load(study_file(tmp_path, text))
    rows = study_results.random_rows(study)
    return rows, [study_results.random_identity(study, row) for row in rows]


@pytest.mark.parametrize(
    "option", ["EVAL.SIZE: 32", "EVAL.RESIZE: 96", "LINEAR.C: [0.1]", "EVAL.PRECISION: bf16"]
)
def test_cells_that_are_judged_otherwise_have_a_random_row_of_their_own(option, tmp_path):
    rows, identities = random_rows(tmp_path, f"  a: {{}}\n  b: {{{option}}}\n")
    assert [row.cells for row in rows] == [("a",), ("b",)]
    assert identities[0] != identities[1]
    # Nothing of the kind: one row for both.
    rows, _ = random_rows(tmp_path, "  a: {}\n  b: {TRAIN.EPOCHS: 3, HEAD.OUT_DIM: 8}\n")
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
        rows, identities = random_rows(tmp_path, text)
        assert len(rows) == 1
        found.append(json.loads(json.dumps(identities[0])))
        assert found[-1] == identities[0]  # as it is read from its file
    for one, other in itertools.combinations(found, 2):
        assert study_results.misfit(one, other, Path("x.json"))
    # What shapes a head that no figure comes from does not.
    changed = cells[0].replace("esvit", "esvit, HEAD.POOL_HIDDEN: 8")
    assert random_rows(tmp_path, changed)[1][0] == found[0]


def test_a_random_row_has_the_branch_of_a_cell_that_has_one(tmp_path):
    text = TINY.replace("  esvit: {", "  lcr: {LOSS.OBJECTIVE: lcr, LCR.CHANNELS: 7}\n  esvit: {")
    study = load(study_file(tmp_path, text))
    source = random_source([study.config(cell) for cell in ("esvit", "cmd", "lcr")], 0)
    assert source.network.rationale.channels == 7
    assert source.network.pool is not None
    assert source.poolings() == ["default", "mean", "mil", "lcr"]
    without = random_source([study.config(cell) for cell in ("esvit", "cmd")], 0)
    assert without.poolings() == ["default", "mean", "mil"]


# --- runs -----------------------------------------------------------------------------

TRAINS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'checkpoint.pth').touch()"


def line_of(run: Run, line: str) -> Run:
    """The same run with a line of Python for its command; sys.argv[1] is its folder."""
    return replace(run, command=[sys.executable, "-c", line, str(run.folder)])


def codes(*runs: Run) -> list[int]:
    return [code for _, code, _ in pretrained(runs)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("TRAIN.EPOCHS", 4),
        ("TRAIN.BATCH_SIZE_PER_GPU", 4),
        ("TRAIN.ACCUM_STEPS", 2),
        ("DATA.MAX_BAD", 0.5),
        ("INIT.WEIGHTS", "other.pth"),
    ],
)
def test_a_folder_with_a_run_of_other_options_is_refused(option, value, tmp_path):
    study = load(study_file(tmp_path))
    run = line_of(run_of(study, "cmd", 0, PLACES, tmp_path), TRAINS)
    assert codes(run) == [0]
    changed = run_of(study.overlaid([(option, value)]), "cmd", 0, PLACES, tmp_path)
    was = config.get(study.config("cmd"), option)
    with pytest.raises(InputError) as caught:
        codes(line_of(changed, TRAINS))
    assert f"of another study: {option} (was {was}, now {value}). Use" in str(caught.value)
    assert codes(run) == [0]  # nothing was changed


def test_a_folder_with_a_run_of_other_images_or_of_nobody_knows_what_is_refused(tmp_path):
    study = load(study_file(tmp_path))
    run = line_of(run_of(study, "cmd", 0, PLACES, tmp_path), TRAINS)
    checks = f"import sys, os; sys.exit(not os.path.exists(sys.argv[1] + '/{IDENTITY}'))"
    assert codes(line_of(run, checks)) == [0]  # it stands before the first step
    others = replace(PLACES, train=LabelledImages("/data/train", ["a.png"], [0], ["a"]))
    other = run_of(study, "cmd", 0, others, tmp_path)
    other.refuse_other()  # there is no checkpoint to go on from
    assert codes(run) == [0]
    with pytest.raises(InputError, match=r"seed0 holds a run of another study: images \(was"):
        other.refuse_other()
    with pytest.raises(InputError, match=r"processes \(was 1, now 2\)"):
        run_of(study, "cmd", 0, PLACES, tmp_path, processes=2).refuse_other()
    # Judged otherwise, it is the same run.
    run_of(study.overlaid([("LINEAR.C", "3")]), "cmd", 0, PLACES, tmp_path).refuse_other()
    (run.folder / IDENTITY).unlink()
    with pytest.raises(InputError, match=f"holds a run, but no {IDENTITY} that says"):
        codes(run)
    (run.folder / "checkpoint.pth").unlink()
    assert codes(run) == [0]


def test_a_folder_in_which_another_trains_is_waited_for_and_others_go_first(tmp_path):
    study = load(study_file(tmp_path))
    runs = [line_of(run_of(study, "cmd", seed, PLACES, tmp_path), TRAINS) for seed in (0, 1)]
    runs[0].folder.mkdir(parents=True)
    other = locked(runs[0].folder / LOCK)
    ended = pretrained(runs)
    assert next(ended)[0] == runs[1]
    assert not (runs[0].folder / "checkpoint.pth").exists()
    other.close()
    assert next(ended)[0] == runs[0]


def test_a_folder_that_cannot_be_locked_is_one_sentence_and_no_endless_wait(tmp_path):
    run = line_of(run_of(load(study_file(tmp_path)), "cmd", 0, PLACES, tmp_path), TRAINS)
    (run.folder / LOCK).mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be locked \(Is a directory\): choose an --out"):
        codes(run)


def test_children_of_a_study_that_stops_get_sigterm_and_are_waited_for(tmp_path):
    study = load(study_file(tmp_path))
    waits = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.3)
    (folder / "checkpoint.pth").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
signal.pause()
"""
    ready = tmp_path / "runs/cmd/seed0/ready"
    quick = f"import os, time\nwhile not os.path.exists('{ready}'): time.sleep(0.01)"
    lines = {0: waits, 1: quick}
    runs = [line_of(run_of(study, "cmd", s, PLACES, tmp_path), line) for s, line in lines.items()]
    ended = pretrained(runs, at_once=2)
    assert next(ended)[0] == runs[1]
    assert not (ready.parent / "checkpoint.pth").exists()
    ended.close()
    assert (ready.parent / "checkpoint.pth").exists()
    locked(ready.parent / LOCK).close()


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
