"""The same seed gives the same bits; ranks and seeds see what no other sees."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from datasets.folder import ImageFolder
from datasets.loader import Batch, StepSampler, build_loader, epoch_order
from engine import build
from engine.training.determinism import explain_refusal, set_deterministic
from engine.training.step import Pretraining
from tests.conftest import TRAINED
from tests.runs import assert_same_state, load, pretraining, small_config
from utils import seeding
from utils.config import Node
from utils.distributed import ALONE
from utils.errors import InputError
from utils.seeding import derive_seed

STEPS = 5  # an epoch of 16 images in threes
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored(monkeypatch) -> Iterator[None]:
    """torch's switches and the environment as they were, whatever the test turns on."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    benchmark = torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.utils.deterministic.fill_uninitialized_memory = fill


def batches(cfg: Node, images) -> list[Batch]:
    """All that the loader brings in a run of two epochs."""
    dataset, batch = ImageFolder(images), cfg.TRAIN.BATCH_SIZE_PER_GPU
    sampler = StepSampler(len(dataset), batch, 0, 1, 1, cfg.SEED, 0, 2 * STEPS)
    feed = build.feed(cfg, dataset, ALONE)
    loader = build_loader(feed.dataset, sampler, 0, pin_memory=False)
    return [batch._replace(data=feed.crops(batch.data)) for batch in loader]


def trained_in_process(cfg: Node, images, steps: int) -> Pretraining:
    run = pretraining(cfg, STEPS)
    feed = iter(batches(cfg, images))
    for _ in range(steps):
        run.train_step(feed)
    return run


# The same bits


@pytest.mark.parametrize("objective", ["cmd", "esvit"])
def test_two_runs_of_a_seed_agree_in_every_bit_with_the_option_and_without(images, objective):
    states = []
    for deterministic in (False, True, True):
        cfg = small_config(LOSS__OBJECTIVE=objective, TRAIN__DETERMINISTIC=deterministic, SEED=4)
        set_deterministic(cfg)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        states.append(trained_in_process(cfg, images, 2 * STEPS).state())
    fresh = pretraining(small_config(LOSS__OBJECTIVE=objective, SEED=4)).student.state_dict()
    assert sum(not torch.equal(states[0]["student"][name], fresh[name]) for name in fresh) > 20
    assert_same_state(states[1], states[2])
    # On the CPU the option costs nothing and changes nothing.
    assert_same_state(states[0], states[1])


def test_the_command_takes_the_option_and_says_so(trained, pretrain, tmp_path):
    done = pretrain(tmp_path, f"{TRAINED} TRAIN.DETERMINISTIC true")
    assert "deterministic: the same command on the same machine gives the same bits" in done.stdout
    assert_same_state(load(trained), load(tmp_path))


# The option


def test_the_option_turns_on_what_torch_needs(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_deterministic(small_config())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert WORKSPACE not in os.environ
    set_deterministic(small_config(TRAIN__DETERMINISTIC=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ[WORKSPACE] == ":4096:8"


def test_the_users_workspace_is_kept_or_refused(monkeypatch):
    cfg = small_config(TRAIN__DETERMINISTIC=True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_deterministic(cfg)
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(InputError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 .* unset it"):
        set_deterministic(cfg)


def test_an_operation_that_cannot_repeat_is_named_with_the_way_out():
    pooled, places = nn.MaxPool2d(2, return_indices=True)(torch.arange(16.0).view(1, 1, 4, 4))
    set_deterministic(small_config(TRAIN__DETERMINISTIC=True))
    sentence = r"max_unpool\S+ cannot .* TRAIN\.DETERMINISTIC false"
    with pytest.raises(InputError, match=sentence), explain_refusal():
        nn.MaxUnpool2d(2)(pooled, places)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_refusal():
        torch.ones(2, 3) @ torch.ones(2, 3)


# Ranks and seeds


def test_ranks_steps_and_micro_batches_drop_paths_of_their_own():
    cfg = small_config(MODEL__DROP_PATH=0.5)
    student, _ = build.networks(cfg)
    crops = [torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))]

    def dropped(step: int, micro: int, rank: int) -> Tensor:
        torch.manual_seed(derive_seed(cfg.SEED, seeding.STEPS, step, micro, rank))
        return student(crops).image_embeddings.detach()

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    outputs = [dropped(*place) for place in places]
    assert torch.equal(outputs[0], dropped(*places[0]))
    for number, output in enumerate(outputs):
        assert all(not torch.equal(output, earlier) for earlier in outputs[:number])


def crops_of(run: list[Batch]) -> dict[int, list[Tensor]]:
    """The crops of each image in the first epoch."""
    return {
        index: [crops[place] for crops in batch.data]
        for batch in run[:STEPS]
        for place, index in enumerate(batch.indices.tolist())
    }


def test_another_seed_is_another_run(images):
    one, other = (small_config(SEED=seed) for seed in (1, 2))
    assert epoch_order(16, 1, 0).tolist() != epoch_order(16, 2, 0).tolist()
    first, second = (crops_of(batches(cfg, images)) for cfg in (one, other))
    for index in first.keys() & second.keys():
        pairs = zip(first[index], second[index], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)
    assert derive_seed(1, seeding.STEPS, 3, 0, 1) != derive_seed(2, seeding.STEPS, 3, 0, 1)
    weights = [build.networks(cfg)[0].state_dict() for cfg in (one, other)]
    # Only what starts as a constant is the same: biases, norms, the prototypes' magnitudes.
    same = {name for name in weights[0] if torch.equal(weights[0][name], weights[1][name])}
    assert all(len(weights[0][name].unique()) == 1 for name in same)
    assert len(same) < len(weights[0])
