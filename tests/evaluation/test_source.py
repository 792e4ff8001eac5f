"""Someone's weights become the frozen network under evaluation, with the feature asked for."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.evaluation.features import Encoder
from engine.evaluation.source import (
    NO_KEY,
    RANDOM,
    Source,
    image_size,
    load_source,
    random_like,
)
from models.network import Network, Parts
from models.registry import BackboneSpec, build_backbone
from tests.evaluation.runs import save_run
from tests.runs import shake
from utils import checkpoint, cli
from utils.config import defaults
from utils.errors import InputError
from utils.logging import setup

SWIN = BackboneSpec("swin_tiny", 16, (1, 1, 2, 1), (1, 2, 4, 8))
VIT = BackboneSpec("deit_tiny", 64, (3,), (1,), patch_size=8, img_size=32)


def backbone(spec: BackboneSpec, seed: int = 1):
    torch.manual_seed(seed)
    return shake(build_backbone(spec), seed).eval().requires_grad_(False)


def images(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def load(path, words: str = "") -> tuple[Source, cli.CommandLine]:
    """The network as the scripts read it from a command line."""
    command = cli.parse("", ["--pretrained_weights", str(path), *words.split()], cli.KNN)
    cfg = command.cfg
    return load_source(cfg.INIT.WEIGHTS, cfg.INIT.CHECKPOINT_KEY, cfg, command.typed), command


def features(path, words: str = "", size: int = 32) -> Tensor:
    source, command = load(path, words)
    return Encoder(source, command.cfg.EVAL.POOLING)(images(size))


def refusal(path, words: str) -> str:
    with pytest.raises(InputError) as caught:
        features(path, words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def of_state(spec: BackboneSpec, state: dict, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Both features by weights that were put into a fresh backbone by hand."""
    plain = build_backbone(spec).eval()
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    plain.load_state_dict(own)
    with torch.no_grad():
        return plain(images())


# Poolings


def attention_by_hand(state: dict, patches: Tensor) -> Tensor:
    """Attention [B, N] of patch features, from a checkpoint's tensors alone."""
    x = math.sqrt(patches.shape[-1]) * patches / patches.norm(dim=-1, keepdim=True)
    tanh = torch.tanh(x @ state["pool.tanh.weight"].T + state["pool.tanh.bias"])
    gate = torch.sigmoid(x @ state["pool.gate.weight"].T + state["pool.gate.bias"])
    scores = (tanh * gate) @ state["pool.score.weight"].T + state["pool.score.bias"]
    return scores.squeeze(-1).softmax(dim=-1)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_poolings_are_the_image_feature_the_mean_and_the_attentions_mean(weights, key):
    stored = torch.load(weights, weights_only=True)
    spec = BackboneSpec.from_dict(stored["model"]["backbone"])
    image, patches = of_state(spec, stored[key], "backbone.")
    attention = attention_by_hand(stored[key], patches)
    assert attention.std() > 0.1 * attention.mean(), "even attention cannot tell mil from mean"
    words = f"--checkpoint_key {key} --pooling"
    assert torch.equal(features(weights, f"{words} default"), image)
    torch.testing.assert_close(features(weights, f"{words} mean"), patches.mean(dim=1))
    weighted = (attention[..., None] * patches).sum(dim=1)
    torch.testing.assert_close(features(weights, f"{words} mil"), weighted, rtol=1e-4, atol=1e-5)


def test_mean_and_mil_take_one_block_and_no_mean_of_patches(weights):
    for pooling in ("mean", "mil"):
        words = f"--pooling {pooling}"
        source, command = load(weights, words)
        network = Encoder(source, command.cfg.EVAL.POOLING, blocks=2, avgpool_patchtokens=True)
        assert (network.blocks, network.avgpool_patchtokens) == (1, False)
        assert network.widths(32) == [48]
        assert torch.equal(network(images()), features(weights, words))


@pytest.mark.parametrize("objective", ["dino", "esvit"])
def test_mil_is_refused_where_there_is_no_pooling(tmp_path, objective):
    save_run(tmp_path / "run.pth", LOSS__OBJECTIVE=objective)
    message = refusal(tmp_path / "run.pth", "--pooling mil")
    assert message.startswith("EVAL.POOLING mil needs the MIL attention")
    assert f"{tmp_path}/run.pth has none" in message
    assert features(tmp_path / "run.pth", "--pooling mean").shape == (2, 48)


@pytest.mark.parametrize("pooling", ["default", "mean", "mil"])
def test_features_are_float32_without_gradient_and_in_eval_mode(weights, pooling):
    source, command = load(weights, f"--pooling {pooling}")
    network = Encoder(source, command.cfg.EVAL.POOLING)
    assert not any(module.training for module in source.network.modules())
    assert not any(parameter.requires_grad for parameter in source.network.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(images())
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_even_attention_is_the_mean(tmp_path, precision):
    """The two poolings differ in the weights alone, whatever the backbone's precision."""
    state = save_run(tmp_path / "run.pth")
    state["teacher"]["pool.score.weight"].zero_()
    checkpoint.save(state, tmp_path / "even.pth")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        mean, mil = (features(tmp_path / "even.pth", f"--pooling {p}") for p in ("mean", "mil"))
    torch.testing.assert_close(mil, mean, rtol=1e-4, atol=1e-5)


# Blocks


def encoder_of(network, **how) -> Encoder:
    return Encoder(Source(None, Network(network, Parts())), **how)


@pytest.mark.parametrize(
    ("spec", "size", "blocks"),
    [(VIT, 32, 3), (SWIN, 64, 5), (BackboneSpec("resnet50"), 64, 4)],
    ids=["vit", "swin", "resnet"],
)
def test_blocks_are_the_backbones_last_ones_and_end_in_the_image_feature(spec, size, blocks):
    network = backbone(spec)
    with torch.no_grad():
        parts = network.last_blocks(images(size), blocks)
        image = network(images(size))[0]
    whole = encoder_of(network, blocks=blocks)
    assert whole.widths(size) == [part.shape[1] for part in parts]
    assert torch.equal(whole(images(size)), torch.cat(parts, dim=1))
    assert torch.equal(encoder_of(network)(images(size)), image)
    torch.testing.assert_close(parts[-1], image)
    if spec is SWIN:
        assert whole.widths(size) == [16, 32, 64, 64, 128]


@pytest.mark.parametrize(("spec", "size"), [(VIT, 32), (SWIN, 64)], ids=["vit", "swin"])
def test_the_patches_mean_is_appended_for_a_vit_alone(spec, size):
    network = backbone(spec)
    both = encoder_of(network, blocks=2, avgpool_patchtokens=True)
    without = encoder_of(network, blocks=2)(images(size))
    if spec is VIT:
        patches = network(images(size))[1].mean(dim=1)
        torch.testing.assert_close(both(images(size)), torch.cat([without, patches], dim=1))
        assert both.widths(size) == [64, 64, 64]
    else:
        assert not both.avgpool_patchtokens
        assert torch.equal(both(images(size)), without)


def test_more_blocks_than_there_are_is_one_sentence():
    with pytest.raises(InputError, match=r"LINEAR\.N_LAST_BLOCKS .*the last 4 .*has 3"):
        encoder_of(backbone(VIT), blocks=4).widths(32)


# Files of all kinds


def test_a_run_of_ours_tells_its_epoch_options_and_hash(weights):
    stored, known = torch.load(weights, weights_only=True), load(weights)[0].weights
    assert known.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (known.path, known.key, known.arch) == (str(weights), "teacher", "vit_small")
    assert (known.epoch, known.run_config) == (2, stored["config"])
    assert known.backbone == stored["model"]["backbone"]


# MODEL.* typed over what a checkpoint says


def test_a_network_of_the_same_shape_may_go_by_another_name(weights):
    same = "MODEL.EMBED_DIM 48 MODEL.DEPTHS [2] MODEL.NUM_HEADS [3]"
    source, _ = load(weights, f"--arch deit_small {same}")
    assert source.weights.arch == "deit_small"
    assert torch.equal(features(weights, f"--arch deit_small {same}"), features(weights))


def test_a_real_architecture_may_be_named_over_another_of_its_shape(tmp_path):
    torch.save(build_backbone(BackboneSpec("vit_small")).state_dict(), tmp_path / "vit.pth")
    for arch in ("deit_small", "vit_small"):
        source, _ = load(tmp_path / "vit.pth", f"--arch {arch}")
        assert source.weights.arch == arch
        assert source.network.backbone.blocks[0].attn.num_heads == 6


def test_heads_that_no_shape_tells_can_be_typed(tmp_path):
    spec = BackboneSpec("vit_small", 64, (2,), (4,), patch_size=8, img_size=32)
    state = backbone(spec).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    wanted, _ = of_state(spec, state)
    assert not torch.allclose(features(tmp_path / "vit.pth"), wanted, atol=1e-3)
    assert torch.equal(features(tmp_path / "vit.pth", "MODEL.NUM_HEADS [4]"), wanted)


def test_a_window_is_read_off_the_file_and_another_is_refused(tmp_path):
    state = backbone(BackboneSpec("swin_tiny", 16, (1, 1, 2, 1), (1, 2, 4, 8), 14)).state_dict()
    torch.save(state, tmp_path / "swin.pth")
    assert load(tmp_path / "swin.pth")[0].network.backbone.window_size == 14
    assert torch.equal(
        features(tmp_path / "swin.pth", "MODEL.WINDOW_SIZE 14", 64),
        features(tmp_path / "swin.pth", "", 64),
    )
    message = refusal(tmp_path / "swin.pth", "MODEL.WINDOW_SIZE 7")
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert f"{table} is [729, 1] in the file, [169, 1] here" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("MODEL.EMBED_DIM 96", "cls_token is [1, 1, 48] in the file, [1, 1, 96] here"),
        ("MODEL.IMG_SIZE 64", "pos_embed is [1, 17, 48] in the file, [1, 65, 48] here"),
        ("--patch_size 4", "pos_embed is [1, 17, 48] in the file, [1, 65, 48] here"),
        ("MODEL.DEPTHS [1]", "left over: blocks.1."),
        ("--arch resnet50 MODEL.EMBED_DIM 0", "missing: conv1.weight"),
        ("--arch swin_tinny", "no architecture 'swin_tinny'. Did you mean swin_tiny?"),
        ("MODEL.NUM_HEADS [5]", "5 heads do not divide the width 48"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_told(weights, words, expected):
    assert expected in refusal(weights, words)


@pytest.mark.parametrize("words", ["--arch vit_small", "--patch_size 8", "MODEL.NUM_CLASSES 0"])
def test_options_that_repeat_the_checkpoint_change_nothing(weights, words):
    source, _ = load(weights, words)
    assert source.weights == load(weights)[0].weights
    assert source.network.pool is not None
    torch.testing.assert_close(
        features(weights, f"{words} --pooling mil"), features(weights, "--pooling mil")
    )


def test_an_option_that_says_the_architectures_own_figure_keeps_the_pooling(tmp_path):
    """A run that left MODEL.PATCH_SIZE at 0, evaluated with EsViT's --patch_size 16."""
    save_run(tmp_path / "run.pth", MODEL__PATCH_SIZE=0)
    found = features(tmp_path / "run.pth", "--patch_size 16 --pooling mil")
    assert torch.equal(found, features(tmp_path / "run.pth", "--pooling mil"))
    identities = [
        source.identity(command.cfg.EVAL.POOLING)
        for source, command in (
            load(tmp_path / "run.pth", words) for words in ("", "--patch_size 16")
        )
    ]
    assert identities[0] == identities[1], "kept features would be refused"


def test_an_option_of_another_family_changes_nothing(weights):
    """EsViT's commands name a Swin's YAML for a ViT too; a ViT has no window."""
    words = "MODEL.WINDOW_SIZE 14 --pooling mil"
    assert torch.equal(features(weights, words), features(weights, "--pooling mil"))


# The image size


@pytest.mark.parametrize(("crops", "words", "expected"), [(32, "--size 48", 48), (64, "", 64)])
def test_the_size_is_evals_else_the_runs(tmp_path, crops, words, expected):
    save_run(tmp_path / "run.pth", AUG__GLOBAL_CROPS_SIZE=crops)
    source, command = load(tmp_path / "run.pth", words)
    assert image_size(source, command.cfg.EVAL.SIZE) == expected


@pytest.mark.parametrize("said", ["[64, 64]", "64x64", "", "-64", "6e1", "64"])
def test_a_size_that_a_foreign_file_says_in_another_way_is_none_so_224(tmp_path, said):
    save_file(backbone(VIT).state_dict(), tmp_path / "vit.safetensors", {"image_size": said})
    assert image_size(load(tmp_path / "vit.safetensors")[0]) == (64 if said == "64" else 224)


# The zero of every figure


@pytest.mark.parametrize("options", [{}, {"HEAD__USE_BN": True}, {"HEAD__LAYERS": 1}])
def test_a_random_network_has_the_shape_of_its_source(tmp_path, options):
    save_run(tmp_path / "run.pth", **options)
    source, command = load(tmp_path / "run.pth", "--pooling mil")
    random = random_like(source, command.cfg.SEED)
    for name in ("backbone", "head_dense", "pool"):
        own, other = (getattr(s.network, name).state_dict() for s in (source, random))
        # The number of prototypes does not reach a feature.
        shapes = [
            {k: v.shape for k, v in state.items() if not k.startswith(("prototypes", "last_layer"))}
            for state in (own, other)
        ]
        assert shapes[0] == shapes[1], name
    found = Encoder(random, command.cfg.EVAL.POOLING)(images())
    assert found.shape == (2, 48)
    assert not torch.allclose(found, Encoder(source, command.cfg.EVAL.POOLING)(images()), atol=1e-3)


def test_a_random_network_is_its_seeds(weights):
    def random(seed: int, pooling: str = "default") -> tuple[Source, Tensor]:
        source, command = load(weights, f"--seed {seed} --pooling {pooling}")
        before = torch.get_rng_state()
        made = random_like(source, command.cfg.SEED)
        assert torch.equal(torch.get_rng_state(), before)
        return made, Encoder(made, command.cfg.EVAL.POOLING)(images())

    first, found = random(1)
    assert torch.equal(found, random(1)[1])
    assert torch.equal(random(1, "mil")[1], random(1, "mil")[1])
    assert not torch.allclose(found, random(2)[1], atol=1e-3)
    made = first.weights
    assert (made.path, made.sha256, made.key, made.epoch) == (RANDOM, "seed 1", "none", 0)


def test_a_random_network_lacks_a_pooling_where_its_source_does(tmp_path):
    torch.save(backbone(VIT).state_dict(), tmp_path / "vit.pth")
    source, command = load(tmp_path / "vit.pth", "--pooling mil")
    random = random_like(source, command.cfg.SEED)
    assert random.network.pool is None
    with pytest.raises(InputError, match=r"mil needs"):
        Encoder(random, command.cfg.EVAL.POOLING)


# What kept features are compared by


def test_identity_differs_for_all_that_decides_the_features(weights, tmp_path):
    save_run(tmp_path / "other.pth", SEED=5)

    def identity(path, words: str = "") -> dict[str, str]:
        source, command = load(path, words)
        return source.identity(command.cfg.EVAL.POOLING)

    own = identity(weights)
    assert own == identity(weights, "--arch vit_small --size 48")
    for name, other in (
        ("weights", identity(tmp_path / "other.pth")),
        ("checkpoint_key", identity(weights, "--checkpoint_key student")),
        ("pooling", identity(weights, "--pooling mean")),
        ("backbone", identity(weights, "MODEL.NUM_HEADS [4]")),
    ):
        assert {key for key in own if own[key] != other[key]} == {name}


def test_a_random_networks_mil_features_depend_on_its_heads_too(weights, tmp_path):
    """Its weights go by the seed alone, so that its shape must say the rest."""
    save_run(tmp_path / "wide.pth", HEAD__HIDDEN_DIM=64)
    for pooling, same in (("mil", False), ("mean", True)):
        found = [
            random_like(source, command.cfg.SEED).identity(pooling)
            for source, command in map(load, (weights, tmp_path / "wide.pth"))
        ]
        assert (found[0] == found[1]) is same


def test_a_file_of_one_network_has_no_key_but_may_be_asked_for_one(tmp_path):
    one = tmp_path / "one.pth"
    torch.save({"ema": backbone(VIT).state_dict(), "notes": "text"}, one)
    assert load(one, "--checkpoint_key ema --arch deit_tiny")[0].weights.key == "ema"
    assert "has nothing under 'average'; it has: ema, notes" in refusal(
        one, "--checkpoint_key average"
    )
    assert "it has: ema, notes" in refusal(one, "")
    plain = tmp_path / "plain.pth"
    torch.save(backbone(VIT).state_dict(), plain)
    assert load(plain, "--checkpoint_key student")[0].weights.key == NO_KEY


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_an_average_beside_the_weights_that_are_taken_is_named(tmp_path, capsys, key):
    """As timm keeps its EMA; other entries of the file are no networks of this kind."""
    weights, average = (backbone(VIT, seed).state_dict() for seed in (1, 2))
    wrapped = {f"module.{name}": value for name, value in average.items()}
    optimizer = {"state": {0: {"step": torch.ones(())}}, 0: torch.ones(2)}
    contents = {"epoch": 3, "optimizer": optimizer, "ema": wrapped}
    path = tmp_path / "timm.pth"
    setup(is_main=True)
    for entries, words, taken in (
        ({key: weights, **contents}, "", weights),
        ({key: weights, **contents}, "--checkpoint_key ema", average),
        ({key: weights, "epoch": 3}, "", weights),
    ):
        torch.save(entries, path)
        network = load(path, words)[0].network
        assert torch.equal(network.backbone.cls_token, taken["cls_token"])
        said = f"under '{key}' are taken; those under 'ema' (--checkpoint_key ema) may be"
        assert (said in capsys.readouterr().out) == ("ema" in entries and not words)


def test_a_folder_is_no_checkpoint_but_may_hold_one(weights):
    folder = weights.parent
    assert refusal(folder, "") == (
        f"{folder} is a folder, not a checkpoint: name a file in it (checkpoint.pth)."
    )


def test_an_architecture_that_is_typed_leaves_the_heads_that_the_file_shows(tmp_path):
    """EsViT's command lines name one always; MoCo v3's networks of these names have 12 heads."""
    made = build_backbone(BackboneSpec("deit_tiny", num_heads=(12,), img_size=32)).state_dict()
    cfg = defaults()
    cfg.MODEL.ARCH = "deit_tiny"
    for prefix, heads, count in (("module.base_encoder.", 12, 1), ("module.", 3, 0)):
        path = tmp_path / "x.pth"
        torch.save({"state_dict": {f"{prefix}{k}": v for k, v in made.items()}}, path)
        source = load_source(path, cfg=cfg, typed={"MODEL.ARCH"})
        assert source.network.backbone.blocks[0].attn.num_heads == heads
        assert len(source.weights.doubts) == count
    cfg.MODEL.NUM_HEADS = [6]
    source = load_source(path, cfg=cfg, typed={"MODEL.NUM_HEADS"})
    assert source.network.backbone.blocks[0].attn.num_heads == 6
    assert source.weights.doubts == ()
