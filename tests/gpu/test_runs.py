"""The scripts on the accelerator: a run that goes on, its evaluation, two processes with NCCL."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.evaluation import feature_cache
from engine.evaluation.knn import rankings
from tests.evaluation.runs import figures, write_data
from tests.processes import launch_python, run_group, run_python
from tests.runs import assert_same_run, load, log_of, tensors
from utils.distributed import ALONE, World

pytestmark = pytest.mark.gpu
# A Swin: the gradient of a ViT's resized position embeddings does not repeat its bits on a GPU
# before torch 2.15.
SWIN = """
    MODEL.ARCH swin_tiny MODEL.EMBED_DIM 16 MODEL.DEPTHS [1,2] MODEL.NUM_HEADS [2,4]
    MODEL.PATCH_SIZE 4 MODEL.WINDOW_SIZE 4
"""
RUN = f"{SWIN} SEED 3 PRINT_FREQ 1 TRAIN.EPOCHS 4 CKPT.KEEP_EVERY 2 DATA.WORKERS 2"
REPEATED = f"{RUN} TRAIN.DETERMINISTIC true"


@pytest.fixture(scope="session")
def run(accelerator, environment) -> Callable:
    """`python WORDS` that sees the GPUs, by a new interpreter or by torchrun several; a rehearsal
    forks them."""
    seen = {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        seen["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]

    def start(*words, processes: int = 1) -> str:
        if accelerator.type == "cpu" and processes == 1:
            done = run_python(*words, environment=environment)
        elif accelerator.type == "cpu":
            done = run_group(processes, *words, environment=environment)
        else:
            torchrun = ("-m", "torch.distributed.run", "--standalone")
            launcher = (*torchrun, f"--nproc_per_node={processes}") if processes > 1 else ()
            done = launch_python(*launcher, *words, environment=seen)
        return done.stdout

    return start


@pytest.fixture(scope="session")
def pretrain(accelerator, run, command) -> Callable[..., str]:
    """main_cmd.py with these options into a folder, on the accelerator; what it wrote."""

    def start(folder: Path, options: str, processes: int = 1) -> str:
        words = command(folder, f"{options} DEVICE {accelerator.type}")
        return run(*words, processes=processes)

    return start


@pytest.fixture(scope="module")
def whole(pretrain, knn_options, tmp_path_factory) -> Path:
    """The folder of a run of four epochs with k-NN, of operations that repeat their bits."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    said = pretrain(folder, f"{REPEATED} {knn_options}")
    assert "the same command on the same machine gives the same bits" in said
    return folder


def lines_of(folder: Path) -> list[dict]:
    """The log's lines of steps."""
    return [line for line in log_of(folder) if "loss" in line]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, pretrain, knn_options, tmp_path):
    """Bit for bit, which TRAIN.DETERMINISTIC promises on a GPU: weights, moments and figures."""
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.copy(half / "checkpoint0002.pth", half / "checkpoint.pth")
    for name in ("checkpoint_previous.pth", "checkpoint0004.pth"):
        (half / name).unlink(missing_ok=True)
    assert "at step 4" in pretrain(half, f"{REPEATED} {knn_options}")
    assert_same_run(whole, half)
    assert [line["step"] for line in lines_of(whole)] == list(range(1, 9))
    assert len(log_of(whole)) == 8 + 3  # the k-NN's, at the start and every two epochs


def test_without_the_option_a_run_is_the_same_but_for_rounding(whole, pretrain, tmp_path):
    pretrain(tmp_path, RUN)
    for one, other in zip(lines_of(whole), lines_of(tmp_path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
    for part in ("student", "teacher", "carried"):
        first, second = (tensors(load(folder)[part]) for folder in (whole, tmp_path))
        for name, value in first.items():
            scale = value.abs().max() + 1e-3
            assert (second[name] - value).abs().max() <= 5e-2 * scale, name


def test_a_check_and_a_run_with_its_images_on_the_device(accelerator, run, command, tmp_path):
    """The check estimates a step's memory there."""
    options = f"{RUN} TRAIN.EPOCHS 1 DEVICE {accelerator.type} DATA."
    for where in ("CROPS device", "CACHE device"):
        run(*command(tmp_path / "run", options + where, flags=["--check"]))
    run(*command(tmp_path / "run", f"{options}CACHE device"))
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]


def test_eval_knn_finds_on_the_device_what_it_finds_on_the_cpu(accelerator, whole, run, tmp_path):
    """By the weights that the device wrote, in float32: features, and figures but for one image."""
    data = write_data(tmp_path / "data")
    for name, device in ((accelerator.type, accelerator.type), ("plain", "cpu")):
        folder = tmp_path / name
        flags = ["--pretrained_weights", whole / "checkpoint.pth", "--data_path", data]
        flags += ["--dump_features", folder, "--output_dir", folder / "knn", "--nb_knn", 3]
        flags += ["--device", device, "--num_workers", 2]
        run("eval_knn.py", *flags, "EVAL.PICTURES", "false", "EVAL.PRECISION", "fp32")
    names = (accelerator.type, "plain")
    for split in ("train", "test"):
        found, wanted = (
            feature_cache.load(tmp_path / name / f"{split}.safetensors").values for name in names
        )
        assert torch.cosine_similarity(found, wanted).min() > 0.999
    found, wanted = (figures(tmp_path / name / "knn", "knn") for name in names)
    assert found["test_images"] == wanted["test_images"] > 20
    for name in ("top1", "top5"):
        within = 100.5 / found["test_images"]
        assert found["k"]["3"][name] == pytest.approx(wanted["k"]["3"][name], abs=within)


@pytest.mark.parametrize("k", [1, 20])
def test_neighbours_are_the_cpu_s(accelerator, k):
    generator = torch.Generator().manual_seed(0)
    gallery, queries = (torch.randn(n, 64, generator=generator) for n in (500, 300))
    labels = torch.randint(12, (500,), generator=generator)
    worlds = (World(0, 1, accelerator), ALONE)
    found = [rankings(gallery, labels, queries, [k], 0.07, 12, world)[k] for world in worlds]
    # Neighbours whose cosines are equal in float32 but for the rounding may change places.
    assert (found[0][:, 0] != found[1][:, 0]).sum() <= 1


@pytest.mark.parametrize("objective", ["cmd", "esvit", "moco_v2"])
def test_two_processes_are_one_of_the_whole_batch(accelerator, objective, pretrain, tmp_path):
    """By torchrun: NCCL, a device each; gloo in a rehearsal."""
    if accelerator.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    options = f"{RUN} LOSS.OBJECTIVE {objective} MODEL.DROP_PATH 0 TRAIN.OPTIMIZER sgd"
    if objective == "moco_v2":
        options += " AUG.LOCAL_CROPS_NUMBER [] MOCO.QUEUE 16"
    pretrain(tmp_path / "one", f"{options} TRAIN.BATCH_SIZE_PER_GPU 8")
    said = pretrain(tmp_path / "two", f"{options} TRAIN.BATCH_SIZE_PER_GPU 4", processes=2)
    assert "batch 4 x processes 2" in said
    for one, other in zip(*(log_of(tmp_path / name) for name in ("one", "two")), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    states = [load(tmp_path / name) for name in ("one", "two")]
    for part in ("student", "teacher", "carried"):
        first, second = (tensors(state[part]) for state in states)
        for name, value in first.items():
            error = (second[name] - value).float().abs().max()
            assert error <= 1e-2 * (value.float().abs().max() + 1e-3), f"{part}{name}: {error}"
