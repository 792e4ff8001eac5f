"""The figures of a run's features: what they say, beside the start's, and what they leave alone."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.feed import step_sampler
from datasets.folder import ImageFolder
from engine import build
from engine.evaluation.source import load_source
from engine.training import resume
from engine.training.loop import train
from engine.training.saving import Checkpoints
from engine.training.standing import Measured, Standing
from engine.training.step import Pretraining
from engine.training.validation import Validation, of_copies
from tests.processes import found_by_each
from tests.runs import (
    RESNET,
    assert_same_state,
    load,
    log_of,
    pretraining,
    record_of,
    small_config,
)
from utils import checkpoint
from utils.checkpoint import BEST, LAST
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.logging import RunLog

OPTIONS = {
    "TRAIN__BATCH_SIZE_PER_GPU": 8,
    "TRAIN__EPOCHS": 2,
    "EVAL__KNN_K": 3,
    "DATA__WORKERS": 0,
    "DATA__CROPS": "workers",
    "PRINT_FREQ": 1,
}


def trained(folder: Path, images: Path, **options) -> Pretraining:
    """A run of 2 steps an epoch over 16 images, through the loop; it goes on where one stands."""
    cfg = small_config(OUTPUT_DIR=str(folder), **OPTIONS | options)
    folder.mkdir(exist_ok=True)
    data, record = ImageFolder(images), record_of(16)
    run = pretraining(cfg, steps_per_epoch=2)
    if (folder / LAST).exists():
        path, state, refused = checkpoint.newest_intact(folder)
        assert (path.name, refused) == (LAST, [])
        resume.resume(run, record, resume.Found(path, state, refused, forced=False))
    steps = (run.step, run.total_steps)
    sampler = step_sampler(data, 8, 1, ALONE, cfg.SEED, *steps)
    batches = build.feed(cfg, data, ALONE).batches(sampler, 0)
    train(run, record, batches, folder, Validation.of(cfg, data))
    return run


def measured(*scores: float, by: str = "images") -> Measured:
    values = torch.tensor(scores, dtype=torch.float32)
    return Measured(by, {"agreement": 100 * values.mean().item()}, values)


# What they say


def plain_agreement(features: Tensor, k: int) -> list[float]:
    """Share of the k nearest other images that the copies of each image have in common."""
    count = len(features)

    def near(of: int, copy: int) -> set[int]:
        others = [i for i in range(count) if i != of]
        cosine = {
            i: torch.cosine_similarity(features[of, copy], features[i, 1 - copy], dim=0).item()
            for i in others
        }
        return set(sorted(others, key=lambda i: -cosine[i])[:k])

    return [len(near(i, 0) & near(i, 1)) / k for i in range(count)]


def test_figures_of_copies_are_those_of_plain_loops():
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 6, generator=draw)
    features = images + 0.7 * torch.randn(12, 2, 6, generator=draw)
    figures, each = of_copies(features, 3)
    assert each.tolist() == pytest.approx(plain_agreement(features, 3))
    assert figures["agreement"] == pytest.approx(100 * each.mean().item())
    assert 0 < figures["agreement"] < 100
    unit = features / features.norm(dim=-1, keepdim=True)
    apart = [(unit[i, 0] - unit[i, 1]).square().sum().item() for i in range(12)]
    assert figures["alignment"] == pytest.approx(sum(apart) / 12, rel=1e-5)
    logs = []
    for copy in unit.unbind(1):
        pairs = [
            math.exp(-2 * (copy[i] - copy[j]).square().sum().item())
            for i in range(12)
            for j in range(i)
        ]
        logs.append(math.log(sum(pairs) / len(pairs)))
    assert figures["uniformity"] == pytest.approx(sum(logs) / 2, rel=1e-4)


def test_copies_that_are_alike_agree_and_features_that_are_alike_do_not():
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 8, generator=draw).expand(-1, 2, -1)
    assert of_copies(images, 4)[0]["agreement"] == 100
    rounding = 1e-7 * torch.randn(30, 2, 8, generator=draw)
    dead, _ = of_copies(torch.ones(30, 2, 8) + rounding, 4)
    assert (dead["agreement"], dead["rank"]) == (0, 0)
    assert of_copies(torch.randn(30, 2, 8, generator=draw), 4)[0]["agreement"] < 50
    with pytest.raises(InputError, match="the network has diverged"):
        of_copies(images / torch.zeros(1), 4)


def test_a_fall_is_counted_in_standard_errors_of_the_difference_image_by_image():
    start = measured(1, 1, 1, 1, 0, 0, 1, 1)
    now = measured(0, 1, 0, 1, 0, 1, 1, 1)
    error = math.sqrt(((3 / 8) - (1 / 8) ** 2) / 8)
    assert now.behind(start) == pytest.approx((1 / 8) / error)
    assert start.behind(now) == start.behind(start) == 0
    # One image could not be read this time.
    apart = math.sqrt(0.75 * 0.25 / 8 + (4 / 7) * (3 / 7) / 7)
    assert measured(0, 1, 0, 1, 0, 1, 1).behind(start) == pytest.approx((0.75 - 4 / 7) / apart)


def test_each_fall_below_the_start_is_told_once_and_what_to_do():
    standing, told = Standing(), []
    for step, share in enumerate((0.5, 0.49, 0.2, 0.1, 0.5, 0.2)):
        new = measured(*torch.full((64,), share).add(torch.arange(64) % 2 * 0.1).tolist())
        told.append(standing.update(new, step, step, from_weights=True))
    assert [len(lines) for lines in told] == [0, 1, 0, 0, 0, 1]
    assert "agreement of neighbours 54.00 % is below the start's 55.00" in told[1][0]
    for option in ("--lr", "INIT.HEADS_EPOCHS", "INIT.FROZEN", "INIT.LAYER_DECAY", "--keep best"):
        assert option in told[1][0]
    scratch = Standing()
    scratch.update(measured(1, 1, 0), 0, 0, from_weights=False)
    (line,) = scratch.update(measured(0, 0, 0), 1, 1, from_weights=False)
    assert "random network" in line
    assert "INIT." not in line


def test_figures_of_other_images_are_not_compared():
    standing = Standing()
    standing.update(measured(1, 1), 0, 0, True)
    (line,) = standing.update(measured(0, 1, by="others"), 1, 2, True)
    assert "measured by images, and are by others" in line
    assert standing.start is None
    assert standing.best == {"figure": "agreement", "value": 50, "epoch": 1}


# In a run


def test_figures_change_no_bit_of_the_training_and_stand_beside_the_starts(images, tmp_path, told):
    trained(tmp_path / "plain", images)
    assert "features" not in told.text
    trained(tmp_path / "measured", images, CKPT__KEEP="best")
    states = [load(tmp_path / name) for name in ("plain", "measured")]
    assert_same_state(*states)
    logs = [log_of(tmp_path / name) for name in ("plain", "measured")]
    figures = [line for line in logs[1] if "agreement" in line]
    assert [line for line in logs[1] if "loss" in line] == logs[0]
    assert [(line["step"], line["epoch"]) for line in figures] == [(0, 0), (2, 1), (4, 2)]
    assert set(figures[0]) == {"step", "epoch", "agreement", "rank", "alignment", "uniformity"}
    start = f"{figures[0]['alignment']:.4f}"
    assert f"alignment {figures[2]['alignment']:.4f} (start {start})" in told.text
    assert states[1]["standing"]["start"]["figures"]["alignment"] == pytest.approx(
        figures[0]["alignment"], rel=1e-6
    )


def test_a_run_that_goes_on_knows_its_start_and_its_best(images, tmp_path, told):
    options = {"EVAL__KNN_TRAIN": str(images), "EVAL__KNN_VAL": str(images), "EVAL__SIZE": 32}
    options |= {"EVAL__KNN_EVERY": 1, "CKPT__KEEP": "best", "TRAIN__BASE_LR": 0.0}
    trained(tmp_path, images, **options, TRAIN__EPOCHS=1)
    told.clear()
    trained(tmp_path, images, **options)
    start = log_of(tmp_path)[0]
    assert (start["epoch"], "knn_top5" in start) == (0, True)
    assert f"epoch 2: features of the teacher: k-NN top-1 {start['knn_top1']:.2f} % (start " in (
        told.text
    )
    # A learning rate of 0 changes nothing: nothing is better than the start.
    assert "no checkpoint is better than the weights that the run started from" in told.text
    best = load(tmp_path, BEST)
    assert (best["step"], best["standing"]["best"]["epoch"], load(tmp_path)["step"]) == (0, 0, 4)
    assert checkpoint.newest_intact(tmp_path)[1]["step"] == 4
    assert load_source(tmp_path / BEST).weights.epoch == 0


def test_the_best_checkpoint_is_that_of_the_best_figure(tmp_path):
    run, record = pretraining(small_config(CKPT__KEEP="best", CKPT__KEEP_EVERY=2)), record_of()
    log = RunLog(tmp_path, 0, 0)
    checkpoints = Checkpoints(run, record, tmp_path, log)
    for epoch, value in enumerate((0.5, 0.4, 0.6, 0.6, 0.3)):
        run.step = 4 * epoch
        record.standing.update(measured(value, value), epoch, run.step, True)
        if checkpoints.kept_as():
            checkpoints.save()
    checkpoints.close()
    log.close()
    steps = {path.name: load(tmp_path, path.name)["step"] for path in tmp_path.glob("*.pth")}
    kept = {"checkpoint0002.pth": 8, "checkpoint0004.pth": 16}
    assert steps == {LAST: 16, "checkpoint_previous.pth": 8, BEST: 8, **kept}
    assert load(tmp_path, BEST)["standing"]["best"]["value"] == pytest.approx(60)
    assert "best features were those after epoch 2" in record.standing.verdict(True)


def test_a_measurement_leaves_statistics_modes_and_random_numbers_alone(images):
    run = pretraining(small_config(**OPTIONS | RESNET, EVAL__KNN_EVERY=1))
    frozen = run.teacher.backbone.layer1.eval()
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    modes, drawn = [m.training for m in run.teacher.modules()], torch.get_rng_state()
    Validation.of(run.cfg, ImageFolder(images)).measure(run)
    assert all(torch.equal(before[name], value) for name, value in run.teacher.state_dict().items())
    assert [m.training for m in run.teacher.modules()] == modes
    assert not frozen.training
    assert run.teacher.training
    assert torch.equal(torch.get_rng_state(), drawn)


def measured_by(world: World, images: Path) -> Measured:
    run = pretraining(small_config(**OPTIONS, EVAL__KNN_EVERY=1))
    run.world = world
    # Rank 0's are those of a checkpoint, and count.
    run.teacher.backbone.register_buffer("own", torch.full((1,), float(world.rank)))
    found = Validation.of(run.cfg, ImageFolder(images)).measure(run)
    assert run.teacher.backbone.own.item() == world.rank
    return found


def test_processes_share_the_images_and_find_the_same(images, tmp_path):
    for place in range(3):
        (tmp_path / str(place)).symlink_to(images)
    alone = measured_by(ALONE, tmp_path)
    assert len(alone.scores) == 48
    for found in found_by_each(2, measured_by, tmp_path):
        assert found.figures == alone.figures
        assert torch.equal(found.scores, alone.scores)


def test_what_is_measured_by_default(images):
    def every(**options) -> object:
        cfg = small_config(**options)
        validation = Validation.of(cfg, ImageFolder(images))
        if validation is None:
            return None
        run = pretraining(cfg)
        due = []
        while run.step < run.total_steps:
            run.step += 1
            due += [run.step] if validation.due(run) else []
        return due

    assert every() is None
    assert every(INIT__WEIGHTS="file.pth", EVAL__KNN_EVERY=0) is None
    assert every(INIT__WEIGHTS="file.pth", TRAIN__EPOCHS=5) == [20]
    assert every(EVAL__KNN_EVERY=2, TRAIN__EPOCHS=5) == [8, 16, 20]
    assert every(CKPT__KEEP="best") == [4, 8]
