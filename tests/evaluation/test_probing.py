"""The linear probe as a protocol: eval_linear.py on class hues and on features made up here."""

import itertools
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.folder import ImageFolder
from datasets.loader import EpochSampler
from datasets.multicrop import RandomCrop, sample_seed
from engine.evaluation import feature_cache, linear
from engine.evaluation.feature_cache import Features
from models.pretrained import load_backbone
from tests.datasets import benchmark_trees as trees
from tests.datasets.photographs import edit
from tests.evaluation.runs import contents, refusal, regression, results, works
from tests.processes import PATIENCE, run_group, start_python
from tests.runs import copy_of
from utils.distributed import ALONE

BASE = "--seed 3 --batch_size_per_gpu 16 --n_last_blocks 2"
SGD = f"{BASE} --epochs 6 --lr 2"
CACHED = f"{SGD} --features cached"
AS_LAUNCHED = f"{SGD} --val_freq 2 --num_labels 1000 DATA.MAX_BAD 0.09"
# Of two runs of the same probe only this differs.
CLOCK = ("seconds",)


@dataclass
class Probed:
    """What eval_linear.py left behind; result: of its first share."""

    out: str
    folder: Path

    @property
    def written(self) -> dict:
        return results(self.folder, "linear")

    @property
    def result(self) -> dict:
        return without_clock(self.written["results"][0])

    @property
    def state(self) -> dict:
        return torch.load(self.folder / "linear.pth")

    @property
    def log(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / "linear_log.txt").read_text().splitlines()
        ]


def without_clock(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if name not in CLOCK}


def run(folder: Path, *words) -> Probed:
    return Probed(works("linear", *words, "--output_dir", folder), folder)


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory) -> Path:
    """The run's, with an uneven attention: of a few steps it is nearly the mean."""
    path, draw = trained / "checkpoint.pth", torch.Generator().manual_seed(0)
    state = torch.load(path)
    weight = state["teacher"]["pool.score.weight"]
    weight += 3 * torch.randn(weight.shape, generator=draw)
    path = tmp_path_factory.mktemp("uneven") / path.name
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes in their hues: 8 training and 4 test images each."""
    return trees.folders(tmp_path_factory.mktemp("data"), train=8, test=4)


@pytest.fixture(scope="module")
def given(checkpoint, data) -> str:
    """The weights, and the class hues."""
    return f"--pretrained_weights {checkpoint} --data_path {data}"


@pytest.fixture(scope="module")
def probe(given, tmp_path_factory) -> Callable[..., Probed]:
    """probe("options", folder): eval_linear.py on the class hues."""

    def start(options: str, folder: Path | None = None) -> Probed:
        return run(folder or tmp_path_factory.mktemp("probe"), given, options)

    return start


@pytest.fixture(scope="module")
def augmented(probe) -> Probed:
    return probe(f"{SGD} --val_freq 2")


@pytest.fixture(scope="module")
def cached(probe) -> Probed:
    return probe(CACHED)


# What a probe gives.


def test_the_classes_are_learnt(augmented, cached):
    for done, kind in ((augmented, "augmented"), (cached, "cached")):
        result = done.result
        assert result["top1"] >= 90
        assert result["top5"] == 100
        assert (result["train_images"], result["test_images"], result["outputs"]) == (24, 12, 3)
        assert (result["classifier"], result["features"]) == ("sgd", kind)
        assert (result["label_share"], result["seed"], result["sweep"]) == (1, 3, [])
        assert (result["epochs"], result["batch"]) == (6, 16)
        assert done.written["weights"]["key"] == "teacher"


def test_augmented_features_go_through_the_network_anew_in_every_epoch(augmented, checkpoint, data):
    """The whole probe by plain PyTorch."""
    backbone = load_backbone(checkpoint)
    images, crop = ImageFolder(data / "train"), RandomCrop(32)
    state = augmented.state
    recipe = linear.Recipe(lrs=(2.0,), epochs=6, batch=16, val_freq=2, outputs=3, seed=3)
    start = linear.Probe(recipe, 64, torch.zeros(24, dtype=torch.bool), ALONE)
    layer = nn.Linear(64, 3)
    layer.weight.data.copy_(start.weights[0].data)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), 2 * 16 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for place, keys in enumerate(EpochSampler(range(24), 16, ALONE, 3, 0, 6)):
        views = [crop(images.load(i), sample_seed(3, epoch, i)) for epoch, i in keys]
        with torch.no_grad():
            features = torch.cat(backbone.last_blocks(torch.stack(views), 2), dim=1)
        targets = torch.tensor([images.labels[i] for _, i in keys])
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features), targets).backward()
        optimizer.step()
        if place % 2:
            schedule.step()
    assert torch.allclose(state["weights"][0], layer.weight, rtol=1e-3, atol=1e-4)
    assert torch.allclose(state["biases"][0], layer.bias, rtol=1e-3, atol=1e-4)


def test_the_figures_are_those_of_the_log(probe):
    done = probe(f"{SGD} --epochs 7 --val_freq 3 --lr 0.3")
    assert [line["epoch"] for line in done.log] == [3, 6, 7]
    result = done.result
    assert result["top1"] == pytest.approx(done.log[-1]["top1"][0], abs=1e-4)
    assert result["top5"] == pytest.approx(done.log[-1]["top5"][0], abs=1e-4)
    best = max(done.log, key=lambda line: line["top1"])
    assert result["best_top1"] == pytest.approx(best["top1"][0], abs=1e-4)
    assert result["best_epoch"] == best["epoch"]
    losses = [line["loss"] for line in done.log]
    assert losses == sorted(losses, reverse=True)


def test_a_share_of_the_labels_has_a_probe_and_a_folder_of_its_own(probe, augmented):
    done = probe(f"{SGD} --val_freq 2 --label_shares 0.5 1")
    half, whole = map(without_clock, done.written["results"])
    assert whole == augmented.result
    assert (half["label_share"], half["train_images"]) == (0.5, 12)
    own = torch.load(done.folder / "labels_50_percent" / "linear.pth")
    assert own["history"][-1]["top1"] == [half["top1"]]
    assert not torch.equal(own["weights"][0], done.state["weights"][0])


def test_more_outputs_than_classes_work_and_fewer_are_refused(probe, given):
    done = probe(f"{CACHED} --num_labels 1000")
    assert done.state["weights"][0].shape == (1000, 64)
    assert done.result["outputs"] == 1000
    assert done.result["top1"] >= 90
    assert "--num_labels 2" in refusal("linear", given, CACHED, "--num_labels 2")


def test_blocks_and_pooling_decide_the_features_and_their_width(probe, cached):
    widths = {
        "--avgpool_patchtokens true": 96,
        "--n_last_blocks 1": 32,
        "--pooling mean": 32,
        "--pooling mil --avgpool_patchtokens true": 32,
    }
    done = [probe(f"{CACHED} --epochs 1 {more}") for more in widths]
    assert [len(each.result["remarks"]) for each in done] == [0, 0, 1, 2]
    assert "--n_last_blocks" in done[2].result["remarks"][0]
    weights = [each.state["weights"][0] for each in done]
    assert [tuple(weight.shape) for weight in weights] == [(3, width) for width in widths.values()]
    assert cached.state["weights"][0].shape == (3, 64)
    for one, other in itertools.combinations(weights[1:], 2):
        assert not torch.allclose(one, other, atol=1e-5)


def test_one_class_and_one_test_image(probe, tmp_path):
    trees.save_image(tmp_path / "train" / "auk" / "0.jpg", 0, 0)
    trees.save_image(tmp_path / "val" / "auk" / "0.jpg", 0, 1)
    for kind in ("", "--features cached", "--classifier logistic"):
        done = probe(f"{SGD} --data_path {tmp_path} {kind}")
        assert (done.result["top1"], done.result["top5"]) == (100, 100)
        assert (done.result["train_images"], done.result["test_images"]) == (1, 1)


# Going on.


def test_a_killed_probe_goes_on_to_the_same_figures(probe, given, tmp_path, environment):
    options = f"{SGD} --epochs 24 --sweep 0.5 2"
    whole, folder = probe(options), tmp_path / "killed"
    words = f"eval_linear.py {given} {options} --output_dir {folder}".split()
    process = start_python(*words, environment=environment)
    log, deadline = folder / "linear_log.txt", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was not killed midway"
    stopped = torch.load(folder / "linear.pth")["epoch"]
    assert 3 <= stopped < 24
    again = probe(options, folder)
    assert f"at epoch {stopped}" in again.out
    remark = f"went on from epoch {stopped} in a second command"
    assert again.out.count(remark) == 1
    assert again.result == whole.result | {"remarks": [remark]}
    assert probe(options, folder).result["remarks"] == [remark], "the probe remembers it"
    assert again.log == whole.log
    for name in ("weights", "biases"):
        for one, other in zip(again.state[name], whole.state[name], strict=True):
            assert torch.equal(one, other)


def test_a_finished_probe_tells_its_figures_again_without_training(augmented, probe, tmp_path):
    folder = copy_of(augmented.folder, tmp_path / "copy")
    before = (folder / "linear.pth").stat().st_mtime_ns
    again = probe(f"{SGD} --val_freq 2", folder)
    assert "epoch 6/6" not in again.out
    assert again.out.splitlines()[-2] == augmented.out.splitlines()[-2]
    assert again.result == augmented.result
    assert again.log == augmented.log
    assert (folder / "linear.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--lr 1", "lrs"),
        ("--sweep 1 2", "lrs"),
        ("--epochs 7", "epochs"),
        ("--seed 4", "seed"),
        ("--batch_size_per_gpu 8", "batch"),
        ("--val_freq 2", "val_freq"),
        ("--num_labels 4", "outputs"),
        ("--n_last_blocks 1", "blocks"),
        ("--avgpool_patchtokens true", "blocks"),
        ("--n_last_blocks 1 --avgpool_patchtokens true", ""),
        ("--checkpoint_key student", "checkpoint_key"),
        ("--pooling mean", "pooling"),
        ("--size 40", "size"),
        ("--features augmented", "training features"),
        ("--precision bf16", "precision"),
    ],
)
def test_a_probe_of_other_settings_is_refused_and_kept(cached, given, tmp_path, options, named):
    folder = copy_of(cached.folder, tmp_path / "copy")
    line = refusal("linear", given, CACHED, options, "--output_dir", folder)
    assert named in line
    assert "--output_dir" in line
    assert contents(folder) == contents(cached.folder)


def test_a_probe_of_other_images_is_refused(cached, augmented, given, data, tmp_path):
    for split in ("train", "val"):
        changed = copy_of(data, tmp_path / split)
        edit(min((changed / split / "auk").iterdir()))
        for done, options in ((cached, CACHED), (augmented, f"{SGD} --val_freq 2")):
            folder = copy_of(done.folder, tmp_path / f"{split}{len(options)}")
            words = f"{options} --data_path {changed} --output_dir {folder}"
            assert "images" in refusal("linear", given, words)


def test_a_sweep_held_out_differently_is_refused(probe, given, tmp_path):
    options = f"{CACHED} --sweep 0.5 2"
    probe(options, tmp_path)
    before = contents(tmp_path)
    words = f"{options} LINEAR.HOLD_OUT 0.5 --output_dir {tmp_path}"
    assert "held out" in refusal("linear", given, words)
    assert contents(tmp_path) == before


def test_a_file_that_is_no_probe_is_refused_and_kept(given, checkpoint, tmp_path):
    for name, source in (("run", checkpoint), ("text", Path(__file__))):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(source, folder / "linear.pth")
        assert "linear.pth" in refusal("linear", given, CACHED, "--output_dir", folder)
        assert (folder / "linear.pth").read_bytes() == source.read_bytes()


def test_the_log_of_a_pretraining_run_in_the_same_folder_survives(probe, trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.pth", "log.txt"):
        shutil.copy(trained / name, folder / name)
    probe(CACHED, folder)
    assert (folder / "log.txt").read_bytes() == (trained / "log.txt").read_bytes()


# Images that cannot be read.


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory) -> Path:
    """The class hues with two training images of the second class that are none."""
    folder = copy_of(data, tmp_path_factory.mktemp("damaged") / "data")
    for name in ("1.jpg", "6.jpg"):
        (folder / "train" / "owl" / name).write_text("no image")
    return folder


@pytest.mark.parametrize("kind", ["augmented", "cached"])
def test_unreadable_training_images_are_left_out_and_listed(probe, damaged, kind, tmp_path):
    options = f"{SGD} --data_path {damaged} --features {kind} DATA.MAX_BAD 0.09"
    done = probe(options, tmp_path)
    listed = done.written["unreadable_images"]
    assert listed.keys() == {"train"}
    assert [Path(line.split(" cannot")[0]).name for line in listed["train"]] == ["1.jpg", "6.jpg"]
    assert done.result["train_images"] == 22
    assert "2 unreadable training images are left out" in str(done.result["remarks"]) or (
        kind == "cached"  # left out when the features were extracted, which is said there
    )
    assert done.result["top1"] >= 90
    again = probe(options, tmp_path)
    assert again.result == done.result
    assert again.written["unreadable_images"] == listed


def test_every_unreadable_image_of_every_share_is_listed(probe, damaged):
    done = probe(f"{SGD} --data_path {damaged} --label_shares 1 0.5 DATA.MAX_BAD 0.2")
    assert len(done.written["unreadable_images"]["train"]) == 2


@pytest.mark.parametrize("kind", ["augmented", "cached"])
def test_too_many_unreadable_images_stop_the_probe(given, damaged, kind, tmp_path):
    words = f"--data_path {damaged} --output_dir {tmp_path} --features {kind} DATA.MAX_BAD 0.08"
    line = refusal("linear", given, SGD, words)
    assert "2 of 24 images" in line
    assert "owl" in line
    assert not (tmp_path / "linear.json").exists()


def test_unreadable_images_within_the_limit_never_stop_a_sweep(probe, damaged):
    """However many of them are among the held-out images."""
    for seed in range(3, 7):
        options = f"--epochs 1 --sweep 1 2 --seed {seed} DATA.MAX_BAD 0.09 LINEAR.HOLD_OUT 0.3"
        done = probe(f"{SGD} --data_path {damaged} {options}")
        assert done.result["train_images"] == 22


# Features made up here: `eval_linear.py --load_features`.


def keep(folder: Path, classes: int, train: int, test: int, noise: float, shift: int = 0) -> Path:
    """Features of two splits about the same centres, `train` and `test` of each class.

    shift: by how much the labels of the test split are moved.
    """
    centres = np.random.default_rng(9).standard_normal((classes, 16))
    for seed, split, count, moved in ((1, "train", train, 0), (2, "test", test, shift)):
        labels = np.repeat(np.arange(classes), count)
        draw = np.random.default_rng(seed).standard_normal((len(labels), 16))
        features = Features(
            values=torch.from_numpy(centres[labels] + noise * draw).float(),
            labels=torch.from_numpy((labels + moved) % classes),
            paths=[f"{i}.jpg" for i in range(len(labels))],
            classes=[f"class {i}" for i in range(classes)],
            root="images",
            widths=[16],
            avgpool_patchtokens=False,
            bad=[],
            made_by={"weights": "none"},
        )
        feature_cache.save(features, folder / f"{split}.safetensors")
    return folder


ON_FEATURES = "--n_last_blocks 1 --features cached --load_features"


def on_features(folder: Path, output: Path, options: str) -> Probed:
    return run(output, ON_FEATURES, folder, options)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> Path:
    """10 classes with 20 training and 20 test images each, well apart."""
    return keep(tmp_path_factory.mktemp("clustered"), 10, 20, 20, noise=0.3)


@pytest.fixture(scope="module")
def misleading(tmp_path_factory) -> Path:
    """Noisy classes, and test labels moved by one: who has learnt fails there."""
    return keep(tmp_path_factory.mktemp("misleading"), 4, 20, 20, noise=2.0, shift=1)


def test_the_rate_is_chosen_on_held_out_images_and_not_on_the_test_split(misleading, tmp_path):
    done = on_features(misleading, tmp_path, "--sweep 0 2 0.0001 --epochs 20 LINEAR.HOLD_OUT 0.25")
    result = done.result
    untrained, learnt, _ = result["sweep"]
    assert [head["base_lr"] for head in result["sweep"]] == [0, 2, 0.0001]
    assert untrained["top1"] > learnt["top1"]
    assert learnt["held_out_top1"] > untrained["held_out_top1"]
    assert result["held_out_images"] == 20
    assert (result["base_lr"], result["top1"]) == (2, learnt["top1"])
    assert result["train_images"] == 80
    assert "chosen on held-out" in done.out
    for index, head in enumerate(result["sweep"]):
        assert head["top1"] == done.state["history"][-1]["top1"][index]
        assert head["top1"] == done.log[-1]["top1"][index]


@pytest.mark.parametrize(("share", "images"), [(1, 20), (0.5, 8)])
def test_the_held_out_figure_is_that_of_the_twin(misleading, tmp_path, share, images):
    options = f"--sweep 0.5 2 --epochs 20 LINEAR.HOLD_OUT 0.25 --label_shares {share}"
    done = on_features(misleading, tmp_path, options)
    train = feature_cache.load(misleading / "train.safetensors")
    used = linear.stratified(train.labels, share, 0)
    held_out = used[linear.hold_out(train.labels[used], 0.25, 0)]
    assert done.result["held_out_images"] == len(held_out) == images
    folder = tmp_path if share == 1 else tmp_path / "labels_50_percent"
    state = torch.load(folder / "linear.pth")
    for head, figures in enumerate(done.result["sweep"]):
        logits = train.values[held_out] @ state["weights"][2 + head].T
        predicted = (logits + state["biases"][2 + head]).argmax(1)
        right = (predicted == train.labels[held_out]).double().mean().item()
        assert figures["held_out_top1"] == pytest.approx(100 * right)


def test_one_rate_of_a_sweep_is_the_probe_of_that_rate(clustered, tmp_path):
    alone = on_features(clustered, tmp_path / "a", "--lr 0.5 --epochs 5")
    swept = on_features(clustered, tmp_path / "b", "--sweep 0.5 --epochs 5")
    assert torch.equal(alone.state["weights"][0], swept.state["weights"][0])
    assert swept.result["sweep"] == []


@pytest.mark.parametrize("rates", ["--lr 1e38", "--sweep 1.0e+38 2.0e+38"])
def test_diverging_rates_alone_are_one_sentence(clustered, tmp_path, rates):
    words = f"{ON_FEATURES} {clustered} {rates} --epochs 4 --output_dir {tmp_path}"
    assert rates.split()[0] in refusal("linear", words)
    assert not (tmp_path / "linear.json").exists()


def test_a_diverging_rate_does_not_stop_a_sweep_and_is_not_chosen(clustered, tmp_path):
    done = on_features(clustered, tmp_path, "--sweep 1.0e+38 1 --epochs 10")
    assert done.result["base_lr"] == 1
    assert done.result["top1"] >= 99
    assert done.result["remarks"] == ["1 of 2 learning rates diverged"]


def scikit_learns(train: Features, c: float, chosen: Tensor, values: Tensor) -> np.ndarray:
    model = regression(c).fit(train.values[chosen].numpy(), train.labels[chosen].numpy())
    return model.predict(values.numpy())


def test_logistic_regression_chooses_its_c_on_held_out_images(misleading, tmp_path):
    done = on_features(
        misleading,
        tmp_path,
        "--classifier logistic LINEAR.C [100.0,0.00000001,0.02] LINEAR.HOLD_OUT 0.5",
    )
    train, test = (
        feature_cache.load(misleading / f"{split}.safetensors") for split in ("train", "test")
    )
    mask = linear.hold_out(train.labels, 0.5, 0)
    held_out, on_test = {}, {}
    for c in (100, 1e-8, 0.02):
        predicted = scikit_learns(train, c, ~mask, train.values[mask])
        held_out[c] = 100 * np.mean(predicted == train.labels[mask].numpy())
        predicted = scikit_learns(train, c, torch.ones_like(mask), test.values)
        on_test[c] = 100 * np.mean(predicted == test.labels.numpy())
    best = max(held_out, key=held_out.get)
    assert best != max(on_test, key=on_test.get)
    assert len(set(held_out.values())) > 1
    for line in done.result["sweep"]:
        assert line["held_out_top1"] == pytest.approx(held_out[line["C"]])
    assert done.result["C"] == best
    assert done.result["top1"] == pytest.approx(on_test[best])


def test_logistic_regression_on_a_share_of_the_labels_is_scikit_learns(misleading, tmp_path):
    done = on_features(misleading, tmp_path, "--classifier logistic --label_shares 0.5")
    train, test = (
        feature_cache.load(misleading / f"{split}.safetensors") for split in ("train", "test")
    )
    chosen = linear.stratified(train.labels, 0.5, 0)
    predicted = scikit_learns(train, 1.0, chosen, test.values)
    assert done.result["train_images"] == len(chosen) == 40
    assert done.result["top1"] == pytest.approx(100 * np.mean(predicted == test.labels.numpy()))


def test_nothing_to_choose_by_is_one_sentence(tmp_path):
    keep(tmp_path, 4, 1, 3, noise=0.3)
    for options in ("--sweep 1 2", "--classifier logistic LINEAR.C [1.0,2.0]"):
        words = f"{ON_FEATURES} {tmp_path} {options} --output_dir {tmp_path}/out"
        assert "held out" in refusal("linear", words)
    assert on_features(tmp_path, tmp_path / "one", "--lr 1 --epochs 40").result["top1"] >= 90


def test_logistic_regression_and_augmentation_exclude_each_other(given):
    line = refusal("linear", given, BASE, "--classifier logistic --features augmented")
    assert "drop --features augmented" in line


def test_augmentation_without_images_is_one_sentence(cached, probe, checkpoint, tmp_path):
    probe(f"{CACHED} --epochs 1 --dump_features {tmp_path / 'kept'}")
    words = f"--pretrained_weights {checkpoint} --load_features {tmp_path}/kept"
    line = refusal("linear", words, SGD, f"--output_dir {tmp_path}/out")
    assert "--data_path" in line or "--features cached" in line
    used = run(tmp_path / "used", words, CACHED)
    assert used.result == cached.result


# Several processes.


@pytest.fixture(scope="module")
def launched(checkpoint, damaged, tmp_path_factory, environment) -> Probed:
    """EsViT's command line by two processes, on images of which two cannot be read."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "some.yaml").write_text("MODEL:\n  ARCH: vit_small\nPRINT_FREQ: 5\n")
    command = f"""
        eval_linear.py
        --data_path {damaged} --output_dir {folder / "lincls"} --pretrained_weights {checkpoint}
        --checkpoint_key teacher --batch_size_per_gpu 8 --arch vit_small
        --cfg {folder / "some.yaml"} --n_last_blocks 2 --num_labels 1000
        --avgpool_patchtokens false --patch_size 8 --epochs 6 --lr 2 --dist_url env://
        --num_workers 1 --val_freq 2 --zip_mode false --seed 3 --device cpu MODEL.NUM_CLASSES 0
        DATA.MAX_BAD 0.09
    """
    done = run_group(2, *command.split(), environment=environment)
    return Probed(done.stdout, folder / "lincls")


def test_esvits_command_line_by_two_processes_gives_what_one_process_gives(
    launched, probe, damaged
):
    alone = probe(f"{AS_LAUNCHED} --data_path {damaged}")
    assert launched.written["processes"] == 2
    assert launched.result["batch"] == alone.result["batch"] == 16
    assert launched.result["top1"] == pytest.approx(alone.result["top1"], abs=0.2)
    assert launched.result["best_epoch"] == alone.result["best_epoch"]
    for name in ("weights", "biases"):
        assert torch.allclose(launched.state[name][0], alone.state[name][0], rtol=1e-4, atol=1e-5)
    assert launched.result["train_images"] == alone.result["train_images"] == 22
    assert launched.written["unreadable_images"] == alone.written["unreadable_images"]
    assert "--zip_mode has no meaning here" in launched.out
    assert launched.out.count("epoch 6/6") == 1


def test_one_process_goes_on_where_two_stopped(launched, probe, damaged, tmp_path):
    copy = copy_of(launched.folder, tmp_path / "copy")
    again = probe(f"{AS_LAUNCHED} --data_path {damaged}", copy)
    assert "going on with the probe" in again.out
    assert again.result["top1"] == launched.result["top1"]
    assert again.log == launched.log
