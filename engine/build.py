"""From options to objects: the one place where configuration meets constructors."""

from dataclasses import asdict, replace

import torch

from datasets.cache import DecodedImages
from datasets.feed import DeviceCrops, Feed, WorkerCrops
from datasets.folder import StoredImages
from datasets.loader import usable_workers
from datasets.multicrop import Augmentation
from losses.contrastive import KeyQueue
from losses.objective import Contrastive, Objective
from losses.targets import Centres
from models.backbone import Backbone
from models.grouped_norm import group_batch_norm
from models.network import HeadSpec, Network, Parts, make_teacher
from models.registry import BackboneSpec, build_backbone
from utils import seeding
from utils.config import (
    Node,
    crops_on_device,
    eval_size,
    knn_folders,
    local_crops,
    normalisation,
)
from utils.distributed import World
from utils.errors import InputError
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


def parts(cfg: Node) -> Parts:
    """HEAD.*, and what the objective uses of it: a student's parts."""
    goal = objective(cfg)
    heads = HeadSpec(
        out_dim=cfg.HEAD.OUT_DIM,
        hidden_dim=cfg.HEAD.HIDDEN_DIM,
        bottleneck_dim=cfg.HEAD.BOTTLENECK_DIM,
        layers=cfg.HEAD.LAYERS,
        use_bn=cfg.HEAD.USE_BN,
        norm_last_layer=cfg.HEAD.NORM_LAST_LAYER,
        pool_hidden=cfg.HEAD.POOL_HIDDEN,
        projects=goal.projects,
    )
    return Parts(
        heads,
        goal.needs_region_head,
        goal.needs_pooling,
        cfg.LCR.CHANNELS if goal.needs_rationale else 0,
        goal.needs_bag_head,
    )


def objective(cfg: Node) -> Objective | Contrastive:
    """LOSS.*, CMD.*, MOCO.* and LCR.* as the objective."""
    if cfg.LOSS.OBJECTIVE in CONTRASTIVE:
        return Contrastive(
            name=cfg.LOSS.OBJECTIVE,
            queue=cfg.MOCO.QUEUE,
            fitting_weight=cfg.LCR.WEIGHT,
        )
    return Objective(
        name=cfg.LOSS.OBJECTIVE,
        lambda1=cfg.CMD.LAMBDA1,
        ls=cfg.CMD.LS,
        lt=cfg.CMD.LT,
        student_temp=cfg.LOSS.STUDENT_TEMP,
        chunk_mib=cfg.LOSS.CHUNK_MIB,
    )


def carried(cfg: Node, goal: Objective | Contrastive) -> Centres | KeyQueue:
    """What the objective carries from one optimizer step to the next, at its beginning."""
    if isinstance(goal, Contrastive):
        seed = derive_seed(cfg.SEED, seeding.QUEUE)
        return KeyQueue(goal.queue, cfg.HEAD.BOTTLENECK_DIM, seed)
    return goal.make_centres(cfg.HEAD.OUT_DIM, cfg.LOSS.CENTER_MOMENTUM)


def augmentation(cfg: Node) -> Augmentation:
    """AUG.* as the settings of the multi-crop augmentation."""
    crops = local_crops(cfg)
    return Augmentation(
        global_crops_size=cfg.AUG.GLOBAL_CROPS_SIZE,
        global_crops_scale=cfg.AUG.GLOBAL_CROPS_SCALE,
        local_crops_number=[number for number, _ in crops],
        local_crops_size=[size for _, size in crops],
        local_crops_scale=cfg.AUG.LOCAL_CROPS_SCALE,
        color_jitter=cfg.AUG.COLOR_JITTER,
        grey_prob=cfg.AUG.GRAY_PROB,
        solarise_prob=cfg.AUG.SOLARIZE_PROB,
        blur_prob=cfg.AUG.BLUR_PROB,
        normalisation=normalisation(cfg),
    )


def feed(cfg: Node, images: StoredImages, world: World, step: int = 0) -> Feed:
    """DATA.CACHE, DATA.CROPS and AUG.* as the way of the images to crops.

    Images that are kept are decoded here, and leave `step` bytes free; all processes together.
    Raises InputError, on all of them, where that cannot be.
    """
    data, common = cfg.DATA, (images, augmentation(cfg), cfg.SEED, world)
    if not crops_on_device(cfg):
        return WorkerCrops(*common)
    kept = None
    if data.CACHE != "none":
        workers, on_device = usable_workers(data.WORKERS), data.CACHE == "device"
        kept = DecodedImages(images, data.CACHE_SIZE, world, workers, on_device, step)
    return DeviceCrops(*common, data.CACHE_SIZE, kept)


def networks(cfg: Node) -> tuple[Network, Network]:
    """Student and teacher, freshly initialised from SEED, the same on every process.

    Both on the CPU, with equal weights; the teacher out of the gradient, without drop path,
    bag head and LCR's branch. A BatchNorm of a contrasting objective has groups. Raises
    InputError for an architecture or a crop size that cannot be.
    """
    goal, own, spec = objective(cfg), parts(cfg), backbone_spec(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(cfg.SEED, seeding.INITIALISATION))
        student = Network(build_backbone(spec, drop_path=cfg.MODEL.DROP_PATH), own)
        teacher = Network(build_backbone(spec), replace(own, rationale=0, bag_head=False))
    if goal.needs_rationale and not student.backbone.mean_of_patches:
        raise InputError(
            f"LOSS.OBJECTIVE lcr fits a map to GradCAM, which needs an image feature that is the "
            f"mean of the patches; that of {spec.arch} is not. Take resnet50 or a Swin."
        )
    widths = student.backbone.num_features, student.backbone.num_patch_features
    if goal.needs_instances and widths[0] != widths[1]:
        raise InputError(
            f"CMD.LS gives patches to the image head, which needs patches as wide as the image "
            f"feature; those of {spec.arch} have {widths[1]} values, and that has {widths[0]}. "
            f"Take another --arch, CMD.LS false, or --objective esvit."
        )
    check_crop_sizes(cfg, student.backbone)
    if goal.projects:
        for network in (student, teacher):
            group_batch_norm(network, cfg.MOCO.BN_IMAGES)
    if student.pool is not None:
        student.embeds_instances = goal.needs_instances
        student.pool.requires_grad_(goal.needs_instances)
    return student, make_teacher(student, teacher)


def check_crop_sizes(cfg: Node, backbone: Backbone) -> None:
    """Raise InputError unless the backbone takes every crop."""
    sizes = [("AUG.GLOBAL_CROPS_SIZE", cfg.AUG.GLOBAL_CROPS_SIZE)]
    sizes += [("AUG.LOCAL_CROPS_SIZE", size) for _, size in local_crops(cfg)]
    if knn_folders(cfg):
        sizes.append(("EVAL.SIZE", eval_size(cfg)))
    for key, size in sizes:
        if misfit := backbone.misfit(size):
            raise InputError(f"{key} {size} {misfit} {cfg.MODEL.ARCH}.")


def model_description(cfg: Node) -> dict:
    """What rebuilds the networks from a checkpoint alone; plain data."""
    return {"backbone": backbone_spec(cfg).to_dict(), **asdict(parts(cfg))}
