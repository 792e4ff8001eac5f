"""Files of studies: what they say, their typos, and the command lines that follow from them."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml

from engine import build
from engine.studies.runs import run_of
from engine.studies.spec import ROOT, load
from tests.studies.studies import PLACES, STUDIES, TINY, study_file
from utils import cli, config
from utils.errors import InputError


@pytest.mark.parametrize(
    ("typo", "sentence"),
    [
        (("base:", "bsae:"), "there is no 'bsae'. Did you mean base?"),
        (("size: 64", "sise: 64"), "there is no 'sise'. Did you mean size?"),
        (("class_cue: 0.5", "class_cue: 7"), "data small: The synthetic set's class_cue is 7"),
        (("train: 48, ", ""), "train must be a whole number from 0, not None"),
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
    study = load(study_file(tmp_path), [("TRAIN.BASE_LR", "0.5"), ("CMD.LT", "false")])
    cfg = study.config("cmd", 7)
    assert (cfg.SEED, cfg.TRAIN.BASE_LR, cfg.CMD.LT, cfg.TRAIN.EPOCHS) == (7, 0.5, False, 3)
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
    study = load(ROOT / "experiments/studies/photographs.yaml")
    for cell in ("lcr", "moco_v2"):
        cfg, recipe = study.config(cell), config.defaults()
        config.merge_file(recipe, ROOT / f"experiments/{cell}.yaml")
        given = ("AUG.GLOBAL_CROPS_SIZE", "DATA", "CKPT", "MOCO.QUEUE", "INIT.CHECKPOINT_KEY")
        given += ("TRAIN.EPOCHS", "TRAIN.BATCH_SIZE_PER_GPU")
        assert differing_but(cfg, recipe, given) == []
        same = ("LOSS", "MODEL", "HEAD", "MOCO", "AUG", "TRAIN", "INIT.CHECKPOINT_KEY")
        same += ("INIT.HEADS_EPOCHS", "INIT.LAYER_DECAY", "INIT.BATCH_NORM")
        assert differing_but(cfg, study.config("cmd"), same) == []


def test_who_crops_is_settled_by_the_device_and_part_of_the_command(tmp_path):
    for device, crops in (("cpu", "workers"), ("cuda", "device")):
        study = load(study_file(tmp_path), [("DEVICE", device)])
        assert crops == study.config("cmd").DATA.CROPS
        run = run_of(study, "cmd", 0, PLACES, tmp_path)
        assert run.identity["options"]["DATA"]["CROPS"] == crops
        assert run.command[-2:] == ["DATA.CROPS", crops]


def test_cells_run_with_one_seed_after_the_other(tmp_path):
    study = load(study_file(tmp_path))
    assert list(study.runs(["esvit", "cmd"], [0, 1])) == [
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
        assert differing_but(typed, study.config(cell, seed), given) == []
        assert typed.DATA.PATH == "/data/train"
        assert run.folder == Path(typed.OUTPUT_DIR) == Path("/out/runs", cell, f"seed{seed}")
        kind = (typed.MODEL.ARCH, typed.LOSS.OBJECTIVE)
        if kind not in built:  # crops, architecture and objective go together
            # A model of timm is shown an image when it is built.
            with torch.device("cpu" if typed.MODEL.ARCH.startswith("timm/") else "meta"):
                build.networks(typed)
            built.add(kind)


def test_the_studies_are_those_asked_for():
    names = {path.stem for path in STUDIES}
    assert names >= {"objectives", "ablation", "photographs", "flowers_cpu"}
    ablation = load(ROOT / "experiments/studies/ablation.yaml")
    assert len(ablation.cells) <= 13
    assert {data.images.background_identity for data in ablation.data.values()} == {0.0, 1.0}
    objectives = load(ROOT / "experiments/studies/objectives.yaml")
    found = {objectives.config(cell).LOSS.OBJECTIVE for cell in objectives.cells}
    assert found == {"dino", "esvit", "cmd", "released", "moco_v2", "lcr"}
    for path in STUDIES:
        assert yaml.safe_load(path.read_text())["seeds"][:2] == [0, 1]
