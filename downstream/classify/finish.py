"""The end of a classifier's run: its weights under timm's names, with what is needed to rebuild the model."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from downstream.classify.config import FinetuneConfig
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.engine import gather_state_dict
from pretrain.trainer.figures import draw_loss
from pretrain.trainer.loop import Run
from pretrain.trainer.metrics import read_metrics

_NORM = "head.0."  # of a probe's head, before its matrix


def finish(run: Run, names: Sequence[str]) -> None:
    """Writes model.safetensors, that of the moving average if there is one, and the loss curve. All ranks together."""
    config = run.config
    assert isinstance(config, FinetuneConfig)
    state = gather_state_dict(run.engine, run.world)
    if run.world.is_main:
        save_classifier(state, config, names, run.folder.model)
        if run.ema.model is not None:
            save_classifier(run.ema.state_dict(), config, names, run.folder.model_ema)
        draw_loss(read_metrics(run.folder.metrics), run.folder.loss_curve)


def save_classifier(state: dict[str, Tensor], config: FinetuneConfig, names: Sequence[str], path: Path) -> None:
    """A classifier's weights under timm's names, with what is needed to rebuild it in the file's metadata.

    `names` are those of the classes, in order, or nothing where the shards have none.
    """
    model, epochs = config.model, config.train.epochs
    spec = EncoderSpec(model.arch, model.patch_size, config.data.height_width, model.position, epochs=epochs)
    metadata = {
        **spec.to_metadata(),
        "classes": str(config.head.num_classes),
        "pool": config.head.pool,
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
