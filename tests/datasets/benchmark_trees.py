"""Miniature benchmarks in their official formats, with real images and real metadata.

Each builder puts the official folder into `root` and returns it. All have 3 classes and, for
each class, `train` images for training and `test` for test (where the format has a validation
split, the last training image of a class is in it).
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

HUES = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
CARS = np.array(
    [["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"]], dtype=object
)
_UUIDS = "0000139e-21dc-4d0c-bfe1-4cae3c85c829"


def save_image(path: Path, label: int, index: int, size: int = 32) -> None:
    """A noisy JPEG of `size` pixels a side in the class's hue."""
    draw = np.random.default_rng((label, index))
    pixels = np.array(HUES[label]) + draw.integers(-40, 40, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _images(train: int, test: int) -> list[tuple[int, int, bool]]:
    """(class, number within the class, whether for training), class by class."""
    return [(c, i, i < train) for c in range(3) for i in range(train + test)]


def cub(root: Path, train: int = 3, test: int = 2) -> Path:
    folder = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    images = _images(train, test)
    paths = [f"{names[c]}/{names[c][4:]}_{i:04d}.jpg" for c, i, _ in images]
    _one_file_each(folder, range(1, len(images) + 1), paths, images, [1, 2, 3])
    write_lines(folder / "classes.txt", [f"{n} {name}" for n, name in enumerate(names, 1)])
    return folder


def nabirds(root: Path, train: int = 3, test: int = 2) -> Path:
    """Seven nodes of the hierarchy, three of them in use; one name is there twice, but plumage."""
    folder = root / "nabirds"
    images = _images(train, test)
    ids = [f"{n:08x}{_UUIDS[8:]}" for n in range(len(images))]
    classes = [295, 817, 1010]
    paths = [
        f"{classes[c]:04d}/{u.replace('-', '')}.jpg"
        for u, (c, _, _) in zip(ids, images, strict=True)
    ]
    _one_file_each(folder, ids, paths, images, classes)
    write_lines(
        folder / "classes.txt",
        [
            "0 Birds",
            "1 Ducks, Geese, and Swans",
            "295 Common Goldeneye (Breeding male)",
            "296 Common Goldeneye",
            "817 Common Goldeneye (Female/Eclipse male)",
            "900 Hawks, Kites, and Eagles",
            "1010 Bald Eagle (Adult, subadult)",
        ],
    )
    return folder


def _one_file_each(folder: Path, ids, paths, images, classes) -> None:
    for path, (c, i, _) in zip(paths, images, strict=True):
        save_image(folder / "images" / path, c, i)
    labels = [classes[c] for c, _, _ in images]
    sides = [int(training) for *_, training in images]
    for name, values in (
        ("images.txt", paths),
        ("image_class_labels.txt", labels),
        ("train_test_split.txt", sides),
    ):
        write_lines(folder / name, [f"{k} {v}" for k, v in zip(ids, values, strict=True)])


def cars(root: Path, train: int = 3, test: int = 2) -> Path:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True, exist_ok=True)
    images = _images(train, test)
    kinds = [("fname", object), ("class", np.uint8), ("bbox_x1", np.uint8)]
    for split, training, file in (
        ("train", True, "devkit/cars_train_annos.mat"),
        ("test", False, "cars_test_annos_withlabels.mat"),
    ):
        chosen = [(c, i) for c, i, side in images if side is training]
        rows = []
        for n, (c, i) in enumerate(chosen, start=1):
            save_image(folder / f"cars_{split}" / f"{n:05d}.jpg", c, i)
            rows.append((f"{n:05d}.jpg", c + 1, 7))
        savemat(folder / file, {"annotations": np.array([rows], dtype=kinds)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": CARS})
    return folder


def cars_in_one_folder(root: Path, train: int = 3, test: int = 2) -> Path:
    """The first form of the cars: car_ims and cars_annos.mat."""
    images = _images(train, test)
    kinds = [("relative_im_path", object), ("bbox_x1", np.uint8), ("class", np.uint8)]
    rows = []
    for n, (c, i, training) in enumerate(images, start=1):
        save_image(root / f"car_ims/{n:06d}.jpg", c, i)
        rows.append((f"car_ims/{n:06d}.jpg", 7, c + 1, not training))
    table = np.array([rows], dtype=[*kinds, ("test", np.uint8)])
    savemat(root / "cars_annos.mat", {"annotations": table, "class_names": CARS})
    return root


def aircraft(root: Path, train: int = 3, test: int = 2) -> Path:
    folder = root / "fgvc-aircraft-2013b"
    data = folder / "data"
    variants = ["707-320", "Cessna 172", "F-16A/B"]
    images = [(f"{34958 + 17 * n:07d}", *image) for n, image in enumerate(_images(train, test))]
    write_lines(data / "variants.txt", variants)
    for name, c, i, _ in images:
        save_image(data / "images" / f"{name}.jpg", c, i)
    for split, training in (("trainval", True), ("test", False)):
        lines = [f"{name} {variants[c]}" for name, c, _, side in images if side is training]
        write_lines(data / f"images_variant_{split}.txt", lines)
    return folder


def flowers(root: Path, train: int = 3, test: int = 2) -> Path:
    """Classes 1, 2 and 102 of the 102 names; the numbers within a split are not in order."""
    folder = root / "flowers-102"
    images = _images(train, test)
    ids: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for n, (c, i, training) in enumerate(images, start=1):
        save_image(folder / "jpg" / f"image_{n:05d}.jpg", c, i)
        ids["tstid" if not training else "valid" if i == train - 1 else "trnid"].insert(0, n)
    labels = np.array([[(1, 2, 102)[c] for c, _, _ in images]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    savemat(folder / "setid.mat", {k: np.array([v], dtype=np.uint16) for k, v in ids.items()})
    return folder


def pets(root: Path, train: int = 3, test: int = 2) -> Path:
    folder = root / "oxford-iiit-pet"
    breeds = ["Abyssinian", "american_bulldog", "wheaten_terrier"]
    images = [(f"{breeds[c]}_{i + 1}", c, i, side) for c, i, side in _images(train, test)]
    for name, c, i, _ in images:
        save_image(folder / "images" / f"{name}.jpg", c, i)
    for split, training in (("trainval", True), ("test", False)):
        lines = [
            f"{name} {c + 1} {1 + (c > 0)} 1" for name, c, _, side in images if side is training
        ]
        write_lines(folder / "annotations" / f"{split}.txt", lines)
    return folder


def folders(root: Path, train: int = 3, test: int = 2, second: str = "val") -> Path:
    """root/train and root/val (or another second split) with the subfolders auk, owl and wren."""
    for c, i, training in _images(train, test):
        split = "train" if training else second
        save_image(root / split / ("auk", "owl", "wren")[c] / f"{i}.jpg", c, i)
    return root


BUILDERS = {
    "cub": cub,
    "cars": cars,
    "aircraft": aircraft,
    "nabirds": nabirds,
    "flowers": flowers,
    "pets": pets,
}
