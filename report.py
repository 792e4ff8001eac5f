"""A report of one run: k-NN beside a random network's, where the attention points, pictures.

    python report.py --output_dir OUT --gallery DATA/train --queries DATA/val
    python report.py --output_dir OUT --queries DATA     # images without labels: no k-NN
reads OUT/checkpoint.pth and OUT/log.txt and writes into OUT
    results.json  report.html  loss_curves.png  attention.png
A DATA folder made by `python -m datasets.synthetic` knows each part's box (DATA/parts.json).
"""

import argparse
import copy
import datetime
import platform
import shlex
import sys
from pathlib import Path

import torch

from datasets.benchmarks import labelled_folder
from datasets.folder import ImageFolder
from engine import build
from engine.evaluation import attention, pointing
from engine.evaluation.source import load_source
from engine.pictures import curves, maps, page, report
from engine.pictures.drawing import Picture
from engine.pictures.shown import show_images
from engine.pictures.views import whole_views
from models.mil import GatedAttentionPool
from models.network import Network
from models.pretrained import count_parameters
from utils import checkpoint, config, distributed, seeding
from utils.cli import Parser, at_least
from utils.errors import InputError, run_script
from utils.files import write_json

IMAGES_SHOWN = 24


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--gallery", type=Path, help="for the k-NN: labelled images, not queries")
    parser.add_argument("--queries", type=Path, help="images to classify and to show attention on")
    parser.add_argument("--size", type=at_least(1), help="pixels of the images [the run's]")
    parser.add_argument("--k", type=at_least(1), default=20, help="neighbours of the k-NN [20]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num_workers", type=at_least(0), default=0, help="loader processes [0]")
    arguments = parser.parse_args()
    world = distributed.start(arguments.device)
    device = world.device

    # The run: its options, the teacher it made, and the network it began with.
    path = arguments.output_dir / checkpoint.LAST
    state = checkpoint.load_own(path)
    cfg = config.from_dict(state["config"], str(path))
    teacher = load_source(path).network.to(device)
    start = build.networks(cfg)[1].to(device).eval()
    size = arguments.size or cfg.AUG.GLOBAL_CROPS_SIZE
    where = report.Setting(
        arguments.gallery and arguments.gallery.resolve(),
        arguments.queries and arguments.queries.resolve(),
        size,
        arguments.k,
        world,
        workers=arguments.num_workers,
    )
    if size % teacher.backbone.patch_size:
        raise InputError(f"--size {size} must be a multiple of {teacher.backbone.patch_size}.")

    # The curves, and what the run was.
    log = curves.read_log(arguments.output_dir / "log.txt")
    results = {
        "title": f"{cfg.LOSS.OBJECTIVE} on {cfg.DATA.PATH}: {state['epoch']} epochs",
        "command": shlex.join(["python", *sys.argv]),
        "facts": {
            "objective": cfg.LOSS.OBJECTIVE,
            "architecture": cfg.MODEL.ARCH,
            "parameters of the backbone": count_parameters(teacher.backbone),
            "optimizer steps": state["step"],
            "images per step": state["images_per_step"],
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        },
        "config": config.to_dict(cfg),
        "tables": {},
    }
    tables = results["tables"]
    pictures = {"loss_curves.png": Picture("Training curves", curves.plot_curves(log))}

    # k-NN beside the network that the run began with.
    if where.gallery and where.queries:
        trained, untrained = (report.image_knn(net, where) for net in (teacher, start))
        chance = 100 / len(labelled_folder(where.gallery).classes)
        results["knn"] = {
            "k": arguments.k,
            "trained": trained,
            "random_initialisation": untrained,
            "chance_top1": chance,
        }
        tables[f"k-NN of the image feature (k = {arguments.k}), percent"] = {
            "trained teacher, top-1": trained["top1"],
            "random initialisation, top-1": untrained["top1"],
            "trained teacher, top-5": trained["top5"],
            "random initialisation, top-5": untrained["top5"],
            "chance, top-1": chance,
        }

    # Where the attention points, if the run trained one.
    trained_maps = [kind for kind in attention.kinds(teacher) if kind in report.UNTRAINED]
    if trained_maps and where.queries:
        (kind,) = trained_maps
        names = ImageFolder(where.queries).paths
        paths = [where.queries / name for name in names]
        boxes, box_size = pointing.part_boxes(paths)
        if boxes:
            untrained = untrained_network(cfg, teacher, kind).to(device).eval()
            figures = report.pointing_figures(teacher, untrained, kind, boxes, box_size, where)
            results["pointing"] = figures
            zero, zero_in_words = report.UNTRAINED[kind]
            tables[f"Pointing of the {attention.NAMES[kind]} at the part, percent of images"] = {
                "accuracy: the strongest patch touches the part's box": figures["accuracy"],
                "zero: a random patch": figures["chance"],
                "zero: the best fixed patch": figures["best_fixed_cell"],
                f"zero: {zero_in_words}": figures[zero],
                "attention mass on patches that touch the box": figures["attention_mass_on_part"],
            }
        images = show_images(paths, names, IMAGES_SHOWN)
        shown = maps.maps_of_views(teacher, whole_views(images.squares, size), kind)
        pictures["attention.png"] = maps.whole_picture(images, {"": shown}, kind, per_line=6)

    # Printed and written.
    for name, table in tables.items():
        print(name)
        for label, value in table.items():
            print(f"  {value:7.2f}  {label}")
    folder = arguments.output_dir
    write_json(folder / "results.json", results)
    parts = [page.table(results["facts"].items()), page.command(results["command"])]
    if tables:
        parts.append(page.paragraph("Each figure stands beside its zero: what no learning gives."))
    for name, table in tables.items():
        parts += [page.heading(name), page.table(table.items())]
    parts += page.pictures(folder, pictures)
    page.write(folder / "report.html", results["title"], parts)
    print(f"written: {folder / 'results.json'}, report.html and PNGs beside it")


def untrained_network(cfg: config.Node, teacher: Network, kind: str) -> Network:
    """The run's teacher with a fresh pooling, or LCR's branch as the run began with it."""
    network = copy.deepcopy(teacher)
    if kind == "lcr":
        network.rationale = build.networks(cfg)[0].rationale
        return network
    heads = network.head_spec
    seed = seeding.derive_seed(cfg.SEED, seeding.UNTRAINED_POOLING)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network.pool = GatedAttentionPool(heads.bottleneck_dim, heads.pool_hidden)
    return network


if __name__ == "__main__":
    run_script(main)
