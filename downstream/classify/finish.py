"""The end of a classifier's run: its weights under timm's names, with what is needed to rebuild the model."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from downstream.classify.config import FinetuneConfig
from pretrain.figures import draw_loss
from pretrain.finish import full_state
from pretrain.loop import Run
from pretrain.metrics import read_metrics

_NORM = "head.0."  # of a probe's head, before its matrix


def finish(run: Run, config: FinetuneConfig, names: Sequence[str]) -> None:
    """Writes model.safetensors, that of the moving average if there is one, and the loss curve. All ranks together."""
    state = full_state(run.engine, run.world)
    if run.world.is_main:
        save_classifier(state, config, names, run.folder.model)
        if averaged := run.average.weights():
            save_classifier(averaged, config, names, run.folder.model_ema)
        draw_loss(read_metrics(run.folder.metrics), run.folder.loss_curve)


def save_classifier(state: dict[str, Tensor], config: FinetuneConfig, names: Sequence[str], path: Path) -> None:
    """A classifier's weights under timm's names, with what is needed to rebuild it in the file's metadata.

    `names` are those of the classes, in order, or nothing where the shards have none.
    """
    metadata = {
        "arch": config.model.arch,
        "patch": str(config.model.patch),
        "size": "x".join(map(str, config.data.height_width)),
        "position": config.model.position,
        "classes": str(config.head.classes),
        "pool": config.head.pool,
        "epochs": str(config.train.epochs),
    }
    if names:
        metadata["names"] = json.dumps(list(names))
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
