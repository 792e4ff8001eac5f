"""From options to objects: the one place where configuration meets constructors."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from datasets import fine_grained
from datasets.batched import BatchedMultiCrop
from datasets.cache import DecodedImages, channels_first
from datasets.folder import BadImage, StoredImages
from datasets.loader import AugmentedDataset, Batch, DecodedDataset, Draws
from datasets.multicrop import MultiCrop
from datasets.shards import ImageShards, ShardOrder
from datasets.substitutes import FullBatches, full
from losses.contrastive import KeyQueue
from losses.objective import Contrastive, Objective
from losses.targets import Centres
from models.grouped_norm import group_batch_norm
from models.network import HeadSpec, Network, make_teacher
from models.registry import BackboneSpec, build_backbone, resolve
from utils import config, distributed, seeding
from utils.config import Node, crops_on_device, local_crops
from utils.distributed import World
from utils.errors import InputError
from utils.logging import logger
from utils.options import CONTRASTIVE
from utils.seeding import derive_seed


def backbone_spec(cfg: Node) -> BackboneSpec:
    """MODEL.* as the architecture's description."""
    return BackboneSpec(
        arch=cfg.MODEL.ARCH,
        embed_dim=cfg.MODEL.EMBED_DIM,
        depths=tuple(cfg.MODEL.DEPTHS),
        num_heads=tuple(cfg.MODEL.NUM_HEADS),
        window_size=cfg.MODEL.WINDOW_SIZE,
        patch_size=cfg.MODEL.PATCH_SIZE,
        img_size=cfg.MODEL.IMG_SIZE,
    )


def head_spec(cfg: Node) -> HeadSpec:
    """HEAD.* as the shape of heads and pooling."""
    return HeadSpec(
        out_dim=cfg.HEAD.OUT_DIM,
        hidden_dim=cfg.HEAD.HIDDEN_DIM,
        bottleneck_dim=cfg.HEAD.BOTTLENECK_DIM,
        layers=cfg.HEAD.LAYERS,
        use_bn=cfg.HEAD.USE_BN,
        norm_last_layer=cfg.HEAD.NORM_LAST_LAYER,
        pool_hidden=cfg.HEAD.POOL_HIDDEN,
        projects=objective(cfg).projects,
    )


def objective(cfg: Node) -> Objective | Contrastive:
    """LOSS.*, CMD.*, MOCO.* and LCR.* as the objective."""
    if cfg.LOSS.OBJECTIVE in CONTRASTIVE:
        return Contrastive(
            name=cfg.LOSS.OBJECTIVE,
            queue=cfg.MOCO.QUEUE,
            temperature=cfg.MOCO.TEMPERATURE,
            fitting_weight=cfg.LCR.WEIGHT,
            fitting_temperature=cfg.LCR.TEMPERATURE,
        )
    return Objective(
        name=cfg.LOSS.OBJECTIVE,
        lambda1=cfg.CMD.LAMBDA1,
        ls=cfg.CMD.LS,
        ls_grad=cfg.CMD.LS_GRAD,
        lt=cfg.CMD.LT,
        diverse_k=cfg.CMD.DIVERSE_K,
        region_weight=cfg.CMD.REGION_WEIGHT,
        student_temp=cfg.LOSS.STUDENT_TEMP,
    )


def carried(cfg: Node, goal: Objective | Contrastive) -> Centres | KeyQueue:
    """What the objective carries from one optimizer step to the next, at its beginning."""
    if isinstance(goal, Contrastive):
        seed = derive_seed(cfg.SEED, seeding.QUEUE)
        return goal.make_queue(cfg.HEAD.BOTTLENECK_DIM, seed)
    return goal.make_centres(cfg.HEAD.OUT_DIM, cfg.LOSS.CENTER_MOMENTUM)


def multicrop(cfg: Node, kind: Callable = MultiCrop) -> MultiCrop | BatchedMultiCrop:
    """AUG.* as the augmentation: of one image (MultiCrop) or of a batch (BatchedMultiCrop)."""
    crops = local_crops(cfg)
    return kind(
        global_crops_size=cfg.AUG.GLOBAL_CROPS_SIZE,
        global_crops_scale=cfg.AUG.GLOBAL_CROPS_SCALE,
        local_crops_number=[number for number, _ in crops],
        local_crops_size=[size for _, size in crops],
        local_crops_scale=cfg.AUG.LOCAL_CROPS_SCALE,
        color_jitter=cfg.AUG.COLOR_JITTER,
        color_jitter_prob=cfg.AUG.COLOR_JITTER_PROB,
        grey_prob=cfg.AUG.GRAY_PROB,
        solarise_prob=cfg.AUG.SOLARIZE_PROB,
        blur_prob=cfg.AUG.BLUR_PROB,
    )


MakeCrops = Callable[[Batch, torch.device], list[Tensor]]  # the crops, on the device


def loaded_crops(batch: Batch, device: torch.device) -> list[Tensor]:
    """The crops of a batch whose crops were made by the loader."""
    return [crop.to(device, non_blocking=True) for crop in full(batch).data]


@dataclass(frozen=True)
class Feed:
    """How images become crops.

    dataset: what a loader reads, whole batches by their keys (epoch, index); crops: makes the
    crops of what the loader brings, InputError where it found no image to fill a batch; told:
    all that in words; bad: what cannot be read, as far as that is known already: folders that
    cannot be listed, and of images to be kept the unreadable ones.
    """

    dataset: FullBatches
    crops: MakeCrops
    told: str
    bad: Sequence[BadImage] = ()


def feed(cfg: Node, images: StoredImages, world: World) -> Feed:
    """DATA.CACHE, DATA.CROPS and AUG.* as the way of the images; kept images are decoded here.

    Raises InputError on all processes where they cannot be.
    """
    if not crops_on_device(cfg):
        dataset = FullBatches(AugmentedDataset(images, multicrop(cfg), cfg.SEED))
        told = "images decoded and cropped by the loader"
        return Feed(dataset, loaded_crops, told, images.unlisted)
    crops, cap = multicrop(cfg, BatchedMultiCrop), cfg.DATA.CACHE_SIZE
    if 0 < cap < cfg.AUG.GLOBAL_CROPS_SIZE:
        logger.warning(
            f"DATA.CACHE_SIZE {cap} is below AUG.GLOBAL_CROPS_SIZE {cfg.AUG.GLOBAL_CROPS_SIZE}: "
            "crops are enlarged from images with less detail"
        )
    capped = f"of at most {cap} pixels on the shorter side" if cap else "of full size"
    told = f"crops made on {world.device} from images {capped}, "
    if cfg.DATA.CACHE == "none":

        def crops_of_loaded(batch: Batch, device: torch.device) -> list[Tensor]:
            pixels, sizes, draws = full(batch).data
            sizes = [tuple(size) for size in sizes.tolist()]
            return crops(channels_first(pixels.to(device, non_blocking=True), sizes), draws)

        dataset = FullBatches(DecodedDataset(images, cap, crops.draw, cfg.SEED))
        return Feed(dataset, crops_of_loaded, told + "decoded by the loader", images.unlisted)

    on_device = cfg.DATA.CACHE == "device"
    kept = DecodedImages(images, cap, world, loader_workers(cfg), on_device)

    def crops_of_kept(batch: Batch, _: torch.device) -> list[Tensor]:
        return crops(kept.batch(full(batch).indices.tolist()), batch.data)

    dataset = FullBatches(Draws(len(images), crops.draw, cfg.SEED, kept.bad))
    bad = [*images.unlisted, *kept.bad.values()]
    return Feed(dataset, crops_of_kept, told + kept.place, bad)


def networks(cfg: Node) -> tuple[Network, Network]:
    """Student and teacher, freshly initialised from SEED, the same on every process.

    Both on the CPU, with equal weights; the teacher out of the gradient, without drop path
    and without a pooling or LCR's branch of its own. A BatchNorm of a contrasting objective has
    groups. Raises InputError for an architecture or a crop size that cannot be.
    """
    goal, heads, spec = objective(cfg), head_spec(cfg), backbone_spec(cfg)
    if goal.needs_rationale and resolve(spec)["family"] == "vit":
        raise InputError(
            f"LOSS.OBJECTIVE lcr fits a map to GradCAM, which needs an image feature that is the "
            f"mean of the patches; that of {spec.arch} is its [CLS] token. Take resnet50 or a Swin."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(cfg.SEED, seeding.INITIALISATION))
        student = Network(
            build_backbone(spec, drop_path=cfg.MODEL.DROP_PATH),
            heads,
            goal.needs_region_head,
            goal.needs_pooling,
            cfg.LCR.CHANNELS if goal.needs_rationale else 0,
        )
        teacher = Network(build_backbone(spec), heads, goal.needs_region_head, pooling=False)
    check_crop_sizes(cfg, student.backbone.patch_size)
    if goal.projects:
        for network in (student, teacher):
            group_batch_norm(network, cfg.MOCO.BN_IMAGES)
    if student.pool is not None and not goal.trains_pooling:
        student.pool.requires_grad_(False)
    return student, make_teacher(student, teacher)


def check_crop_sizes(cfg: Node, multiple: int) -> None:
    """Raise InputError unless the backbone takes every crop."""
    sizes = [("AUG.GLOBAL_CROPS_SIZE", cfg.AUG.GLOBAL_CROPS_SIZE)]
    sizes += [("AUG.LOCAL_CROPS_SIZE", size) for _, size in local_crops(cfg)]
    if cfg.EVAL.KNN_EVERY:
        sizes.append(("EVAL.SIZE", eval_size(cfg)))
    for key, size in sizes:
        if size % multiple:
            raise InputError(
                f"{key} {size} is not a multiple of {multiple} pixels, the patch size of "
                f"{cfg.MODEL.ARCH}."
            )


def download(cfg: Node) -> None:
    """With DATA.DOWNLOAD, fetch the data set; the first process does it, the others wait."""
    if cfg.DATA.DOWNLOAD:
        distributed.on_main(lambda: fine_grained.download(cfg.DATA.DATASET, cfg.DATA.PATH))


def index_shards(cfg: Node) -> None:
    """Make the index of shards that have none; the first process does it, the others wait."""
    several = len(distributed.gather_objects(None)) > 1
    if several and fine_grained.DATASETS.get(cfg.DATA.DATASET) is ImageShards:
        distributed.on_main(lambda: ImageShards(cfg.DATA.PATH))


def shard_order(cfg: Node, dataset: StoredImages, world: int) -> ShardOrder | None:
    """The epochs' order that keeps each process in its own shards; None where there are none."""
    if not isinstance(dataset, ImageShards):
        return None
    images = cfg.TRAIN.BATCH_SIZE_PER_GPU * cfg.TRAIN.ACCUM_STEPS
    return ShardOrder(dataset.counts, world, images, cfg.SEED)


def eval_size(cfg: Node) -> int:
    """Pixels of an evaluation's centre crop: EVAL.SIZE, else the run's global crops'."""
    return cfg.EVAL.SIZE or cfg.AUG.GLOBAL_CROPS_SIZE


def loader_workers(cfg: Node) -> int:
    """DATA.WORKERS, at most the cores at hand: more loader processes only cost memory."""
    if hasattr(os, "sched_getaffinity"):
        return min(cfg.DATA.WORKERS, len(os.sched_getaffinity(0)))
    return min(cfg.DATA.WORKERS, os.cpu_count() or 1)


def untrained_pooling_seed(cfg: Node) -> int:
    """Seed of the fresh pooling that the report measures attention against."""
    return derive_seed(cfg.SEED, seeding.UNTRAINED_POOLING)


def shuffling_seed(cfg: Node, step: int, micro: int) -> int:
    """Seed of the order of the keys of one micro-batch, the same on all processes."""
    return derive_seed(cfg.SEED, seeding.SHUFFLING, step, micro)


def step_seed(cfg: Node, step: int, micro: int, rank: int) -> int:
    """Seed of the device-side randomness (drop path) of one micro-batch."""
    return derive_seed(cfg.SEED, seeding.STEPS, step, micro, rank)


def precision(cfg: Node, device: torch.device, option: str = "TRAIN.PRECISION") -> str:
    """fp32, bf16 or fp16: what TRAIN.PRECISION or EVAL.PRECISION means on this device."""
    wanted = config.get(cfg, option)
    if wanted == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and device.type != "cuda":
        raise InputError(f"{option} fp16 needs a GPU; on the CPU use fp32 or bf16.")
    return wanted


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision of that name for networks; the losses keep float32 by themselves."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=dtypes[precision], enabled=precision != "fp32")


def model_description(cfg: Node, student: Network) -> dict:
    """What rebuilds the networks from a checkpoint alone; plain data."""
    return {
        "backbone": backbone_spec(cfg).to_dict(),
        "heads": asdict(head_spec(cfg)),
        "region_head": student.head_dense is not None,
        "pooling": student.pool is not None,
        "rationale": cfg.LCR.CHANNELS if student.rationale is not None else 0,
    }
