"""A loss or gradient that is not finite: the step leaves nothing behind, on no process."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine import build
from engine.training.loop import train
from engine.training.resume import Found, resume
from engine.training.step import Pretraining
from losses.objective import Objective
from tests.processes import found_by_each
from tests.runs import (
    RESNET,
    assert_same_bits,
    batch_of,
    log_of,
    pretraining,
    random_crops,
    record_of,
    small_config,
)
from utils import checkpoint
from utils.distributed import World
from utils.errors import InputError


def batch(seed: int, spoilt: bool = False):
    crops = random_crops(3, seed)
    if spoilt:
        crops[0][1, 0, 3, 5] = math.nan
    return batch_of(crops)


def everything(run: Pretraining) -> dict[str, Tensor]:
    """All that a step changes, copied."""
    parts = {
        "student": run.student.state_dict(),
        "teacher": run.teacher.state_dict(),
        "carried": run.carried.state_dict(),
        **{f"moments {i}": s for i, s in run.optimizer.state_dict()["state"].items()},
    }
    return {f"{part} {k}": v.clone() for part, values in parts.items() for k, v in values.items()}


@pytest.mark.parametrize(
    ("options", "bad_step"),
    [
        # At step 0 the optimizer has no moments yet.
        ({"TRAIN__ACCUM_STEPS": 2}, 0),
        ({"TRAIN__ACCUM_STEPS": 2}, 1),
        ({"HEAD__USE_BN": True, "TRAIN__ACCUM_STEPS": 2}, 1),
        ({"LOSS__OBJECTIVE": "released", "TRAIN__OPTIMIZER": "sgd"}, 0),
        ({"LOSS__OBJECTIVE": "released", "TRAIN__OPTIMIZER": "sgd"}, 1),
        ({"TRAIN__PRECISION": "bf16"}, 1),
        ({**RESNET, "LOSS__OBJECTIVE": "dino"}, 1),
    ],
    ids=["cmd-0", "cmd-1", "batchnorm", "released-sgd-0", "released-sgd-1", "bf16", "resnet"],
)
def test_a_run_goes_on_as_if_the_bad_step_had_not_been(options, bad_step):
    cfg = small_config(**options)
    run, other = pretraining(cfg), pretraining(cfg)
    micro = cfg.TRAIN.ACCUM_STEPS
    for step in range(3):
        bad = step == bad_step
        batches = [batch(micro * step + i, bad and i == micro - 1) for i in range(micro)]
        before = everything(run)
        figures, _, good = run.train_step(iter(batches))
        assert good.item() == (not bad)
        assert figures["loss"].isfinite().item() == (not bad)
        if bad:
            after = everything(run)
            # Moments that were not there before the first step are there now, all zero.
            assert all(not value.any() for name, value in after.items() if name not in before)
            assert_same_bits({name: after[name] for name in before}, before)
            other.step += 1
        else:
            other.train_step(iter(batches))
    assert run.step == other.step == 3
    assert_same_bits(everything(run), everything(other))
    assert run.is_finite()


def skipped_step(run: Pretraining) -> dict[str, Tensor]:
    """The figures of a step that must leave everything as it was."""
    before = everything(run)
    figures, _, good = run.train_step(iter([batch(0)]))
    assert not good
    after = everything(run)
    assert_same_bits({name: after[name] for name in before}, before)
    return figures


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_alone_is_enough(value):
    run = pretraining(small_config())
    weight = run.student.backbone.blocks[0].mlp.fc1.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), value))
    figures = skipped_step(run)
    assert figures["loss"].isfinite()
    assert not figures["grad_norm"].isfinite()


class WithoutLoss(Objective):
    """A loss that is not finite, with its finite gradient."""

    def __call__(self, *views) -> tuple:
        loss, *rest = super().__call__(*views)
        return loss + math.nan, *rest


def test_a_loss_alone_is_enough_where_gradients_are_finite():
    run = pretraining(small_config())
    run.objective = WithoutLoss(**vars(run.objective))
    assert skipped_step(run)["grad_norm"].isfinite()


def spoilt_on_one(world: World, spoilt_rank: int) -> dict[str, Tensor]:
    cfg = small_config(HEAD__USE_BN=True)
    run = Pretraining.build(cfg, world, *build.networks(cfg), steps_per_epoch=4)
    found = {}
    for step in range(3):
        bad = step == 1 and world.rank == spoilt_rank
        before = everything(run)
        _, _, good = run.train_step(iter([batch(2 * step + world.rank, bad)]))
        found[f"good {step}"] = good
        assert isinstance(run.wrapped, DistributedDataParallel)
        if step == 1:
            assert_same_bits(everything(run), before)
    found["skipped"] = run.guard.skipped
    return found | everything(run)


@pytest.mark.parametrize("spoilt_rank", [0, 1])
def test_two_processes_skip_together(spoilt_rank):
    first, second = found_by_each(2, spoilt_on_one, spoilt_rank)
    for found in (first, second):
        assert [found[f"good {step}"].item() for step in range(3)] == [True, False, True]
        assert found["skipped"].item() == 1
    # Running statistics are each process's own.
    same = [name for name in first if "running" not in name]
    assert_same_bits({n: first[n] for n in same}, {n: second[n] for n in same})


# In the loop


def run_with(folder: Path, bad: set[int], **options) -> Pretraining:
    """A run of two epochs of four steps, some of them bad, through the loop."""
    cfg = small_config(OUTPUT_DIR=str(folder), PRINT_FREQ=2, **options)
    folder.mkdir(exist_ok=True)
    run = pretraining(cfg)
    loader = [batch(step, step in bad) for step in range(run.total_steps)]
    train(run, record_of(), loader, folder)
    return run


def test_lines_of_the_log_are_of_the_good_steps_alone_and_count_the_others(tmp_path, told):
    run_with(tmp_path / "bad", {2, 4, 5})
    lines = {line["step"]: line for line in log_of(tmp_path / "bad")}
    assert [lines[step]["skipped_steps"] for step in (1, 2, 4, 6, 8)] == [0, 0, 1, 3, 3]
    assert lines[6]["loss"] is None  # none of its two steps was good
    assert all(lines[step]["loss"] > 0 for step in (1, 2, 4, 8))

    # Step 3's loss alone: that of the same run, asked for every step.
    cfg = small_config()
    run = pretraining(cfg)
    losses = [run.train_step(iter([batch(s, s == 2)]))[0]["loss"].item() for s in range(4)]
    assert lines[4]["loss"] == pytest.approx(losses[3], rel=1e-6)
    assert lines[2]["loss"] == pytest.approx(losses[1], rel=1e-6)
    warnings = [r.getMessage() for r in told.records if r.levelname == "WARNING"]
    assert [w.split(",")[0] for w in warnings] == [
        "steps skipped up to step 4: 1",
        "steps skipped up to step 6: 2",
    ]


def test_too_many_in_a_row_stop_the_run_with_the_last_good_state_and_a_dump(tmp_path):
    with pytest.raises(InputError) as caught:
        run_with(tmp_path, {3, 4, 5}, TRAIN__MAX_BAD_STEPS=3)
    sentence = str(caught.value)
    assert "was not finite in 3 steps in a row (TRAIN.MAX_BAD_STEPS)" in sentence
    assert f"{tmp_path} holds a checkpoint of the last finite state" in sentence
    assert str(tmp_path / "bad_steps.json") in sentence
    assert sentence.endswith("To go on: --lr with a lower learning rate, and --resume force.")

    state = checkpoint.load_own(tmp_path / checkpoint.LAST)
    run = pretraining(small_config())
    for step in range(3):
        run.train_step(iter([batch(step)]))
    assert state["step"] == 6
    wanted = run.state()
    for part in ("student", "teacher", "carried"):
        assert_same_bits(state[part], wanted[part])

    steps = json.loads((tmp_path / "bad_steps.json").read_text())["steps"]
    assert [(s["step"], s["bad"]) for s in steps] == [(i, i >= 3) for i in range(6)]
    assert steps[3]["images_by_rank"] == [[0, 1, 2]]
    assert steps[3]["terms_by_rank"][0]["loss"] == "nan"
    assert steps[2]["terms_by_rank"][0]["L_R"] > 0
    norms = steps[2]["gradient_norms"]
    assert {n for n, p in run.student.named_parameters() if p.requires_grad} == set(norms)
    assert norms["pool.score.weight"] > 0
    assert steps[5]["gradient_norms"]["backbone.patch_embed.proj.weight"] == "nan"


def test_a_run_without_one_good_step_is_not_told_to_learn_more_slowly(tmp_path):
    with pytest.raises(InputError) as caught:
        run_with(tmp_path / "fp32", {0, 1, 2, 3}, TRAIN__MAX_BAD_STEPS=3)
    assert str(caught.value).endswith(
        "norms of these steps. No step of the run was finite: look there for the term that is not."
    )
    with pytest.raises(InputError, match="To go on: --precision fp32, and --resume force"):
        run_with(tmp_path / "bf16", {0, 1}, TRAIN__MAX_BAD_STEPS=2, TRAIN__PRECISION="bf16")


def test_a_row_of_bad_steps_pushes_out_no_earlier_checkpoint(tmp_path):
    with pytest.raises(InputError):
        run_with(tmp_path, {3, 4, 5, 6, 7}, TRAIN__MAX_BAD_STEPS=5, CKPT__EVERY_MINUTES=0.0)
    # Steps 1 to 4 wrote one each (one bad step is no row yet), the stop after step 8 another.
    before = checkpoint.load_own(tmp_path / checkpoint.PREVIOUS)
    assert (before["step"], checkpoint.load_own(tmp_path / checkpoint.LAST)["step"]) == (4, 8)


def test_a_run_that_was_stopped_goes_on_with_good_steps_and_keeps_the_dump(tmp_path, told):
    with pytest.raises(InputError):
        run_with(tmp_path, {3, 4, 5}, TRAIN__MAX_BAD_STEPS=3)
    dump = (tmp_path / "bad_steps.json").read_bytes()
    path = tmp_path / checkpoint.LAST
    cfg = small_config(OUTPUT_DIR=str(tmp_path), PRINT_FREQ=2, TRAIN__MAX_BAD_STEPS=3)
    run = pretraining(cfg)
    record = record_of()
    resume(run, record, Found(path, checkpoint.load_own(path), [], forced=False))
    told.clear()
    train(run, record, [batch(6), batch(7)], tmp_path)
    assert run.step == 8
    assert "were skipped" not in told.text  # they are no news
    assert log_of(tmp_path)[-1]["skipped_steps"] == 3
    assert (tmp_path / "bad_steps.json").read_bytes() == dump


def test_a_resume_takes_up_the_unfinished_line_the_row_and_the_watch(tmp_path):
    """The state of one run in another, as resume puts it there."""
    run, record = pretraining(small_config()), record_of()
    for step in range(3):
        figures, _, good = run.train_step(iter([batch(step, step == 2)]))
        record.window.add(figures, good)
    for information in (1.0, 0.0):
        record.watch.update({"teacher_information": information, "feature_rank": 9.0}, 3)
    again, other = pretraining(small_config()), record_of()
    state = run.state() | record.state()
    resume(again, other, Found(tmp_path, state, [], forced=False))
    kept = record.watch.state_dict()
    assert other.watch.state_dict() == kept
    assert (kept["information"], kept["rank"]) == (1, 0)
    assert kept["of_information"] == {"lines": 2, "mean": 0.5, "most": 0.0, "temperature": 0.0}
    for each, kept in ((run, record), (again, other)):
        figures, _, good = each.train_step(iter([batch(3, True)]))
        kept.window.add(figures, good)
    counts = [{k: v.item() for k, v in each.guard.counts().items()} for each in (run, again)]
    assert counts[0] == counts[1] == {"skipped_steps": 2, "longest_row": 2}
    assert record.window.fetch({}) == other.window.fetch({})


def test_bad_steps_with_good_ones_between_do_not_stop(tmp_path):
    run = run_with(tmp_path, {1, 2, 4, 5, 7}, TRAIN__MAX_BAD_STEPS=3)
    assert run.step == 8
    assert checkpoint.load_own(tmp_path / checkpoint.LAST)["guard"]["skipped"] == 5


def test_weights_that_are_not_finite_replace_no_checkpoint(pretrain, tmp_path):
    options = "TRAIN.CLIP_GRAD 0 TRAIN.EPOCHS 8 PRINT_FREQ 1 TRAIN.OPTIMIZER sgd"
    pretrain(tmp_path, f"{options} TRAIN.EPOCHS 2")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    done = pretrain(tmp_path, f"{options} TRAIN.BASE_LR 1e38 RESUME force", fails=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not finite" in line
    assert "--resume force" in line
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
