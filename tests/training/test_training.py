"""Runs of main_cmd.py: what they write, repeat, resume, refuse, and share between processes."""

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import build
from engine.training.health import PATIENCE, CollapseWatch, effective_rank
from engine.training.lines import Lines
from engine.training.optim import TeacherEMA, build_optimizer, clip, parameter_groups, set_rates
from engine.training.record import Window
from tests.runs import (
    CLOCKED,
    batch_of,
    cfg_of,
    copy_of,
    events_of,
    load,
    log_of,
    pretraining,
    random_crops,
    record_of,
    small_config,
    tensors,
)
from utils.distributed import ALONE
from utils.logging import RunLog

TERMS = {
    "dino": {"L_I"},
    "esvit": {"L_I", "L_R"},
    "cmd": {"L_I", "L_R", "L_S", "L_T"},
    "released": {"L_I", "L_R", "T", "S"},
}
FIGURES = {
    *("step", "epoch", "loss", "grad_norm", "lr", "weight_decay", "momentum", "teacher_temp"),
    *("images_per_second", "data_wait", "teacher_entropy", "teacher_kl_uniform"),
    *("teacher_information", "centre_norm", "feature_rank", "skipped_steps"),
}


# What a run writes


def test_a_run_of_cmd_writes_every_figure(trained):
    steps = [line for line in log_of(trained) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    wanted = FIGURES | TERMS["cmd"] | {"region_centre_norm", "attention_entropy"}
    assert set(steps[0]) | CLOCKED == wanted
    assert all(math.isfinite(value) for line in steps for value in line.values())
    assert [line["epoch"] for line in steps] == [step / 2 for step in range(1, 9)]
    cfg = cfg_of(trained)
    for line in steps:
        terms = (line["L_I"] + line["L_R"]) / 2 + 0.3 * (line["L_S"] + line["L_T"])
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert line["teacher_entropy"] + line["teacher_kl_uniform"] == pytest.approx(math.log(64))
        assert line["teacher_temp"] == cfg.LOSS.TEACHER_TEMP
    peak = cfg.TRAIN.BASE_LR * 8 / 256
    for step, line in enumerate(steps):
        half = (1 + math.cos(math.pi * step / 8)) / 2
        assert line["lr"] == pytest.approx(1e-6 + (peak - 1e-6) * half, rel=1e-6)
        assert line["weight_decay"] == pytest.approx(0.4 + (0.04 - 0.4) * half, rel=1e-6)
        assert line["momentum"] == pytest.approx(1 + (0.996 - 1) * half, rel=1e-6)
    raw = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 for line in raw if "loss" in line)
    assert all(0 <= line["data_wait"] < 100 for line in raw if "loss" in line)


def test_tensorboard_has_the_logs_figures_at_the_logs_steps(trained):
    steps = events_of(trained)
    assert steps["loss"] == list(range(1, 9))
    assert steps["L_S"] == steps["lr"] == steps["feature_rank"] == steps["loss"]
    assert steps["knn_top1"] == [0, 4, 8]


def test_knn_lines_come_when_due_and_tell_the_two_hues_apart(trained):
    lines = [line for line in log_of(trained) if "knn_top1" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (4, 2), (8, 4)]
    # Gallery and queries are the same images: each finds itself, two hues are easy.
    assert all(50 < line["knn_top1"] <= 100 and line["knn_top5"] == 100 for line in lines)


def test_the_options_that_were_used_are_written(trained):
    cfg = cfg_of(trained)
    assert (cfg.TRAIN.EPOCHS, cfg.SEED, cfg.MODEL.DEPTHS) == (4, 3, [2])
    assert cfg.DATA.CROPS == "workers"  # auto, on a CPU


SWIN = "MODEL.ARCH swin_tiny MODEL.DEPTHS [1,2] MODEL.PATCH_SIZE 4 MODEL.NUM_HEADS [1,2]"
RESNET = (
    "MODEL.ARCH resnet50 MODEL.EMBED_DIM 0 MODEL.DEPTHS [] MODEL.NUM_HEADS [] MODEL.PATCH_SIZE 0"
)


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        pytest.param("esvit", SWIN, id="esvit-swin"),
        pytest.param(
            "dino", f"{RESNET} TRAIN.OPTIMIZER sgd", id="dino-resnet50", marks=pytest.mark.slow
        ),
        pytest.param("released", "", id="released-vit"),
    ],
)
def test_every_objective_and_family_trains(objective, network, pretrain, tmp_path):
    done = pretrain(
        tmp_path, f"LOSS.OBJECTIVE {objective} {network} TRAIN.EPOCHS 1 PRINT_FREQ 1 SEED 3"
    )
    assert "images per step 8 (batch 8 x processes 1 x accumulation 1)" in done.stdout
    assert "processes 1 on cpu, fp32" in done.stdout
    first, second = log_of(tmp_path)
    wanted = FIGURES | TERMS[objective]
    if objective != "dino":
        wanted.add("region_centre_norm")
    assert set(first) | CLOCKED == wanted
    assert all(math.isfinite(value) for value in [*first.values(), *second.values()])
    student, _ = build.networks(cfg_of(tmp_path))
    fresh, trained = student.state_dict(), load(tmp_path)["student"]
    assert fresh.keys() == trained.keys()
    moved = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    still = {name for name in fresh if ".last_layer." in name}
    # Biases before a softmax or a norm have no gradient and may stand still.
    missed = {name for name in set(fresh) - moved - still if not name.endswith("bias")}
    assert not missed
    assert not moved & still


def test_prototypes_stand_still_in_the_frozen_epoch_and_move_after_it(trained):
    student, _ = build.networks(cfg_of(trained))
    fresh = student.state_dict()
    epochs = [load(trained, f"checkpoint{epoch:04d}.pth")["student"] for epoch in (1, 2)]
    for head in ("head", "head_dense"):
        name = f"{head}.last_layer.weight_v"
        assert torch.equal(epochs[0][name], fresh[name])
        assert not torch.equal(epochs[1][name], fresh[name])
        magnitudes = f"{head}.last_layer.weight_g"
        assert torch.equal(epochs[1][magnitudes], fresh[magnitudes])
    assert not torch.equal(epochs[0]["head.mlp.0.weight"], fresh["head.mlp.0.weight"])


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("DATA.PATH /nowhere/at/all", "the data folder /nowhere/at/all does not exist"),
        ("DATA.PATH {empty}", "holds no images"),
        ("DATA.PATH {texts}", "holds no images"),
        ("DATA.PATH {broken}", "a batch cannot be filled"),
        ("DATA.DATASET cub", "cub was not found in {images}"),
        ("TRAIN.BATCH_SIZE_PER_GPU 17", "has 16 images but one step takes 17"),
        ("TRAIN.ACCUM_STEPS 3", "has 16 images but one step takes 24"),
        ("TRAIN.EPOCS 2", "Did you mean TRAIN.EPOCHS?"),
        ("MODEL.ARCH vit_smal", "Did you mean vit_small?"),
        ("MODEL.NUM_HEADS [3]", "3 heads do not divide the width 32"),
        ("MODEL.DEPTHS [1.5]", "MODEL.DEPTHS"),
        ("AUG.LOCAL_CROPS_SIZE [20]", "AUG.LOCAL_CROPS_SIZE 20 is not a multiple of 8"),
        ("AUG.LOCAL_CROPS_SIZE [0]", "AUG.LOCAL_CROPS_SIZE"),
        ("TRAIN.PRECISION fp16", "fp16 needs a GPU"),
        ("INIT.WEIGHTS {texts}/a.txt", "is not a checkpoint"),
        ("INIT.WEIGHTS none.pth", "there is no checkpoint at none.pth"),
        ("OUTPUT_DIR {texts}/a.txt", "--output_dir {texts}/a.txt cannot be written"),
        (
            "EVAL.KNN_EVERY 1 EVAL.KNN_TRAIN /nowhere EVAL.KNN_VAL /nowhere EVAL.SIZE 32",
            "the data folder /nowhere does not exist",
        ),
        (
            "EVAL.KNN_EVERY 1 EVAL.KNN_TRAIN {images} EVAL.KNN_VAL {images} EVAL.SIZE 30",
            "EVAL.SIZE 30",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(options, words, refuse, images, tmp_path):
    folders = {name: tmp_path / name for name in ("empty", "texts", "broken")}
    for folder in folders.values():
        folder.mkdir()
    (folders["texts"] / "a.txt").write_text("no image\n")
    for i in range(16):
        (folders["broken"] / f"{i}.png").write_text("no image\n")
    folders["images"] = images
    epochs = "" if "EPOCHS" in options else "TRAIN.EPOCHS 1"
    line = refuse(tmp_path / "run", f"{epochs} {options.format(**folders)}")
    assert words.format(**folders) in line
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    assert "/nowhere/at/all" not in options or not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(refuse, tmp_path):
    assert "no GPU was found on this machine" in refuse(tmp_path, "DEVICE cuda")


# Several processes, and accumulation

# SGD: Adam turns the rounding noise of a gradient that is zero into a step. Drop path draws
# differ between processes. Prototypes train from the start.
SHARED = """
    SEED 3 MODEL.DROP_PATH 0 TRAIN.EPOCHS 2 TRAIN.OPTIMIZER sgd TRAIN.BASE_LR 3 TRAIN.CLIP_GRAD 0.1
    TRAIN.FREEZE_LAST_LAYER 0 PRINT_FREQ 1 TRAIN.MOMENTUM_TEACHER 0.5 CKPT.KEEP_EVERY 1
"""
# How 8 images are divided: (processes, batch, accumulation).
DIVIDED = {"processes": (2, 4, 1), "accumulated": (1, 4, 2), "both": (2, 2, 2)}


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory, pretrain) -> Callable[[str], Path]:
    """The folder of a run of one process with the whole batch of 8, made once; by the objective's
    name, and options after it."""

    @functools.cache
    def run(objective: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        pretrain(folder, f"{SHARED} LOSS.OBJECTIVE {objective}")
        return folder

    return run


def assert_close_runs(first: Path, second: Path) -> None:
    """Weights and centres equal within float32's rounding, which is far below their change."""
    states = [load(folder) for folder in (first, second)]
    fresh = build.networks(cfg_of(first))[0].state_dict()
    for part in ("student", "teacher", "carried"):
        left, right = tensors(states[0][part]), tensors(states[1][part])
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=2e-5, msg=name)
    moved = [
        (states[0]["student"][name] - fresh[name]).abs().max()
        for name in fresh
        if name.endswith(("mlp.0.weight", "qkv.weight", "weight_v", "tanh.weight"))
    ]
    assert min(moved) > 1e-3
    for left, right in zip(log_of(first), log_of(second), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


# The losses of each by two processes: tests/losses/test_losses_distributed.py. L_S and L_T compare
# the images of a micro-batch, so that with accumulation they are others.
@pytest.mark.parametrize(
    ("objective", "how"),
    [
        ("cmd", "processes"),
        *(("esvit", how) for how in ("accumulated", "both")),
        *(
            pytest.param(name, how, marks=pytest.mark.slow)
            for how, names in (
                ("processes", ("dino", "esvit", "released")),
                ("accumulated", ("released",)),
            )
            for name in names
        ),
    ],
)
def test_a_divided_batch_reaches_the_weights_of_the_whole_one(
    objective, how, whole_batch, pretrain, tmp_path
):
    processes, batch, micro = DIVIDED[how]
    parts = f"TRAIN.BATCH_SIZE_PER_GPU {batch} TRAIN.ACCUM_STEPS {micro}"
    done = pretrain(tmp_path, f"{SHARED} LOSS.OBJECTIVE {objective} {parts}", processes=processes)
    division = f"(batch {batch} x processes {processes} x accumulation {micro})"
    assert f"images per step 8 {division}" in done.stdout
    assert "FutureWarning: `broadcast_buffers`" not in done.stderr  # renamed in torch 2.15
    assert_close_runs(whole_batch(objective), tmp_path)


def test_a_run_of_one_process_resumes_as_two(whole_batch, pretrain, tmp_path):
    one = whole_batch("cmd")
    two = copy_of(one, tmp_path / "two", epoch=1)
    done = pretrain(two, f"{SHARED} LOSS.OBJECTIVE cmd TRAIN.BATCH_SIZE_PER_GPU 4", processes=2)
    assert "at step 2" in done.stdout
    assert_close_runs(one, two)


def test_two_processes_say_what_is_wrong_once(pretrain, tmp_path):
    done = pretrain(tmp_path, "SEED x", fails=True, processes=2)
    assert done.returncode != 0
    said = re.findall(r"^error: .*$", done.stderr, flags=re.MULTILINE)
    assert said == ["error: command line: SEED must be a whole number, not 'x'."]


# The optimizer's side


def test_each_trained_parameter_is_in_one_group_and_only_matrices_decay():
    student, _ = build.networks(small_config(HEAD__NORM_LAST_LAYER=False, HEAD__USE_BN=True))
    student.head_dense.last_layer.weight_g.requires_grad_(False)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in parameter_groups(student))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert sorted(decayed + plain) == sorted(trained)
    assert "head.last_layer.weight_g" in decayed
    assert "head_dense.last_layer.weight_g" not in trained
    assert {"backbone.pos_embed", "backbone.cls_token", "pool.score.weight"} <= set(decayed)
    assert all(
        name.endswith("weight") or "embed" in name or "token" in name
        for name in decayed
        if not name.endswith(("weight_g", "weight_v"))
    )
    assert {"backbone.norm.weight", "head.mlp.1.weight", "pool.score.bias"} <= set(plain)
    optimizer = build_optimizer("adamw", student)
    set_rates(optimizer, 0.25, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.25, 0.5),
        (0.25, 0),
    ]


@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0])
def test_gradients_are_clipped_each_by_its_own_norm(limit):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2), (1,))]
    for parameter, size in zip(parameters, (0.1, 1.0, 10.0, 0.0), strict=True):
        parameter.grad = size * torch.randn_like(parameter)
    parameters.append(nn.Parameter(torch.zeros(2)))
    gradients = [p.grad.clone() for p in parameters[:-1]]
    norms = clip(parameters, limit)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        norm = gradient.norm()
        scale = min(1.0, limit / (norm.item() + 1e-6)) if limit else 1.0
        torch.testing.assert_close(parameter.grad, scale * gradient)
    assert parameters[-1].grad is None
    assert norms.tolist() == pytest.approx([gradient.norm().item() for gradient in gradients])


@pytest.mark.parametrize("good", [None, True, False])
def test_the_teacher_moves_by_the_ema_of_parameters_and_keeps_its_own_bn_statistics(good):
    student, teacher = build.networks(small_config(HEAD__USE_BN=True))
    ema = TeacherEMA(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student([torch.randn(2, 3, 32, 32)] * 2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    students = {k: v.clone() for k, v in student.state_dict().items()}
    ema.update(0.996, None if good is None else torch.tensor(good))
    # A magnitude that is not trained is the same in both, but for this test.
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    for name, value in teacher.state_dict().items():
        moves = name in trained and good is not False
        wanted = before[name].lerp(students[name], 1 - 0.996) if moves else before[name]
        assert torch.equal(value, wanted), name
    for name, value in student.state_dict().items():
        assert torch.equal(value, students[name]), name
    changed = "head.mlp.1.running_mean"
    assert not torch.equal(students[changed], before[changed])


def test_the_attention_has_a_rate_of_its_own():
    run = pretraining(small_config(CMD__ATTENTION_RATE=7.0))
    rates = {name: g["rate"] for g in run.optimizer.param_groups for name in g["names"]}
    assert {rates[name] for name in rates if name.startswith("pool.")} == {7.0}
    assert {rates[name] for name in rates if not name.startswith("pool.")} == {1.0}


def test_networks_that_differ_in_layout_are_not_averaged():
    student, teacher = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="layout"):
        TeacherEMA(student, teacher)


# Health


def test_the_effective_rank_of_known_rows():
    assert effective_rank(torch.ones(5, 3)).item() == 0
    line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2, 3])
    assert effective_rank(line + 7).item() == pytest.approx(1, abs=1e-3)
    # Two equal singular values after the mean is taken off; then 3 : 1.
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(cross).item() == pytest.approx(2, abs=1e-5)
    stretched = cross * torch.tensor([3.0, 1, 1])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(stretched).item() == pytest.approx(math.exp(entropy), abs=1e-5)


HEALTHY = {"teacher_information": 1.5, "feature_rank": 8.0, "attention_entropy": 0.7}


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("teacher_information", 0.001, "the teacher gives all images nearly the same target"),
        ("feature_rank", 1.1, "lie on a line"),
        ("attention_entropy", 0.001, "the MIL attention looks at one patch"),
    ],
)
def test_a_collapse_is_told_once_after_patience_and_again_after_a_recovery(figure, value, words):
    watch = CollapseWatch()
    sick = {**HEALTHY, figure: value}
    for _ in range(PATIENCE - 1):
        assert watch.update(sick, 32) == []
    (warning,) = watch.update(sick, 32)
    assert words in warning
    for _ in range(2 * PATIENCE):
        assert watch.update(sick, 32) == []
    assert watch.update(HEALTHY, 32) == []
    warnings = [watch.update(sick, 32) for _ in range(PATIENCE)]
    assert len(warnings[-1]) == 1


def told(watch: CollapseWatch, values: list[float], temperature: float = 0.04) -> list[str]:
    lines = [{**HEALTHY, "teacher_information": v, "teacher_temp": temperature} for v in values]
    return [warning for line in lines for warning in watch.update(line, 32)]


def test_targets_that_fade_are_told_long_before_they_are_equal():
    fading = [1.5 * 0.98**line for line in range(150)]
    watch = CollapseWatch()
    (warning,) = told(watch, fading)
    assert "less and less" in warning
    # Where it is told, a target still says a good part of what it did.
    early = CollapseWatch()
    told_at = next(n for n in range(150) if told(early, fading[n : n + 1]))
    assert fading[told_at] > 1.5 / 3
    # A rough figure, one that rises, and one that a warmer teacher lowers are no reason.
    for values in ([1.5, 0.5] * 100, [0.5 + 0.01 * line for line in range(150)]):
        assert told(CollapseWatch(), values) == []
    # A step that is skipped ends no watch.
    watch = CollapseWatch()
    assert told(watch, [float("nan")]) == []
    assert len(told(watch, [*fading[:20], float("nan"), *fading[20:]])) == 1
    watch = CollapseWatch()
    for epoch in range(30):
        assert told(watch, [1.5 * 0.97**epoch] * 8, 0.04 + 0.001 * epoch) == []


def test_health_and_short_lapses_are_silent():
    watch = CollapseWatch()
    for line in range(4 * PATIENCE):
        lapse = {"feature_rank": 1.0} if line % PATIENCE else {}
        assert watch.update({**HEALTHY, **lapse}, 32) == []
        assert watch.update({**HEALTHY, "teacher_information": 0.2}, 32) == []


MADE_TO_COLLAPSE = {
    # Without centring one prototype takes all; with a teacher as soft as that, none does.
    "centring off": ("LOSS.CENTER_MOMENTUM 1", 0.0),
    "sharpening off": ("LOSS.TEACHER_TEMP 1 LOSS.WARMUP_TEACHER_TEMP 1", math.log(64)),
    "neither": ("", None),
}


def warnings_of_training(done) -> list[str]:
    """All but what is said before step 1 of a batch of half the images, and of targets that fade
    on their way to nothing."""
    found = re.findall(r"^warning: (?!a step takes 8 of 16).*", done.stdout, flags=re.MULTILINE)
    return [warning for warning in found if "less and less" not in warning]


@pytest.mark.parametrize("how", MADE_TO_COLLAPSE)
def test_a_run_made_to_collapse_is_warned_about_and_the_same_with_both_on_is_not(
    how, pretrain, tmp_path
):
    options, entropy = MADE_TO_COLLAPSE[how]
    fast = "LOSS.OBJECTIVE dino TRAIN.EPOCHS 21 TRAIN.BASE_LR 0.05 TRAIN.MOMENTUM_TEACHER 0.98"
    fast += " AUG.LOCAL_CROPS_NUMBER []"
    done = pretrain(tmp_path, f"{fast} {options} PRINT_FREQ 1 SEED 2")
    warnings = warnings_of_training(done)
    if entropy is None:
        assert not warnings
        return
    *early, warning = warnings
    assert len(early) == (how == "sharpening off")
    assert all("targets are no sharper" in each for each in early)
    assert "the teacher gives all images nearly the same target" in warning
    assert "Check the teacher temperature and the centring" in warning
    assert log_of(tmp_path)[-1]["teacher_entropy"] == pytest.approx(entropy, abs=0.05)


def test_a_run_that_is_well_is_not_warned_about(pretrain, tmp_path):
    done = pretrain(tmp_path, "TRAIN.EPOCHS 15 PRINT_FREQ 1 TRAIN.BASE_LR 0.001")
    assert not warnings_of_training(done)
    assert not done.stderr
    assert len(log_of(tmp_path)) == 30


def test_an_unfinished_line_of_two_processes_goes_on_in_one_with_their_mean():
    window, good = Window(), torch.tensor(True)
    window.load_state_dict({"names": ["loss"], "sums": torch.tensor([[4.0, 1], [2, 1]])}, ALONE)
    window.add({"loss": torch.tensor(6.0)}, good)
    assert window.fetch({}) == {"loss": 4.5}  # of two steps, 3 and 6


def test_images_a_second_do_not_count_the_time_of_a_pause(tmp_path):
    run, record, log = pretraining(small_config()), record_of(), RunLog(tmp_path, 0, 0)
    crops = random_crops(3, seed=0)
    start = time.perf_counter()
    lines = Lines(run, record, log)
    figures, health, good = run.train_step(iter([batch_of(crops)]), measure_health=True)
    lines.add(figures, good)
    with lines.paused():
        time.sleep(0.3)
    lines.write(health)
    most = time.perf_counter() - start - 0.3
    lines.close()
    log.close()
    (line,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert 0 < run.images_per_step / line["images_per_second"] < most


def test_nothing_is_written_beside_the_runs_folder(trained):
    names = {path.name for path in trained.iterdir() if not path.name.startswith("checkpoint")}
    assert names == {".pretraining.lock", "config.yaml", "log.txt", "tensorboard"}
    assert os.listdir(trained.parent) == ["run"]
