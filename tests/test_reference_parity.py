"""Parity with the reference implementations' golden figures: all that the folder holds.

The folder is tests/goldens, or the one named by CMD_GOLDENS; its README.md says what each
array is.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

from engine.evaluation import knn, retrieval
from engine.training.schedules import cosine, teacher_temperature
from losses.objective import Objective
from models.heads import DINOHead
from models.network import make_teacher
from models.pretrained import HEADS, load_strictly
from models.recognition import infer_spec
from models.registry import build_backbone
from models.swin import Swin
from models.vit import ViT
from tests.goldens import (
    array,
    assert_parity,
    labels,
    read_arrays,
    read_json,
    weights,
)
from tests.runs import batch_of, pretraining, small_config
from utils.views import Views

BACKBONES = read_json("backbone_keys.json")
FEATURES = read_arrays("backbones.npz")


def golden_backbone(name: str):
    state = weights(BACKBONES[name])
    backbone = build_backbone(infer_spec(state, name)[0])
    load_strictly(backbone, state, name)
    return backbone.eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_features(name):
    backbone = golden_backbone(name)
    sizes = sorted({int(key.split("/")[1]) for key in FEATURES if key.startswith(f"{name}/")})
    assert sizes, f"{name} has no golden features"
    seen = set()
    for size in sizes:
        images = array(size, 2, 3, size, size)
        with torch.no_grad():
            image, patches = backbone(images)
            faint, _ = backbone(images * 0.01)
            ours = {
                "cls": image,
                "region_every7": patches[:, ::7],
                "cls_of_faint_input": faint,
            }
            if f"{name}/{size}/last4" in FEATURES:
                ours["last4"] = torch.cat(backbone.last_blocks(images, 4), dim=-1)
        for what, value in ours.items():
            key = f"{name}/{size}/{what}"
            assert_parity(value, FEATURES[key], key)
            seen.add(key)
    assert seen == {key for key in FEATURES if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_layer_norm_eps(name):
    backbone = golden_backbone(name)
    expected = {Swin: 1e-5, ViT: 1e-6}[type(backbone)]
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert {norm.eps for norm in norms} == {expected}


def test_every_golden_backbone_is_covered():
    assert {key.split("/")[0] for key in FEATURES} == set(BACKBONES)


def test_head_logits():
    head = DINOHead(48, 64, hidden_dim=96, bottleneck_dim=32, norm_last_layer=False)
    head.load_state_dict(weights(read_json("head_keys.json")))
    logits = head(array(5, 6, 48)) @ head.prototypes().T
    assert_parity(logits, read_arrays("head.npz")["out"], "head")


# The losses' inputs: B = 3, K = 40, crops 2 + 3, patches 9 and 4; logits stand in for
# embeddings, with the identity for prototypes.
B, K, D = 3, 40, 24
TEMPERATURE = teacher_temperature(0.04, 0.07, 5, 10)[3]


def golden_views(image_seed, layout, requires_grad=False):
    rows = [views * B * patches for views, patches in layout]
    image = array(image_seed, B * sum(views for views, _ in layout), K)
    region = array(image_seed + 1, sum(rows), K)
    features = array(image_seed + 2, sum(rows), D)
    image.requires_grad_(requires_grad)
    region.requires_grad_(requires_grad)

    def split(tensor):
        return [
            part.view(views * B, patches, -1)
            for part, (views, patches) in zip(tensor.split(rows), layout, strict=True)
        ]

    identity = torch.eye(K)
    views = Views(B, image, identity, None, split(features), split(region), identity)
    return views, image, region


def golden_pair():
    student, image, region = golden_views(11, [(2, 9), (3, 4)], requires_grad=True)
    teacher, _, _ = golden_views(14, [(2, 9)])
    return student, teacher, image, region


@pytest.mark.parametrize(
    ("golden", "name"), [("dino", "dino"), ("esvit", "esvit"), ("cmd_released", "released")]
)
def test_losses(golden, name):
    figures = read_arrays("losses.npz")
    objective = Objective(name, lambda1=1.0)
    centres = objective.make_centres(K)
    for call in (0, 1):
        student, teacher, image, region = golden_pair()
        total, _, _ = objective(student, teacher, centres, TEMPERATURE)
        total.backward()
        centres.collect(teacher)
        centres.update()
        ours = {"loss": total, "grad_view": image.grad, "center": centres.image[None]}
        if name != "dino":
            ours |= {"grad_region": region.grad, "center_grid": centres.region[None]}
        expected = {key for key in figures if key.startswith(f"{golden}/{call}/")}
        assert {f"{golden}/{call}/{what}" for what in ours} == expected
        for what, value in ours.items():
            assert_parity(value, figures[f"{golden}/{call}/{what}"], f"{golden}/{call}/{what}")


def test_both_terms_of_esvit_apart():
    figures, objective = read_arrays("cmd.npz"), Objective("esvit")
    centres = objective.make_centres(K)
    for call in (0, 1):
        student, teacher, *_ = golden_pair()
        _, terms, _ = objective(student, teacher, centres, TEMPERATURE)
        centres.collect(teacher)
        centres.update()
        for name, value in terms.items():
            assert_parity(value, figures[f"{call}/{name}"], f"{call}/{name}")


def test_six_training_steps():
    """Networks, loss, schedules, clipping, frozen last layer, AdamW, EMA and centres together."""
    shapes, figures = read_json("steps_keys.json"), read_arrays("steps.npz")
    cfg = small_config(
        MODEL__DROP_PATH=0.0,
        HEAD__NORM_LAST_LAYER=False,
        LOSS__OBJECTIVE="esvit",
        LOSS__TEACHER_TEMP=0.07,
        LOSS__WARMUP_TEACHER_TEMP_EPOCHS=2,
        TRAIN__EPOCHS=3,
        TRAIN__BATCH_SIZE_PER_GPU=4,
        TRAIN__BASE_LR=0.005 * 256 / 4,
        TRAIN__WARMUP_EPOCHS=1,
        TRAIN__FREEZE_LAST_LAYER=1,
        TRAIN__MOMENTUM_TEACHER=0.9,
        TRAIN__CLIP_GRAD=0.3,
    )
    run = pretraining(cfg, steps_per_epoch=2)
    own_name = {name: name if re.match(HEADS, name) else f"backbone.{name}" for name in shapes}
    state = {own_name[name]: value for name, value in weights(shapes).items()}
    load_strictly(run.student, state, "golden")
    make_teacher(run.student, run.teacher)
    losses = []
    for step in range(len(figures["losses"])):
        crops = [
            array(100 + 10 * step + crop, 4, 3, size, size)
            for crop, size in enumerate((32, 32, 16, 16))
        ]
        step_figures, *_ = run.train_step(iter([batch_of(crops)]))
        losses.append(step_figures["loss"].item())
    assert_parity(np.array(losses), figures["losses"], "losses")
    parameters = run.teacher.state_dict()
    for name in shapes:
        value = parameters[own_name[name]]
        assert_parity(value.double().norm(), figures[f"teacher_norm/{name}"], f"norm of {name}")
        assert_parity(value.flatten()[:8], figures[f"teacher_first8/{name}"], f"start of {name}")


def test_schedules():
    figures = read_arrays("schedules.npz")
    ours = {
        "lr": cosine(0.0005 * 64 / 256, 1e-6, 10, 7, warmup_epochs=3),
        "wd": cosine(0.04, 0.4, 10, 7),
        "momentum": cosine(0.996, 1.0, 10, 7),
    }
    assert set(ours) == set(figures)
    for name, value in ours.items():
        assert_parity(value, figures[name], name)


def evaluation_features():
    """Training and test features with their labels, as evaluation.json's figures had them."""
    centres = array(23, 12, 16)
    found = []
    for seed, y in ((24, labels(21, 600, 12)), (25, labels(22, 200, 12))):
        found += [nn.functional.normalize(0.5 * centres[y] + array(seed, len(y), 16), dim=1), y]
    return found


def test_knn():
    figures = read_json("evaluation.json")
    ks = [int(name.removeprefix("knn")) for name in figures if name.startswith("knn")]
    assert ks
    *inputs, test_labels = evaluation_features()
    ours = knn.rankings(*inputs, ks, 0.07, classes=12)
    for k in ks:
        assert knn.accuracy(ours[k], test_labels) == pytest.approx(figures[f"knn{k}"], rel=1e-5)


@pytest.mark.parametrize("split", ["retrieval", "retrieval_ratio"])
def test_retrieval(split):
    train, train_labels, test, test_labels = evaluation_features()
    values, labels = torch.cat([train, test]), torch.cat([train_labels, test_labels])
    kind = "ratio" if split == "retrieval_ratio" else "standard"
    gallery, queries = retrieval.divide(kind, len(train), len(test))
    ours = retrieval.retrieve(values[gallery], labels[gallery], values[queries], labels[queries])
    for name, figure in read_json("evaluation.json")[split].items():
        assert getattr(ours, name) == pytest.approx(figure, rel=1e-5), name
