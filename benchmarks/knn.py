"""Exact k-NN search beside scikit-learn's, on the same features, in turn, in one process.

    OMP_NUM_THREADS=2 python -m benchmarks.knn --output benchmarks/results/DATE-knn-cpu.json

Features are drawn: classes about a common direction, with variance that falls along the
dimensions, as networks give them; --features gaussian has neither. scikit-learn's
NearestNeighbors is tried with both metrics that rank unit vectors by cosine, and the faster is
the rival. Both get unit float32 vectors and give places and distances of the k nearest. With
--alone there is no rival, and the process's peak memory is ours.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks import common
from engine.evaluation import knn, retrieval
from engine.evaluation.similarity import Blocks, Gallery, over_blocks, unit
from utils.distributed import ALONE
from utils.errors import run_script

CPU = torch.device("cpu")
CLASSES = 200
# Both sides sum D products in float32 or better: cosines nearer than this may change places.
ROUNDING = 2e-6


def draw_features(kind: str, images: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit features [images, width] float32 and labels [images]."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=own)
    values = torch.randn(images, width, generator=own)
    if kind == "classes":
        centres = torch.randn(CLASSES, width, generator=shared)
        direction = 2 * torch.randn(width, generator=shared)
        values = (values + centres[labels] + direction) * torch.arange(1.0, width + 1) ** -0.5
    return unit(values, CPU), labels


def neighbours(gallery: Tensor, queries: Tensor, k: int) -> Tensor:
    """The places [m, k] in the gallery of each query's neighbours, by the product's search."""
    blocks = Blocks.that_fit(*gallery.shape, knn.EACH, None)
    features = Gallery(gallery, blocks, CPU)
    (places,) = over_blocks(
        lambda block, _: features.nearest(block, k)[1:], queries, blocks.queries, ALONE
    )
    return places


def timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(gallery: Tensor, queries: Tensor, ours: Tensor, theirs: Tensor) -> dict:
    """Places [m, k] of both against float64 cosines; how far apart the differing ones are."""
    differs = ours != theirs
    rows = differs.any(1)
    worst = 0.0
    for query, mine, other in zip(queries[rows], ours[rows], theirs[rows], strict=True):
        first, second = (gallery[places].double() @ query.double() for places in (mine, other))
        worst = max(worst, (first - second).abs().max().item())
    return {
        "places": differs.numel(),
        "places_that_differ": int(differs.sum()),
        "largest_cosine_gap_where_they_differ": worst,
        "same_but_for_rounding": worst < ROUNDING,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--gallery", type=int, default=20000, help="images in the gallery")
    parser.add_argument("--queries", type=int, default=20000, help="query images")
    parser.add_argument("--width", type=int, default=768, help="features of an image")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--threads", type=int, default=2, help="for both sides")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the best counts")
    parser.add_argument("--features", choices=["classes", "gaussian"], default="classes")
    parser.add_argument("--alone", action="store_true", help="measure time and memory of ours")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    gallery, labels = draw_features(args.features, args.gallery, args.width, 1)
    queries, query_labels = draw_features(args.features, args.queries, args.width, 2)

    def rival(metric: str) -> np.ndarray:
        search = NearestNeighbors(n_neighbors=args.k, algorithm="brute", metric=metric)
        return search.fit(gallery.numpy()).kneighbors(queries.numpy())[1]

    contestants = {
        "ours": lambda: neighbours(gallery, queries, args.k),
        "scikit-learn, euclidean": lambda: rival("euclidean"),
        "scikit-learn, cosine": lambda: rival("cosine"),
        "our retrieval, whole gallery": lambda: retrieval.retrieve(
            gallery, labels, queries, query_labels
        ),
    }
    if args.alone:
        contestants = {name: run for name, run in contestants.items() if name.startswith("our")}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    with threadpool_limits(args.threads):
        for _ in range(args.repeats):
            for name, run in contestants.items():
                taken, results[name] = timed(run)
                seconds[name].append(taken)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = {name: min(times) for name, times in seconds.items()}
    figures = {"best_seconds": best, "all_seconds": seconds}
    line = (
        f"{args.queries} x {args.gallery} x {args.width}, k = {args.k}, {args.threads} threads: "
        f"ours {best['ours']:.2f} s"
    )
    if args.alone:
        figures["peak_resident_gib"] = round(peak, 2)
        line += (
            f", retrieval {best['our retrieval, whole gallery']:.2f} s; peak memory {peak:.2f} GiB"
        )
    else:
        name = min((name for name in best if name.startswith("scikit")), key=best.__getitem__)
        ratio = best[name] / best["ours"]
        same = compare(gallery, queries, results["ours"], torch.from_numpy(results[name]).long())
        figures |= {"rival": name, "times_faster": ratio, "neighbours": same}
        line += (
            f", {name} {best[name]:.2f} s: {ratio:.2f} times faster; {same['places_that_differ']} "
            f"of {same['places']} places differ, by at most "
            f"{same['largest_cosine_gap_where_they_differ']:.1e} in cosine"
        )
        if not same["same_but_for_rounding"]:
            sys.exit("error: the neighbours are not the same.")
    print(line)
    what = (
        f"exact k-NN, {args.queries} queries in a gallery of {args.gallery} images, "
        f"{args.width}-d float32, k = {args.k}, features: {args.features}"
    )
    remarks = [
        "The best of several turns of each; a turn runs all contestants one after the other.",
        "Places may differ where two cosines are equal but for float32 rounding: "
        "scikit-learn sums in another order.",
    ]
    others = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
    device, versions = common.device_name("cpu", args.threads), common.versions() | others
    common.write_report(args, what, figures, remarks, device=device, versions=versions)


if __name__ == "__main__":
    run_script(main)
