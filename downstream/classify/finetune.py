"""Trains a classifier: `deepspeed downstream/classify/finetune.py RECIPE [section.key=value ...]`.

torchrun, srun and python work too. RECIPE is a YAML file or the name of one in downstream/classify/recipes. A stopped
run continues when the same command is run again.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts us as a script
if os.environ.get("LOMAR_VERBOSE", "0") in ("", "0"):  # torch reads the level below on import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise a rank that loses a peer prints C++ stack frames

import torch

from data.decode import DECODER
from data.image_folder import Samples, load_samples
from data.index import Index, load_index
from data.storage.cache import CacheSettings
from downstream.classify.checks import check_batches, check_train_and_val, with_classes_of_data
from downstream.classify.config import ELSEWHERE, RECIPES, FinetuneConfig, load
from downstream.classify.model import build_classifier, check_start
from pretrain.trainer.checkpoint_layout import checkpoint_names
from pretrain.trainer.engine import check_engine, check_engine_file
from pretrain.trainer.launch import World, init_distributed, ranks_on_node
from pretrain.trainer.listing import Catalog
from pretrain.trainer.logs import log_to_file
from pretrain.trainer.main import main
from pretrain.trainer.node_speed import check_speed
from pretrain.trainer.phases import UNLIMITED, report_if_slow
from pretrain.trainer.preflight import checked_start
from pretrain.trainer.run_folder import RunFolder

AnySamples = TypeVar("AnySamples", Index, Samples)
_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, world: World) -> None:
    """Runs the whole training, on all ranks."""
    folder = RunFolder(Path(config.runs) / config.name)
    # A run with a checkpoint of its own does not need start.checkpoint, which may have been deleted since.
    is_new = not checkpoint_names(folder.checkpoints)

    def load() -> tuple[FinetuneConfig, Index, Samples]:
        if is_new:
            check_start(config)
        index = _load("data.shards", load_index, config.data.shards, config.data.cache)
        val = _load("val.shards", load_samples, config.val.shards, config.data.cache)
        complete = with_classes_of_data(config, index, val)
        assert complete.head.num_classes is not None
        check_train_and_val(index, val, complete.head.num_classes)
        check_batches(complete, world, len(index))
        return complete, index, val

    # Before joining the process group, because reading many shards takes time.
    config, index, val = checked_start(world, folder.root, config.to_yaml(), load, lambda loaded: loaded[1].fingerprint)
    device = init_distributed(world, UNLIMITED)
    if ranks_on_node(world) < world.size and device.type == "cuda":
        check_speed(world, device, config.watchdog.slow_factor)
    with folder.locked(world.is_main):
        log_to_file(folder.logs, world)
        _train(config, world, device, folder, index, val, is_new)


def _load(
    key: str, load_set: Callable[[str, CacheSettings], AnySamples], path: str, cache: CacheSettings
) -> AnySamples:
    try:
        return load_set(path, cache)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _train(
    config: FinetuneConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    index: Index,
    val: Samples,
    is_new: bool,
) -> None:
    # These import DeepSpeed, which looks for its accelerator at once.
    from downstream.classify.build import build_ema, build_evaluation
    from downstream.classify.finish import finish
    from downstream.classify.optimizers import build_optimizer
    from pretrain.models.sdpa import set_deterministic
    from pretrain.trainer.assemble import Parts, assemble, build_loader
    from pretrain.trainer.engine import ds_settings, zero_stage
    from pretrain.trainer.loop import train
    from pretrain.trainer.report import log_outputs

    settings = ds_settings(config, world.size)
    set_deterministic(config.train.deterministic)
    with report_if_slow("building the classifier and loading the weights that it starts from"):
        classifier, loaded = build_classifier(config, index.classes, load_start=is_new)
    if world.is_main and is_new:
        _log.info("%s", loaded)
    parts = Parts(
        classifier,
        build_optimizer(classifier.vit, config, zero_stage(settings)),
        build_ema(config, classifier, device),
        build_loader(config, index, world, labels=True, num_classes=config.head.num_classes),
        evaluation=build_evaluation(config, val, world, device),
        numerics={"device": device.type, "deterministic": config.train.deterministic, "decoder": DECODER},
    )
    run = assemble(config, world, device, folder, index, settings, parts)
    train(run)
    finish(run, index.classes, index.multi_labels is not None)
    log_outputs(run)


if __name__ == "__main__":
    catalog = Catalog(FinetuneConfig, RECIPES, load, ELSEWHERE, check_engine_file)
    main(__doc__, load, finetune, check=check_engine, catalog=catalog)
