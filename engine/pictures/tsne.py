"""t-SNE of image features as a picture (van der Maaten and Hinton 2008)."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from engine.pictures.drawing import DPI, LOOK, short
from utils.errors import InputError

LEGEND_CLASSES = 20


def stratified_subset(labels: Tensor, most: int, seed: int) -> Tensor:
    """At most `most` images, of each class about its share: int64 indices, ascending.

    labels: int64 [n]. `seed` decides which images of a class, and which classes give one more
    where shares are not whole. All are taken where n <= most.
    """
    count, labels = min(most, len(labels)), labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].sort(stable=True).indices]  # by class, random within
    # At even distances in that order, from a random start.
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    places = (torch.arange(count) + start) * len(labels) / max(count, 1)
    return order[places.long()].sort().values


@LOOK
def plot_tsne(
    features: Tensor, labels: Tensor, classes: list[str], seed: int, most: int = 2000
) -> Figure | None:
    """t-SNE of L2-normalised features by scikit-learn; None where there are fewer than 3 images.

    features: float [n, D]; labels: int64 [n], indices into `classes`. At most `most`
    images are drawn, by `stratified_subset`; the start is the PCA, the perplexity
    (n - 1) / 3 but within 1 and 30. Raises InputError where features are not finite.
    """
    subset = stratified_subset(labels, most, seed)
    if len(subset) < 3:
        return None
    drawn = F.normalize(features.detach().cpu()[subset].double(), dim=1)
    if not drawn.isfinite().all():
        raise InputError(
            "the features hold NaN or infinity, so t-SNE cannot place them: the network that "
            "made them has diverged, take an earlier checkpoint."
        )
    perplexity = min(30, max(1, (len(subset) - 1) / 3))
    # The PCA of features that are all alike is undefined.
    varied = drawn.shape[1] > 1 and (drawn - drawn[0]).abs().max() > 1e-12
    start = "pca" if varied else "random"
    tsne = TSNE(perplexity=perplexity, init=start, random_state=seed % 2**32)
    points = tsne.fit_transform(drawn.float().numpy())
    figure = Figure(figsize=(10, 8), dpi=DPI, layout="constrained")
    axis = figure.add_subplot()
    _scatter(axis, points, labels.cpu()[subset], classes)
    count = f"{len(subset)} of {len(labels)}" if len(subset) < len(labels) else len(subset)
    axis.set(xticks=[], yticks=[], title=f"t-SNE of the features of {count} images")
    axis.set_aspect("equal", adjustable="datalim")
    return figure


def _scatter(axis: Axes, points: np.ndarray, labels: Tensor, classes: list[str]) -> None:
    present = labels.unique().tolist()
    look = {"s": 40 if len(points) <= 300 else 16, "alpha": 0.8, "linewidths": 0}
    if len(present) > LEGEND_CLASSES:
        # In random order no class lies on top of all others.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        dots = axis.scatter(*points[order].T, c=labels[order], cmap="turbo", **look)
        axis.figure.colorbar(dots, label=f"class number ({len(present)} classes)", shrink=0.7)
        return
    colors = matplotlib.colormaps["tab10"].colors
    for place, label in enumerate(present):
        name = short(classes[label], 30)
        color, marker = colors[place % 10], "o^"[place // 10]
        axis.scatter(*points[labels == label].T, color=color, marker=marker, label=name, **look)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, markerscale=1.5)
