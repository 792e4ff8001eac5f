"""MoCo v2: its loss against a plain loop, the queue, shuffled keys, and whole steps of it."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.folder import LabelledImages
from engine import build
from engine.preflight import advice
from engine.training.health import measure
from engine.training.shuffling import shuffled, shuffling_seed
from engine.training.step import Pretraining
from losses.contrastive import KeyQueue, info_nce
from models.grouped_norm import GroupedBatchNorm, group_batch_norm
from tests.processes import found_by_each
from tests.runs import (
    RESNET,
    SWIN,
    assert_same_run,
    batch_of,
    crops_for,
    log_of,
    random_crops,
    small_config,
)
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.views import Views

CONTRAST = {
    "LOSS__OBJECTIVE": "moco_v2",
    "AUG__LOCAL_CROPS_NUMBER": [],
    "HEAD__LAYERS": 2,
    "MOCO__QUEUE": 10,
    "TRAIN__MOMENTUM_TEACHER": 0.5,
}
OBJECTIVES = {
    "moco_v2": CONTRAST,
    "lcr": CONTRAST | {"LOSS__OBJECTIVE": "lcr", "LCR__CHANNELS": 4, "LCR__WEIGHT": 1.0},
}


SHARP = {"LOSS__OBJECTIVE": "dino"}


def unit(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=draw, dtype=dtype), dim=1)


def crops_of(seed: int) -> list[Tensor]:
    return random_crops(4, seed, sizes=(32, 32))


def run_of(world: World = ALONE, dtype: torch.dtype = torch.float32, **options) -> Pretraining:
    cfg = small_config(**options)
    networks = [network.to(dtype) for network in build.networks(cfg)]
    return Pretraining.build(cfg, world, *networks, 4)


# The loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_info_nce_is_the_plain_formula_with_its_gradient(dtype, tolerance):
    queries, keys, queue = unit(3, 5, 1, dtype), unit(3, 5, 2, dtype), unit(7, 5, 3, dtype)
    queries.requires_grad_()
    loss, _ = info_nce(queries, keys, queue, 0.2)
    plain = 0.0
    for query, key in zip(queries, keys, strict=True):
        own = torch.exp(query @ key / 0.2)
        plain = plain - torch.log(own / (own + sum(torch.exp(query @ k / 0.2) for k in queue))) / 3
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    (gradient,), (wanted,) = (torch.autograd.grad(value, queries) for value in (loss, plain))
    assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_keys_get_no_gradient_and_hits_are_the_nearest_ones():
    queries = torch.eye(4)[:3].requires_grad_()
    keys = torch.stack([queries[0], -queries[1], queries[2]]).detach().requires_grad_()
    loss, hits = info_nce(queries, keys, unit(6, 4, 5, torch.float32), 0.2)
    assert hits.tolist() == [True, False, True]
    loss.backward()
    assert queries.grad.abs().sum() > 0
    assert keys.grad is None


def test_info_nce_is_exact_under_autocast():
    queries, keys, queue = (unit(4, 64, seed, torch.float32) for seed in (1, 2, 3))
    plain = info_nce(queries, keys, queue, 0.05)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(queries, keys, queue, 0.05)[0], plain)


# The queue


def views_of(keys: Tensor) -> Views:
    return Views(len(keys), keys)


def test_the_queue_is_first_in_first_out_and_wraps_round():
    queue = KeyQueue(5, 2, seed=0)
    begin = queue.keys.clone()
    batches = [torch.full((2, 2), float(step)) for step in (1, 2, 3)]
    for batch in batches:
        queue.collect(views_of(batch))
        queue.update()
    # 6 keys came into 5 places: the first one and all that stood there went.
    assert queue.keys[:, 0].tolist() == [3.0, 1.0, 2.0, 2.0, 3.0]
    assert queue.place.item() == 1
    assert begin.norm(dim=1).sub(1).abs().max() < 1e-6
    assert torch.equal(KeyQueue(5, 2, seed=0).keys, begin)
    assert not torch.equal(KeyQueue(5, 2, seed=1).keys, begin)


def test_of_more_keys_than_places_the_last_ones_stay():
    queue = KeyQueue(3, 1, seed=0)
    queue.collect(views_of(torch.arange(5.0)[:, None]))
    queue.update()
    assert sorted(queue.keys[:, 0].tolist()) == [2.0, 3.0, 4.0]


def test_micro_batches_go_in_together_and_a_bad_step_puts_nothing_in():
    queue = KeyQueue(4, 1, seed=0)
    for value in (1.0, 2.0):
        queue.collect(views_of(torch.tensor([[value]])))
    before = queue.keys.clone()
    assert torch.equal(queue.keys, before)  # held until the step is done
    queue.update(torch.tensor(True))
    assert queue.keys[:2, 0].tolist() == [1.0, 2.0]
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.collect(views_of(torch.tensor([[math.nan]])))
    queue.update(torch.tensor(False))
    assert all(torch.equal(queue.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="nothing collected"):
        queue.update()


# Groups of BatchNorm, and shuffled keys


@pytest.mark.parametrize("count", [3, 6, 7])
def test_groups_have_statistics_of_their_own(count):
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    names = list(norm.state_dict())
    module = nn.Sequential(norm)
    group_batch_norm(module, 3)
    assert list(norm.state_dict()) == names
    batch = torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    groups = {3: [3], 6: [3, 3], 7: [3, 2, 2]}[count]
    wanted, mean = [], torch.zeros(4)
    for group in batch.split(groups):
        # mean and variance by hand, per channel
        centre = group.mean((0, 2, 3), keepdim=True)
        spread = (group - centre).square().mean((0, 2, 3), keepdim=True)
        scaled = (group - centre) / (spread + norm.eps).sqrt()
        wanted.append(scaled * norm.weight[:, None, None] + norm.bias[:, None, None])
        mean = 0.9 * mean + 0.1 * centre.flatten()
    assert torch.allclose(module(batch), torch.cat(wanted), atol=1e-5)
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)
    module.eval()
    assert torch.equal(module(batch), nn.BatchNorm2d.forward(norm, batch))


def test_shuffled_keys_are_those_of_another_grouping_in_the_crops_order():
    """Each key is what its crop gives inside the group that the permutation put it in."""
    run = run_of(**CONTRAST | RESNET, MOCO__BN_IMAGES=2)
    crops = crops_of(0)[0]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(7))
    assert order.tolist() != [0, 1, 2, 3]
    with torch.no_grad():
        found = shuffled(run.teacher, crops, seed=7).image_embeddings
        for pair in order.split(2):
            alone = run.teacher([crops[pair]]).image_embeddings
            assert torch.allclose(found[pair], alone, atol=1e-5)
        plain = run.teacher([crops]).image_embeddings
    assert not torch.allclose(found, plain, atol=1e-3)


def test_every_micro_batch_is_shuffled_anew():
    seeds = {shuffling_seed(0, step, micro) for step in range(3) for micro in range(2)}
    assert len(seeds) == 6


@pytest.mark.parametrize(
    ("options", "processes", "images", "words"),
    [
        (RESNET | {"MOCO__BN_IMAGES": 2}, 1, 41, None),
        (SWIN | {"MOCO__QUEUE": 40}, 1, 40, "MOCO.QUEUE 40 holds a key of each of the 40 images"),
        (SHARP | {"LOSS__TEACHER_TEMP": 0.07}, 2, 40, None),
        (SHARP | {"LOSS__TEACHER_TEMP": 0.1}, 2, 40, "temperature 0.1 is not below LOSS.STUDENT_T"),
        (
            SHARP | {"LOSS__WARMUP_TEACHER_TEMP": 0.3, "LOSS__WARMUP_TEACHER_TEMP_EPOCHS": 1},
            *(2, 40, "the teacher's temperature 0.3 is not below"),
        ),
        ({"LOSS__TEACHER_TEMP": 0.3}, 1, 41, None),
    ],
)
def test_what_is_unwise_is_warned_about(options, processes, images, words):
    cfg = small_config(**CONTRAST | {"TRAIN__BATCH_SIZE_PER_GPU": 4} | options)
    names = [str(index) for index in range(images)]
    found = list(advice.warnings(cfg, processes, LabelledImages("", names, [-1] * images, [])))
    assert [words in sentence for sentence in found] == ([True] if words else [])


def test_no_batch_norm_no_shuffling():
    assert run_of(**CONTRAST | RESNET).shuffles
    assert run_of(**CONTRAST | SWIN, HEAD__USE_BN=True).shuffles  # in the projection
    assert not run_of(**CONTRAST | SWIN).shuffles
    kept = {"INIT__WEIGHTS": "weights.pth", "INIT__BATCH_NORM": "statistics"}
    assert not run_of(**CONTRAST | RESNET | kept).shuffles
    assert run_of(**CONTRAST | RESNET | kept, HEAD__USE_BN=True).shuffles
    assert not run_of(**RESNET).shuffles  # cmd
    kinds = {type(m) for m in run_of(**RESNET).student.modules()}
    assert nn.BatchNorm2d in kinds
    assert not any(issubclass(kind, GroupedBatchNorm) for kind in kinds)


# Whole steps


def state_after(world: World, options: dict, steps: int) -> dict[str, Tensor]:
    """Weights and queue after some steps of 8 images."""
    run = run_of(world, torch.float64, **options, TRAIN__BATCH_SIZE_PER_GPU=8 // world.size)
    for step in range(steps):
        crops = [crop.double() for crop in crops_for(run, step)]
        run.train_step(iter([batch_of(crops)]))
    names = ("running_mean", "running_var", "num_batches_tracked")  # each process has its own
    parts = {"student": run.student, "teacher": run.teacher, "carried": run.carried}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if not name.endswith(names)
    }


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        ("moco_v2", SWIN | {"HEAD__USE_BN": True}),
        ("lcr", SWIN | {"HEAD__USE_BN": True}),
        # A crop of this size is one cell of a ResNet, whose map says nothing.
        pytest.param("moco_v2", RESNET, marks=pytest.mark.slow),
    ],
    ids=["moco_v2 swin", "lcr swin", "moco_v2 resnet50"],
)
def test_two_processes_of_half_the_batch_are_one_of_the_whole(objective, network):
    """Queue, shuffling and groups of BatchNorm: two processes of a group each are one of two.

    In float64, for a BatchNorm of few cells magnifies rounding.
    """
    options = OBJECTIVES[objective] | network | {"MOCO__BN_IMAGES": 4, "MODEL__DROP_PATH": 0.0}
    # SGD, for the first steps of AdamW are the sign of a gradient, which rounding may turn.
    options |= {"TRAIN__OPTIMIZER": "sgd", "TRAIN__BASE_LR": 0.5, "TRAIN__CLIP_GRAD": 0.0}
    begun, whole = (state_after(ALONE, options, steps) for steps in (0, 2))
    halves = found_by_each(2, state_after, options, 2)
    for half in halves:
        assert half.keys() == whole.keys()
        for name, value in whole.items():
            moved = (value.double() - begun[name].double()).abs().max().item()
            off = (half[name].double() - value.double()).abs().max().item()
            assert off <= 1e-3 * moved + 1e-6, name
    assert torch.equal(halves[0]["carried.keys"], halves[1]["carried.keys"])
    assert whole["carried.place"].item() == 6  # 16 keys round a queue of 10


def test_a_step_of_moco_is_query_of_the_first_crop_and_key_of_the_second():
    run = run_of(**CONTRAST | SWIN)
    crops = crops_of(3)
    with torch.no_grad():
        query = run.student([crops[0]]).image_embeddings
        key = run.teacher([crops[1]]).image_embeddings
        wanted = info_nce(query, key, run.carried.keys, 0.2)[0]
    run.student.backbone.train()
    figures, health, good = run.train_step(iter([batch_of(crops)]), measure_health=True)
    assert good
    assert figures["loss"].item() == pytest.approx(wanted.item(), rel=0.05)  # drop path apart
    assert torch.allclose(run.carried.keys[:4], key, atol=1e-6)
    assert set(health) == {"feature_rank", "contrast_accuracy"}
    assert 0 <= health["contrast_accuracy"] <= 100


def test_contrast_accuracy_is_percent_of_hits():
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0])
    teacher = Views(4, unit(4, 3, 0), image_features=torch.randn(4, 6))
    assert measure(teacher, KeyQueue(4, 3, 0), hits, 0.04)["contrast_accuracy"].item() == 75


def test_the_teachers_momentum_may_stand_still():
    run = run_of(**CONTRAST | SWIN | {"TRAIN__MOMENTUM_TEACHER_END": 0.5})
    assert set(run.schedules.momentum) == {0.5}
    assert run_of(**CONTRAST | SWIN).schedules.momentum[-1] > 0.9


def test_a_run_from_the_command_line_resumes_bit_for_bit(pretrain, tmp_path):
    options = (
        "LOSS.OBJECTIVE lcr AUG.LOCAL_CROPS_NUMBER [] MOCO.QUEUE 24 HEAD.LAYERS 2 "
        "MODEL.ARCH swin_tiny MODEL.EMBED_DIM 16 MODEL.DEPTHS [1,1] MODEL.NUM_HEADS [1,2] "
        "MODEL.PATCH_SIZE 4 MODEL.WINDOW_SIZE 4 LCR.CHANNELS 4 TRAIN.EPOCHS 4 "
        "PRINT_FREQ 1 CKPT.KEEP_EVERY 2"
    )
    pretrain(tmp_path / "whole", options)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/log.txt", tmp_path / "parts")
    shutil.copy(tmp_path / "whole/checkpoint0002.pth", tmp_path / "parts/checkpoint.pth")
    assert "at step 4" in pretrain(tmp_path / "parts", options).stdout
    assert {"L_C", "L_F", "contrast_accuracy"} <= set(log_of(tmp_path / "whole")[-1])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_single_image_has_nothing_to_be_told_from():
    with pytest.raises(InputError, match=r"TRAIN\.BATCH_SIZE_PER_GPU must be at least 2"):
        small_config(**CONTRAST, TRAIN__BATCH_SIZE_PER_GPU=1)


def test_local_crops_are_refused_with_the_recipe():
    with pytest.raises(InputError, match=r"without local ones.*--cfg experiments/moco_v2\.yaml"):
        small_config(LOSS__OBJECTIVE="moco_v2")
