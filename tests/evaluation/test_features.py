"""Features of all images in order by any number of processes; and on the disk, used or refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets.folder import LabelledImages
from datasets.multicrop import eval_transform
from engine.evaluation import feature_cache
from engine.evaluation.feature_cache import Features
from engine.evaluation.features import Reading
from models.registry import BackboneSpec, build_backbone
from tests.datasets.benchmark_trees import save_image
from tests.disk import forked
from tests.processes import found_by_each
from tests.runs import assert_same_bits
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.files import replacing

IMAGES = 11
BROKEN = (0, 4, 10)
WHOLE = eval_transform(32, 32)
# (number of images, batch): full and uneven last batches, fewer batches than processes, one image.
SIZES = [(11, 4), (8, 4), (11, 11), (11, 1), (1, 4)]


def write_images(folder: Path, broken=()) -> LabelledImages:
    """Eleven images; those of `broken` are no images."""
    images = images_of(folder)
    for n, path in enumerate(images.paths):
        save_image(folder / path, n % 3, n)
        if n in broken:
            (folder / path).write_text("no image")
    return images


def images_of(folder: Path) -> LabelledImages:
    paths = [f"{n:02d}.jpg" for n in range(IMAGES)]
    return LabelledImages(folder, paths, [2 - n % 3 for n in range(IMAGES)], ["a", "b", "c"])


def network() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    spec = BackboneSpec("deit_tiny", 48, (2,), (3,), patch_size=8, img_size=32)
    backbone = build_backbone(spec).eval()
    return lambda images: backbone(images)[0]


def run(dataset: LabelledImages, world: World, batch: int, **how) -> dict | str:
    """What `Reading.extract` finds, or the words of its refusal."""
    try:
        return vars(Reading(world, 32, 32, batch=batch, **how).extract(network(), dataset))
    except InputError as error:
        return str(error)


def found_by(world: World, folder: Path) -> dict:
    """Every case of these tests on the images in folder/whole and folder/broken."""
    whole, broken = images_of(folder / "whole"), images_of(folder / "broken")
    found = {size: run(whole.subset(range(size[0])), world, size[1]) for size in SIZES}
    found["left out"] = run(broken, world, 2, max_bad=0.3)
    found["whole batches left out"] = run(broken, world, 1, max_bad=0.3)
    found["a share too many"] = run(broken, world, 2, max_bad=0.25)
    found["all"] = run(broken.subset(BROKEN), world, 2, max_bad=1.0)
    reading = Reading(world, 32, 32, batch=4)
    found["several values"] = vars(reading.extract(lambda x: x[:, :2, :3, :1], whole))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extract")
    write_images(folder / "whole")
    write_images(folder / "broken", BROKEN)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return found_by(ALONE, folder)


@pytest.fixture(scope="module")
def ranks(folder) -> dict[int, list[dict]]:
    """What each process of two and of three found."""
    return {size: found_by_each(size, found_by, folder) for size in (2, 3)}


def one_by_one(dataset: LabelledImages, places) -> Tensor:
    function = network()
    with torch.no_grad():
        return torch.cat([function(WHOLE(dataset.load(place))[None]) for place in places])


# One process


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_image_comes_once_in_order_with_its_label(alone, folder, size):
    found, count = alone[size], size[0]
    assert found["places"].tolist() == list(range(count))
    assert found["labels"].tolist() == [2 - n % 3 for n in range(count)]
    assert found["labels"].dtype == torch.int64
    assert found["bad"] == []
    wanted = one_by_one(images_of(folder / "whole"), range(count))
    torch.testing.assert_close(found["values"], wanted)
    assert found["values"].dtype == torch.float32


def test_values_of_any_shape_are_gathered(alone, folder):
    images = images_of(folder / "whole")
    wanted = torch.stack([WHOLE(images.load(n))[:2, :3, :1] for n in range(IMAGES)])
    assert torch.equal(alone["several values"]["values"], wanted)


@pytest.mark.parametrize("case", ["left out", "whole batches left out"])
def test_unreadable_images_are_left_out_and_listed(alone, folder, case):
    found = alone[case]
    kept = [n for n in range(IMAGES) if n not in BROKEN]
    assert found["places"].tolist() == kept
    assert found["labels"].tolist() == [2 - n % 3 for n in kept]
    torch.testing.assert_close(found["values"], one_by_one(images_of(folder / "broken"), kept))
    assert [bad.path for bad in found["bad"]] == [f"{folder}/broken/{n:02d}.jpg" for n in BROKEN]
    assert {bad.reason for bad in found["bad"]} == {"it is not an image in a known format"}


def test_a_share_too_many_is_refused_with_the_share_and_one_of_them(alone, folder):
    assert alone["a share too many"] == (
        "3 of 11 images cannot be read, more than DATA.MAX_BAD 0.25 allows; for instance: the "
        f"image {folder}/broken/00.jpg cannot be read (it is not an image in a known format): "
        "repair it or remove it (or raise DATA.MAX_BAD)."
    )


def test_nothing_but_unreadable_images_are_refused_whatever_is_allowed(alone):
    assert alone["all"].startswith("3 of 3 images cannot be read")


def test_with_no_share_allowed_the_first_unreadable_image_is_named(folder):
    text = run(images_of(folder / "broken").subset(range(1, IMAGES)), ALONE, 4)
    assert text.startswith(f"the image {folder}/broken/04.jpg cannot be read")


def test_loader_processes_change_nothing(alone, folder):
    found = run(images_of(folder / "broken"), ALONE, 2, max_bad=0.3, workers=2)
    assert_same_bits(found, alone["left out"])


# Several processes


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_finds_the_same_bits(alone, ranks, processes):
    """And the same words where there are too many unreadable images."""
    for found in ranks[processes]:
        assert_same_bits(found, alone)


# The file

MADE_BY = {
    "weights": "ab" * 32,
    "checkpoint_key": "teacher",
    "backbone": "vit",
    "pooling": "default",
    "size": "224",
    "resize": "256",
    "precision": "fp32",
    "images": "contents:12",
}


def kept(avgpool: bool = False) -> Features:
    """Five images' features of three parts, and perhaps the patches' mean."""
    widths = [2, 3, 4] + [4] * avgpool
    draw = torch.Generator().manual_seed(0)
    return Features(
        values=torch.randn(5, sum(widths), generator=draw),
        labels=torch.tensor([0, 1, 2, 0, 1]),
        paths=[
            "a b/ü.jpg",
            "日本/x.png",
            "line\nbreak.jpg",
            os.fsdecode(b"latin\xe9.jpg"),
            "e.jpg",
        ],
        classes=["a b", "日本", os.fsdecode(b"caf\xe9")],
        root="/data/é",
        widths=widths,
        avgpool_patchtokens=avgpool,
        bad=["the image f.jpg cannot be read", "中"],
        made_by=MADE_BY,
    )


WRITTEN = {
    "blocks": kept(),
    "and the patches' mean": kept(avgpool=True),
    "some columns": kept().narrowed(2),
    "one class, all readable": replace(
        kept(), classes=["only"], labels=torch.zeros(5).long(), bad=[]
    ),
    "a root of latin letters": replace(kept(), root=os.fsdecode(b"/data/caf\xe9")),
    "a root of two lines": replace(kept(), root="/data/two\nlines"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_file_gives_back_what_was_written(tmp_path, case):
    path = tmp_path / "new" / "folder" / "train.safetensors"
    feature_cache.save(WRITTEN[case], path)
    assert_same_bits(vars(feature_cache.load(path)), vars(WRITTEN[case]))
    assert os.listdir(path.parent) == ["train.safetensors"]


def test_who_may_read_a_file_is_the_users_choice(tmp_path):
    """As for every other file: others who share the folder want the features too."""
    (tmp_path / "plain").write_text("x")
    feature_cache.save(kept(), tmp_path / "f")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_evaluations_may_keep_the_same_features_at_once(tmp_path):
    """The one that is done first takes nothing from the other, which replaces its file."""
    reading, writing = os.pipe()

    def keep(told: TextIO) -> None:
        with replacing(tmp_path / "f") as temporary:
            temporary.write_text("of the slower")
            told.write("written\n")
            os.read(reading, 1)
        told.write("done\n")

    with forked(keep) as (_, told):
        assert told.readline() == "written\n"
        feature_cache.save(kept(), tmp_path / "f")
        assert_same_bits(vars(feature_cache.load(tmp_path / "f")), vars(kept()))
        os.write(writing, b"x")
        assert told.readline() == "done\n"
    assert (tmp_path / "f").read_text() == "of the slower"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("held", "blocks", "avgpool", "columns"),
    [
        (False, 1, False, slice(5, 9)),
        (False, 2, False, slice(2, 9)),
        (False, 3, False, slice(0, 9)),
        (True, 1, False, slice(5, 9)),
        (True, 3, False, slice(0, 9)),
        (True, 1, True, slice(5, 13)),
        (True, 2, True, slice(2, 13)),
        (True, 3, True, slice(0, 13)),
    ],
)
def test_narrowed_features_are_the_last_blocks_columns(held, blocks, avgpool, columns):
    whole = kept(held)
    narrow = whole.narrowed(blocks, avgpool)
    assert torch.equal(narrow.values, whole.values[:, columns])
    assert sum(narrow.widths) == narrow.values.shape[1]
    assert len(narrow.widths) == blocks + avgpool
    assert narrow.avgpool_patchtokens is avgpool
    assert_same_bits(vars(narrow.narrowed(1)), vars(whole.narrowed(1)))
    assert (narrow.paths, narrow.made_by) == (whole.paths, whole.made_by)


# Refusals


@pytest.mark.parametrize("name", MADE_BY)
def test_features_made_by_something_else_do_not_fit(name):
    words = {
        "weights": "they come from another checkpoint (sha256 abababababab, not other)",
        "images": "the images have changed since: their names, contents, number or labels",
    }.get(name, f"their {name} is {MADE_BY[name]}, not other")
    assert kept().misfit(MADE_BY, 1, False) == ""
    assert kept().misfit(MADE_BY | {name: "other"}, 1, False) == words
    unknown = replace(kept(), made_by={k: v for k, v in MADE_BY.items() if k != name})
    assert unknown.misfit(MADE_BY, 1, False), "what is not recorded cannot be said to fit"
    # What the command does not know is not compared.
    assert kept().misfit({k: v for k, v in MADE_BY.items() if k != name}, 1, False) == ""


def test_features_of_a_version_that_knew_images_by_their_sizes_do_not_fit():
    old = replace(kept(), made_by=MADE_BY | {"images": "ab" * 32})
    words = "an earlier version kept them, which did not look at images' contents"
    assert old.misfit(MADE_BY, 1, False) == words


def test_features_of_too_few_blocks_do_not_fit():
    assert kept().misfit(MADE_BY, 3, False) == ""
    words = "they hold the last 3 blocks, not 4 (--n_last_blocks 3 takes these)"
    assert kept().misfit(MADE_BY, 4, False) == words
    assert kept(True).misfit(MADE_BY, 3, True) == ""
    assert kept(True).misfit(MADE_BY, 4, True) == words
    assert kept().misfit(MADE_BY, 1, True) == "they lack the mean of the patches"


def test_the_fingerprint_changes_with_names_contents_number_labels_and_classes(tmp_path):
    dataset = write_images(tmp_path)
    first = dataset.subset(range(len(dataset))).fingerprint
    assert write_images(tmp_path / "copy").fingerprint == first

    def other(**changes) -> LabelledImages:
        parts = {"paths": dataset.paths, "labels": dataset.labels, "classes": dataset.classes}
        return LabelledImages(tmp_path, **parts | changes)

    renamed = [*dataset.paths[:-1], "other.jpg"]
    os.link(tmp_path / "10.jpg", tmp_path / "other.jpg")
    prints = {
        "same": first,
        "fewer": dataset.subset(range(10)).fingerprint,
        "order": dataset.subset(range(10, -1, -1)).fingerprint,
        "name": other(paths=renamed).fingerprint,
        "label": other(labels=[0, *dataset.labels[1:]]).fingerprint,
        "classes": other(classes=["a", "b", "d"]).fingerprint,
    }
    with open(tmp_path / "05.jpg", "ab") as file:
        file.write(b"x")
    prints["size"] = dataset.subset(range(len(dataset))).fingerprint
    (tmp_path / "05.jpg").unlink()
    prints["gone"] = dataset.subset(range(len(dataset))).fingerprint
    assert len(set(prints.values())) == len(prints), prints


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        feature_cache.load(path)
    return str(caught.value)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3])
def test_features_of_which_all_images_have_the_same_are_said_to_be_alike(scale):
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    alike = replace(kept(), values=scale * noise + torch.arange(8.0))
    assert alike.are_alike == (scale < 1e-3)
    assert replace(alike, values=torch.zeros(6, 8)).are_alike
    assert not replace(alike, values=torch.zeros(1, 8)).are_alike


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "f"
    feature_cache.save(kept(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert refusal(path) == f"{path} is not a feature file, or is damaged."


def parts_of(path: Path) -> tuple[dict, dict]:
    """The tensors and the metadata of `kept` in a file."""
    feature_cache.save(kept(), path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_safetensors_of_others_are_refused(tmp_path):
    path = tmp_path / "f"
    tensors, metadata = parts_of(path)
    for held, said in (
        ({"weight": torch.zeros(3)}, None),
        ({"weight": torch.zeros(3)}, {"format": "pt"}),
        ({"weight": torch.zeros(3)}, {"format": feature_cache.FORMAT}),
        (tensors, metadata | {"format": "0"}),
    ):
        save_file(held, path, said)
        assert refusal(path) == f"{path} holds no features that this version wrote."


def test_a_file_that_lacks_a_part_or_has_a_broken_one_is_refused(tmp_path):
    path = tmp_path / "f"
    tensors, metadata = parts_of(path)
    assert tensors.keys() == {"values", "labels", "paths", "classes", "bad"}
    for lost in tensors:
        save_file({name: tensors[name] for name in tensors.keys() - {lost}}, path, metadata)
        assert refusal(path) == f"{path} is not a feature file, or is damaged."
    for name in ("widths", "made_by", "avgpool_patchtokens"):
        assert json.loads(metadata[name]) == getattr(kept(), name)
        save_file(tensors, path, metadata | {name: "{"})
        assert refusal(path) == f"{path} is not a feature file, or is damaged."


def test_no_file_a_folder_and_text_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        assert refusal(path) == f"there are no features at {path}: its folder holds none."
    (tmp_path / "text").write_text("hello\n")
    assert "is not a feature file" in refusal(tmp_path / "text")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--dump_features .*/file/sub cannot be written"):
        feature_cache.save(kept(), tmp_path / "file" / "sub" / "f")
