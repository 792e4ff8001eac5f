"""All images of a data set decoded once and kept, in one buffer for all processes of a machine."""

import contextlib
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datasets.batched import Images
from datasets.folder import BadImage, StoredImages, UnreadableImage, capped_size
from datasets.loader import decode, for_each, pad
from utils import distributed
from utils.distributed import World
from utils.errors import InputError
from utils.logging import logger

Size = tuple[int, int]  # (height, width), pixels
GIB = 2**30
_LIMIT_OF_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"  # of control groups


class DecodedImages:
    """Every image of a data set, decoded by `load_image`, in memory or on the device.

    The processes of one machine decode a share each into one buffer, which they all read; with
    `on_device` each then copies it to its device and lets it go. sizes: int64 [n, 2], on the host,
    (height, width). (Ours.)

    shorter_side: see `load_image`. workers: loader processes for each process. step: bytes that a
    training step of a process takes at its peak, which are left free. `bad`: by index the images
    that any process could not read, the same on all; they are not to be asked for.

    Raises InputError, on all processes, where no image can be read, or where there is too
    little memory, which the images' headers show before any is decoded.
    """

    def __init__(
        self,
        images: StoredImages,
        shorter_side: int,
        world: World,
        workers: int = 0,
        on_device: bool = False,
        step: int = 0,
    ) -> None:
        self.device, machine = world.device, _machine(world)
        on_device = on_device and world.device.type != "cpu"
        share = distributed.share(len(images), world)
        found = for_each(images.size_or_bad, share, workers, "reading headers")
        capped = [
            size if isinstance(size, BadImage) else capped_size(size, shorter_side)
            for size in found
        ]
        expected, bad = _of_all(capped, share)
        _some_readable(bad, len(images))
        # Tensors, which loader processes share: Python's numbers would be copied into each.
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), expected.prod(1).cumsum(0)])
        self.bytes = 3 * self._starts[-1].item()
        where = f"on {world.device}" if on_device else "in memory"
        self.place = f"kept {where}"
        distributed.on_all(
            lambda: refuse_no_room(
                self.bytes, shorter_side, world.device, on_device, step, machine.size
            )
        )
        logger.info(f"{len(images):,} images, {self.bytes / GIB:.2f} GiB, {where}: decoding them")

        first = world.rank - machine.rank  # of this machine's processes
        with _shared_pixels(self.bytes, machine, first) as (path, pixels):
            self.share = distributed.share(len(images), machine)
            fill = partial(_fill, images, shorter_side, expected, bad, self._starts, path)
            found = for_each(fill, self.share, workers, "decoding images")
            # Each machine decodes its own copies, of which others may be damaged.
            ranks = slice(first, first + machine.size)
            self.sizes, self.bad = _of_all(found, self.share, ranks)
        _some_readable(self.bad, len(images))
        self._pixels = pixels.to(world.device) if on_device else pixels

    def batch(self, indices: list[int]) -> Images:
        """The images at `indices`, padded, on the processes' device; the host does not wait."""
        sizes = [*map(tuple, self.sizes[indices].tolist())]
        if self._pixels.device.type == "cpu":
            pixels, _ = pad([self[i] for i in indices], pinned=self.device.type == "cuda")
            pixels = pixels.to(self.device, non_blocking=True)
        else:
            pixels = gather_padded(self._pixels, self._starts[indices].tolist(), sizes)
        return channels_first(pixels, sizes)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 [h, w, 3], where it is kept."""
        pixels = self._pixels[self._starts[index] : self._starts[index + 1]]
        return pixels.view(*self.sizes[index].tolist(), 3)


def channels_first(pixels: Tensor, sizes: Sequence[Size]) -> Images:
    """A padded batch uint8 [B, H, W, 3], with the images' sizes on the host, as `Images`."""
    return Images(pixels.permute(0, 3, 1, 2).contiguous(), sizes)


def gather_padded(pixels: Tensor, starts: Sequence[int], sizes: Sequence[Size]) -> Tensor:
    """A padded batch, uint8 [B, H, W, 3], out of a buffer uint8 [N, 3] on the same device.

    Image b, of sizes[b], is stored by rows from pixel starts[b]; beyond it its edge repeats.
    About ten kernels for any batch, where a copy of each image would be one for each.
    """
    heights, widths = zip(*sizes, strict=True)
    # All that the host knows goes over at once, from pinned memory so that it need not wait.
    known = torch.tensor([starts, heights, widths])
    if pixels.device.type == "cuda":
        known = known.pin_memory()
    start, height, width = known.to(pixels.device, non_blocking=True)[:, :, None]
    down = torch.arange(max(heights), device=pixels.device).minimum(height - 1)  # [B, H]
    across = torch.arange(max(widths), device=pixels.device).minimum(width - 1)  # [B, W]
    return pixels[(start + down * width)[:, :, None] + across[:, None, :]]


# Reading and decoding, shared out between processes and their loader workers


def _fill(
    images: StoredImages,
    shorter_side: int,
    expected: Tensor,
    bad: dict[int, BadImage],
    starts: Tensor,
    path: str,
    index: int,
) -> Size | BadImage:
    """Decode an image into its place in the file; its size, or a marker if it is unreadable."""
    if index in bad:
        return bad[index]
    try:
        pixels = decode(images, index, shorter_side)
    except UnreadableImage as error:
        return error.bad
    height, width, _ = pixels.shape
    # By EXIF the sides may have changed places, which takes no other room.
    sides = expected[index].tolist()
    if sorted((height, width)) != sorted(sides):
        wanted = "{} x {}".format(*sides)
        reason = f"by its header it would have {wanted} pixels, it has {width} x {height}"
        return BadImage(images.name(index), reason)
    with open(path, "r+b") as file:
        file.seek(3 * starts[index].item())
        file.write(pixels.numpy())
    return height, width


def _of_all(
    found: list[Size | BadImage], share: range, ranks: slice = slice(None)
) -> tuple[Tensor, dict[int, BadImage]]:
    """Sizes, int64 [n, 2], of the images that `ranks` share, and all processes' markers by index.

    found: of this process's share. All together. The sizes of what has a marker are 0.
    """
    bad = {i: size for i, size in zip(share, found, strict=True) if isinstance(size, BadImage)}
    known = [(0, 0) if isinstance(size, BadImage) else size for size in found]
    mine = torch.tensor(known, dtype=torch.int64).view(-1, 2)
    sizes, markers = zip(*distributed.gather_objects((mine, bad)), strict=True)
    return torch.cat(sizes[ranks]), {i: image for part in markers for i, image in part.items()}


def _some_readable(bad: dict[int, BadImage], images: int) -> None:
    """InputError where all images are bad."""
    if len(bad) == images:
        first = bad[min(bad)]
        raise InputError(f"none of the {images} images can be read: for instance, {first}")


# Memory


def _machine(world: World) -> World:
    """This process's place among those of its machine, by the launcher's variables; else alone."""
    size = distributed.processes_here() if world.size > 1 else 1
    return World(int(os.environ["LOCAL_RANK"]) if size > 1 else 0, size, world.device)


@contextlib.contextmanager
def _shared_pixels(size: int, machine: World, first: int) -> Iterator[tuple[str, Tensor]]:
    """A file for all processes of the machine, by its path, and its bytes as uint8 [N, 3].

    The first of them, of rank `first`, makes it. It lasts while one process has it mapped. Raises
    InputError on all processes where one has not so much memory.
    """
    file, path = None, ""

    @_refusing_what_cannot_be_had(size)
    def make() -> None:
        nonlocal file, path
        if not machine.is_main:
            return
        # A file in memory has no name, so none is left behind however a process ends, and
        # /dev/shm, which is small in containers, does not bound it. Linux has it.
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("decoded images")
            path = f"/proc/{os.getpid()}/fd/{file}"
            os.posix_fallocate(file, 0, size)  # an error now instead of a signal later
        else:
            file, path = tempfile.mkstemp()
            os.truncate(file, size)

    @_refusing_what_cannot_be_had(size)
    def mapped() -> Tensor:
        with open(path, "r+b") as opened:
            return torch.frombuffer(mmap.mmap(opened.fileno(), size), dtype=torch.uint8)

    try:
        distributed.on_all(make)
        path = distributed.gather_objects(path)[first]
        yield path, distributed.on_all(mapped).view(-1, 3)
    finally:
        if file is not None:
            os.close(file)
            if not path.startswith("/proc"):
                os.unlink(path)


@contextlib.contextmanager
def _refusing_what_cannot_be_had(size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"DATA.CACHE: {size / GIB:.2f} GiB of memory cannot be had ({error.strerror}): set a "
            "smaller DATA.CACHE_SIZE, or DATA.CACHE none and DATA.CROPS device"
        ) from None


def refuse_no_room(
    size: int,
    shorter_side: int,
    device: torch.device,
    on_device: bool,
    step: int = 0,
    processes: int = 1,
) -> None:
    """InputError where images of `size` bytes do not fit into memory, or on a GPU if they are to be
    there, beside the training steps of this machine's `processes`, `step` bytes each.
    """
    on_gpu = device.type == "cuda"
    rooms = {"of this machine's memory": (available(), 0 if on_gpu else processes * step)}
    if on_device and on_gpu:
        rooms[f"on {device}"] = free_on(device), step
    for where, (free, steps) in rooms.items():
        if size + steps > free:
            beside = f" and training steps about {steps / GIB:.2f} GiB" if steps else ""
            raise InputError(
                f"the decoded images take {size / GIB:.2f} GiB{beside}, and {free / GIB:.2f} GiB "
                f"{where} are free: set a smaller DATA.CACHE_SIZE (now "
                f"{shorter_side or 'none, as 288'}){' or batch' if steps else ''}, or DATA.CACHE "
                f"none and DATA.CROPS device"
            )


def free_on(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free, or with this process already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def available() -> int:
    """Bytes of memory that programs can still have; sys.maxsize where the system does not say.

    The machine's, or what a container's or job's limit (control group, version 1 or 2) leaves.
    """
    rooms = [sys.maxsize]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line))
    # In a container its group is the root, whatever the path says.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
            if number != "0":
                root, limit, used = f"{root}/memory", *_LIMIT_OF_VERSION_1
            for folder in (root, root + path) if number == "0" or "memory" in kinds else ():
                with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                    most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
                    rooms.append(max(0, most - taken))
    return min(rooms)
