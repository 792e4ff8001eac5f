"""Pictures of the evaluations: their figures on known predictions, and what the pictures hold."""

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from datasets.folder import LabelledImages
from engine.pictures.classes import most_confused, per_class_accuracy, plot_classes
from engine.pictures.curves import plot_curves, read_log
from engine.pictures.drawing import RIGHT, WRONG, save
from engine.pictures.retrieved import choose_queries, plot_retrieved
from engine.pictures.tsne import plot_tsne, stratified_subset
from utils.errors import InputError

# Mathematics to matplotlib, longer than any caption, CUB's form, no letters of the usual font,
# bytes of a file's name that are no UTF-8.
NAMES = [
    "$x_1^{ costs 5$",
    "Lincoln Sparrow (Adult/Breeding) " * 3,
    "001.Black_footed_Albatross",
    "信天翁" * 20,
    "bad\udcff",
]


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.fixture
def grey(tmp_path) -> LabelledImages:
    """Four grey images of classes 0, 0, 1 and 1, and a broken one of class 0."""
    for index in range(4):
        Image.new("RGB", (50, 40), (40 + 40 * index,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"broken")

    paths = [f"{i}.png" for i in range(5)]
    return LabelledImages(tmp_path, paths, [0, 0, 1, 1, 0], ["a_bird", "002.other"])


def frame(axis: Axes) -> tuple[str, str]:
    """Colour and line of a cell's frame, the same on its four sides."""
    sides = [axis.spines[side] for side in ("left", "right", "top", "bottom")]
    assert all(side.get_visible() for side in sides)
    (found,) = {(to_hex(side.get_edgecolor()), side.get_linestyle()) for side in sides}
    return found


def test_a_row_is_the_query_and_its_hits_with_their_names_and_frames(grey):
    places = torch.tensor([[1, 2, 3, 4], [0, 2, 3, 1]])
    figure = plot_retrieved(grey, grey, places, [0, 2], "some title")
    rows = np.array(figure.axes).reshape(2, 5)
    assert [axis.get_title() for axis in rows[0]] == ["query", "hit 1", "hit 2", "hit 3", "hit 4"]
    shades = [[np.asarray(axis.images[0].get_array()) for axis in row] for row in rows]
    assert all(shade.shape == (160, 160, 3) for row in shades for shade in row)  # square, uncut
    assert [[shade.mean() for shade in row] for row in shades] == [
        [40, 80, 120, 160, 255],  # the last cannot be read
        [120, 40, 120, 160, 80],
    ]
    assert [text.get_text() for axis in rows.flat for text in axis.texts] == ["unreadable"]
    names = [axis.get_xlabel() for axis in rows[0]]
    assert names == ["a bird", "a bird", "other", "other", "a bird"]
    right, wrong = (RIGHT, "-"), (WRONG, "--")
    names = {"solid": "-", "dashed": "--"}
    frames = [[frame(axis) for axis in row[1:]] for row in rows]
    frames = [[(color, names.get(line, line)) for color, line in row] for row in frames]
    assert frames == [[right, wrong, wrong, right], [wrong, right, right, wrong]]
    assert figure.get_suptitle() == "some title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "same class as the query",
        "another class",
    ]


def test_many_hits_have_smaller_pictures(grey):
    figure = plot_retrieved(grey, grey, torch.zeros(4, 10).long(), [0] * 4, "title")
    assert figure.axes[0].images[0].get_array().shape == (121, 121, 3)


def test_names_of_every_kind_can_be_drawn(grey, tmp_path):
    images = LabelledImages(grey.root, [*grey.paths[:4], "0.png"], list(range(5)), NAMES)
    places = torch.arange(5).expand(2, 5)
    predicted, labels = torch.tensor([1, 2, 3, 4, 0]), torch.arange(5)
    accuracy = per_class_accuracy(predicted, labels, NAMES)
    title = "$a_{ " * 80
    figures = [
        plot_retrieved(images, images, places, [0, 1], title),
        plot_classes(accuracy, most_confused(predicted, labels, NAMES), title),
        plot_tsne(torch.eye(5), labels, NAMES, 0),
    ]
    for figure in figures:
        save(figure, tmp_path / "picture.png")
        assert read(tmp_path / "picture.png").std() > 5
    shown = [label.get_text() for label in figures[1].axes[0].get_yticklabels()]
    assert "$x 1^{ costs 5$" in shown
    assert "Lincoln Sparrow…dult/Breeding)" in shown  # both ends stay
    assert "Black footed Albatross" in shown


def test_queries_are_spread_from_the_best_to_the_worst():
    precision = torch.tensor([0.1, 0.9, 0.0, 0.5, 0.7, 0.3, 0.9])
    assert choose_queries(precision, 7) == [1, 6, 4, 3, 5, 0, 2]
    assert choose_queries(precision, 20) == [1, 6, 4, 3, 5, 0, 2]
    assert choose_queries(precision, 2) == [1, 2]
    assert choose_queries(torch.arange(100.0), 4) == [99, 66, 33, 0]


def test_class_figures_on_known_predictions():
    classes = ["c", "b", "a", "empty"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 1, 1, 2, 1, 0, 3, 1])
    accuracy = per_class_accuracy(predicted, labels, classes)
    assert accuracy == {
        "c": {"accuracy": 25, "images": 4},
        "b": {"accuracy": 50, "images": 2},
        "a": {"accuracy": 0, "images": 2},
    }
    confused = most_confused(predicted, labels, classes)
    # By images, equals by the names of the true and then of the predicted class.
    assert [tuple(pair.values()) for pair in confused] == [
        ("c", "b", 2, 50),
        ("a", "b", 1, 50),
        ("a", "empty", 1, 50),
        ("b", "c", 1, 50),
        ("c", "a", 1, 25),
    ]
    assert most_confused(predicted, labels, classes, 2) == confused[:2]
    assert most_confused(labels, labels, classes) == []
    assert json.loads(json.dumps([accuracy, confused])) == [accuracy, confused]


def bars(axis: Axes) -> list[tuple[str, float]]:
    names = [label.get_text() for label in axis.get_yticklabels()]
    return list(zip(names, [bar.get_width() for bar in axis.patches], strict=True))


@pytest.mark.parametrize("classes", [1, 40, 41, 200])
def test_bars_show_the_accuracies(classes):
    accuracy = {f"class_{i}": {"accuracy": 100 * i / classes, "images": 9} for i in range(classes)}
    confused = [{"true": "a_b", "predicted": "c", "images": 4, "percent": 44.4}]
    figure = plot_classes(accuracy, confused, "10-NN")
    expected = [(f"class {i}", 100 * i / classes) for i in reversed(range(classes))]
    *curve, named, pairs = figure.axes
    if classes > 40:
        (line, mean) = curve[0].lines
        assert list(line.get_ydata()) == [value for _, value in expected]
        assert mean.get_ydata()[0] == pytest.approx(50, abs=2)
        expected = [*expected[:15], (f"({classes - 30} classes between)", 0), *expected[-15:]]
    assert bars(named) == expected
    texts = [text.get_text() for text in named.texts]
    assert texts[0] == f"{100 * (classes - 1) / classes:.1f} % of 9"
    assert bars(pairs) == [("a b → c", 4)]
    assert [text.get_text() for text in pairs.texts] == ["4 (44 %)"]


def test_nothing_to_show_is_said():
    *_, pairs = plot_classes({"a": {"accuracy": 100.0, "images": 9}}, [], "10-NN").axes
    assert pairs.texts[0].get_text() == "no image was taken for another class"


def points(figure: Figure) -> dict[str, np.ndarray]:
    """Where t-SNE put each class's images."""
    dots = figure.axes[0].collections
    return {group.get_label(): np.asarray(group.get_offsets()) for group in dots}


def test_tsne_puts_images_of_a_class_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 8, generator=generator) * 0.1 + torch.eye(8)[labels]
    found = points(plot_tsne(features, labels, ["a", "b"], 0))
    assert [len(of_class) for of_class in found.values()] == [30, 30]
    between = np.linalg.norm(found["a"].mean(0) - found["b"].mean(0))
    assert between > 2 * max(found["a"].std(0).max(), found["b"].std(0).max())
    again = points(plot_tsne(features, labels, ["a", "b"], 0))
    assert all(np.array_equal(found[name], again[name]) for name in ("a", "b"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [0, 2, 3, 6])
def test_tsne_of_few_or_equal_images(n):
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    for shown in (features, features[:, :1], torch.ones(n, 4)):
        figure = plot_tsne(shown, torch.zeros(n).long(), ["a"], 0)
        if n < 3:
            assert figure is None
        else:
            ((name, dots),) = points(figure).items()
            assert (name, len(dots)) == ("a", n)
            assert np.isfinite(dots).all()


def test_tsne_of_many_classes_has_a_colour_map_and_no_more_images_than_asked():
    labels = torch.arange(63) % 21
    features = torch.randn(63, 4, generator=torch.Generator().manual_seed(0))
    names = [f"class {i}" for i in range(21)]
    axis, bar = plot_tsne(features, labels, names, 0, most=50).axes
    (dots,) = axis.collections
    subset = stratified_subset(labels, 50, 0)
    assert sorted(dots.get_array().tolist()) == sorted(labels[subset].tolist())
    assert axis.get_title() == "t-SNE of the features of 50 of 63 images"
    assert bar.get_ylabel() == "class number (21 classes)"


def test_tsne_refuses_features_that_are_not_finite():
    features = torch.full((5, 4), float("nan"))
    with pytest.raises(InputError, match="NaN"):
        plot_tsne(features, torch.zeros(5).long(), ["a"], 0)


def test_the_subset_has_each_class_in_its_share():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    labels = labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    subset = stratified_subset(labels, 50, 1)
    assert labels[subset].bincount().tolist() == [30, 15, 5]
    assert subset.unique().tolist() == subset.tolist()  # ascending, none twice
    assert torch.equal(subset, stratified_subset(labels, 50, 1))
    assert not torch.equal(subset, stratified_subset(labels, 50, 2))
    assert stratified_subset(labels, 100, 1).tolist() == list(range(100))
    # Classes of one image: those drawn are not the first ones.
    assert stratified_subset(torch.arange(100), 50, 1).max() > 60


def test_a_picture_that_cannot_be_written_leaves_the_former(tmp_path):
    # The longest name that a file can have: there is no room for a temporary one beside it.
    former = tmp_path / ("p" * 251 + ".png")
    former.write_bytes(b"former")
    for path in (former, tmp_path / "missing" / "picture.png"):
        with pytest.raises(InputError, match=r"the picture .* could not be written"):
            save(Figure(), path)
    assert former.read_bytes() == b"former"
    # More than matplotlib draws: eight thousand images of `visualize.py --count`.
    with pytest.raises(InputError, match=r"would have 800 x 440000 pixels.*show fewer images"):
        save(Figure(figsize=(8, 4400), dpi=100), tmp_path / "large.png")
    assert [path.name for path in tmp_path.iterdir()] == [former.name]


def test_a_log_that_is_being_written_is_read_but_for_its_torn_line(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        '{"step": 1, "epoch": 1.0, "loss": null, "L_I": 2.0, "Q": 1.0}\n{"step": 2, "epoch": 2.0, '
        '"loss": 3.0, "Q": 1.0, "L_T": 1.0}\n{"step": 3, "ep'
    )
    lines = read_log(log)
    assert [line["step"] for line in lines] == [1, 2]
    axis = plot_curves(lines).axes[0]  # a term of any name is beside the loss, of whatever part
    shown = [text.get_text() for text in axis.get_legend().get_texts()]
    assert shown == ["loss", "L_I", "Q", "L_T"]
    for text in ("", "3\n", "[]\n"):
        log.write_text(text)
        with pytest.raises(InputError, match="is not the log of a run"):
            read_log(log)
