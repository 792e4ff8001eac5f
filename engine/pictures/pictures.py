"""Pictures of the evaluations: retrieved images, accuracy by class, t-SNE of the features."""

import contextlib
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from sklearn.manifold import TSNE
from torch import Tensor

from datasets.folder import LabelledImages, UnreadableImage, load_image
from utils.errors import InputError
from utils.files import replacing

RIGHT, WRONG, UNKNOWN = "#1a9641", "#d7191c", "#888888"
_BAND = "#e6e9ef"
NAMED_CLASSES = 40
EXTREME_CLASSES = 15
LEGEND_CLASSES = 20

_DPI = 100
# Photographs in PNG take some 2.5 bytes a pixel: thumbnails of all cells together stay near 1.6 MB.
_PIXELS_OF_THUMBNAILS = 650_000
_SMALLEST_SIDE, _LARGEST_SIDE = 64, 160
_MARGIN, _GAP, _FRAME = 20, 14, 3
_CAPTION, _LINE = 30, 18
# DejaVu, matplotlib's own font, has no Chinese, Japanese or Korean.
_FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei")


@contextlib.contextmanager
def _drawing(path: str | Path, width: float, height: float, layout: str | None) -> Iterator[Figure]:
    """A figure of width x height pixels, written to `path` at the end of the block."""
    installed = {font.name for font in fontManager.ttflist}
    fonts = ["sans-serif", *(name for name in _FALLBACK_FONTS if name in installed)]
    with (
        matplotlib.rc_context({"text.parse_math": False, "font.family": fonts}),
        warnings.catch_warnings(),
    ):
        # A letter that no font has is drawn as a box; a line on stderr for each helps nobody.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout=layout)
        yield figure
        with replacing(path, "picture") as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI)


def _readable(name: str) -> str:
    """A class name as shown: CUB's numbers off, underscores as spaces."""
    return re.sub(r"^\d+\.(?=\D)", "", name).replace("_", " ").strip() or name


def _columns(name: str, columns: int) -> int:
    """How many letters of `name` fit where `columns` narrow ones do."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in name)
    return max(columns // (2 if wide else 1), 2)


def _short(name: str, columns: int) -> str:
    """On one line: the middle is cut out, since fine-grained names differ at either end."""
    name = _printable(" ".join(_readable(name).split()))
    most = _columns(name, columns)
    if len(name) <= most:
        return name
    return name[: most // 2].rstrip() + "…" + name[len(name) - (most - most // 2 - 1) :].lstrip()


def _wrapped(text: str, columns: int, lines: int) -> str:
    pieces = textwrap.wrap(text, _columns(text, columns), max_lines=lines, placeholder="…")
    return _printable("\n".join(pieces))


def _printable(text: str) -> str:
    """Names of files that are not UTF-8 hold letters that no font takes."""
    return text.encode("utf-8", "replace").decode()


def _class_name(classes: list[str], label: int) -> str:
    return classes[label] if label >= 0 else "unknown class"


def choose_queries(average_precision: Tensor, count: int = 8) -> list[int]:
    """Queries to show: evenly spaced by rank from the best average precision to the worst.

    average_precision: [m] float; NaN marks queries that have none, which are not chosen.
    Returns min(count, m) indices, the best first; of equals the earlier counts as better.
    A single one is the median.
    """
    known = (~average_precision.isnan()).nonzero().flatten()
    ranking = known[average_precision[known].sort(descending=True, stable=True).indices]
    count = min(count, len(ranking))
    if count == 1:
        return [int(ranking[(len(ranking) - 1) // 2])]
    places = torch.linspace(0, len(ranking) - 1, count, dtype=torch.float64).round().long()
    return ranking[places.to(ranking.device)].tolist()


def retrieval_gallery(
    path: str | Path,
    queries: LabelledImages,
    gallery: LabelledImages,
    places: Tensor,
    chosen: list[int],
    title: str,
) -> None:
    """One row a chosen query: the query, then its first hits, right and wrong ones told apart.

    queries, gallery: labels of both number the gallery's classes; -1 is neither right nor wrong.
    The files are shown as they are, cropped to the centre square; `transform` is not used.
    places: int64 [q, h], the gallery's places of the h first hits of each of the q `chosen`
    queries. Files that cannot be read are shown as empty boxes.
    Raises InputError where the picture cannot be written or no query is chosen.
    """
    if not chosen:
        raise InputError(f"there is no query to show in {path}: give at least one.")
    hits = places.shape[1]
    side = int((_PIXELS_OF_THUMBNAILS / (len(chosen) * (hits + 1))) ** 0.5)
    side = min(max(side, _SMALLEST_SIDE), _LARGEST_SIDE)
    pitch, row_height = side + _GAP, side + _CAPTION + _GAP
    first_hit = _MARGIN + pitch + 2 * _GAP
    width = max(first_hit + hits * pitch - _GAP + _MARGIN, 460)
    heading = _wrapped(title, (width - 2 * _MARGIN) // 8, 3)
    top = _MARGIN + _LINE * (heading.count("\n") + 1) + 2 * _LINE
    bottom = top + len(chosen) * row_height
    height = bottom + 2 * _LINE

    with _drawing(path, width, height, None) as figure:
        axis = figure.add_axes((0, 0, 1, 1))
        axis.text(_MARGIN, _MARGIN, heading, fontsize=10, weight="bold", va="top")
        _centred(axis, _MARGIN + side / 2, top - _LINE, "query", weight="bold")
        for hit in range(hits):
            _centred(axis, first_hit + hit * pitch + side / 2, top - _LINE, f"hit {hit + 1}")
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(_BAND, (_MARGIN - 10, top - 3 * _LINE // 2, _MARGIN + side + 10, bottom - 4))
        for row, (query, found) in enumerate(zip(chosen, places.tolist(), strict=True)):
            cells = [(_MARGIN, queries, query, (1, "black", "solid"))]
            for hit, place in enumerate(found):
                frame = _frame(queries.labels[query], gallery.labels[place])
                cells.append((first_hit + hit * pitch, gallery, place, frame))
            for x, images, index, frame in cells:
                name = _class_name(gallery.classes, images.labels[index])
                corner = x, top + row * row_height
                _add_image(axis, canvas, corner, side, images.root / images.paths[index], name)
                _add_frame(axis, corner, (side, side), *frame)
        axis.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest")
        for x, text, label in ((_MARGIN, "same class as the query", 0), (240, "another class", 1)):
            _add_frame(axis, (x, bottom + 2), (26, 18), *_frame(0, label))
            axis.text(x + 36, bottom + 11, text, fontsize=8, va="center")
        axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        axis.axis("off")


def _centred(axis: Axes, x: float, y: float, text: str, **look) -> None:
    axis.text(x, y, text, fontsize=8, ha="center", va="center", **look)


def _frame(query_label: int, label: int) -> tuple[float, str, str]:
    if min(query_label, label) < 0:
        return _FRAME, UNKNOWN, "dotted"
    return (_FRAME, RIGHT, "solid") if query_label == label else (_FRAME, WRONG, "dashed")


def _add_frame(axis: Axes, corner: tuple, size: tuple, line: float, color: str, style: str) -> None:
    """A line of `line` pixels around, not over, a rectangle."""
    look = {"edgecolor": color, "linestyle": style, "linewidth": line * 72 / _DPI, "snap": False}
    (x, y), (width, height) = corner, size
    outer = (x - line / 2, y - line / 2), width + line, height + line
    axis.add_patch(Rectangle(*outer, fill=False, **look))


def _add_image(
    axis: Axes, canvas: Image.Image, corner: tuple, side: int, path: Path, name: str
) -> None:
    """The centre square of a file at side x side pixels, and its class's name below."""
    x, y = corner
    try:
        square = ImageOps.fit(load_image(path), (side, side), Image.Resampling.LANCZOS)
    except UnreadableImage:
        square = Image.new("RGB", (side, side), "white")
        _centred(axis, x + side / 2, y + side / 2, "unreadable", color="#555555")
    canvas.paste(square, corner)
    name = _wrapped(_readable(name), side // 6 + 1, 2)
    axis.text(x + side / 2, y + side + 6, name, fontsize=7, ha="center", va="top")


def per_class_accuracy(
    predicted: Tensor, labels: Tensor, classes: list[str]
) -> dict[str, dict[str, float | int]]:
    """Accuracy of each class, percent of its images, in the order of `classes`, for JSON.

    predicted, labels: int64 [m], indices into `classes`; images labelled -1 do not count.
    Returns name -> {"accuracy": percent, "images": how many}; classes without images are absent.
    """
    known = labels >= 0
    images = torch.bincount(labels[known], minlength=len(classes)).tolist()
    right = torch.bincount(labels[known & (predicted == labels)], minlength=len(classes)).tolist()
    return {
        name: {"accuracy": 100 * hits / count, "images": count}
        for name, hits, count in zip(classes, right, images, strict=True)
        if count
    }


def most_confused(
    predicted: Tensor, labels: Tensor, classes: list[str], count: int = 20
) -> list[dict[str, str | float | int]]:
    """The pairs of classes with the most wrong predictions, for JSON.

    predicted, labels: int64 [m], indices into `classes`; images labelled -1 do not count.
    Returns at most `count` of {"true": name, "predicted": name, "images": how many, "percent":
    their share of the true class's images}, by images descending, then by names.
    """
    wrong = (labels >= 0) & (predicted != labels)
    pairs = torch.stack([labels[wrong], predicted[wrong]], dim=1)
    pairs, images = pairs.unique(dim=0, return_counts=True)
    totals = torch.bincount(labels[labels >= 0], minlength=len(classes)).tolist()
    confused = [
        {
            "true": classes[true],
            "predicted": classes[given],
            "images": number,
            "percent": 100 * number / totals[true],
        }
        for (true, given), number in zip(pairs.tolist(), images.tolist(), strict=True)
    ]
    confused.sort(key=lambda pair: (-pair["images"], pair["true"], pair["predicted"]))
    return confused[:count]


def plot_classes(
    path: str | Path,
    accuracy: dict[str, dict[str, float | int]],
    confused: list[dict[str, str | float | int]],
    title: str,
) -> None:
    """Accuracy by class and the most confused pairs, as PNG.

    accuracy: of `per_class_accuracy`; all classes up to NAMED_CLASSES by name, of more a sorted
    curve and the EXTREME_CLASSES best and worst. confused: of `most_confused`.
    Raises InputError where the picture cannot be written.
    """
    ranking = sorted(accuracy.items(), key=lambda item: (-item[1]["accuracy"], item[0]))
    many = len(ranking) > NAMED_CLASSES
    named, skipped = ranking, 0
    if many:
        named = ranking[:EXTREME_CLASSES] + ranking[-EXTREME_CLASSES:]
        skipped = len(ranking) - len(named)
    bars_height = 90 + 20 * max(len(named) + 2 * bool(skipped), len(confused), 4)
    curve_height = 260 if many else 0
    heading = _wrapped(title, 150, 3)
    height = bars_height + curve_height + 40 + _LINE * heading.count("\n")
    with _drawing(path, 1400, height, "constrained") as figure:
        figure.suptitle(heading, fontsize=11, weight="bold")
        grid = figure.add_gridspec(
            1 + many, 2, height_ratios=[curve_height, bars_height][1 - many :]
        )
        if many:
            _plot_sorted(figure.add_subplot(grid[0, :]), [c["accuracy"] for _, c in ranking])
        _plot_named(figure.add_subplot(grid[-1, 0]), named, skipped)
        _plot_confused(figure.add_subplot(grid[-1, 1]), confused)


def _plot_sorted(axis: Axes, accuracies: list[float]) -> None:
    mean = sum(accuracies) / len(accuracies)
    axis.fill_between(range(1, len(accuracies) + 1), accuracies, alpha=0.25)
    axis.plot(range(1, len(accuracies) + 1), accuracies)
    axis.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.1f} %")
    axis.set(
        xlim=(1, len(accuracies)),
        ylim=(0, 102),
        xlabel="classes, the best first",
        ylabel="accuracy, percent",
        title=f"accuracy of all {len(accuracies)} classes",
    )
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _plot_named(axis: Axes, named: list[tuple[str, dict]], skipped: int) -> None:
    """Bars by name, the best at the top; where classes are skipped, a gap after the first half."""
    if not named:
        _say(axis, "accuracy by class", "no image has a class")
        return
    half = len(named) // 2
    rows = [row + 2 * (bool(skipped) and row >= half) for row in range(len(named))]
    values = [entry["accuracy"] for _, entry in named]
    texts = [f"{entry['accuracy']:.1f} % of {entry['images']}" for _, entry in named]
    _bars(axis, rows, values, [_short(name, 30) for name, _ in named], texts, RIGHT)
    title = f"accuracy by class: the {half} best and worst" if skipped else "accuracy by class"
    if skipped:
        axis.text(
            50, half + 0.5, f"{skipped} classes between", fontsize=8, ha="center", va="center"
        )
    else:
        mean = sum(values) / len(values)
        axis.axvline(mean, color="black", linestyle="--", linewidth=1)
        title += f" (dashed: mean {mean:.1f} %)"
    axis.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="percent of the images", title=title)


def _plot_confused(axis: Axes, confused: list[dict]) -> None:
    title = "most confused: true → predicted"
    if not confused:
        _say(axis, title, "no image was taken for another class")
        return
    values = [pair["images"] for pair in confused]
    names = [f"{_short(pair['true'], 25)} → {_short(pair['predicted'], 25)}" for pair in confused]
    texts = [f"{pair['images']} ({pair['percent']:.0f} %)" for pair in confused]
    _bars(axis, list(range(len(confused))), values, names, texts, WRONG)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(
        xlim=(0, 1.25 * max(values)),
        xlabel="images (in brackets: share of the true class)",
        title=title,
    )


def _bars(
    axis: Axes,
    rows: list[int],
    values: list[float],
    names: list[str],
    texts: list[str],
    color: str,
) -> None:
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    look = {"fontsize": 7, "va": "center", "bbox": background}
    axis.barh(rows, values, height=0.7, color=color, alpha=0.75)
    axis.set_yticks(rows, names, fontsize=8)
    axis.set_ylim(max(rows) + 0.7, -0.7)
    for row, value, text in zip(rows, values, texts, strict=True):
        axis.annotate(text, (value, row), (4, 0), textcoords="offset points", **look)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _say(axis: Axes, title: str, text: str) -> None:
    axis.set(title=title, xticks=[], yticks=[])
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")


def stratified_subset(labels: Tensor, most: int, seed: int) -> Tensor:
    """At most `most` images, of each class about its share: int64 indices, ascending.

    labels: int64 [n]. `seed` decides which images of a class, and which classes give one more
    where shares are not whole. All are taken where n <= most.
    """
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].sort(stable=True).indices]  # by class, random within
    _, numbers, counts = labels[order].unique_consecutive(return_inverse=True, return_counts=True)
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[numbers]
    # Evenly spread over (0, 1) in each class, from a random offset: the lowest are its share.
    offsets = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    spread = (within + offsets[numbers]) / counts[numbers]
    return order[spread.sort(stable=True).indices[:most]].sort().values


def plot_tsne(
    path: str | Path,
    features: Tensor,
    labels: Tensor,
    classes: list[str],
    seed: int,
    most: int = 2000,
) -> int:
    """t-SNE (van der Maaten and Hinton 2008) of L2-normalised features, as PNG.

    features: float [n, D]; labels: int64 [n], indices into `classes` or -1. At most `most`
    images are drawn, by `stratified_subset`; the start is the PCA, the perplexity
    (n - 1) / 3 but within 1 and 30. Returns how many images are drawn: 0, and no picture is
    written, where there are fewer than 3.
    Raises InputError where features are not finite or the picture cannot be written.
    """
    subset = stratified_subset(labels, most, seed)
    if len(subset) < 3:
        return 0
    drawn = F.normalize(features.detach().cpu()[subset].double(), dim=1)
    if not drawn.isfinite().all():
        raise InputError(
            "the features hold NaN or infinity, so t-SNE cannot place them: the network that "
            "made them has diverged, take an earlier checkpoint."
        )
    perplexity = min(30, max(1, (len(subset) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init=_start(drawn), random_state=seed % 2**32)
    points = tsne.fit_transform(drawn.float().numpy())
    with _drawing(path, 1000, 800, "constrained") as figure:
        axis = figure.add_subplot()
        _scatter(axis, points, labels.cpu()[subset], classes)
        count = f"{len(subset)} of {len(labels)}" if len(subset) < len(labels) else len(subset)
        axis.set(
            xticks=[], yticks=[], aspect="equal", title=f"t-SNE of the features of {count} images"
        )
        axis.set_adjustable("datalim")
    return len(subset)


def _start(features: Tensor) -> np.ndarray:
    """The first two principal components, at t-SNE's scale; zeros where features do not vary.

    scikit-learn's own start divides by their spread, which is 0 for constant features.
    """
    left, scale, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    components = F.pad(left * scale, (0, 2))[:, :2]
    spread = components[:, 0].std(correction=0)
    if spread > 1e-12:
        components = components / spread
    return (1e-4 * components).float().numpy()


def _scatter(axis: Axes, points: np.ndarray, labels: Tensor, classes: list[str]) -> None:
    present = labels.unique().tolist()
    size = 40 if len(points) <= 300 else 16
    if len(present) > LEGEND_CLASSES:
        # In random order no class lies on top of all others.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        dots = axis.scatter(
            *points[order].T, c=labels[order], cmap="turbo", s=size, alpha=0.8, linewidths=0
        )
        axis.figure.colorbar(dots, label=f"class number ({len(present)} classes)", shrink=0.7)
        return
    colors = matplotlib.colormaps["tab10"].colors
    for place, label in enumerate(present):
        axis.scatter(
            *points[labels == label].T,
            color=colors[place % 10],
            marker="o^"[place // 10],
            s=size,
            alpha=0.8,
            linewidths=0,
            label=_short(_class_name(classes, label), 30),
        )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, markerscale=1.5)
