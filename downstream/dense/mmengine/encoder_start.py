"""The encoder that a training starts from: a `model.backbone.init_cfg` of type EncoderCheckpoint."""

from typing import Any

_TYPE = "EncoderCheckpoint"  # of downstream.dense.backbone.loading, which a configuration imports


def set_start(cfg: Any, checkpoint: str | None, weights: str | None) -> None:
    """Writes `start.checkpoint` and `start.weights` into the backbone's `init_cfg`; None keeps the configuration's.

    Args:
        cfg: an mmengine Config; modified.
        checkpoint, weights: see `EncoderCheckpoint`.

    Raises:
        ValueError: the backbone is not ours, or weights are given without a checkpoint.
    """
    if checkpoint is None and weights is None:
        return
    backbone: Any = cfg.model.get("backbone") or {}
    if backbone.get("type") != "PlainViT":
        typed = f"start.checkpoint={checkpoint}" if checkpoint else f"start.weights={weights}"
        raise ValueError(
            f"{typed} needs model.backbone.type=PlainViT, but it is {backbone.get('type')}: "
            f"give load_from=FILE for the weights of a whole model"
        )
    before = [init for init in _init_cfgs(backbone) if init.get("type") == _TYPE]
    given = {"checkpoint": checkpoint, "weights": weights}
    init = {"type": _TYPE, **(before[0] if before else {}), **{k: v for k, v in given.items() if v is not None}}
    if init.get("checkpoint") is None:
        raise ValueError(f"start.weights={weights} selects weights of a checkpoint: give start.checkpoint=FILE as well")
    backbone.init_cfg = init


def check_start(cfg: Any) -> None:
    """Raises ValueError, like `load_start`, if the encoder does not fit the backbone, before any model is built."""
    from downstream.dense.backbone.loading import read_start  # it needs modules that a configuration imports

    backbone = cfg.model.get("backbone") or {}
    for init in _init_cfgs(backbone):
        if init.get("type") == _TYPE:
            names = ("arch", "patch_size", "position", "class_token", "registers")
            known = {name: backbone[name] for name in names if name in backbone}
            read_start(init["checkpoint"], init.get("weights"), **known)


def has_start(cfg: Any) -> bool:
    """Whether the backbone starts from an encoder's checkpoint."""
    return any(init.get("type") == _TYPE for init in _init_cfgs(cfg.model.backbone))


def clear_start(cfg: Any) -> None:
    """Removes the encoder's checkpoint: a model that is loaded as a whole does not need it, and it may be gone."""
    if has_start(cfg):
        cfg.model.backbone.init_cfg = None


def _init_cfgs(backbone: Any) -> list[Any]:
    init = backbone.get("init_cfg")
    return [] if init is None else [init] if isinstance(init, dict) else list(init)
