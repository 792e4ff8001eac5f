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
from dataclasses import asdict
from pathlib import Path

from datasets.folder import LabelledImages, refuse_among_images
from engine.evaluation import attention
from engine.evaluation.features import Reading
from engine.evaluation.source import Source
from engine.pictures import maps, matches, page, shown, steadiness, views
from engine.pictures.drawing import Picture, evenly
from engine.pictures.tsne import plot_tsne, stratified_subset
from utils import distributed, logging
from utils.cli import Parser, at_least
from utils.distributed import World
from utils.errors import run_script
from utils.files import make_folder, write_json

TSNE_CAPTION = (
    "Image features, placed so that near ones stay near; each dot is an image, its colour its "
    "class. Distances between far groups and the groups' sizes mean nothing."
)


def main() -> None:
    arguments = parse()
    world = distributed.start(arguments.device)
    logging.setup(world.is_main)
    folder, seed = arguments.output_dir, arguments.seed

    # The networks, the images, and the views of them that all networks are shown.
    sources = shown.load_sources(arguments.checkpoint, arguments.checkpoint_key, world.device)
    networks = {letter: source.network for letter, source in sources.items()}
    size, local_size = shown.common_sizes(
        list(sources.values()), arguments.size, arguments.local_crops > 0
    )
    paths, names, labelled = shown.find_images(arguments.images)
    images = shown.show_images(paths, names, arguments.count)
    if labelled is not None:
        refuse_among_images(folder, labelled)
    distributed.on_main(lambda: make_folder(folder))
    detailed = images.first(arguments.detailed)
    whole = views.whole_views(images.squares, size)
    crops = views.seeded_views(
        detailed.squares, size, local_size, arguments.local_crops, seed, plain=True
    )
    crops = [[view, *of_image] for view, of_image in zip(whole, crops, strict=False)]
    pairs = views.seeded_views(images.squares, size, local_size, 0, seed, plain=False)
    # One image at a time: so many photographs as they are would take gigabytes.
    chosen = [paths[index] for index in evenly(len(paths), arguments.pairs)]
    squares = shown.readable_squares(chosen)
    judged = views.seeded_views(squares, size, local_size, 0, seed, plain=False)

    # What the networks make of them.
    found = {
        letter: matches.correspondences(network, pairs) for letter, network in networks.items()
    }
    whole_maps = {
        kind: {
            letter: maps.maps_of_views(network, whole, kind)
            for letter, network in networks.items()
            if kind in attention.kinds(network)
        }
        for kind in attention.NAMES
    }
    heads = {
        letter: maps.heads_of_views(networks[letter], whole[: len(crops)])
        for letter in whole_maps["self"]
    }
    steady = [
        {"checkpoint": letter, "map": kind}
        | steadiness.figures(
            *(maps.maps_of_views(network, view, kind) for view in zip(*judged, strict=True))
        )
        for letter, network in networks.items()
        for kind in attention.kinds(network)
    ]
    pictures = {
        f"maps_{kind}.png": maps.whole_picture(images, of_kind, kind)
        for kind, of_kind in whole_maps.items()
        if of_kind
    }
    pictures["crops.png"] = maps.crops_picture(detailed, networks, crops)
    if heads:
        pictures["heads.png"] = maps.heads_picture(detailed, heads)
    pictures["correspondence.png"] = matches.correspondence_picture(
        pairs[: len(crops)], found, arguments.queries
    )
    if labelled is not None and labelled.classes and arguments.tsne:
        for letter, source in sources.items():
            picture = tsne_picture(letter, source, labelled, size, arguments.tsne, seed, world)
            if picture is not None:
                pictures[f"tsne_{letter}.png"] = picture
    if not world.is_main:
        return

    # Printed and written.
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "size": size,
        "local_size": local_size,
        "seed": seed,
        "checkpoints": [
            {"letter": letter, "maps": attention.kinds(source.network), **asdict(source.weights)}
            for letter, source in sources.items()
        ],
        "images": images.names,
        "pointing": [
            {"checkpoint": letter, "map": kind, "images": len(images.boxes)}
            | maps.pointing_of(whole_maps[kind][letter], images)
            for letter, network in networks.items()
            for kind in attention.kinds(network)
            if images.boxes
        ],
        "steadiness": steady,
        "correspondence": [
            {"checkpoint": letter, **matches.correspondence_figures(of_network)}
            for letter, of_network in found.items()
        ],
        "pictures": list(pictures),
    }
    write_json(folder / "visualize.json", results)
    parts = [*tables(results), *page.pictures(folder, pictures), page.command(results["command"])]
    page.write(folder / "visualize.html", "What the networks look at", parts)
    for row in results["pointing"] + steady + results["correspondence"]:
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()))
    print(f"written: {folder / 'visualize.html'}, visualize.json, {len(pictures)} PNGs beside it")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="files of weights, drawn side by side")
    add("--checkpoint_key", default="teacher", help="teacher or student, of ours [teacher]")
    add("--images", nargs="+", type=Path, required=True, help="a folder of images, or image files")
    add("--output_dir", type=Path, required=True, help="where page, figures and pictures go")
    one, none = at_least(1), at_least(0)
    add("--count", type=one, default=8, help="images shown, spread evenly over the folder [8]")
    add("--detailed", type=one, default=4, help="of them shown by crops, heads and matches [4]")
    add("--size", type=one, help="pixels of images and global crops [the first run's, or 224]")
    add("--local_crops", type=none, default=3, help="local crops an image [3]")
    add("--pairs", type=one, default=200, help="images whose two views' maps are compared [200]")
    add("--queries", type=none, default=12, help="patches whose match is drawn [12]")
    add("--tsne", type=none, default=500, help="images in the t-SNE, 0 for none [500]")
    add("--seed", type=none, default=0, help="of crops and t-SNE [0]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def tsne_picture(
    letter: str,
    source: Source,
    images: LabelledImages,
    size: int,
    most: int,
    seed: int,
    world: World,
) -> Picture | None:
    """t-SNE of the image features of at most `most` images; None of fewer than 3."""
    chosen = stratified_subset(images.labels, most, seed).tolist()
    whole = Reading(world, size, size, normalisation=source.normalisation)
    found = whole.extract(lambda batch: source.network.backbone(batch)[0], images.subset(chosen))
    figure = plot_tsne(found.values, found.labels, images.classes, seed, most)
    return figure and Picture(f"t-SNE of {letter}", figure, TSNE_CAPTION, columns=6)


def tables(results: dict) -> list[str]:
    """The page above the pictures: the networks, and the figures as tables."""
    about = [
        (
            one["letter"],
            one["path"],
            one["arch"],
            "unknown" if one["epoch"] is None else one["epoch"],
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
        columns = {
            "checkpoint": "",
            "map": "map",
            "accuracy": "strongest patch touches the part",
            "chance": "a random patch would",
            "best_fixed_cell": "the best fixed patch would",
            "mass_on_part": "share of the map on the part",
        }
        parts.append(_table_of_maps(results["pointing"], columns))
    parts.append(page.heading("Maps of two views of an image"))
    columns = {
        "checkpoint": "",
        "map": "map",
        "images": "images",
        "steadiness": "correlation at the same places",
        "other_image": "with another image's",
        "effective_patches": "exp of the entropy, percent of the patches",
    }
    parts.append(_table_of_maps(results["steadiness"], columns))
    parts.append(page.heading("Matches of patches between two views, percent of patches"))
    rows = [list(row.values()) for row in results["correspondence"] if row["patches"]]
    header = ("", "patches", "on or beside the right patch", "a random patch would be")
    parts.append(page.table(rows, (*header, "the patch in the same row and column would be")))
    return parts


def _table_of_maps(rows: list[dict], columns: dict[str, str]) -> str:
    """Figures of maps, one row each; columns: name of a figure -> heading."""
    cells = [
        [attention.NAMES[row[name]] if name == "map" else row.get(name, "–") for name in columns]
        for row in rows
    ]
    return page.table(cells, columns.values())


def _short(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)
