"""A report of one run: k-NN beside a random network's, where the attention points, pictures.

    python report.py --output_dir OUT --gallery DATA/train --queries DATA/val
    python report.py --output_dir OUT --queries DATA     # images without labels: no k-NN
reads OUT/checkpoint.pth and OUT/log.txt and writes into OUT
    results.json  report.html  loss_curves.png  attention.png
A DATA folder made by `python -m datasets.synthetic` knows each part's box (DATA/parts.json).
"""

import argparse
import copy
from pathlib import Path

from datasets.folder import ImageFolder, refuse_among_images
from datasets.multicrop import default_resize
from datasets.splits import Splits
from engine import build
from engine.evaluation import attention, pointing
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading, gallery_and_queries
from engine.evaluation.measure import KNN, measure
from engine.evaluation.pointing import Pointing
from engine.evaluation.provenance import provenance
from engine.evaluation.source import Source, load_source
from engine.pictures import curves, maps, page
from engine.pictures.drawing import Picture
from engine.pictures.shown import show_images
from engine.pictures.views import whole_views
from models.network import Network
from models.pretrained import count_parameters
from utils import checkpoint, config, distributed, logging
from utils.cli import Parser, at_least
from utils.errors import InputError, run_script
from utils.files import write_json
from utils.logging import logger

IMAGES_SHOWN = 24
# The maps that training made, and how a report calls their zero: in JSON, in words.
UNTRAINED = {
    "mil": ("untrained_pooling", "untrained pooling on the trained network"),
    "lcr": ("untrained_branch", "untrained branch on the trained network"),
}


def main() -> None:
    arguments = parse()
    folder, k, key = arguments.output_dir, arguments.k, arguments.checkpoint_key
    world = distributed.start(arguments.device)
    logging.setup(world.is_main)

    # The run: its options, the network it made, and those it began with.
    path = folder / checkpoint.LAST
    state = checkpoint.load_own(path)
    cfg = config.from_dict(state["config"], str(path))
    source = load_source(path, key)
    network = source.network
    student_at_start, teacher_at_start = build.networks(cfg)
    size = arguments.size or cfg.AUG.GLOBAL_CROPS_SIZE
    if misfit := network.backbone.misfit(size):
        raise InputError(f"--size {size} {misfit} {source.weights.arch}.")
    log = curves.read_log(folder / "log.txt")
    pictures = {"loss_curves.png": Picture("Training curves", curves.plot_curves(log))}

    # The images: for the k-NN two folders with classes, else any to show the attention on.
    splits = None
    if arguments.gallery and arguments.queries:
        splits = gallery_and_queries(arguments.gallery, arguments.queries)
        for note in splits.notes:
            logger.warning(note)
    elif arguments.queries:
        queries = ImageFolder(arguments.queries)
        splits = Splits("queries", queries, queries, [])
    if splits is not None:
        refuse_among_images(folder, splits.train, splits.test)
    reading = Reading(
        world,
        size,
        default_resize(size),
        workers=arguments.num_workers,
        normalisation=source.normalisation,
    )
    features = SplitFeatures(source, splits, reading)
    # Printed and written, each figure beside its zero: results.json by these names, the tables.
    figures, tables = {}, {}

    # k-NN beside the network that the run began with.
    if arguments.gallery and splits:
        at_start = SplitFeatures(Source(None, teacher_at_start.eval()), splits, reading)
        trained, untrained = (
            measure(of, [KNN([k])])[0].figures["k"][str(k)] for of in (features, at_start)
        )
        chance = 100 / len(splits.train.classes)
        figures["knn"] = {
            "k": k,
            "trained": trained,
            "random_initialisation": untrained,
            "chance_top1": chance,
        }
        tables[f"k-NN of the image feature (k = {k}), percent"] = {
            f"trained {key}, top-1": trained["top1"],
            "random initialisation, top-1": untrained["top1"],
            f"trained {key}, top-5": trained["top5"],
            "random initialisation, top-5": untrained["top5"],
            "chance, top-1": chance,
        }

    # Where the attention points, if the run trained one.
    kind = next((kind for kind in attention.kinds(network) if kind in UNTRAINED), None)
    if kind and splits:
        paths = [splits.test.root / name for name in splits.test.paths]
        if pointing.part_boxes(paths)[0]:
            untrained = untrained_network(network, student_at_start, kind).eval()
            fresh = SplitFeatures(Source(None, untrained), splits, reading)
            found, zero = (
                measure(of, [Pointing((kind,))])[0].figures[kind] for of in (features, fresh)
            )
            name, words = UNTRAINED[kind]
            mass = found.pop("mass_on_part")
            figures["pointing"] = found | {name: zero["accuracy"], "attention_mass_on_part": mass}
            tables[f"Pointing of the {attention.NAMES[kind]} at the part, percent of images"] = {
                "accuracy: the strongest patch touches the part's box": found["accuracy"],
                "zero: a random patch": found["chance"],
                "zero: the best fixed patch": found["best_fixed_cell"],
                f"zero: {words}": zero["accuracy"],
                "attention mass on patches that touch the box": mass,
            }
        images = show_images(paths, splits.test.paths, IMAGES_SHOWN)
        shown = maps.maps_of_views(network, whole_views(images.squares, size), kind)
        pictures["attention.png"] = maps.whole_picture(images, {"": shown}, kind, per_line=6)

    if not world.is_main:
        return
    for name, table in tables.items():
        print(name)
        for label, value in table.items():
            print(f"  {value:7.2f}  {label}")
    title = f"{cfg.LOSS.OBJECTIVE} on {cfg.DATA.PATH}: {state['epoch']} epochs"
    facts = {
        "objective": cfg.LOSS.OBJECTIVE,
        "architecture": cfg.MODEL.ARCH,
        "parameters of the backbone": count_parameters(network.backbone),
        "optimizer steps": state["step"],
        "images per step": state["images_per_step"],
    }
    behind = provenance(cfg, features)
    write_json(folder / "results.json", {"title": title, "facts": facts} | figures | behind)
    known = {name: behind[name] for name in ("device", "commit", "date")}
    parts = [
        page.table((facts | behind["versions"] | known).items()),
        page.command(behind["command"]),
    ]
    parts += [page.paragraph(note) for note in splits.notes] if splits else []
    if tables:
        parts.append(page.paragraph("Each figure stands beside its zero: what no learning gives."))
    for name, table in tables.items():
        parts += [page.heading(name), page.table(table.items())]
    remarks = figures.get("knn", {}).get("trained", {}).get("remarks", [])
    parts += [page.paragraph(f"k-NN: {remark}") for remark in remarks]
    page.write(folder / "report.html", title, [*parts, *page.pictures(folder, pictures)])
    print(f"written: {folder / 'results.json'}, report.html and PNGs beside it")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="the run's folder")
    add("--gallery", type=Path, help="for the k-NN: labelled images, not queries")
    add("--queries", type=Path, help="images to classify and to show attention on")
    add("--checkpoint_key", default="teacher", help="teacher or student [teacher]")
    add("--size", type=at_least(1), help="pixels of the evaluated images [the run's]")
    add("--k", type=at_least(1), default=20, help="neighbours of the k-NN [20]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--num_workers", type=at_least(0), default=0, help="loader processes [0]")
    arguments = parser.parse_args()
    if arguments.gallery and not arguments.queries:
        raise InputError("--gallery alone gives no figure: --queries names what is classified.")
    return arguments


def untrained_network(trained: Network, student_at_start: Network, kind: str) -> Network:
    """The run's network with the attention, or LCR's branch, that the run began with."""
    network = copy.deepcopy(trained)
    if kind == "lcr":
        network.rationale = student_at_start.rationale
    else:
        network.pool = student_at_start.pool
    return network


if __name__ == "__main__":
    run_script(main)
