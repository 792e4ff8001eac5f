"""Backbones, heads, pooling, and the pair of student and teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engine import build
from models import ARCHITECTURES, BackboneSpec, build_backbone
from models.heads import DINOHead
from models.mil import GatedAttention
from models.network import HeadSpec, Network, Parts, make_teacher
from models.pretrained import count_parameters
from models.registry import resolve
from tests.runs import config_of
from utils.errors import InputError

# Figures that keep a forward at 224 pixels in milliseconds.
SMALL = {
    "swin": {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "vit": {"embed_dim": 32, "depths": (2,), "num_heads": (2,)},
    "resnet": {},
}
# Backbone parameters, published (classifier taken off), in millions.
MILLIONS = {
    "swin_tiny": 27.52,
    "swin_small": 48.84,
    "swin_base": 86.74,
    "swin_large": 195.0,
    "deit_tiny": 5.53,
    "deit_small": 21.67,
    "vit_small": 21.67,
    "vit_base": 85.8,
    "resnet50": 23.51,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(arch: str, drop_path: float = 0.0, **changed):
    spec = BackboneSpec(arch, **{**SMALL[ARCHITECTURES[arch]["family"]], **changed})
    return build_backbone(spec, drop_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_has_its_published_size(arch):
    with torch.device("meta"):
        backbone = build_backbone(BackboneSpec(arch))
    wanted = MILLIONS[arch]
    assert count_parameters(backbone) / 1e6 == pytest.approx(wanted, abs=0.006 * wanted)


@pytest.mark.parametrize("size", [(224, 224), (112, 112), (96, 96), (64, 160)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_features_come_at_every_crop_size(arch, size):
    backbone = small(arch).eval()
    with torch.no_grad():
        image, patches = backbone(torch.randn(2, 3, *size))
    rows, columns = backbone.patch_grid(*size)
    assert rows == -(-size[0] // backbone.stride)
    assert columns == -(-size[1] // backbone.stride)
    assert image.shape == (2, backbone.num_features)
    assert patches.shape == (2, rows * columns, backbone.num_features)


@pytest.mark.parametrize("arch", ["swin_tiny", "resnet50"])
def test_the_image_feature_is_the_mean_of_the_patches(arch):
    image, patches = small(arch).eval()(torch.randn(2, 3, 96, 96))
    torch.testing.assert_close(image, patches.mean(1))


@pytest.mark.parametrize("arch", ["swin_tiny", "deit_small"])
def test_patches_are_row_major(arch):
    backbone = small(arch).eval()
    picture = torch.zeros(1, 3, 96, 128)
    rows, columns = backbone.patch_grid(96, 128)
    moved = picture.clone()
    # The top right corner changes; with windows and shallow nets the change stays near it.
    moved[..., :8, -8:] = 5
    with torch.no_grad():
        change = (backbone(moved)[1] - backbone(picture)[1]).norm(dim=-1)[0]
    assert change.argmax() == columns - 1
    assert len(change) == rows * columns


@pytest.mark.parametrize(("arch", "size"), [("swin_tiny", 98), ("deit_small", 100)])
def test_a_size_that_patches_do_not_tile_is_refused(arch, size):
    with pytest.raises(ValueError, match=f"{size}.*multiples of the patch size"):
        small(arch)(torch.zeros(1, 3, size, 96))


@pytest.mark.parametrize(
    ("img_size", "window", "windows", "shifts"),
    [
        # Maps of 56, 28, 14, 7 patches.
        (224, 7, [7, 7, 7, 7], [3, 3, 3, 0]),
        (224, 14, [14, 14, 14, 7], [7, 7, 0, 0]),
        # Maps of 8, 4, 2, 1.
        (32, 7, [7, 4, 2, 1], [3, 0, 0, 0]),
    ],
)
def test_windows_shrink_to_the_maps_of_the_built_size_for_good(img_size, window, windows, shifts):
    backbone = small("swin_tiny", depths=(2, 2, 2, 2), window_size=window, img_size=img_size).eval()
    for size in (None, 96):
        if size:
            backbone(torch.zeros(1, 3, size, size))
        seconds = [stage.blocks[1] for stage in backbone.layers]
        assert [block.window_size for block in seconds] == [(w, w) for w in windows]
        assert [block.shift_size for block in seconds] == [(s, s) for s in shifts]
    tables = [block.attn.relative_position_bias_table for block in seconds]
    assert [len(table) for table in tables] == [(2 * w - 1) ** 2 for w in windows]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (BackboneSpec("swin_tinny"), "swin_tiny"),
        (BackboneSpec("resnet50", embed_dim=64), "MODEL.EMBED_DIM: resnet50 has nothing"),
        (BackboneSpec("deit_small", depths=(2, 2), num_heads=(2, 2)), "one depth"),
        (BackboneSpec("swin_tiny", depths=(2, 2)), "equally long"),
        (BackboneSpec("deit_small", num_heads=(5,)), "5 heads do not divide"),
        (BackboneSpec("deit_small", img_size=100), "multiple of the patch size"),
    ],
)
def test_figures_that_do_not_fit_are_refused(spec, words):
    with pytest.raises(InputError, match=words):
        resolve(spec)


def test_a_spec_survives_plain_data():
    spec = BackboneSpec("swin_tiny", depths=(1, 2, 3, 4), window_size=14)
    plain = spec.to_dict()
    assert plain["depths"] == [1, 2, 3, 4]
    assert BackboneSpec.from_dict(plain) == spec


@pytest.mark.parametrize(
    "network",
    ["", "MODEL.ARCH swin_tiny MODEL.EMBED_DIM 12 MODEL.DEPTHS [1,1,2] MODEL.NUM_HEADS [1,1,2]"],
    ids=["vit", "swin"],
)
def test_drop_path_is_the_students_alone_and_rises_to_the_last_block(network, network_options):
    student, teacher = build.networks(config_of(f"{network_options} {network} MODEL.DROP_PATH 0.3"))

    def rates(network):
        return [
            m.drop_path1.drop_prob
            for m in network.modules()
            if type(getattr(m, "drop_path1", None)).__name__ == "DropPath"
        ]

    found = rates(student)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.3)
    assert rates(teacher) == []
    crop = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher([crop]).image_features, teacher([crop]).image_features)
        runs = torch.stack([student([crop]).image_features for _ in range(6)])
    assert (runs.std(0) > 1e-4).any()


def test_the_head_gives_unit_embeddings_and_prototypes_of_norm_g():
    head = DINOHead(12, 7, hidden_dim=16, bottleneck_dim=5, norm_last_layer=False)
    embeddings = head(torch.randn(2, 3, 12))
    assert embeddings.shape == (2, 3, 5)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2, 3))
    assert torch.equal(head.last_layer.weight_g, torch.ones(7, 1))
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.arange(1.0, 8)[:, None])
    torch.testing.assert_close(head.prototypes().norm(dim=1), torch.arange(1.0, 8))
    directions = F.normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close(F.normalize(head.prototypes(), dim=1), directions)


def test_a_projection_is_plain_linears_with_relu_and_no_prototypes():
    head = HeadSpec(out_dim=7, hidden_dim=16, bottleneck_dim=5, layers=2, projects=True).build(12)
    torch.manual_seed(0)
    wanted = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    assert [type(module) for module in head.mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    for name, value in wanted.state_dict().items():
        assert torch.equal(head.mlp.state_dict()[name], value)
    assert head.prototypes() is None
    assert all(name.startswith("mlp.") for name in head.state_dict())
    rows = torch.randn(3, 12)
    torch.testing.assert_close(head(rows), F.normalize(wanted(rows), dim=-1))


@pytest.mark.parametrize("frozen", [True, False])
def test_norm_last_layer_freezes_the_magnitudes_alone(frozen):
    head = DINOHead(12, 7, 16, 5, norm_last_layer=frozen)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert ("last_layer.weight_g" not in trained) == frozen
    assert "last_layer.weight_v" in trained
    assert len(trained) == 8 - frozen


def test_batch_norm_stands_after_every_linear_but_the_last():
    head = DINOHead(12, 7, 16, 5, use_bn=True)
    kinds = [type(module).__name__ for module in head.mlp]
    assert kinds == [
        *("Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU"),
        "Linear",
    ]
    rows = torch.randn(6, 12)
    head(rows)
    expected = 0.1 * head.mlp[0](rows).mean(0)
    torch.testing.assert_close(head.mlp[1].running_mean, expected)


def attention_of(pool: GatedAttention, patches: torch.Tensor) -> torch.Tensor:
    """Attention [N] of one bag's patch features [N, D], by the formula, one after the other."""
    p, scores = pool.state_dict(), []
    for x in patches:
        scaled = len(x) ** 0.5 * x / x.norm()
        tanh = torch.tanh(p["tanh.weight"] @ scaled + p["tanh.bias"])
        gate = torch.sigmoid(p["gate.weight"] @ scaled + p["gate.bias"])
        scores.append(p["score.weight"][0] @ (tanh * gate) + p["score.bias"][0])
    return torch.stack(scores).softmax(0)


def test_the_attention_is_its_formula_and_even_at_first():
    """Over patch features; instances are the image head's of each patch."""
    student, _ = pair()
    assert student.pool.score.in_features == student.parts.heads.pool_hidden
    crops = [torch.randn(2, 3, size, size) for size in (32, 32, 16)]
    with torch.no_grad():
        for log_attention in student(crops).log_attention:
            assert torch.equal(log_attention, log_attention[0, 0].expand_as(log_attention))
        nn.init.normal_(student.pool.score.weight)
        student.eval()
        views = student(crops)
        for features, instances, log_attention in zip(
            views.patch_features, views.instance_embeddings, views.log_attention, strict=True
        ):
            wanted = torch.stack([attention_of(student.pool, row) for row in features])
            torch.testing.assert_close(log_attention.exp(), wanted)
            assert wanted.std() > 0.1 * wanted.mean()
            torch.testing.assert_close(instances, student.head(features))


def test_gradcheck_of_the_attention():
    torch.manual_seed(0)
    pool = GatedAttention(7, hidden=4).double()
    nn.init.normal_(pool.score.weight)
    patches = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)

    def attention(patches: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(pool.named_parameters()), parameters, strict=True))
        return functional_call(pool, named, (patches,))

    assert torch.autograd.gradcheck(attention, (patches, *pool.parameters()))


def test_under_autocast_attention_stays_float32():
    torch.manual_seed(0)
    pool, patches = GatedAttention(32, 16), F.normalize(torch.randn(4, 9, 32), dim=-1)
    nn.init.normal_(pool.score.weight)
    wanted = pool(patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(patches), wanted)


def pair(use_bn: bool = False) -> tuple[Network, Network]:
    heads = HeadSpec(8, 16, 5, use_bn=use_bn, pool_hidden=4)
    backbone = {"img_size": 32, "patch_size": 8}
    student, teacher = (
        Network(small("deit_small", **backbone), Parts(heads, True, True)) for _ in range(2)
    )
    student.embeds_instances = True
    return student, make_teacher(student, teacher)


def test_a_teacher_starts_as_the_student_out_of_the_gradient():
    student, teacher = pair()
    states = student.state_dict(), teacher.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert not any(p.requires_grad for p in teacher.parameters())
    views = teacher([torch.randn(2, 3, 32, 32)])
    assert not views.image_embeddings.requires_grad


def test_runs_of_equal_crops_come_back_crop_major():
    student, _ = pair()
    student.eval()
    crops = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16, 16)]
    with torch.no_grad():
        views = student(crops)
        alone = [student([crop]) for crop in crops]
    assert [tuple(p.shape) for p in views.patch_embeddings] == [(4, 16, 5), (6, 4, 5)]
    assert views.count == 5
    torch.testing.assert_close(
        views.image_embeddings, torch.cat([view.image_embeddings for view in alone])
    )
    for name in ("instance_embeddings", "log_attention"):
        found = torch.cat([part.flatten(0, 1) for part in getattr(views, name)])
        apart = torch.cat([part.flatten(0, 1) for view in alone for part in getattr(view, name)])
        torch.testing.assert_close(found, apart)


@pytest.mark.parametrize(
    "part",
    [
        "image_embeddings",
        "bag_embeddings",
        "patch_embeddings",
        "instance_embeddings",
        "log_attention",
    ],
)
def test_a_gradient_reaches_the_backbone_by_each_part(part):
    parts = Parts(HeadSpec(8, 16, 5, pool_hidden=4), region_head=True, pooling=True, bag_head=True)
    student = Network(small("deit_small", img_size=32, patch_size=8), parts)
    student.embeds_instances = True
    nn.init.normal_(student.pool.score.weight)
    found = getattr(student([torch.randn(2, 3, 32, 32)]), part)
    found = found[0] if isinstance(found, list) else found
    (found * torch.randn_like(found)).sum().backward()
    assert student.backbone.patch_embed.proj.weight.grad.any()


def test_batch_norm_of_a_head_takes_the_patches_of_all_sizes_of_crop_together():
    student, _ = pair(use_bn=True)
    with torch.no_grad():
        views = student([torch.randn(2, 3, size, size) for size in (32, 32, 16)])
        rows = torch.cat([part.flatten(0, 1) for part in views.patch_features])
        for head, parts in (
            (student.head_dense, views.patch_embeddings),
            (student.head, views.instance_embeddings),
        ):
            found = torch.cat([part.flatten(0, 1) for part in parts])
            torch.testing.assert_close(found, head(rows))
