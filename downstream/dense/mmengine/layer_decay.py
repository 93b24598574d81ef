"""Layer decay for mmengine: a smaller learning rate for layers closer to the image."""

import re
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from downstream.dense.backbone.plain_vit import PlainViT
from pretrain.trainer.optim import layers_above

_NOT_DECAYED = re.compile(r".*(cls_token|reg_token|pos_embed|rel_pos_[hw])")


def layer_decay_groups(model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups each trainable parameter once: per layer, one group with and one without weight decay.

    `lr_scale` is layer_decay ** (blocks above + 1). Patch embedding, class token and positions have all blocks above
    them; what follows the blocks gets 1. Vectors, class token, positions and decomposed tables have no weight decay;
    LoMaR's tables do, as in pretraining. Call it before ZeRO-3 partitions parameters and empties their shapes.

    Args:
        model: contains one `PlainViT`.
        lr: of the model's heads.
        weight_decay: of matrices.
        layer_decay: ratio of a block's learning rate to the next block's, above 0 and at most 1.

    Returns:
        Optimizer groups with their `lr`, from the image upwards.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"optim_wrapper.paramwise_cfg.layer_decay={layer_decay}: must be above 0, at most 1")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PlainViT)]
    if len(found) != 1:
        raise ValueError(f"layer decay needs a model with one PlainViT, but this one has {len(found)}")
    prefix, backbone = found[0][0] + "." if found[0][0] else "", found[0][1]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    depth = len(backbone.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        above = layers_above(name.removeprefix(prefix), depth) if name.startswith(prefix) else 0
        decays = parameter.ndim > 1 and not _NOT_DECAYED.fullmatch(name)
        scale = layer_decay**above
        group = groups.setdefault(
            (-above, decays),
            {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor:
    """`optim_wrapper=dict(constructor=<this class's name>, paramwise_cfg=dict(layer_decay=0.7), optimizer=...)`.

    The optimizer's `lr` applies to the heads; mmengine's schedulers scale each group's own.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
        if not paramwise_cfg or paramwise_cfg.keys() != {"layer_decay"}:
            raise ValueError(
                f"layer decay needs optim_wrapper.paramwise_cfg=dict(layer_decay=...), not {paramwise_cfg}"
            )
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))
        self.layer_decay = paramwise_cfg["layer_decay"]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        optimizer_cfg = dict(self.optimizer_cfg)
        optimizer_cfg["params"] = layer_decay_groups(
            getattr(model, "module", model),  # inside a wrapper
            lr=optimizer_cfg["lr"],
            weight_decay=optimizer_cfg.get("weight_decay", 0.0),
            layer_decay=self.layer_decay,
        )
        wrapper_cfg = {"type": "OptimWrapper", **self.wrapper_cfg}
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args={"optimizer": OPTIMIZERS.build(optimizer_cfg)})
