"""The synthetic fine-grained set as an image folder whose decisive parts are known (ours).

`datasets/synthetic_images.py` says what the images are. A set is an ordinary folder,

    FOLDER/{train,val}/<class>/<index>.png     FOLDER/parts.json

and parts.json holds each image's label, coarse label and the box of its part.
Run `python -m datasets.synthetic --help` to write one.
"""

import dataclasses
import json
import os
from pathlib import Path

from PIL import Image

from datasets.synthetic_images import (
    COARSE_NAMES,
    DIFFICULTIES,
    Box,
    SyntheticConfig,
    in_range,
    render,
)
from utils import cli
from utils.errors import InputError, run_script
from utils.files import replacing
from utils.logging import progress

# Raise this whenever the same config and seed would no longer give the same images.
FORMAT = 1
PARTS_FILE = "parts.json"
# The validation split starts here, so that it stays the same whatever the training count.
VAL_START = 500_000


def write_folder(
    config: SyntheticConfig, seed: int, folder: str | os.PathLike, train: int, val: int
) -> bool:
    """Write the set as `folder/{train,val}/<class>/<index>.png` with `folder/parts.json`.

    The splits hold `train` and `val` images, their classes balanced to within one image. A file's
    name is the index that `render` takes. The folder appears whole or not at all. Returns whether
    it was written: False where it holds the same set already. Raises InputError where it holds
    anything else or cannot be written, and where a count or the seed is out of range.
    """
    folder = Path(folder).absolute()
    header = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "seed": in_range("seed", seed, int, 0, 2**32 - 1),
        "train": in_range("train", train, int, config.fine_classes, VAL_START),
        "val": in_range("val", val, int, config.fine_classes, VAL_START),
    }
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        _check_same(folder, header)
        return False
    with replacing(folder, "synthetic set") as unfinished:
        unfinished.mkdir(parents=True)
        _write_images(config, header, unfinished)
    return True


def _check_same(folder: Path, header: dict) -> None:
    """Raise InputError unless the folder holds this very set."""
    if not (folder / PARTS_FILE).is_file():
        raise InputError(
            f"{folder} already exists and is not a synthetic set (it has no {PARTS_FILE}); "
            "choose another folder."
        )
    here, wanted = ({**content, **content["config"]} for content in (_read(folder), header))
    differing = [name for name in wanted if name != "config" and here.get(name) != wanted[name]]
    if differing:
        raise InputError(
            f"{folder} holds another synthetic set (its {', '.join(differing)} differ); choose "
            "another folder or delete that one."
        )


def _write_images(config: SyntheticConfig, header: dict, folder: Path) -> None:
    names = config.class_names
    for split in ("train", "val"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
    jobs = [("train", index) for index in range(header["train"])]
    jobs += [("val", VAL_START + number) for number in range(header["val"])]
    images = {}
    for split, index in progress(jobs, "rendering images", len(jobs)):
        # The draws do not depend on the label, so going round the classes is no bias.
        label = index % config.fine_classes
        sample = render(config, header["seed"], index, label)
        path = f"{split}/{names[label]}/{index:06d}.png"
        Image.fromarray(sample.image).save(folder / path, compress_level=1)
        coarse = label // (config.fine_classes // len(COARSE_NAMES))
        images[path] = {"box": sample.part_box, "label": label, "coarse": coarse}
    (folder / PARTS_FILE).write_text(json.dumps({**header, "images": images}), encoding="utf-8")


def read_parts(folder: str | os.PathLike) -> dict[str, Box]:
    """The part's box (x0, y0, x1, y1), in pixels, of every image of a written set.

    Keys are paths relative to the folder with forward slashes, `val/round_ring/500004.png`.
    Raises InputError where the folder has no `parts.json`, or one that cannot be read.
    """
    return {path: entry["box"] for path, entry in _read(Path(folder))["images"].items()}


def read_size(folder: str | os.PathLike) -> int:
    """The side of a written set's images in pixels, to which the boxes refer; see `read_parts`."""
    return _read(Path(folder))["config"]["size"]


def _read(folder: Path) -> dict:
    """What parts.json holds, with the boxes as tuples."""
    path = folder / PARTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["config"]["size"] = int(content["config"]["size"])
        for entry in content["images"].values():
            x0, y0, x1, y1 = map(int, entry["box"])
            entry["box"] = (x0, y0, x1, y1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} cannot be read ({reason}); give a folder written by datasets.synthetic."
        ) from error
    return content


def main() -> None:
    """Write the set that the command line asks for and say so in one line."""
    parser = cli.Parser(
        prog="python -m datasets.synthetic",
        description="Write a synthetic fine-grained image folder with the parts' boxes.",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    add, some = parser.add_argument, cli.at_least(0)
    add("--train", type=some, default=1000, help="training images (%(default)s)")
    add("--val", type=some, default=500, help="validation images (%(default)s)")
    add("--seed", type=some, default=0, help="seed of all draws (%(default)s)")
    parser.add_argument(
        "--difficulty",
        choices=DIFFICULTIES,
        default="easy",
        help="preset that the settings below override (%(default)s)",
    )
    settings = dataclasses.fields(SyntheticConfig)
    for field in settings:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=cli.at_least(field.metadata["range"][0], field.type),
            metavar="{}..{}".format(*field.metadata["range"]),
            help=field.metadata["help"],
        )
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in settings}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(DIFFICULTIES[args.difficulty], **given)
    written = write_folder(config, args.seed, args.output, args.train, args.val)
    print(
        f"{'wrote' if written else 'found'} {args.train} training and {args.val} validation "
        f"images of {config.fine_classes} classes at {config.size} pixels in {args.output}"
    )


if __name__ == "__main__":
    run_script(main)
