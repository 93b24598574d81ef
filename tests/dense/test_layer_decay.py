"""Tests of layer decay in mmengine's optimizer wrappers."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import AmpOptimWrapper, MultiStepLR, OptimWrapper, build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper

from downstream.dense.backbone.plain_vit import PlainViT
from downstream.dense.mmengine.layer_decay import LayerDecayOptimWrapperConstructor, layer_decay_groups
from pretrain.models.vit import ARCHS, Arch

DECAY = 0.5


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with patch.dict(ARCHS, vit_tiny=Arch(8, 3, 2)):
        yield


class Detector(BaseModule):
    def __init__(self, position: str = "sincos"):
        super().__init__()
        self.backbone = PlainViT(
            "vit_tiny",
            4,
            16,
            position,
            window_size=0,
            class_token=True,
            conv_blocks=(1,),
            parallel_conv=True,
            out_indices=(2,),
        )
        self.backbone_neck = torch.nn.Conv2d(8, 4, 1)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)


def named_groups(model: Detector, groups: list[dict]) -> dict[str, dict]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found), "a parameter twice"
    return dict(found)


@pytest.mark.parametrize("position", ["relative", "sincos"])
def test_every_parameter_is_in_one_group_with_the_scale_of_its_layer(position: str):
    model = Detector(position)
    groups = layer_decay_groups(model, lr=0.1, weight_decay=0.2, layer_decay=DECAY)
    found = named_groups(model, groups)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    scales = {
        "backbone.patch_embed.proj.weight": DECAY**4,
        "backbone.patch_embed.proj.bias": DECAY**4,
        "backbone.cls_token": DECAY**4,
        "backbone.pos_embed": DECAY**4,
        "backbone.blocks.0.norm1.weight": DECAY**3,
        "backbone.blocks.0.attn.rel_pos_h": DECAY**3,
        "backbone.blocks.0.attn.rpe_k.lookup_table_weight": DECAY**3,
        "backbone.blocks.1.propagate.0.weight": DECAY**2,
        "backbone.blocks.2.parallel.0.weight": DECAY,
        "backbone.blocks.2.mlp.fc2.weight": DECAY,
        "backbone.norm.weight": 1.0,
        "backbone_neck.weight": 1.0,
        "backbone_neck.bias": 1.0,
    }
    for name, scale in scales.items():
        if name in found:
            assert found[name]["lr_scale"] == scale, name
            assert found[name]["lr"] == 0.1 * scale, name
    assert len(scales.keys() & found.keys()) == (11 if position == "relative" else 12)
    undecayed = ("cls_token", "pos_embed", "rel_pos_h", "rel_pos_w")
    for name, parameter in model.named_parameters():
        if name in found:
            decays = parameter.ndim > 1 and not name.endswith(undecayed)
            assert found[name]["weight_decay"] == (0.2 if decays else 0.0), name
    assert len(groups) <= 2 * 5
    assert [group["lr_scale"] for group in groups] == sorted(group["lr_scale"] for group in groups)


@pytest.mark.parametrize("kind", ["OptimWrapper", "AmpOptimWrapper"])
def test_schedules_of_mmengine_keep_the_scales(kind: str):
    model = Detector()
    optimizer = {"type": "AdamW", "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.2}
    options = {"dtype": "bfloat16"} if kind == "AmpOptimWrapper" else {}
    # mmengine rejects AMP without a GPU.
    with patch.object(amp_optimizer_wrapper, "is_cuda_available", lambda: True):
        wrapper = build_optim_wrapper(
            model,
            {
                "type": kind,
                "constructor": LayerDecayOptimWrapperConstructor.__name__,
                "paramwise_cfg": {"layer_decay": DECAY},
                "optimizer": optimizer,
                "clip_grad": {"max_norm": 1.0},
                **options,
            },
        )
    assert type(wrapper) is {"OptimWrapper": OptimWrapper, "AmpOptimWrapper": AmpOptimWrapper}[kind]
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    found = named_groups(model, wrapper.optimizer.param_groups)
    assert found["backbone_neck.weight"]["betas"] == (0.9, 0.99)
    schedule = MultiStepLR(wrapper, milestones=[1], gamma=0.1)
    wrapper.optimizer.step()
    schedule.step()
    for group in wrapper.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"] * 0.1)


@pytest.mark.parametrize("paramwise", [None, {}, {"layer_decay": 0.5, "bias_lr_mult": 2}, {"decay_rate": 0.5}])
def test_other_options_are_rejected(paramwise):
    with pytest.raises(ValueError, match=r"needs optim_wrapper\.paramwise_cfg"):
        LayerDecayOptimWrapperConstructor({"optimizer": {"type": "AdamW", "lr": 1.0}}, paramwise)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_out_of_range_is_rejected(decay: float):
    with pytest.raises(ValueError, match="must be above 0, at most 1"):
        layer_decay_groups(Detector(), lr=1.0, weight_decay=0.0, layer_decay=decay)


def test_model_without_the_backbone_is_rejected():
    with pytest.raises(ValueError, match="needs a model with one PlainViT, but this one has 0"):
        layer_decay_groups(torch.nn.Linear(2, 2), lr=1.0, weight_decay=0.0, layer_decay=0.5)
