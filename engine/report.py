"""What a run came to: figures beside their zeros, and pictures that a person can look at."""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop

from datasets.folder import ImageFolder, load_image
from datasets.multicrop import eval_transform
from engine import pointing
from engine.features import extract, gallery_and_queries
from engine.knn import knn_accuracy
from models.backbone import Backbone
from models.mil import GatedAttentionPool
from models.network import Network
from utils.distributed import World
from utils.errors import InputError

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

IMAGES_SHOWN = 24


@dataclass(frozen=True)
class Evaluation:
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


def image_knn(backbone: Backbone, where: Evaluation) -> dict[str, float]:
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


def attention_maps(
    network: Network, pools: list[GatedAttentionPool], where: Evaluation
) -> list[Tensor]:
    """MIL attention [n, N] of each pooling over the query images, in their order, in one pass."""

    def attention(images: Tensor) -> Tensor:
        embeddings = network.head_dense(network.backbone(images)[1])
        return torch.stack([pool(embeddings).exp() for pool in pools], dim=1)

    maps = extract(
        attention,
        ImageFolder(where.queries, eval_transform(where.size, where.size)),
        where.world,
        where.batch,
        where.workers,
    ).values
    return list(maps.unbind(1))


def pointing_figures(
    network: Network,
    untrained_pool: GatedAttentionPool,
    boxes: list[pointing.Box],
    box_size: int,
    where: Evaluation,
) -> tuple[dict[str, float], Tensor]:
    """Pointing accuracy beside its three zeros, percent; and the attention maps [n, N].

    boxes: one a query image, in pixels of images of box_size x box_size.
    """
    grid = network.backbone.patch_grid(where.size, where.size)
    cell = network.backbone.stride * box_size / where.size
    touching = pointing.cells_touching(boxes, grid, cell)
    maps, untrained = attention_maps(network, [network.pool, untrained_pool], where)
    return {
        "accuracy": pointing.pointing(maps, touching),
        "chance": pointing.chance(touching),
        "best_fixed_cell": pointing.best_fixed_cell(touching),
        "untrained_pooling": pointing.pointing(untrained, touching),
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
    panels = [
        ("loss", [n for n in ("loss", "L_I", "L_R", "L_S", "L_T", "T", "S") if n in steps[0]]),
        ("teacher, nats", ["teacher_entropy", "teacher_kl_uniform", "teacher_information"]),
        ("effective rank of the features", ["feature_rank"]),
        ("gradient norm", ["grad_norm"]),
    ]
    if "attention_entropy" in steps[0]:
        panels.append(("attention entropy (1: uniform)", ["attention_entropy"]))
    panels.append(("learning rate", ["lr"]))
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
    backbone: Backbone,
    size: int,
    folder: Path,
    paths: list[str],
    boxes: list[pointing.Box] | None,
    path: Path,
) -> None:
    """Query images, each beside its attention map, with the part's box where known, as PNG.

    maps [n, N]: of images shown to the backbone at size x size pixels.
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
    for place, index in enumerate(shown):
        row, column = divmod(place, columns)
        image = load_image(folder / paths[index])
        image = center_crop(image, min(image.size))  # what the evaluation shows the network
        picture, overlay = axes[row, 2 * column], axes[row, 2 * column + 1]
        picture.imshow(image)
        picture.set_title(Path(paths[index]).parent.name, fontsize=6)
        overlay.imshow(image, alpha=0.45)
        cell = backbone.stride * image.width / size
        overlay.imshow(
            maps[index].view(grid),
            extent=(0, grid[1] * cell, grid[0] * cell, 0),
            cmap="inferno",
            alpha=0.6,
            interpolation="nearest",
            vmin=0,
            vmax=maps[shown].max().item(),
        )
        overlay.set(xlim=(0, image.width), ylim=(image.height, 0))
        if boxes:
            x0, y0, x1, y1 = boxes[index]
            overlay.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="cyan", linewidth=1)
            )
    uniform = 100 / maps.shape[1]
    figure.suptitle(
        f"MIL attention: dark 0 %, bright {100 * maps[shown].max().item():.1f} % on one patch, one "
        f"scale for all (uniform: {uniform:.1f} %)" + ("; box: the part" if boxes else ""),
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_html(results: dict, pictures: list[tuple[str, Path]], path: Path) -> None:
    """One self-contained page: the figures as tables, the pictures inside."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Report of a run</title>",
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:1300px;margin:2em auto;"
        "padding:0 1em}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;"
        "padding:.3em .8em;text-align:left}td.n{text-align:right}img{max-width:100%}</style>",
        f"<h1>{html.escape(results['title'])}</h1>",
        "<table>"
        + "".join(
            f"<tr><td>{html.escape(label)}</td><td>{html.escape(str(value))}</td></tr>"
            for label, value in results["facts"].items()
        )
        + "</table>",
        f"<p>Command: <code>{html.escape(results['command'])}</code></p>",
    ]
    if results["tables"]:
        parts.append("<p>Each figure stands beside its zero: what no learning would give.</p>")
    for name, table in results["tables"].items():
        rows = "".join(
            f"<tr><td>{html.escape(label)}</td><td class='n'>{value:.2f}</td></tr>"
            for label, value in table.items()
        )
        parts.append(f"<h2>{html.escape(name)}</h2><table>{rows}</table>")
    for caption, picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(caption)}</h2>"
            f"<img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        )
    path.write_text("\n".join(parts) + "\n</html>\n")
