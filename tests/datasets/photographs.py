"""Small images of noise, files of them and edits of these, and what compares crops with them."""

import io
import os
import random
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise


def noise(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def raw_png(width: int, height: int, bits: int, colour: int, rows: Iterable[bytes]) -> bytes:
    """A PNG put together by hand, of kinds that PIL does not write; colour 0: grey, 2: RGB."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(b"\0" + row) for row in rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def save(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(root / name)
    return root


def edit(path: Path, place: int = -100) -> None:
    """Other contents of the same length in the same file, which seems as old as before."""
    status = path.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def pixels(crop: torch.Tensor) -> np.ndarray:
    """A crop [3, S, S] as an image's array [S, S, 3]."""
    return crop.permute(1, 2, 0).numpy()


def same(crop: torch.Tensor, image: Image.Image) -> bool:
    return np.array_equal(pixels(crop), np.asarray(image))


def equal_crops(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


def rng_states() -> list:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002
