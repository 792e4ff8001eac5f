"""A run that starts from someone's weights: what it takes from them besides, and keeps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from datasets.batched import BatchedMultiCrop, Images
from datasets.feed import WorkerCrops
from datasets.folder import ImageFolder
from datasets.loader import Batch
from datasets.multicrop import Augmentation, MultiCrop, RandomCrop, eval_transform
from engine import build
from engine.evaluation.features import Reading
from engine.evaluation.source import load_source
from engine.pictures.views import PlacedView, in_batches
from engine.training.resume import find, start_from
from engine.training.step import Pretraining
from tests.datasets.photographs import noise, save
from tests.runs import record_of, small_config
from utils import checkpoint, config
from utils.distributed import ALONE
from utils.errors import InputError
from utils.normalisation import IMAGENET, Normalisation

HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))


def timms_folder(path: Path, by: Normalisation = HALVES, **more) -> Path:
    """The weights of `small_config`'s network as timm keeps them on the hub, with a classifier."""
    backbone = build.networks(small_config(SEED=5))[0].backbone
    state = backbone.state_dict() | {"head.weight": torch.ones(7, 48), "head.bias": torch.ones(7)}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    facts = {"architecture": "deit_small_patch16_224", "model_args": shape}
    path.mkdir()
    save_file(state, path / "model.safetensors")
    facts["pretrained_cfg"] = {"mean": list(by.mean), "std": list(by.std)}
    (path / "config.json").write_text(json.dumps(facts | more))
    return path


def started(folder: Path, **options) -> tuple[config.Node, Pretraining]:
    cfg = small_config(INIT__WEIGHTS=str(folder), **options)
    student, teacher = build.networks(cfg)
    start_from(cfg, student, teacher)
    return cfg, Pretraining.build(cfg, ALONE, student, teacher, 4)


def test_every_way_to_a_network_normalises_alike(tmp_path):
    image, sizes = noise(size=(32, 32)), {"local_crops_number": (1,), "local_crops_size": (8,)}
    images = ImageFolder(save(tmp_path, "a.png"))

    def ways(by: Normalisation) -> list[torch.Tensor]:
        settings = Augmentation(16, **sizes, normalisation=by)
        feed = WorkerCrops(images, settings, 0, ALONE)
        batched, batch = (
            BatchedMultiCrop(settings),
            [c[None] for c in MultiCrop(settings)(image, 3)],
        )
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        whole = Images(pixels.view(1, 32, 32, 3).permute(0, 3, 1, 2), [(32, 32)])
        return [
            *feed.crops(feed.moved(Batch(batch, torch.zeros(1), []))),
            *batched(whole, batched.draw(3)[None]),
            eval_transform(16, 16, by)(image),
            RandomCrop(16, by)(image, 3),
        ]

    for own, imagenets in zip(ways(HALVES), ways(IMAGENET), strict=True):
        assert (own - imagenets).abs().max() > 0.1
        torch.testing.assert_close(own, HALVES.of_imagenets(imagenets), atol=2e-5, rtol=0)


def test_the_normalisation_of_the_weights_is_the_runs_from_then_on(tmp_path, told):
    folder = timms_folder(tmp_path / "theirs")
    cfg, run = started(folder)
    assert config.normalisation(cfg) == build.augmentation(cfg).normalisation == HALVES
    file = folder / "model.safetensors"
    assert f"images are normalised as for {file}: {HALVES}" in told.messages
    assert f"{file}: not read: head.bias, head.weight" in told.messages
    assert f"starting from {folder}: backbone" in told.messages

    # Its checkpoint says so to whoever evaluates it, and to the run that goes on from it.
    path = tmp_path / checkpoint.LAST
    state = run.state() | record_of(12).state() | {"images": "images"}
    checkpoint.save(state, path)
    source = load_source(path)
    assert not [line for line in told.messages if "weights of" in line]  # by names these are DINO's
    assert Reading.of(config.defaults(), ALONE, source).normalisation == HALVES
    assert Reading.of(cfg, ALONE, load_source(folder)).normalisation == HALVES
    later = small_config(OUTPUT_DIR=str(tmp_path))
    assert find(later, 12, "images", 3, ALONE) is not None
    assert config.normalisation(later) == HALVES

    # Pictures are made once for networks of any normalisation.
    view = PlacedView(torch.rand(3, 32, 32), None)
    (seen,) = in_batches(lambda pixels: pixels, source.network, [view])
    torch.testing.assert_close(seen, HALVES.of_imagenets(view.pixels))


def test_a_normalisation_that_is_given_stays_and_the_difference_is_said(tmp_path, told):
    given = {"DATA__MEAN": list(IMAGENET.mean), "DATA__STD": list(IMAGENET.std)}
    cfg, _ = started(timms_folder(tmp_path / "theirs"), **given)
    assert config.normalisation(cfg) == IMAGENET
    assert any(str(IMAGENET) in line and str(HALVES) in line for line in told.messages)
    assert started(timms_folder(tmp_path / "plain", IMAGENET))[0].DATA.MEAN == []


def test_a_run_goes_on_with_its_normalisation_in_other_words_and_with_no_other(tmp_path):
    """[] stands for ImageNet's."""
    run = started(timms_folder(tmp_path / "plain", IMAGENET))[1]
    state = run.state() | record_of(12).state() | {"images": "images"}
    checkpoint.save(state, tmp_path / checkpoint.LAST)

    def going_on(by: Normalisation) -> config.Node:
        mean, std = map(list, by)
        cfg = small_config(OUTPUT_DIR=str(tmp_path), DATA__MEAN=mean, DATA__STD=std)
        assert not find(cfg, 12, "images", 3, ALONE).forced
        return cfg

    assert config.normalisation(going_on(IMAGENET)) == IMAGENET
    with pytest.raises(InputError, match=r"DATA.MEAN \(was \[\], now \[0.5, 0.5, 0.5\]\)"):
        going_on(HALVES)
