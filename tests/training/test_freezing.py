"""Continuing from weights: who trains when, at what rate, and going on in each phase."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine import build
from engine.preflight.memory import kept_by_forward
from engine.training.acceleration import compile_network
from engine.training.lines import lag
from engine.training.optim import parameter_groups
from engine.training.resume import Found, find, resume
from engine.training.schedules import Schedules
from engine.training.step import Pretraining
from tests.processes import found_by_each
from tests.runs import (
    RESNET,
    SWIN,
    assert_same_run,
    assert_same_state,
    batch_of,
    cfg_of,
    checkpoint_of,
    copy_of,
    crops_for,
    load,
    pretraining,
    record_of,
    small_config,
)
from utils import checkpoint, config
from utils.distributed import ALONE, World
from utils.errors import InputError

# Heads alone in the first epoch, then half of the blocks; epochs of two steps.
RECIPE = {"INIT__HEADS_EPOCHS": 1, "INIT__FROZEN": 0.5, "INIT__LAYER_DECAY": 0.5}
LCR = {"LOSS__OBJECTIVE": "lcr", "AUG__LOCAL_CROPS_NUMBER": [], "MOCO__QUEUE": 8}
STATISTICS = {"INIT__WEIGHTS": "weights.pth", "INIT__BATCH_NORM": "statistics"}
# Half of the blocks, and the stem.
LOWER = {
    "vit": (
        "backbone.cls_token",
        "backbone.pos_embed",
        "backbone.patch_embed.",
        "backbone.blocks.0.",
    ),
    "swin": ("backbone.patch_embed.", "backbone.layers.0.", "backbone.layers.1.blocks.0."),
    "resnet": (
        "backbone.conv1.",
        "backbone.bn1.",
        "backbone.layer1.",
        "backbone.layer2.",
        "backbone.layer3.0.",
    ),
}
NETWORKS = {
    "vit": {"MODEL__DEPTHS": [2]},
    "swin": {**SWIN, "MODEL__DEPTHS": [1, 3]},
    "resnet": RESNET,
}


def steps(run: Pretraining, until: int) -> Pretraining:
    """Steps from where the run is; what a step sees depends on its number alone."""
    micros = run.cfg.TRAIN.ACCUM_STEPS
    while run.step < until:
        crops = [crops_for(run, run.step * micros + micro) for micro in range(micros)]
        run.train_step(iter(map(batch_of, crops)))
    return run


def start(options: dict, world: World = ALONE) -> Pretraining:
    options = {"TRAIN__BATCH_SIZE_PER_GPU": 4 // world.size, "MODEL__DROP_PATH": 0.5, **options}
    cfg = small_config(**options)
    return Pretraining.build(cfg, world, *build.networks(cfg), steps_per_epoch=2)


def moved(run: Pretraining, before: dict[str, Tensor], network: str = "student") -> set[str]:
    now = getattr(run, network).state_dict()
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


@pytest.mark.parametrize("arch", NETWORKS)
def test_what_is_frozen_stays_as_it_is_in_student_and_teacher_and_keeps_nothing(arch):
    """BatchNorm's statistics too. LCR reads a gradient at the features, which have none then."""
    objective = LCR if arch == "resnet" else {"LOSS__OBJECTIVE": "esvit"}
    run = start({**NETWORKS[arch], **RECIPE, **objective})
    first = copy.deepcopy(run.student.state_dict())
    frozen = {name for name in first if name.startswith(LOWER[arch])}
    steps(run, 1)
    features, _ = run.student.backbone(crops_for(run, 0)[0])
    assert not features.requires_grad
    steps(run, 2)
    heads = {name for name in first if not name.startswith("backbone.")}
    students = moved(run, first)
    assert students <= heads
    assert {"head.mlp.0.weight", "head.mlp.0.bias"} <= students
    steps(run, 4)
    upper = {name for name in first if not name.endswith("index")} - heads - frozen
    assert moved(run, first) - heads == upper
    averaged = moved(run, {n: first[n] for n in run.teacher.state_dict()}, "teacher") - heads
    assert averaged <= upper  # a change may be less than a float's last bit
    assert any(name.endswith("running_mean") for name in averaged) or arch != "resnet"
    gradients = []
    for block in run.student.backbone.all_blocks():
        block.register_forward_hook(lambda _, __, out: gradients.append(out.requires_grad))
    run.student(crops_for(run, 0)[:1])
    half = len(gradients) // 2
    assert gradients == [False] * half + [True] * half
    for network in (run.student, run.teacher):
        blocks = network.backbone.all_blocks()
        assert [block.training for block in blocks] == gradients


@pytest.mark.parametrize("objective", [{"LOSS__OBJECTIVE": "cmd"}, LCR])
def test_batch_norm_keeps_the_statistics_of_the_weights_and_trains_its_scale(objective):
    """So a network normalises an image alone as beside others, and blocks can be recomputed."""
    options = {**RESNET, **objective, **STATISTICS, "INIT__HEADS_EPOCHS": 1}
    run, recomputed = start(options), start({**options, "TRAIN__CHECKPOINTING": True})
    first = copy.deepcopy(run.student.state_dict())
    steps(run, 4)
    assert not moved(steps(recomputed, 4), run.student.state_dict())
    running = {name for name in first if "running_" in name or name.endswith("num_batches_tracked")}
    heads = {name for name in first if not name.startswith("backbone.")}
    students = moved(run, first) - heads
    assert "backbone.layer4.0.bn2.running_var" in running
    assert not students & running
    assert not moved(run, {n: first[n] for n in running - heads}, "teacher")
    assert {"backbone.bn1.weight", "backbone.layer4.0.bn2.bias"} <= students
    images = crops_for(run, 0)[0]
    for network in (run.student, run.teacher):
        alone, together = (network.backbone(part)[0] for part in (images[:1], images))
        assert (alone - together[:1]).norm() < 1e-5 * alone.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_to_the_same_bits_from_each_phase(optimizer):
    options = {**RECIPE, "TRAIN__OPTIMIZER": optimizer, "TRAIN__ACCUM_STEPS": 2}
    whole = checkpoint_of(steps(start(options), 4))
    for stop in (1, 2, 3):
        state = checkpoint_of(steps(start(options), stop))
        again = start(options)
        resume(again, record_of(), Found(Path("run"), copy.deepcopy(state), [], forced=False))
        assert again.step == stop
        assert_same_state(checkpoint_of(steps(again, 4)), whole)


def of_a_process(world: World, options: dict) -> dict[str, Tensor]:
    run = start(options, world)
    for until in (1, 3):
        steps(run, until)
        assert isinstance(run.wrapped, DistributedDataParallel) == (world.size > 1)
    return run.student.state_dict()


def test_two_processes_reach_the_weights_of_one_in_both_phases():
    options = {**RECIPE, "TRAIN__OPTIMIZER": "sgd", "TRAIN__ACCUM_STEPS": 2}
    options |= {"MODEL__DROP_PATH": 0.0, "LOSS__OBJECTIVE": "esvit", "TRAIN__CHECKPOINTING": True}
    wanted = of_a_process(ALONE, {**options, "TRAIN__CHECKPOINTING": False})
    first, second = found_by_each(2, of_a_process, options)
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_the_run_is_the_plain_one():
    options = {**NETWORKS["swin"], **RECIPE, "TRAIN__OPTIMIZER": "sgd", "MODEL__DROP_PATH": 0.0}
    torch._dynamo.reset()
    plain, run = (start({**options, "LOSS__OBJECTIVE": "dino"}) for _ in range(2))
    compile_network(run.student, "aot_eager")
    compile_network(run.teacher, "aot_eager")
    steps(run, 4)
    for name, value in steps(plain, 4).student.state_dict().items():
        torch.testing.assert_close(run.student.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_checkpointing_leaves_out_frozen_blocks_and_changes_no_bit():
    options = {**RECIPE, "MODEL__DEPTHS": [4]}
    plain, run = start(options), start({**options, "TRAIN__CHECKPOINTING": True})
    steps(plain, 4)
    assert not moved(steps(run, 4), plain.student.state_dict())
    crops = crops_for(run, 0)[:1]
    kept = {share: 0 for share in (0, 0.5, 1)}
    for share in kept:
        run = start({"INIT__FROZEN": share, "MODEL__DEPTHS": [4]})
        run.freezing.enter(0)
        kept[share] = kept_by_forward(run.student, crops)
    # Of each block alike; heads and final norm stay.
    assert kept[0.5] - kept[1] == pytest.approx((kept[0] - kept[1]) / 2, rel=0.1)


def test_the_rate_falls_from_block_to_block_and_decay_stays_with_matrices():
    student, _ = build.networks(small_config(**NETWORKS["swin"]))
    groups = parameter_groups(student, 0.5)
    of = {name: (g["rate"], g["decays"]) for g in groups for name in g["names"]}
    assert list(of.values()) == sorted(of.values(), reverse=True)
    assert of["head.mlp.0.weight"] == (1.0, True)
    assert of["backbone.norm.weight"] == (1.0, False)
    assert of["backbone.layers.1.blocks.2.mlp.fc1.weight"] == (0.5, True)
    assert of["backbone.layers.1.blocks.1.mlp.fc1.bias"] == (0.25, False)
    # What leads to the next stage goes with the block before it.
    assert of["backbone.layers.0.downsample.reduction.weight"] == (0.0625, True)
    assert of["backbone.patch_embed.proj.weight"] == (0.03125, True)
    student, _ = build.networks(small_config())
    of = {name: g["rate"] for g in parameter_groups(student, 0.5) for name in g["names"]}
    assert of["backbone.pos_embed"] == of["backbone.cls_token"] == 0.125
    assert len(parameter_groups(student)) == 2


def test_the_rate_rises_for_the_heads_and_then_for_all():
    options = {
        "TRAIN__EPOCHS": 4,
        "TRAIN__WARMUP_EPOCHS": 2,
        "TRAIN__BASE_LR": 256,
        "TRAIN__MIN_LR": 0,
    }
    cfg = small_config(**options, INIT__HEADS_EPOCHS=1)
    lr = Schedules.build(cfg, 4, 3).lr
    third = [0, 3 / 7, 6 / 7, 9 / 7, 12 / 7, 15 / 7, 18 / 7, 3]
    assert lr[:12].tolist() == pytest.approx([0, 1, 2, 3, *third])
    assert len(lr) == 16
    assert lr[12] == 3
    assert all(np.diff(lr[12:]) < 0)
    for heads, rises in ((4, 1), (3, 2)):  # the warm-up is no longer than what is left
        lr = Schedules.build(small_config(**options, INIT__HEADS_EPOCHS=heads), 4, 3).lr
        assert (len(lr), lr[-1], (lr == 0).sum()) == (16, 3, rises)


@pytest.mark.parametrize("named", [True, False])
def test_moments_go_to_their_parameters_though_the_groups_are_others(named):
    state = checkpoint_of(steps(start({"INIT__LAYER_DECAY": 0.5} if named else {}), 1))
    groups = state["optimizer"]["param_groups"]
    names = [name for group in groups for name in group["names"]]
    before = dict(zip(names, state["optimizer"]["state"].values(), strict=True))
    if not named:
        for group in groups:  # as of a version that kept no names
            del group["names"], group["rate"]
    again = start({"INIT__FROZEN": 0.5} if named else {})
    resume(again, record_of(), Found(Path("run"), copy.deepcopy(state), [], forced=True))
    assert [group["lr"] for group in again.optimizer.param_groups] == [0] * 4
    moments, parameters = again.optimizer.state, dict(again.student.named_parameters())
    frozen = LOWER["vit"] if named else ("none",)
    assert {n for n, p in parameters.items() if p in moments} == {
        name for name in before if not name.startswith(frozen)
    }
    for name, wanted in before.items():
        if not name.startswith(frozen):
            assert torch.equal(moments[parameters[name]]["exp_avg"], wanted["exp_avg"]), name
    steps(again, 2)


def test_bad_steps_of_both_phases_are_dumped_with_their_parameters_names(tmp_path):
    run = start({**RECIPE, "LOSS__OBJECTIVE": "esvit"})
    steps(run, 3)
    names = [name for name, p in run.student.named_parameters() if p.requires_grad]
    dump = json.loads(run.guard.dump(tmp_path, names).read_text())
    alone, all_of_them = (list(dump["steps"][step]["gradient_norms"]) for step in (1, 2))
    assert all_of_them == names
    assert alone == [name for name in names if not name.startswith("backbone.")]


# Options


def settled(folder: Path, **options) -> tuple[int, float, str]:
    cfg = small_config(OUTPUT_DIR=str(folder), **options)
    find(cfg, 12, "images", 3, ALONE)
    return cfg.INIT.HEADS_EPOCHS, cfg.INIT.LAYER_DECAY, cfg.INIT.BATCH_NORM


def test_the_recipe_is_on_by_itself_with_weights_and_goes_on_as_it_began(tmp_path):
    given = {"INIT__WEIGHTS": "weights.pth"}
    assert settled(tmp_path) == (-1, 0, "")
    assert settled(tmp_path, **given) == (1, 0.9, "statistics")
    assert settled(tmp_path, **given, TRAIN__EPOCHS=1) == (0, 0.9, "statistics")
    off = {"INIT__HEADS_EPOCHS": 0, "INIT__LAYER_DECAY": 1.0, "INIT__BATCH_NORM": "batch"}
    assert settled(tmp_path, **given, **off) == (0, 1, "batch")
    for own in ((2, 0.8, "batch"), (-1, 0, "")):  # the latter: of an older version
        options = dict(zip(off, own, strict=True))
        cfg = small_config(**given, **options)
        checkpoint.save_last(checkpoint_of(pretraining(cfg)) | {"images": "images"}, tmp_path)
        assert settled(tmp_path, **given) == settled(tmp_path) == own


def test_the_options_of_a_run_that_went_on_without_its_weights_named_can_be_read_again(tmp_path):
    cfg = small_config(INIT__WEIGHTS="weights.pth", INIT__BATCH_NORM="statistics")
    checkpoint.save_last(checkpoint_of(pretraining(cfg)) | {"images": "images"}, tmp_path)
    again = small_config(OUTPUT_DIR=str(tmp_path))
    find(again, 12, "images", 3, ALONE)
    assert (again.INIT.WEIGHTS, again.INIT.BATCH_NORM) == ("weights.pth", "statistics")
    config.check(again)


def test_a_teacher_that_lags_in_a_run_from_weights_is_told():
    def told(weights: str, momentum: float) -> str:
        options = {"INIT__WEIGHTS": weights, "TRAIN__MOMENTUM_TEACHER": momentum}
        return lag(pretraining(small_config(TRAIN__EPOCHS=4, **options)))

    assert "% the weights that it began with" in told("weights.pth", 0.996)
    assert told("weights.pth", 0.1) == told("", 0.996) == ""


def test_statistics_of_no_weights_are_refused():
    with pytest.raises(InputError, match=r"INIT\.BATCH_NORM statistics .*: give INIT\.W"):
        small_config(INIT__BATCH_NORM="statistics")


def test_a_run_of_a_version_without_the_option_goes_on_by_the_batch(tmp_path, told):
    state = checkpoint_of(pretraining(small_config())) | {"images": "images"}
    del state["config"]["INIT"]["BATCH_NORM"]
    checkpoint.save_last(state, tmp_path)
    assert settled(tmp_path, INIT__WEIGHTS="weights.pth") == (-1, 0, "")
    assert told.messages[0].endswith("by which it goes on: INIT.BATCH_NORM ''")
    with pytest.raises(InputError, match=r"INIT\.BATCH_NORM \(was '', now statistics\)"):
        settled(tmp_path, **STATISTICS)


def test_a_run_from_weights_says_its_recipe_and_goes_on_by_the_same_command(
    trained, pretrain, tmp_path
):
    options = "LOSS.OBJECTIVE dino TRAIN.EPOCHS 2 CKPT.KEEP_EVERY 1 INIT.FROZEN 0.5"
    words = f"{options} INIT.WEIGHTS {trained / 'checkpoint.pth'}"
    folder = tmp_path / "run"
    done = pretrain(folder, words)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("from weights: "))
    assert line == (
        "from weights: heads alone for 1 of 2 epochs; stem and 1 of 2 blocks frozen; learning rate "
        "times 0.9 a block, 0.73 at the stem; the run is short: at its end the teacher is still "
        "100 % the weights that it began with, so evaluate the student too (--checkpoint_key "
        "student)"
    )
    init = cfg_of(folder).INIT
    assert (init.HEADS_EPOCHS, init.LAYER_DECAY, init.BATCH_NORM) == (1, 0.9, "statistics")
    start, before = (load(f)["teacher"] for f in (trained, folder))
    assert torch.equal(start["backbone.pos_embed"], before["backbone.pos_embed"])
    assert not torch.equal(start["backbone.norm.weight"], before["backbone.norm.weight"])
    again = copy_of(folder, tmp_path / "again", epoch=1)
    assert "resuming from" in pretrain(again, words).stdout
    assert_same_run(folder, again)
