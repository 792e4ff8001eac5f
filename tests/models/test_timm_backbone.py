"""Models of timm as backbones: timm's own features, through all that is done here."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.splits import paired_folders
from engine import build
from engine.evaluation import attention
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Encoder, Reading
from engine.evaluation.measure import KNN, measure
from engine.evaluation.source import load_source
from engine.pictures.maps import maps_of_views
from engine.pictures.views import whole_views
from engine.preflight.memory import kept_by_forward
from engine.training.acceleration import checkpoint_blocks, compile_network
from models.grouped_norm import GroupedBatchNorm, batch_norms
from models.pretrained import load_backbone
from models.registry import BackboneSpec, build_backbone, identity, resolve
from models.timm_backbone import measured
from tests.runs import batch_of, checkpoint_of, pretraining, small_config
from utils import checkpoint
from utils.distributed import ALONE
from utils.errors import InputError

# By name, the sides of global and of local crops: channels first, and a BatchNorm with an
# activation; channels last, and two widths; registers.
SMALL = {"test_efficientnet": (64, 48), "test_mambaout": (64, 48), "test_vit2": (64, 48)}
FAMILIES = {
    "resnet18": (96, 64),
    "convnext_atto": (96, 64),
    "convnextv2_atto": (96, 64),
    "efficientnet_lite0": (96, 64),
    "mobilenetv4_conv_small": (96, 64),
    "regnety_002": (96, 64),
    "swin_tiny_patch4_window7_224": (96, 64),
    "swinv2_tiny_window8_256": (96, 64),
    "maxvit_rmlp_pico_rw_256": (96, 96),
    "vit_tiny_patch16_224": (96, 64),
    "deit3_small_patch16_224": (96, 64),
    "vit_small_patch14_dinov2": (98, 56),
    "vit_small_patch14_reg4_dinov2": (98, 56),
    "vit_small_patch16_dinov3": (96, 64),
    "eva02_tiny_patch14_224": (98, 56),
    "xcit_nano_12_p16_224": (96, 64),
    "hiera_tiny_224": (96, 96),
    "pvt_v2_b0": (96, 64),
    "levit_128s": (128, 128),
    "mambaout_femto": (96, 64),
    "hgnet_tiny": (96, 64),
}
# Residual blocks, in some of these families stages. A stem of several parts, a BatchNorm with an
# activation after the stem or the last block, and a group that has no module of its own are none.
BLOCKS = {
    "efficientnet_lite0": 16,
    "resnet50d": 16,
    "poolformer_s12": 4,
    "nest_tiny_jx": 12,
}
SLOW_BLOCKS = {
    "resnet18": 8,
    "densenet121": 58,
    "dpn68": 22,
    "convnext_atto": 12,
    "mobilenetv4_conv_small": 17,
    "regnety_002": 13,
    "swin_tiny_patch4_window7_224": 12,
    "maxvit_rmlp_pico_rw_256": 4,
    "vit_tiny_patch16_224": 12,
    "vit_small_patch14_reg4_dinov2": 12,
    "eva02_tiny_patch14_224": 12,
    "xcit_nano_12_p16_224": 14,
    "hiera_tiny_224": 12,
    "pvt_v2_b0": 4,
    "levit_128s": 9,
    "mambaout_femto": 18,
}
EVERY = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
SIZES = SMALL | FAMILIES


def noise(size: int, count: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def built(name: str, **spec):
    torch.manual_seed(1)
    backbone = build_backbone(BackboneSpec(f"timm/{name}", **{"img_size": SIZES[name][0]} | spec))
    # Zero are at their initialisation, for instance, what a residual branch of a ResNet adds.
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return backbone.eval()


def run_of(name: str, **options):
    """Of the objective cmd where it can be: patches are as wide as the image feature."""
    size, local = SIZES.get(name, (64, 48))
    shapes = measured(name, size).shapes
    settings = {
        "LOSS__OBJECTIVE": "cmd" if shapes.features == shapes.patches else "esvit",
        "MODEL__ARCH": f"timm/{name}",
        "MODEL__EMBED_DIM": 0,
        "MODEL__DEPTHS": [],
        "MODEL__NUM_HEADS": [],
        "MODEL__PATCH_SIZE": 0,
        "MODEL__IMG_SIZE": size,
        "MODEL__DROP_PATH": 0.0,
        "AUG__GLOBAL_CROPS_SIZE": size,
        "AUG__LOCAL_CROPS_SIZE": local,
        "TRAIN__OPTIMIZER": "sgd",
    }
    return pretraining(small_config(**settings | options))


def crops_of(run, step: int) -> list[Tensor]:
    sizes = [run.cfg.AUG.GLOBAL_CROPS_SIZE] * 2 + [run.cfg.AUG.LOCAL_CROPS_SIZE[0]] * 2
    return [noise(size, 3, seed=10 * step + place) for place, size in enumerate(sizes)]


# What comes out


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_the_features_are_timms(name):
    backbone, size = built(name), SIZES[name][0]
    keywords = {"img_size": size} if "img_size" in measured(name, size).keywords else {}
    stock = timm.create_model(name, num_classes=0, **keywords).eval()
    stock.load_state_dict(backbone.model.state_dict())
    stock.to(memory_format=backbone.memory_format)  # by another layout kernels round otherwise
    images = noise(size).contiguous(memory_format=backbone.memory_format)
    features = stock.forward_features(images)
    image, patches = backbone(images)
    torch.testing.assert_close(image, stock.forward_head(features, pre_logits=True))
    rows, columns = backbone.patch_grid(size, size)
    assert image.shape == (2, backbone.num_features)
    assert patches.shape == (2, rows * columns, backbone.num_patch_features)
    # Where timm itself lays the patches out, it is in rows and columns of the same cells.
    last = stock.forward_intermediates(
        images, indices=1, intermediates_only=True, **backbone.measured.asked
    )[-1]
    last = last[0] if isinstance(last, tuple) else last
    assert last.shape[2:] == (rows, columns)
    cells = last.flatten(2).transpose(1, 2)
    if name.startswith("xcit"):  # its class attention comes after, and moves all patches
        nearest = F.normalize(patches, dim=2) @ F.normalize(cells, dim=2).mT
        assert (nearest.argmax(dim=2) == torch.arange(rows * columns)).float().mean() > 0.9
    elif cells.shape == patches.shape:
        torch.testing.assert_close(patches, cells, rtol=1e-4, atol=1e-5)
    assert patches.std() > 1e-3


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_the_last_blocks_end_in_the_image_feature(name):
    backbone = built(name)
    images = noise(SIZES[name][0])
    image, patches = backbone(images)
    (one,) = backbone.last_blocks(images, 1)
    torch.testing.assert_close(one, image)
    two = backbone.last_blocks(images, 2, avgpool_patchtokens=True)
    torch.testing.assert_close(two[1], image)
    torch.testing.assert_close(two[2], patches.mean(dim=1))
    assert two[0].shape[0] == 2
    assert two[0].std() > 1e-4
    assert not torch.equal(two[0], two[1])
    with pytest.raises(ValueError, match=f"the backbone has {backbone.depth}"):
        backbone.last_blocks(images, backbone.depth + 1)


@torch.no_grad()
def test_blocks_of_a_vit_are_read_by_its_head_and_stages_by_their_mean():
    vit, convs = built("test_vit2"), built("test_mambaout")
    images = noise(64)
    found = vit.last_blocks(images, 3)
    for feature, (cells, prefix) in zip(
        found,
        vit.model.forward_intermediates(
            images, indices=3, norm=True, return_prefix_tokens=True, intermediates_only=True
        ),
        strict=True,
    ):
        tokens = torch.cat([prefix, cells.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(feature, vit.model.forward_head(tokens, pre_logits=True))
    stages = convs.model.forward_intermediates(images, indices=2, intermediates_only=True)
    torch.testing.assert_close(convs.last_blocks(images, 2)[0], stages[0].mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Convolutions that round up, and that leave out the border.
        ("test_efficientnet", {96: (3, 3), 100: (4, 4), 70: (3, 3)}),
        ("test_vit2", {224: (14, 14), 96: (6, 6), 100: None}),
        ("hiera_tiny_224", {224: (7, 7), 96: None, 448: None}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("inception_v3", {224: (5, 5), 299: (8, 8)}),
                ("vit_small_patch14_reg4_dinov2", {224: (16, 16), 518: (37, 37), 96: None}),
                ("coatnet_nano_rw_224", {224: (7, 7), 96: None}),
            )
        ),
    ],
)
def test_the_grid_is_measured(name, sizes):
    with torch.device("meta"):
        backbone = build_backbone(BackboneSpec(f"timm/{name}"))
    for size, grid in sizes.items():
        assert (backbone.misfit(size) == "") == (grid is not None)
        if grid is None:
            with pytest.raises(ValueError, match=f"images of {size}x{size} pixels"):
                backbone.patch_grid(size, size)
        else:
            assert backbone.patch_grid(size, size) == grid
            assert (grid[0] - 1) * backbone.stride < size


def test_whether_the_image_feature_is_the_patches_mean_is_measured():
    found = {name: built(name).mean_of_patches for name in SMALL}
    assert found == {"test_efficientnet": True, "test_mambaout": False, "test_vit2": False}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *BLOCKS.items(),
        *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_BLOCKS.items()),
    ],
)
def test_its_blocks_are_counted_and_the_stem_stands_before_them(name, count):
    with torch.device("meta"):
        backbone = build_backbone(BackboneSpec(f"timm/{name}", img_size=SIZES.get(name, (224,))[0]))
    blocks, depths = backbone.all_blocks(), backbone.depths()
    assert len(blocks) == count
    assert [depths[block] for block in blocks] == list(range(1, count + 1))
    first = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    assert depths[first] == 0
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert inside > 0.5 * sum(p.numel() for p in backbone.parameters())


# What is refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            {"arch": "timm/resnett18"},
            "has no model 'resnett18'; the nearest: timm/resnet18, .*newer",
        ),
        ({"arch": "timm/qqqqqqqq"}, r"has no model 'qqqqqqqq' \(a newer timm may have it\)"),
        ({"arch": "timm/resnet18.nobody"}, "no weights 'nobody' of resnet18; it has: a1_in1k,"),
        ({"arch": "resnet18"}, "no architecture 'resnet18'. Did you mean timm/resnet18"),
        ({"arch": "timm/crossvit_tiny_240"}, "no single map of patches"),
        ({"arch": "timm/resnet18", "depths": (2,)}, "MODEL.DEPTHS: timm/resnet18 has nothing"),
        (
            {"arch": "timm/test_vit2", "img_size": 100},
            "MODEL.IMG_SIZE 100: timm/test_vit2 takes multiples of 16 pixels",
        ),
        (
            {"arch": "timm/test_convnext", "img_size": 16},
            "MODEL.IMG_SIZE 16: timm/test_convnext takes images of 32 pixels and more",
        ),
    ],
)
def test_what_timm_cannot_give_is_refused(spec, words):
    with pytest.raises(InputError, match=words):
        resolve(BackboneSpec(**spec))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("test_vit2", 40, "MODEL.IMG_SIZE 64, multiples of 16 pixels go into timm/test_vit2."),
        ("test_convnext", 31, "MODEL.IMG_SIZE 64, images of 32 pixels and more go into"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("hiera_tiny_224", 64, "MODEL.IMG_SIZE 96, images of 96 pixels alone go into"),
                ("maxvit_rmlp_pico_rw_256", 48, "multiples of 96 pixels go into"),
            )
        ),
    ],
)
def test_a_crop_that_it_cannot_take_is_refused_with_what_it_can(name, size, words):
    with pytest.raises(InputError, match=f"AUG.LOCAL_CROPS_SIZE {size} does not fit: .*{words}"):
        run_of(name, AUG__LOCAL_CROPS_SIZE=size)


def test_lcr_wants_an_image_feature_that_is_the_mean_of_the_patches():
    options = {"LOSS__OBJECTIVE": "lcr", "AUG__LOCAL_CROPS_NUMBER": [], "MOCO__QUEUE": 6}
    run = run_of("test_efficientnet", **options)
    run.train_step(iter([batch_of([noise(64, 3), noise(64, 3, 8)])]))
    with pytest.raises(InputError, match="that of timm/test_vit2 is not"):
        run_of("test_vit2", **options)


def test_l_s_wants_patches_as_wide_as_the_image_feature_and_l_t_does_not():
    with pytest.raises(InputError) as caught:
        run_of("test_mambaout", LOSS__OBJECTIVE="cmd")
    shapes = measured("test_mambaout", 64).shapes
    assert str(caught.value) == (
        "CMD.LS gives patches to the image head, which needs patches as wide as the image "
        f"feature; those of timm/test_mambaout have {shapes.patches} values, and that has "
        f"{shapes.features}. Take another --arch, CMD.LS false, or --objective esvit."
    )
    run = run_of("test_mambaout", LOSS__OBJECTIVE="cmd", CMD__LS=False)
    before = run.student.head_bag.mlp[0].weight.detach().clone()
    run.train_step(iter([batch_of(crops_of(run, 0))]))
    assert not torch.equal(run.student.head_bag.mlp[0].weight, before)


def test_stochastic_depth_is_the_students_and_its_lack_is_said(caplog):
    student, _ = build.networks(run_of("test_vit2", MODEL__DROP_PATH=0.3).cfg)
    rates = [m.drop_prob for m in student.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)
    assert "stochastic depth" not in caplog.text
    with torch.device("meta"):
        build_backbone(BackboneSpec("timm/vgg11"), drop_path=0.1)
    assert "timm/vgg11 has no stochastic depth" in caplog.text


def test_tags_of_weights_do_not_tell_networks_apart():
    specs = [BackboneSpec(f"timm/resnet18{tag}") for tag in ("", ".a1_in1k")]
    assert identity(specs[0]) == identity(specs[1])
    assert identity(specs[0]) != identity(BackboneSpec("timm/resnet34"))
    assert BackboneSpec.from_dict(specs[1].to_dict()) == specs[1]


def test_the_size_tells_networks_apart_that_are_laid_out_for_one():
    """Two random networks that are the same would be two equal rows of a table."""
    same = {
        name: identity(BackboneSpec(f"timm/{name}", img_size=64))
        == identity(BackboneSpec(f"timm/{name}", img_size=96))
        for name in ("test_efficientnet", "test_vit2")
    }
    assert same == {"test_efficientnet": True, "test_vit2": False}


# A whole run


@pytest.mark.parametrize("name", EVERY)
def test_a_run_trains_all_that_is_not_frozen_and_its_checkpoint_is_evaluated(
    name, images, tmp_path
):
    run = run_of(name)
    crops = crops_of(run, 0)
    views = run.student(crops)
    parts = (*views.patch_embeddings, *views.instance_embeddings, views.image_embeddings)
    sum(part.sum() for part in parts).backward()
    named = dict(run.student.backbone.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in named.values())
    run.student.zero_grad()
    before = {key: value.clone() for key, value in named.items()}
    figures, *_ = run.train_step(iter([batch_of(crops)]))
    assert all(value.isfinite().all() for value in figures.values())
    assert any(not torch.equal(before[key], value) for key, value in named.items())

    path = tmp_path / "checkpoint.pth"
    checkpoint.save(checkpoint_of(run), path)
    source = load_source(path)
    size = SIZES[name][0]
    with torch.no_grad():
        wanted = run.teacher.eval().backbone(noise(size))
        for found in (source.network.backbone(noise(size)), load_backbone(path)(noise(size))):
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs)
        for pooling in ("mean", "mil") if source.network.pool else ("mean",):
            width = source.network.backbone.num_patch_features
            assert Encoder(source, pooling)(noise(size)).shape == (2, width)
    splits = paired_folders("the test", images, images)
    features = SplitFeatures(source, splits, Reading.of(run.cfg, ALONE, source))
    (found,) = measure(features, [KNN([3])])
    # Two hues, of images that vote for themselves; fresh networks of many blocks hardly tell them.
    assert found.figures["k"]["3"]["top1"] >= (60 if name in SMALL else 50)

    grid = source.network.backbone.patch_grid(size, size)
    views = whole_views([splits.test.load(0)], size)
    for kind in attention.kinds(source.network):
        (drawn,) = maps_of_views(source.network, views, kind)
        assert drawn.grid == grid
        assert drawn.values.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_compiled_and_recomputed_it_is_the_same(name):
    torch._dynamo.reset()
    plain, compiled, recomputed = (run_of(name) for _ in range(3))
    for network in (compiled.student, compiled.teacher):
        compile_network(network, "aot_eager")
    runs = [plain, compiled]
    if not any(norm.training for norm in batch_norms(plain.student.backbone)):
        kept = kept_by_forward(recomputed.student, crops_of(plain, 0))
        checkpoint_blocks(recomputed.student)
        assert kept_by_forward(recomputed.student, crops_of(plain, 0)) < 0.8 * kept
        runs.append(recomputed)
    else:
        with pytest.raises(InputError, match="BatchNorm"):
            checkpoint_blocks(recomputed.student)
    first, *others = [run.train_step(iter([batch_of(crops_of(plain, 1))]))[0] for run in runs]
    for figures in others:
        for key, value in first.items():
            torch.testing.assert_close(figures[key], value, rtol=2e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_batch_norm_with_an_activation_keeps_it_in_groups():
    run = run_of(
        "test_efficientnet",
        LOSS__OBJECTIVE="moco_v2",
        AUG__LOCAL_CROPS_NUMBER=[],
        MOCO__QUEUE=6,
        MOCO__BN_IMAGES=2,
    )
    norms = [m for m in run.student.backbone.modules() if isinstance(m, GroupedBatchNorm)]
    norm = next(norm for norm in norms if not isinstance(norm.act, nn.Identity))
    batch = torch.randn(4, norm.num_features, 3, 3)
    wanted = [F.batch_norm(part, None, None, training=True) for part in batch.chunk(2)]
    torch.testing.assert_close(norm.train()(batch), norm.act(torch.cat(wanted)))
