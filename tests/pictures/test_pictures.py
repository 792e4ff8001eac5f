"""Pictures of the evaluations: their figures on known predictions, and what the files show."""

import itertools
import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from datasets.folder import ImageFolder, LabelledImages
from engine.pictures import pictures
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


def count(pixels: np.ndarray, color: str) -> int:
    """Pixels of nearly this colour."""
    wanted = np.array([round(255 * part) for part in to_rgb(color)])
    return int((abs(pixels - wanted).max(-1) < 12).sum())


@pytest.fixture
def grey(tmp_path) -> LabelledImages:
    """Four grey images of classes 0, 0, 1 and unknown, and a broken one of class 0."""
    for index in range(4):
        Image.new("RGB", (50, 40), (40 + 40 * index,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"broken")

    def never(image):
        raise AssertionError("the transform was used")

    return LabelledImages(
        tmp_path, [f"{i}.png" for i in range(5)], [0, 0, 1, -1, 0], NAMES[:2], never
    )


def frames(grey, query: int, place: int) -> dict[str, int]:
    """Pixels of the frames' colours around the only hit of the only query."""
    path = grey.root / "picture.png"
    pictures.retrieval_gallery(path, grey, grey, torch.tensor([[place]]), [query], "title")
    pixels = read(path)[-245:-75]  # the thumbnails' rows: below are the names and the legend
    colors = {"right": pictures.RIGHT, "wrong": pictures.WRONG, "unknown": pictures.UNKNOWN}
    return {name: count(pixels, color) for name, color in colors.items()}


def test_right_and_wrong_hits_have_frames_of_their_own_colour_and_style(grey):
    side = 160  # the largest thumbnail
    whole = 4 * 3 * (side + 3)
    right = frames(grey, 0, 1)
    assert right == {"right": pytest.approx(whole, rel=0.02), "wrong": 0, "unknown": 0}
    wrong = frames(grey, 0, 2)
    assert wrong["right"] == wrong["unknown"] == 0
    assert 0.5 * whole < wrong["wrong"] < 0.9 * whole  # dashed
    unknown = frames(grey, 0, 3)
    assert unknown["right"] == unknown["wrong"] == 0
    assert unknown["unknown"] > 0.2 * whole  # dotted


def test_a_row_shows_the_query_then_its_hits_in_order(grey):
    path = grey.root / "picture.png"
    places = torch.tensor([[1, 2], [0, 1]])
    pictures.retrieval_gallery(path, grey, grey, places, [2, 0], "title")
    pixels = read(path)
    for row, shades in enumerate([(120, 80, 120), (40, 40, 80)]):
        line = pixels[-140 - 204 * (1 - row), :, 0].tolist()  # through the row's middle
        runs = [(shade, len(list(run))) for shade, run in itertools.groupby(line)]
        assert [run for run in runs if run[1] == 160] == [(shade, 160) for shade in shades]


def test_a_file_that_cannot_be_read_is_an_empty_box(grey):
    assert frames(grey, 0, 4)["right"] > 1000  # the label is known
    empty = read(grey.root / "picture.png")
    assert frames(grey, 4, 0)["right"] > 1000
    shades = [count(empty, f"#{shade:02x}{shade:02x}{shade:02x}") for shade in (40, 80, 120, 160)]
    assert shades[0] >= 160 * 160  # the query
    assert max(shades[1:]) < 1000  # no other image


def test_names_of_every_kind_can_be_drawn(grey, tmp_path):
    images = LabelledImages(grey.root, [*grey.paths[:4], "0.png"], list(range(5)), NAMES)
    places = torch.arange(5).expand(5, 5)
    predicted, labels = torch.tensor([1, 2, 3, 4, 0]), torch.arange(5)
    accuracy = pictures.per_class_accuracy(predicted, labels, NAMES)
    confused = pictures.most_confused(predicted, labels, NAMES)
    title = "$a_{ " * 80
    pictures.retrieval_gallery(tmp_path / "g.png", images, images, places, list(range(5)), title)
    pictures.plot_classes(tmp_path / "c.png", accuracy, confused, title)
    assert pictures.plot_tsne(tmp_path / "t.png", torch.eye(5), labels, NAMES, 0) == 5
    for name in "gct":
        assert read(tmp_path / f"{name}.png").std() > 5


def test_queries_are_spread_from_the_best_to_the_worst():
    precision = torch.tensor([0.1, 0.9, float("nan"), 0.5, 0.7, 0.3, 0.9])
    assert pictures.choose_queries(precision, 6) == [1, 6, 4, 3, 5, 0]
    assert pictures.choose_queries(precision, 20) == [1, 6, 4, 3, 5, 0]
    assert pictures.choose_queries(precision, 2) == [1, 0]
    assert pictures.choose_queries(precision, 1) == [4]
    assert pictures.choose_queries(torch.full((3,), float("nan"))) == []
    assert pictures.choose_queries(torch.arange(100.0), 4) == [99, 66, 33, 0]


def test_class_figures_on_known_predictions():
    classes = ["c", "b", "a", "empty"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1])
    predicted = torch.tensor([0, 1, 1, 2, 1, 0, 3, 1, 0])
    accuracy = pictures.per_class_accuracy(predicted, labels, classes)
    assert accuracy == {
        "c": {"accuracy": 25, "images": 4},
        "b": {"accuracy": 50, "images": 2},
        "a": {"accuracy": 0, "images": 2},
    }
    confused = pictures.most_confused(predicted, labels, classes)
    # By images, equals by the names of the true and then of the predicted class.
    assert [tuple(pair.values()) for pair in confused] == [
        ("c", "b", 2, 50),
        ("a", "b", 1, 50),
        ("a", "empty", 1, 50),
        ("b", "c", 1, 50),
        ("c", "a", 1, 25),
    ]
    assert pictures.most_confused(predicted, labels, classes, 2) == confused[:2]
    assert pictures.most_confused(labels, labels, classes) == []
    assert json.loads(json.dumps([accuracy, confused])) == [accuracy, confused]


@pytest.mark.parametrize("classes", [0, 1, 40, 41, 200])
def test_bars_show_the_accuracies(classes, tmp_path):
    """Half of the classes at 100 %, half at 50 %: the green bars' pixels follow."""

    def green(share: float) -> int:
        accuracy = {f"class_{i}": {"accuracy": share, "images": 9} for i in range(classes)}
        pictures.plot_classes(tmp_path / "classes.png", accuracy, [], "title")
        pixels = read(tmp_path / "classes.png")
        red, greens, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        assert pixels.shape[0] < 1300
        return int(((greens - red > 60) & (greens - blue > 40)).sum())

    whole, half, none = green(100), green(50), green(0)
    assert none < 100
    if classes:
        assert half == pytest.approx(whole / 2, rel=0.05)
        assert whole > 2000 * min(classes, 30)


def test_tsne_puts_images_of_a_class_together(tmp_path):
    """Two classes far apart: two groups of dots, the colours not mixed."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 8, generator=generator) * 0.1 + torch.eye(8)[labels]
    path = tmp_path / "tsne.png"
    assert pictures.plot_tsne(path, features, labels, ["a", "b"], 0) == 60
    first = path.read_bytes()
    pixels = read(path)[:, :850].astype(int)  # without the legend
    blue = np.argwhere(pixels[..., 2] - pixels[..., 0] > 80)
    orange = np.argwhere(pixels[..., 0] - pixels[..., 2] > 80)
    between = np.linalg.norm(blue.mean(0) - orange.mean(0))
    assert between > 2 * max(blue.std(0).max(), orange.std(0).max())
    pictures.plot_tsne(path, features, labels, ["a", "b"], 0)
    assert path.read_bytes() == first


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", range(7))
def test_tsne_of_few_or_equal_images(n, tmp_path):
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    one_class = torch.zeros(n, dtype=torch.long)
    drawn = n if n >= 3 else 0
    for number, shown in enumerate((features, features[:, :1], torch.ones(n, 4))):
        path = tmp_path / f"{number}.png"
        assert pictures.plot_tsne(path, shown, one_class - number % 2, ["a"], 0) == drawn
        assert path.exists() == bool(drawn)
        if drawn:
            pixels = read(path)
            assert (pixels[:, :800].max(-1) - pixels[:, :800].min(-1) > 60).any()  # a dot


def test_tsne_of_many_classes_has_a_colour_map(tmp_path):
    labels = torch.arange(63) % 21
    features = torch.randn(63, 4, generator=torch.Generator().manual_seed(0))
    names = [f"class {i}" for i in range(21)]
    assert pictures.plot_tsne(tmp_path / "t.png", features, labels, names, 0, most=50) == 50
    bar = read(tmp_path / "t.png")[400:401, 850:].reshape(-1, 3)
    assert (bar.max(-1) - bar.min(-1) > 60).sum() > 15


def test_tsne_refuses_features_that_are_not_finite(tmp_path):
    features = torch.full((5, 4), float("nan"))
    with pytest.raises(InputError, match="NaN"):
        pictures.plot_tsne(tmp_path / "t.png", features, torch.zeros(5).long(), ["a"], 0)


def test_the_subset_has_each_class_in_its_share():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    labels = labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    subset = pictures.stratified_subset(labels, 50, 1)
    assert labels[subset].bincount().tolist() == [30, 15, 5]
    assert subset.unique().tolist() == subset.tolist()  # ascending, none twice
    assert torch.equal(subset, pictures.stratified_subset(labels, 50, 1))
    assert not torch.equal(subset, pictures.stratified_subset(labels, 50, 2))
    assert pictures.stratified_subset(labels, 100, 1).tolist() == list(range(100))
    # Classes of one image: those drawn are not the first ones.
    assert pictures.stratified_subset(torch.arange(100), 50, 1).max() > 60


def test_a_picture_that_cannot_be_written_leaves_the_former(images, tmp_path):
    folder = ImageFolder(images)
    # The longest name that a file can have: there is no room for a temporary one beside it.
    former = tmp_path / ("p" * 251 + ".png")
    former.write_bytes(b"former")
    for path in (former, tmp_path / "missing" / "picture.png"):
        with pytest.raises(InputError, match=r"the picture .* could not be written"):
            pictures.retrieval_gallery(path, folder, folder, torch.tensor([[1]]), [0], "title")
    assert former.read_bytes() == b"former"
    assert [path.name for path in tmp_path.iterdir()] == [former.name]
