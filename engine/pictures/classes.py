"""Class by class: how many images are right, which classes are taken for which; as a picture."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.pictures.drawing import DPI, LOOK, RIGHT, WRONG, short, wrapped

NAMED_CLASSES = 40
EXTREME_CLASSES = 15


def per_class_accuracy(
    predicted: Tensor, labels: Tensor, classes: list[str]
) -> dict[str, dict[str, float | int]]:
    """Accuracy of each class, percent of its images, in the order of `classes`, for JSON.

    predicted, labels: int64 [m], indices into `classes`.
    Returns name -> {"accuracy": percent, "images": how many}; classes without images are absent.
    """
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    right = torch.bincount(labels[predicted == labels], minlength=len(classes)).tolist()
    return {
        name: {"accuracy": 100 * hits / count, "images": count}
        for name, hits, count in zip(classes, right, images, strict=True)
        if count
    }


def most_confused(
    predicted: Tensor, labels: Tensor, classes: list[str], count: int = 20
) -> list[dict[str, str | float | int]]:
    """The pairs of classes with the most wrong predictions, for JSON.

    predicted, labels: int64 [m], indices into `classes`.
    Returns at most `count` of {"true": name, "predicted": name, "images": how many, "percent":
    their share of the true class's images}, by images descending, then by names.
    """
    wrong = predicted != labels
    pairs = torch.stack([labels[wrong], predicted[wrong]], dim=1)
    pairs, images = pairs.unique(dim=0, return_counts=True)
    totals = torch.bincount(labels, minlength=len(classes)).tolist()
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


@LOOK
def plot_classes(
    accuracy: dict[str, dict[str, float | int]],
    confused: list[dict[str, str | float | int]],
    title: str,
) -> Figure:
    """Accuracy by class and the most confused pairs.

    accuracy: of `per_class_accuracy`; all classes up to NAMED_CLASSES by name, of more a sorted
    curve and the EXTREME_CLASSES best and worst. confused: of `most_confused`.
    """
    ranking = sorted(accuracy.items(), key=lambda item: (-item[1]["accuracy"], item[0]))
    many = len(ranking) > NAMED_CLASSES
    bars = max(2 * EXTREME_CLASSES + 1 if many else len(ranking), len(confused), 4)
    heights = [260, 90 + 20 * bars][1 - many :]
    figure = Figure(figsize=(14, (sum(heights) + 60) / DPI), dpi=DPI, layout="constrained")
    figure.suptitle(wrapped(title, 150, 3), fontsize=11, weight="bold")
    grid = figure.add_gridspec(1 + many, 2, height_ratios=heights)
    if many:
        _plot_sorted(figure.add_subplot(grid[0, :]), [c["accuracy"] for _, c in ranking])
    _plot_named(figure.add_subplot(grid[-1, 0]), ranking, many)
    _plot_confused(figure.add_subplot(grid[-1, 1]), confused)
    return figure


def _plot_sorted(axis: Axes, accuracies: list[float]) -> None:
    mean = sum(accuracies) / len(accuracies)
    places = range(1, len(accuracies) + 1)
    axis.fill_between(places, accuracies, alpha=0.25)
    axis.plot(places, accuracies)
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


def _plot_named(axis: Axes, ranking: list[tuple[str, dict]], many: bool) -> None:
    """Bars by name, the best at the top; of many classes the best and the worst."""
    title = "accuracy by class"
    bars = [
        (short(name, 30), entry["accuracy"], f"{entry['accuracy']:.1f} % of {entry['images']}")
        for name, entry in ranking
    ]
    if many:
        between = (f"({len(bars) - 2 * EXTREME_CLASSES} classes between)", 0, "")
        bars = [*bars[:EXTREME_CLASSES], between, *bars[-EXTREME_CLASSES:]]
        title += f": the {EXTREME_CLASSES} best and worst"
    else:
        mean = sum(value for _, value, _ in bars) / len(bars)
        axis.axvline(mean, color="black", linestyle="--", linewidth=1)
        title += f" (dashed: mean {mean:.1f} %)"
    _bars(axis, bars, RIGHT)
    axis.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="percent of the images", title=title)


def _plot_confused(axis: Axes, confused: list[dict]) -> None:
    title = "most confused: true → predicted"
    if not confused:
        axis.set(title=title, xticks=[], yticks=[])
        words = "no image was taken for another class"
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")
        return
    bars = [
        (
            f"{short(pair['true'], 25)} → {short(pair['predicted'], 25)}",
            pair["images"],
            f"{pair['images']} ({pair['percent']:.0f} %)",
        )
        for pair in confused
    ]
    _bars(axis, bars, WRONG)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(
        xlim=(0, 1.25 * confused[0]["images"]),
        xlabel="images (in brackets: share of the true class)",
        title=title,
    )


def _bars(axis: Axes, bars: list[tuple[str, float, str]], color: str) -> None:
    """Horizontal bars from the top: (name, value, text at its end)."""
    names, values, texts = zip(*bars, strict=True)
    drawn = axis.barh(range(len(bars)), values, height=0.7, color=color, alpha=0.75)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.bar_label(drawn, texts, padding=4, fontsize=7, bbox=background)
    axis.set_yticks(range(len(bars)), names, fontsize=8)
    axis.set_ylim(len(bars) - 0.3, -0.7)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
