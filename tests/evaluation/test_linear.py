"""The linear probe's parts against plain PyTorch, torchvision and scikit-learn, by any number of
processes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from datasets.loader import EpochSampler
from datasets.multicrop import RandomCrop
from engine.evaluation import linear
from engine.evaluation.linear import Probe, Recipe
from tests.evaluation import runs
from tests.processes import found_by_each
from utils.distributed import ALONE, World
from utils.normalisation import IMAGENET

CLASSES, WIDTH = 4, 6
SWEEP = (0.05, 2.0, 20.0)


def blobs(seed: int, n: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features [n, WIDTH] around the centres of CLASSES classes, and labels [n]."""
    return runs.blobs(seed, n, CLASSES, WIDTH, noise, spread=2)


def recipe_of(lrs: tuple[float, ...], **changes) -> Recipe:
    options = {"epochs": 5, "batch": 16, "val_freq": 1, "outputs": CLASSES, "seed": 3}
    return Recipe(lrs=lrs, **{**options, **changes})


def every(n: int, step: int) -> Tensor:
    """Bool [n], true at each `step`-th place."""
    return torch.arange(n) % step == 0


def batches_of(
    features: Tensor, labels: Tensor, recipe: Recipe, world: World = ALONE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    sampler = EpochSampler(range(len(labels)), recipe.batch, world, recipe.seed, 0, recipe.epochs)
    for keys in sampler:
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        yield features[indices], labels[indices], indices


def trained_probe(
    recipe: Recipe,
    features: Tensor,
    labels: Tensor,
    held_out: Tensor | None = None,
    world: World = ALONE,
) -> tuple[Probe, list[float]]:
    """A probe after all its epochs, and the loss of each."""
    if held_out is None:
        held_out = torch.zeros(len(labels), dtype=torch.bool)
    probe = Probe(recipe, features.shape[1], held_out, world)
    batches = batches_of(features, labels, recipe, world)
    steps = -(-len(labels) // recipe.batch)
    return probe, [probe.train_epoch(batches, steps).item() for _ in range(recipe.epochs)]


def plain_probe(
    recipe: Recipe, lr: float, features: Tensor, labels: Tensor, unseen: Tensor | None = None
) -> tuple[nn.Linear, list[float]]:
    """EsViT's recipe by PyTorch's own parts; `unseen` bool [n]: images dropped from batches."""
    layer = nn.Linear(features.shape[1], recipe.outputs)
    start = Probe(recipe, features.shape[1], torch.zeros(0, dtype=torch.bool), ALONE)
    layer.weight.data.copy_(start.weights[0].data)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr * recipe.batch / 256, momentum=0.9, weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, eta_min=0)
    batches, losses = batches_of(features, labels, recipe), []
    for _ in range(recipe.epochs):
        epoch = []
        for _ in range(-(-len(labels) // recipe.batch)):
            values, targets, indices = next(batches)
            seen = slice(None) if unseen is None else ~unseen[indices]
            loss = nn.functional.cross_entropy(layer(values[seen]), targets[seen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch.append(loss.item())
        schedule.step()
        losses.append(sum(epoch) / len(epoch))
    return layer, losses


def assert_is_head(probe: Probe, head: int, layer: nn.Linear) -> None:
    assert torch.allclose(probe.weights[head], layer.weight, rtol=1e-4, atol=1e-5)
    assert torch.allclose(probe.biases[head], layer.bias, rtol=1e-4, atol=1e-5)


def test_heads_start_normal_with_deviation_001_and_zero_bias():
    nothing = torch.zeros(0, dtype=torch.bool)
    state = torch.random.get_rng_state()
    probe = Probe(recipe_of(SWEEP, outputs=300), 200, nothing, ALONE)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = probe.weights[0].detach()
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weights.mean().item()) < 2e-4
    # Kurtosis 3: normal rather than uniform.
    assert (weights**4).mean() / weights.var() ** 2 == pytest.approx(3, abs=0.15)
    assert len(probe.weights) == len(probe.biases) == 2 * len(SWEEP)
    assert all(torch.equal(other, weights) for other in probe.weights)
    assert not any(bias.any() for bias in probe.biases)
    again = Probe(recipe_of((1.0,), outputs=300), 200, nothing, ALONE)
    other_seed = Probe(recipe_of((1.0,), outputs=300, seed=4), 200, nothing, ALONE)
    assert torch.equal(again.weights[0], weights)
    assert not torch.equal(other_seed.weights[0], weights)


@pytest.mark.parametrize("n", [64, 70])
def test_a_probe_is_a_linear_layer_with_sgd_and_a_cosine(n):
    features, labels = blobs(1, n)
    recipe = recipe_of((4.0,), epochs=7)
    probe, losses = trained_probe(recipe, features, labels)
    layer, expected = plain_probe(recipe, 4.0, features, labels)
    assert_is_head(probe, 0, layer)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] / 2
    assert len(probe.weights) == 1


def test_a_sweep_has_each_rates_probe_and_its_twin_on_the_rest_of_each_batch():
    features, labels = blobs(1, 70)
    held_out = every(70, 5)
    recipe = recipe_of(SWEEP)
    sweep, _ = trained_probe(recipe, features, labels, held_out)
    for head, lr in enumerate(SWEEP):
        assert_is_head(sweep, head, plain_probe(recipe, lr, features, labels)[0])
        twin, _ = plain_probe(recipe, lr, features, labels, held_out)
        assert_is_head(sweep, len(SWEEP) + head, twin)


def test_a_batch_of_held_out_images_alone_is_no_harm():
    features, labels = blobs(1, 32)
    sweep, _ = trained_probe(recipe_of((0.5, 1.0)), features, labels, every(32, 1))
    assert torch.equal(sweep.weights[2], sweep.weights[3])  # never trained
    assert not torch.equal(sweep.weights[0], sweep.weights[1])
    assert all(weight.isfinite().all() for weight in sweep.weights)


def test_a_diverging_rate_leaves_the_other_heads_alone():
    features, labels = blobs(1, 70)
    sweep, _ = trained_probe(recipe_of((2.0, 1e38, 0.05)), features, labels, every(70, 5))
    without, _ = trained_probe(recipe_of((2.0, 0.05)), features, labels, every(70, 5))
    assert not sweep.weights[1].isfinite().all()
    for here, there in ((0, 0), (2, 1), (3, 2), (5, 3)):
        assert torch.allclose(sweep.weights[here], without.weights[there], rtol=1e-4, atol=1e-5)
    top1, _ = sweep.accuracy(features, labels)
    assert top1[0] == without.accuracy(features, labels)[0][0]


@pytest.mark.parametrize("block", [1, 7, 8192])
def test_accuracy_counts_each_row_once(block, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK_ROWS", block)
    features, labels = blobs(2, 53, noise=4.0)
    recipe = recipe_of((0.05, 2.0), outputs=9)
    probe, _ = trained_probe(recipe, *blobs(1, 70))
    top1, top5 = probe.accuracy(features, labels)
    for head in range(recipe.heads):
        ranking = (features @ probe.weights[head].T + probe.biases[head]).argsort(
            dim=1, descending=True
        )
        hits = [row.tolist().index(label) for row, label in zip(ranking, labels, strict=True)]
        assert top1[head] == pytest.approx(100 * np.mean([place < 1 for place in hits]))
        assert top5[head] == pytest.approx(100 * np.mean([place < 5 for place in hits]))
    assert 0 < top1[0] < top5[0] <= 100


def test_with_fewer_than_five_outputs_top5_is_top_all():
    probe, _ = trained_probe(recipe_of((2.0,)), *blobs(1, 70))
    top1, top5 = probe.accuracy(*blobs(2, 53, noise=4.0))
    assert top1[0] < top5[0] == 100


# Which images are in which batch.


def test_epochs_and_seeds_of_the_sampler_have_orders_of_their_own():
    sampler = EpochSampler(range(20), 8, ALONE, 5, 0, 2)
    assert (sampler.batches_per_epoch, len(sampler)) == (3, 6)
    spans = list(sampler)[:3], list(sampler)[3:], EpochSampler(range(20), 8, ALONE, 6, 0, 1)
    orders = [[index for keys in batches for _, index in keys] for batches in spans]
    assert len({tuple(order) for order in (*orders, range(20))}) == 4


# Several processes.


def found_by(world: World) -> dict:
    """Weights and accuracies of sweeps; 65 images leave a last batch of one."""
    found = {}
    for n in (64, 65, 70):
        features, labels = blobs(1, n)
        probe, losses = trained_probe(recipe_of((2.0, 4.0)), features, labels, every(n, 5), world)
        found[n] = {
            "weights": [weight.detach() for weight in (*probe.weights, *probe.biases)],
            "losses": losses,
            "accuracy": [probe.accuracy(*blobs(2, rows, noise=4.0)) for rows in (1, 67)],
        }
    return found


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_trains_the_same_heads(size):
    alone = found_by(ALONE)
    for rank, found in enumerate(found_by_each(size, found_by)):
        for n, expected in alone.items():
            for ours, theirs in zip(found[n]["weights"], expected["weights"], strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), (rank, n)
            assert found[n]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            assert found[n]["accuracy"] == expected["accuracy"]


# The training view.


def test_the_training_view_is_torchvisions_of_imagenet_training():
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                32, scale=(0.08, 1), interpolation=transforms.InterpolationMode.BILINEAR
            ),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs(image)
        before = torch.random.get_rng_state()
        ours = RandomCrop(32)(image, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert ours.shape == (3, 32, 32)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, expected, atol=1e-5)


# Parts of the labels.


def uneven_labels() -> Tensor:
    """Classes of 1, 2, 10 and 40 images in mixed order; class 3 has none."""
    counts = torch.tensor([1, 2, 10, 0, 40])
    labels = torch.arange(5).repeat_interleave(counts)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (0.01, [1, 1, 1, 0, 1]),
        (0.1, [1, 1, 1, 0, 4]),
        (0.3, [1, 1, 3, 0, 12]),
        (0.5, [1, 1, 5, 0, 20]),
        (1.0, [1, 2, 10, 0, 40]),
    ],
)
def test_a_share_of_the_labels_is_that_of_every_class(share, counts):
    labels = uneven_labels()
    chosen = linear.stratified(labels, share, seed=1)
    assert labels[chosen].bincount(minlength=5).tolist() == counts
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_larger_shares_hold_the_smaller_ones():
    labels, before = uneven_labels(), set()
    for share in (0.01, 0.1, 0.2, 0.35, 0.5, 0.9, 1):
        chosen = set(linear.stratified(labels, share, seed=1).tolist())
        assert before <= chosen
        before = chosen


def test_the_share_of_a_class_depends_on_the_seed_and_on_no_other_class():
    labels = uneven_labels()
    chosen = linear.stratified(labels, 0.3, seed=1)
    assert torch.equal(chosen, linear.stratified(labels, 0.3, seed=1))
    assert not torch.equal(chosen, linear.stratified(labels, 0.3, seed=2))
    largest = (labels == 4).nonzero().flatten()
    alone = largest[linear.stratified(labels[largest], 0.3, seed=1)]
    assert torch.equal(alone, chosen[labels[chosen] == 4])


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (0.1, [0, 1, 1, 0, 4]),
        (0.5, [0, 1, 5, 0, 20]),
        (0.75, [0, 1, 8, 0, 30]),
        (0.96, [0, 1, 9, 0, 38]),
        (0.99, [0, 1, 9, 0, 39]),
    ],
)
def test_held_out_images_are_of_every_class_but_never_all_of_it(share, counts):
    labels = uneven_labels()
    mask = linear.hold_out(labels, share, seed=1)
    assert mask.dtype == torch.bool
    assert labels[mask].bincount(minlength=5).tolist() == counts


def test_held_out_images_are_their_seeds():
    labels = uneven_labels()
    mask = linear.hold_out(labels, 0.1, seed=1)
    assert torch.equal(mask, linear.hold_out(labels, 0.1, seed=1))
    assert not torch.equal(mask, linear.hold_out(labels, 0.1, seed=2))
    # Not the images that a share of the labels takes first.
    first = linear.stratified(labels, 0.1, seed=1)
    assert not torch.equal(mask.nonzero().flatten(), first[labels[first] != 0])


# Logistic regression.


@pytest.mark.parametrize("c", [0.001, 1.0])
def test_logistic_regression_is_scikit_learns(c):
    (train, labels), (test, _) = blobs(1, 90, noise=3), blobs(2, 40, noise=3)
    train[:, 0] *= 1000  # matters unless standardised
    test[:, 0] *= 1000
    model = runs.regression(c).fit(train.numpy(), labels.numpy())
    scores, _ = linear.logistic_scores(train, labels, test, CLASSES, c)
    assert scores.shape == (40, CLASSES)
    assert np.allclose(scores, model.decision_function(test.numpy()), rtol=1e-4, atol=1e-5)
    assert scores.argmax(1).tolist() == model.predict(test.numpy()).tolist()


def test_logistic_regression_of_two_classes_is_scikit_learns():
    (train, labels), (test, _) = blobs(1, 90, noise=3), blobs(2, 40, noise=3)
    train, labels = train[labels < 2], 3 * labels[labels < 2]
    model = runs.regression().fit(train.numpy(), labels.numpy())
    scores, _ = linear.logistic_scores(train, labels, test, 5, 1.0)
    assert set(model.predict(test.numpy())) == {0, 3}
    assert scores.argmax(1).tolist() == model.predict(test.numpy()).tolist()
    assert (scores[:, [1, 2, 4]] == -torch.inf).all()


def test_logistic_regression_never_says_a_class_without_training_images():
    (train, labels), (test, targets) = blobs(1, 90), blobs(2, 40)
    train, labels = train[labels != 1], labels[labels != 1]
    scores, _ = linear.logistic_scores(train, labels, test, 7, 1.0)
    ranking = scores.argsort(dim=1, descending=True)
    assert {0, 2, 3} == set(ranking[:, :3].flatten().tolist())
    # Four of the seven outputs are unknown: in the first five, but no hits.
    top1, top5 = linear.top_accuracy(scores, targets)
    known = (targets != 1).double().mean().item()
    assert top5 == pytest.approx(100 * known)
    assert top1 <= top5 < 100


def test_logistic_regression_of_one_class_says_that_class():
    train, test = blobs(1, 10)[0], blobs(2, 5)[0]
    scores, _ = linear.logistic_scores(train, torch.full((10,), 2), test, 4, 1.0)
    assert linear.top_accuracy(scores, torch.tensor([2, 2, 2, 0, 1])) == (60, 60)


def test_a_regression_that_has_not_converged_says_so(recwarn, monkeypatch):
    (train, labels), (test, _) = blobs(1, 90, noise=3), blobs(2, 40)
    assert linear.logistic_scores(train, labels, test, CLASSES, 1.0)[1] == []
    monkeypatch.setattr(linear, "ITERATIONS", 2)
    (remark,) = linear.logistic_scores(train, labels, test, CLASSES, 1.0)[1]
    assert remark.startswith("logistic regression, C 1: lbfgs failed to converge")
    assert not recwarn.list, "it stands beside the figure, not on stderr"


def test_top_accuracy_of_few_and_many_classes():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert linear.top_accuracy(scores, torch.tensor([0, 0])) == (50, 100)
    assert linear.top_accuracy(scores[:, :1], torch.tensor([0, 0])) == (100, 100)
    falling = -torch.arange(7.0).repeat(7, 1)
    assert linear.top_accuracy(falling, torch.arange(7)) == pytest.approx((100 / 7, 500 / 7))
