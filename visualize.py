"""What networks look at: maps over images, matches between views, t-SNE; one page for all.

    python visualize.py --checkpoint A.pth B.pth --images DATA/val --output_dir OUT
takes checkpoints of this project and others' files of weights, whose maps are fewer, and writes
into OUT
    visualize.html  visualize.json  *.png
The page holds the pictures itself. docs/pictures.md says how to read them.
"""

import argparse
import shlex
import sys
from pathlib import Path

from engine.evaluation import attention
from engine.pictures import page, visual, visual_pictures, visual_views
from engine.pictures.overlays import whole
from engine.pictures.pictures import plot_tsne
from utils import distributed
from utils.cli import Parser
from utils.errors import InputError, run_script
from utils.files import make_folder, write_json

LOCAL_SHARE = 96 / 224  # of a local crop's side in a global one's, the field's
LEAST = {
    "count": 1,
    "detailed": 1,
    "size": 1,
    "local_crops": 0,
    "queries": 0,
    "tsne": 0,
    "seed": 0,
}
TITLE = "What the networks look at"
TSNE_CAPTION = (
    "Image features, placed so that near ones stay near; each dot is an image, its colour its "
    "class. Distances between far groups and the groups' sizes mean nothing."
)
CELL_ON_PHONES = 85  # pixels; a picture of many columns is scrolled rather than shrunk below it


def main() -> None:
    arguments = parse()
    world = distributed.start(arguments.device)
    folder, seed = arguments.output_dir, arguments.seed

    # The networks, the images, and the views of them that all networks are shown.
    found = visual.subjects(arguments.checkpoint, arguments.checkpoint_key, world.device)
    size, multiple = visual.common_size(found, arguments.size)
    images = visual.open_images(arguments.images, arguments.count)
    distributed.on_main(lambda: make_folder(folder))
    batch = images.batch(size)
    detailed = images.squares[: arguments.detailed]
    local_size = max(1, round(size * LOCAL_SHARE / multiple)) * multiple
    views = [
        [visual_views.View(pixels, whole(square)), *crops]
        for pixels, square, crops in zip(
            batch[: len(detailed)],
            detailed,
            visual_views.seeded_views(
                detailed, size, local_size, arguments.local_crops, seed, plain=True
            ),
            strict=True,
        )
    ]
    pairs = visual_views.seeded_views(images.squares, size, local_size, 0, seed, plain=False)

    # What the networks make of them, and the figures.
    maps = visual.whole_maps(found, batch)
    heads = visual.whole_heads(found, batch[: len(detailed)])
    matches = {
        subject.letter: visual_views.correspondences(subject.network, pairs) for subject in found
    }
    features = visual.image_features(found, images, size, arguments.tsne, seed, world)
    if not world.is_main:
        return
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "size": size,
        "local_size": local_size,
        "seed": seed,
        "checkpoints": [subject.described() for subject in found],
        "images": images.names,
        "pointing": visual.pointing_rows(found, maps, images, size),
        "correspondence": [
            {"checkpoint": letter, **visual_views.correspondence_figures(of_network)}
            for letter, of_network in matches.items()
        ],
    }

    # The pictures: (title, file, how to read it, columns).
    pictures = []
    for kind, of_kind in maps.items():
        path = folder / f"maps_{kind}.png"
        caption = visual_pictures.maps_picture(path, images, found, of_kind, kind, size)
        pictures.append((attention.NAMES[kind], path, caption, visual_pictures.PER_LINE))
    path = folder / "crops.png"
    caption = visual_pictures.crops_picture(path, images, found, views)
    pictures.append(("The first map, crop by crop", path, caption, 1 + len(views[0])))
    if heads:
        path = folder / "heads.png"
        caption = visual_pictures.heads_picture(path, images, found, heads, size)
        most = max(of_network.shape[1] for of_network in heads.values())
        columns = 1 + min(most, visual_pictures.HEADS_PER_LINE)
        pictures.append(("Self-attention, head by head", path, caption, columns))
    path = folder / "correspondence.png"
    caption = visual_pictures.correspondence_picture(
        path, found, pairs[: len(detailed)], matches, arguments.queries
    )
    pictures.append(("Which patches of two views match", path, caption, 4))
    for letter, extracted in features.items():
        path = folder / f"tsne_{letter}.png"
        classes = images.folder.classes
        if plot_tsne(path, extracted.values, extracted.labels, classes, seed, arguments.tsne):
            pictures.append((f"t-SNE of {letter}", path, TSNE_CAPTION, 6))

    # Printed and written.
    results["pictures"] = [path.name for _, path, _, _ in pictures]
    write_json(folder / "visualize.json", results)
    page.write(folder / "visualize.html", TITLE, page_parts(results, pictures))
    for row in results["pointing"] + results["correspondence"]:
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()))
    print(f"written: {folder / 'visualize.html'}, visualize.json, {len(pictures)} PNGs beside it")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="files of weights, drawn side by side")
    add("--checkpoint_key", default="teacher", help="teacher or student, of ours [teacher]")
    add("--images", nargs="+", type=Path, required=True, help="a folder of images, or image files")
    add("--output_dir", type=Path, required=True, help="where page, figures and pictures go")
    add("--count", type=int, default=8, help="images shown, spread evenly over the folder [8]")
    add("--detailed", type=int, default=4, help="of them shown by crops, heads and matches [4]")
    add(
        "--size", type=int, help="pixels of whole images and global crops [the first run's, or 224]"
    )
    add("--local_crops", type=int, default=3, help="local crops an image [3]")
    add("--queries", type=int, default=12, help="patches whose match is drawn [12]")
    add("--tsne", type=int, default=500, help="images of the folder in the t-SNE, 0 for none [500]")
    add("--seed", type=int, default=0, help="of crops and t-SNE [0]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}.")
    return arguments


def page_parts(results: dict, pictures: list[tuple[str, Path, str, int]]) -> list[str]:
    """The page's body: the networks, the figures as tables, the pictures."""
    about = [
        (
            one["letter"],
            one["path"],
            one["architecture"],
            "unknown" if one["epochs"] is None else one["epochs"],
            ", ".join(attention.NAMES[kind] for kind in one["maps"]),
        )
        for one in results["checkpoints"]
    ]
    parts = [
        page.table(about, ("", "file", "architecture", "epochs", "maps")),
        page.paragraph(
            f"{len(results['images'])} images, shown to the networks at {results['size']} pixels. "
            f"In every picture a row is the network of its letter."
        ),
    ]
    if results["pointing"]:
        parts.append(page.heading("Pointing at the part, percent of the images shown"))
        rows = [
            (
                row["checkpoint"],
                attention.NAMES[row["map"]],
                *(row[name] for name in ("accuracy", "chance", "best_fixed_cell", "mass_on_part")),
            )
            for row in results["pointing"]
        ]
        header = ("", "map", "strongest patch touches the part", "a random patch would")
        header += ("the best fixed patch would", "share of the map on the part")
        parts.append(page.table(rows, header))
    parts.append(page.heading("Matches of patches between two views, percent of patches"))
    rows = [list(row.values()) for row in results["correspondence"] if row["patches"]]
    header = ("", "patches", "on or beside the right patch", "a random patch would be")
    parts.append(page.table(rows, (*header, "the patch in the same row and column would be")))
    for title, path, caption, columns in pictures:
        parts.append(page.heading(title))
        parts.append(page.picture(path, title, caption, columns * CELL_ON_PHONES))
    return [*parts, page.command(results["command"])]


def _short(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)
