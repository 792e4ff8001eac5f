r"""What `make gpu` needs on a machine without a network, into the folder bundle/.

    make gpu-bundle DATA="../data/cars98 ../data/flowers17"     # python -m benchmarks.bundle ...

bundle/wheels has packages that the other machine may lack, bundle/reference the sources of public
checkouts, bundle/data the photographs. Carry it there inside the checkout; `make gpu` finds it. All
is at most LIMIT MiB. Sets of images are taken in the order given; one that does not fit whole is
encoded anew, with the largest shorter side with which it does: that is other data, and so its
folder is named by the side.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from email.parser import Parser
from pathlib import Path

from benchmarks import common
from benchmarks.gpu import check_sources
from datasets.folder import UnreadableImage, load_image
from utils.errors import InputError, run_script
from utils.files import make_folder, replacing

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SIDES = (0, 256, 224, 208, 192, 176, 160)  # pixels of the shorter side at most; 0: as it is
QUALITY = 85  # of the JPEGs that are encoded anew
WHEELS = ("yacs", "tensorboardX", "webdataset", "braceexpand")
SOURCES = (".py", ".yaml")  # of a checkout: all that a step of it reads


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[], help="folders with train and val")
    add("--reference", type=Path, nargs="+", default=[], help="public checkouts of EsViT or CMD")
    add("--wheels", nargs="+", default=WHEELS, help="packages (%(default)s)")
    add("--python", default="3.12", help="of the other machine (%(default)s)")
    add("--platform", nargs="+", default=["manylinux_2_28_x86_64", "manylinux2014_x86_64"])
    add("--limit", type=float, default=58, help="MiB of all (%(default)s)")
    add("--output", type=Path, default=ROOT / "bundle", help="replaced if it is there (bundle)")
    return parser.parse_args()


def take_wheels(names: list[str], python: str, platforms: list[str], folder: Path) -> list[str]:
    """Download wheels into `folder`; returns the packages that they need besides."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = {re.split("[<>=]", line)[0].lower(): line for line in lines}
    wanted = [bounds.get(name.lower(), name) for name in names]
    words = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    words += [f"--platform={platform}" for platform in platforms]
    if subprocess.run([sys.executable, "-m", *words, "--dest", str(folder), *wanted]).returncode:
        raise InputError(
            f"pip brought no wheels of {', '.join(wanted)} for Python {python}; it needs a network "
            f"here, and its words stand above."
        )
    needs = set()
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as wheel:
            (inside,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            required = Parser().parsestr(wheel.read(inside).decode()).get_all("Requires-Dist", [])
        needs |= {re.match(r"[\w.-]+", need)[0].lower() for need in required if "extra" not in need}
    return sorted(needs - {name.lower() for name in names})


def take_images(source: Path, folder: Path, room: float) -> Path:
    """Copy a set of images into `folder`, within `room` bytes; returns where it is then.

    Raises InputError where it fits at no size.
    """
    paths = sorted(
        path for split in ("train", "val") for path in source.glob(f"{split}/*/*") if path.is_file()
    )
    name = source.resolve().name
    for side in SIDES:
        contents = {path.relative_to(source): encoded(path, side) for path in paths}
        if sum(map(len, contents.values())) <= room:
            place = folder / (f"{name}-{side}px" if side else name)
            for path, data in contents.items():
                make_folder((place / path).parent)
                (place / path).write_bytes(data)
            return place
    raise InputError(
        f"--data: {source} does not fit into the {room / MIB:.1f} MiB that are left, not even with "
        f"a shorter side of {SIDES[-1]} pixels: leave it out, or raise --limit."
    )


def encoded(path: Path, side: int) -> bytes:
    """An image's file, or for a side its JPEG with a shorter side of at most so many pixels.

    What is no image that can be read stays as it is.
    """
    buffer = io.BytesIO()
    with suppress(UnreadableImage):
        if side:
            load_image(path, side).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue() or path.read_bytes()


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    args = parse()
    check_sources(args.data, args.reference)
    with replacing(args.output, "bundle") as bundle:
        make_folder(bundle / "wheels")
        needs = take_wheels(args.wheels, args.python, args.platform, bundle / "wheels")
        print(f"wheels: {' '.join(args.wheels)}; they need {', '.join(needs)} there")
        for checkout in args.reference:
            for path in checkout.rglob("*"):
                if path.suffix in SOURCES and path.is_file():
                    place = bundle / "reference" / checkout.resolve().name
                    place /= path.relative_to(checkout)
                    make_folder(place.parent)
                    shutil.copyfile(path, place)
        for source in args.data:
            place = take_images(source, bundle / "data", args.limit * MIB - bytes_of(bundle))
            print(f"{source}: {bytes_of(place) / MIB:.1f} MiB as data/{place.name}")
        if bytes_of(bundle) > args.limit * MIB:
            raise InputError(
                f"the bundle would have {bytes_of(bundle) / MIB:.1f} MiB, which is above --limit: "
                f"leave out a checkout or wheels, or raise it."
            )
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        own = sum((ROOT / name).stat().st_size for name in tracked.splitlines())
        print(
            f"{args.output}: {bytes_of(bundle) / MIB:.1f} MiB, and {own / MIB:.1f} MiB of the "
            f"checkout's own files"
        )
        shutil.rmtree(args.output, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
