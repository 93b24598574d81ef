"""The end of a classifier's run: its weights as a timm model, with what is needed to rebuild it."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from downstream.classify.config import FinetuneConfig
from downstream.classify.model import build_vit
from downstream.files import read_source
from pretrain.figures import draw_loss
from pretrain.finish import full_state
from pretrain.loop import Run
from pretrain.metrics import read_metrics

_NORM = "head.0."  # of a probe's head, before its matrix


def finish(run: Run, config: FinetuneConfig) -> None:
    """Writes model.safetensors, that of the moving average if there is one, and the loss curve. All ranks together."""
    state = full_state(run.engine, run.world)
    if run.world.is_main:
        save_classifier(state, config, run.folder.model)
        if averaged := run.average.weights():
            save_classifier(averaged, config, run.folder.model_ema)
        draw_loss(read_metrics(run.folder.metrics), run.folder.loss_curve)


def save_classifier(state: dict[str, Tensor], config: FinetuneConfig, path: Path) -> None:
    """A classifier's weights under timm's names; `load_classifier` reads them."""
    metadata = {
        "arch": config.model.arch,
        "patch": str(config.model.patch),
        "size": "x".join(map(str, config.data.height_width)),
        "position": config.model.position,
        "classes": str(config.head.classes),
        "pool": config.head.pool,
        "epochs": str(config.train.epochs),
    }
    tensors = _fold_norm({name.removeprefix("vit."): tensor for name, tensor in state.items()})
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def _fold_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """W ((x - mean) / deviation) + b = (W / deviation) x + (b - W mean / deviation): timm's head is a matrix."""
    if _NORM + "running_mean" not in tensors:
        return tensors
    folded = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    weight = tensors["head.1.weight"] * (tensors[_NORM + "running_var"] + 1e-6).rsqrt()
    return folded | {
        "head.weight": weight,
        "head.bias": tensors["head.1.bias"] - weight @ tensors[_NORM + "running_mean"],
    }


def load_classifier(path: Path | str, classes: int | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The timm model of a file of `save_classifier`, in eval mode, and the file's metadata.

    Args:
        path: the file.
        classes: how many are expected.

    Raises:
        ValueError: the file is damaged, no classifier of ours, or of another number of classes.
    """
    tensors = read_source(path).tensors
    with safe_open(str(path), "pt") as file:
        facts = file.metadata() or {}
    if not facts.keys() >= {"arch", "patch", "size", "position", "classes", "pool"}:
        raise ValueError(f"{path} is no classifier of this project: its metadata is {facts or 'empty'}")
    if classes is not None and int(facts["classes"]) != classes:
        raise ValueError(f"{path} tells {facts['classes']} classes apart, not the {classes} that are asked for")
    height, width = map(int, facts["size"].split("x"))
    with torch.device("meta"):
        vit = build_vit(
            facts["arch"],
            int(facts["patch"]),
            (height, width),
            facts["position"],
            int(facts["classes"]),
            facts["pool"],
            fc_norm="fc_norm.weight" in tensors,
        )
    try:
        vit.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold what its metadata says: {error}") from None
    return vit.eval(), facts
