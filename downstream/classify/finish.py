"""The end of a classifier's run: saves the weights under timm's names, with what is needed to rebuild the model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from downstream.checkpoints.fold import fold_batch_norm
from downstream.classify.classifier_spec import ClassifierSpec
from downstream.classify.config import FinetuneConfig
from downstream.classify.model import encoder_spec
from pretrain.trainer.engine import gather_state_dict
from pretrain.trainer.figures import draw_loss
from pretrain.trainer.loop import Run
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.phases import limited
from pretrain.trainer.safetensors_file import save_state_dict

_NORM = "head.0."  # the batch norm in front of a linear probe's matrix


@limited("writing the classifier and the loss curve", "evaluation_minutes")
def finish(run: Run, class_names: Sequence[str], multi_label: bool = False) -> None:
    """Writes the classifier, its moving average if there is one, and the loss curve. All ranks must call it."""
    config = run.config
    assert isinstance(config, FinetuneConfig)
    state = gather_state_dict(run.engine, run.world)
    if run.world.is_main:
        save_classifier(state, config, class_names, run.folder.model, multi_label)
        if run.ema.model is not None:
            save_classifier(run.ema.state_dict(), config, class_names, run.folder.model_ema, multi_label)
        draw_loss(read_metrics(run.folder.metrics), run.folder.loss_curve)


def save_classifier(
    state: dict[str, Tensor],
    config: FinetuneConfig,
    class_names: Sequence[str],
    path: Path,
    multi_label: bool = False,
) -> None:
    """Writes weights under timm's names, with what is needed to rebuild the model in the file's metadata.

    Args:
        state: of a `Classifier`.
        config: the one it was trained with.
        class_names: in the order of the labels; empty if the shards have none.
        path: of the safetensors file.
        multi_label: whether it was trained on lists of labels.
    """
    head, encoder = config.head, replace(encoder_spec(config), epochs=config.train.epochs)
    assert head.num_classes is not None
    spec = ClassifierSpec(encoder, head.num_classes, head.pool, tuple(class_names), multi_label)
    tensors = _fold_norm({name.removeprefix("vit."): tensor for name, tensor in state.items()})
    save_state_dict(tensors, spec.to_metadata(), path)


def _fold_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Folds a probe's batch norm into its matrix, because timm's head is only a matrix."""
    if _NORM + "running_mean" not in tensors:
        return tensors
    folded = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    norm = (tensors[_NORM + "running_mean"], tensors[_NORM + "running_var"])
    weight, bias = fold_batch_norm(tensors["head.1.weight"], tensors["head.1.bias"], *norm)
    return folded | {"head.weight": weight, "head.bias": bias}
