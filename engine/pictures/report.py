"""What a run came to: figures beside their zeros, and pictures that a person can look at."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop

from datasets.folder import ImageFolder, load_image
from datasets.multicrop import eval_transform
from engine.evaluation import pointing
from engine.evaluation.attention import attention_map
from engine.evaluation.features import extract, gallery_and_queries
from engine.evaluation.knn import knn_accuracy
from engine.pictures import overlays, page
from models.backbone import Backbone
from models.network import Network
from utils.distributed import World
from utils.errors import InputError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES_SHOWN = 24
# The panels of the curves, at most six of which a run logs.
CURVES = (
    ("loss", ("loss", "L_I", "L_R", "L_S", "L_T", "T", "S", "L_C", "L_F")),
    ("teacher, nats", ("teacher_entropy", "teacher_kl_uniform", "teacher_information")),
    ("queries nearest to their own key, percent", ("contrast_accuracy",)),
    ("effective rank of the features", ("feature_rank",)),
    ("gradient norm", ("grad_norm",)),
    ("attention entropy (1: uniform)", ("attention_entropy",)),
    ("learning rate", ("lr",)),
)
# The maps that training made, and what a report calls their zero: in JSON, in words.
UNTRAINED = {
    "mil": ("untrained_pooling", "untrained pooling on the trained network"),
    "lcr": ("untrained_branch", "untrained branch on the trained network"),
}


@dataclass(frozen=True)
class Setting:
    """Where and how a report measures.

    gallery, queries: folders, for the k-NN with class subfolders; None for none. size: pixels of
    the k-NN's centre crops, and at which the attention is shown whole images, so that parts'
    boxes hold. k: neighbours.
    """

    gallery: Path | None
    queries: Path | None
    size: int
    k: int
    world: World
    batch: int = 64
    workers: int = 0


def image_knn(backbone: Backbone, where: Setting) -> dict[str, float]:
    """k-NN of the image features, of resized centre crops as in eval_knn.py: percent."""
    folders = gallery_and_queries(where.gallery, where.queries, where.size)
    gallery, queries = (
        extract(lambda images: backbone(images)[0], folder, where.world, where.batch, where.workers)
        for folder in folders
    )
    top1, top5 = knn_accuracy(
        gallery.values, gallery.labels, queries.values, queries.labels, [where.k]
    )[where.k]
    return {"top1": top1, "top5": top5}


def attention_maps(network: Network, kind: str, where: Setting) -> Tensor:
    """The map `kind` [n, N] of every query image, in their order; see attention.py."""
    images = ImageFolder(where.queries, eval_transform(where.size, where.size))
    look = partial(attention_map, network, kind=kind)
    return extract(look, images, where.world, where.batch, where.workers).values


def pointing_figures(
    network: Network,
    untrained: Network,
    kind: str,
    boxes: list[pointing.Box],
    box_size: int,
    where: Setting,
) -> tuple[dict[str, float], Tensor]:
    """Pointing accuracy beside its three zeros, percent; and the maps `kind` [n, N].

    untrained: the same network but for what makes the map, which is as a run begins.
    boxes: one a query image, in pixels of images of box_size x box_size.
    """
    grid = network.backbone.patch_grid(where.size, where.size)
    cell = network.backbone.stride * box_size / where.size
    touching = pointing.cells_touching(boxes, grid, cell)
    maps, zero = (attention_maps(one, kind, where) for one in (network, untrained))
    return {
        "accuracy": pointing.pointing(maps, touching),
        "chance": pointing.chance(touching),
        "best_fixed_cell": pointing.best_fixed_cell(touching),
        UNTRAINED[kind][0]: pointing.pointing(zero, touching),
        "attention_mass_on_part": pointing.mass_on_part(maps, touching),
    }, maps


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.txt; InputError without any."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError):
        lines = []
    if not any("loss" in line for line in lines):
        raise InputError(f"{path} is not the log of a run: give the folder that main_cmd.py wrote.")
    return lines


def plot_curves(lines: list[dict], path: Path) -> None:
    """Loss terms, the teacher's health and the schedules over the epochs, as PNG."""
    steps = [line for line in lines if "loss" in line]
    logged = [(title, [name for name in names if name in steps[0]]) for title, names in CURVES]
    panels = [(title, names) for title, names in logged if names]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    epochs = [line["epoch"] for line in steps]
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            axis.plot(epochs, [line[name] for line in steps], label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if names == ["attention_entropy"]:
            axis.set_ylim(0, 1.05)
        if len(names) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_attention(
    maps: Tensor,
    name: str,
    backbone: Backbone,
    size: int,
    folder: Path,
    paths: list[str],
    boxes: list[pointing.Box] | None,
    path: Path,
) -> None:
    """Query images, each beside its map, with the part's box where known, as PNG.

    maps [n, N]: of images shown to the backbone at size x size pixels. name: what they are.
    """
    grid = backbone.patch_grid(size, size)
    shown = torch.linspace(0, len(paths) - 1, min(IMAGES_SHOWN, len(paths))).long().tolist()
    columns = 6
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=(2 * columns, 1.15 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    most = maps[shown].max().item()
    for place, index in enumerate(shown):
        row, column = divmod(place, columns)
        image = load_image(folder / paths[index])
        image = center_crop(image, min(image.size))  # what the evaluation shows the network
        picture, overlay = axes[row, 2 * column], axes[row, 2 * column + 1]
        picture.imshow(image)
        picture.set_title(Path(paths[index]).parent.name, fontsize=6)
        overlays.draw_map(overlay, image, maps[index], grid, backbone.stride / size, most)
        if boxes:
            overlays.draw_box(overlay, boxes[index], "cyan")
    uniform = 100 / maps.shape[1]
    figure.suptitle(
        f"{name}: dark 0 %, bright {100 * most:.1f} % on one patch, one "
        f"scale for all (uniform: {uniform:.1f} %)" + ("; box: the part" if boxes else ""),
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_html(results: dict, pictures: list[tuple[str, Path]], path: Path) -> None:
    """One self-contained page: the figures as tables, the pictures inside."""
    parts = [page.table(results["facts"].items()), page.command(results["command"])]
    if results["tables"]:
        parts.append(page.paragraph("Each figure stands beside its zero: what no learning gives."))
    for name, table in results["tables"].items():
        parts += [page.heading(name), page.table(table.items())]
    for name, picture in pictures:
        parts += [page.heading(name), page.picture(picture, name)]
    page.write(path, results["title"], parts)
