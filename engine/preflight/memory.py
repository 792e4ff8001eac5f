"""How much memory a step takes: what is held all the time, and what two small forwards keep."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from datasets.folder import capped_size
from engine import build
from engine.training.acceleration import checkpoint_blocks
from engine.training.freezing import Freezing
from losses.cross_entropy import chunk_elements
from models.network import Network, student_only
from utils.config import Node, crops_on_device
from utils.distributed import World
from utils.precision import autocast, precision_of

Size = tuple[int, int]
SMALL_BATCHES = (2, 3)  # images of the two forward passes that are measured


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process's tensors on its device; `checkpoint` is the size of the file.

    activations: what the student's forward of a micro-batch keeps for the backward pass. loss: the
    logits of one chunk; for each head both networks' prototypes and the gradient of the student's.
    """

    student: int
    teacher: int
    optimizer: int
    carried: int
    crops: int
    activations: int
    gradients: int
    loss: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """The most that is held at once, which is where the backward pass begins."""
        return sum(astuple(self)) - self.checkpoint


def of_step(cfg: Node, world: World, student: Network, teacher: Network) -> StepMemory:
    """An estimate of the memory of an optimizer step of these options. (Ours.)

    What a forward pass keeps is measured for 2 and for 3 images, and the line continued to the
    batch. Not in it: the next batch on a GPU, kernels' scratch, what the allocator rounds up, and
    what Python and torch take. With TRAIN.COMPILE less is kept than this says.

    The networks are of no use afterwards. Raises InputError where the backbone cannot do
    TRAIN.CHECKPOINTING.
    """
    device, batch = world.device, cfg.TRAIN.BATCH_SIZE_PER_GPU
    student, teacher = student.to(device), teacher.to(device)
    objective, sides = build.objective(cfg), build.augmentation(cfg).sizes
    Freezing(cfg, student, teacher).enter(cfg.TRAIN.EPOCHS)
    if cfg.TRAIN.CHECKPOINTING:
        checkpoint_blocks(student)
    kept = []
    for images in SMALL_BATCHES:
        crops = [torch.zeros(images, 3, side, side, device=device) for side in sides]
        with autocast(precision_of(cfg, device), device):
            kept.append(kept_by_forward(student, crops[objective.student_crops]))
    (few, more), (kept_of_few, kept_of_more) = SMALL_BATCHES, kept
    kept_of_image = (kept_of_more - kept_of_few) // (more - few)
    heads = [head for head in (student.head, student.head_dense) if head is not None]
    prototypes = _bytes(head.last_layer.weight_v for head in heads if head.last_layer)
    elements = chunk_elements(device.type, cfg.LOSS.CHUNK_MIB)
    return StepMemory(
        **_stored(cfg, student, teacher),
        crops=4 * crop_values(cfg),
        activations=kept_of_few + (batch - few) * kept_of_image,
        gradients=_bytes(p for p in student.parameters() if p.requires_grad),
        # Two matrices [rows, K] of float32; contrast has no prototypes.
        loss=0 if objective.projects else 2 * 4 * elements + 3 * prototypes,
        checkpoint=checkpoint_size(cfg, student, teacher),
    )


def room_for_step(cfg: Node, world: World) -> int:
    """Bytes to leave free where DATA.CACHE keeps all images: a step's peak, or 0 where the step is
    elsewhere."""
    where = {"none": None, "ram": "cpu", "device": world.device.type}[cfg.DATA.CACHE]
    if where != world.device.type:
        return 0
    peak = of_step(cfg, world, *build.networks(cfg)).peak
    if where == "cuda":
        torch.cuda.empty_cache()
    return peak


def crop_values(cfg: Node) -> int:
    """Numbers in the crops of a micro-batch."""
    images = cfg.TRAIN.BATCH_SIZE_PER_GPU
    return sum(images * 3 * size**2 for size in build.augmentation(cfg).sizes)


def moved_size(cfg: Node, sizes: Sequence[Size]) -> int:
    """Bytes of what a micro-batch's crops are made of: crops of uint8, or images, padded.

    Of images it is the mean of the batches that `sizes` make in their order.
    """
    if not crops_on_device(cfg):
        return crop_values(cfg)
    images = cfg.TRAIN.BATCH_SIZE_PER_GPU
    capped = [capped_size(size, cfg.DATA.CACHE_SIZE) for size in sizes]
    batches = [zip(*capped[i : i + images], strict=True) for i in range(0, len(sizes), images)]
    areas = [max(first) * max(second) for first, second in batches]
    return 3 * images * sum(areas) // max(1, len(areas))


def checkpoint_size(cfg: Node, student: Network, teacher: Network) -> int:
    """Bytes of a checkpoint of a run of these options and networks."""
    stored = _stored(cfg, student, teacher).values()
    return sum(stored) + _bytes(student_only(student.state_dict()).values())


def _stored(cfg: Node, student: Network, teacher: Network) -> dict[str, int]:
    """Bytes that last from step to step."""
    return {
        "student": _bytes(student.state_dict().values()),
        "teacher": _bytes(teacher.state_dict().values()),
        "optimizer": _moments(cfg.TRAIN.OPTIMIZER, student),
        "carried": _bytes(build.carried(cfg, build.objective(cfg)).state_dict().values()),
    }


def kept_by_forward(network: Network, crops: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, but for parameters and crops."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        views = network(crops)  # its graph keeps what is counted, so no address comes twice
    for tensor in (*network.parameters(), *network.buffers(), *crops):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del views
    return sum(storages.values())


def _moments(name: str, student: Network) -> int:
    """Bytes of the optimizer's state: AdamW's two moments and step counts, or SGD's momentum."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if name == "adamw":
        return 2 * _bytes(trained) + 4 * len(trained)
    return _bytes(trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
