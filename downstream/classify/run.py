"""Trains a classifier: `deepspeed downstream/classify/run.py RECIPE [section.key=value ...]`, or by another launcher.

RECIPE is a YAML file or the name of one in downstream/classify/recipes. A run that was stopped continues when the same
command is given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts us as a script

import torch

from data.index import Index, load_index
from downstream.classify.config import FinetuneConfig, load
from pretrain.command import main
from pretrain.launch import World, start
from pretrain.runfolder import RunFolder


def finetune(config: FinetuneConfig, world: World) -> None:
    """The whole run, on all ranks."""
    indices = []  # before the ranks are bound together: reading many shards takes its time
    for key, shards in {"data.shards": config.data.shards, "val.shards": config.val.shards}.items():
        try:
            indices.append(load_index(shards))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    device = start(world)
    folder = RunFolder(Path(config.runs) / config.name)
    with folder.owned(world.is_main):
        _train(config, world, device, folder, *indices)


def _train(
    config: FinetuneConfig, world: World, device: torch.device, folder: RunFolder, index: Index, val: Index
) -> None:
    # These import DeepSpeed, which looks for its accelerator at once.
    from downstream.classify.build import (
        build_average,
        build_evaluation,
        check_classes,
        check_labels,
        check_pairs,
    )
    from downstream.classify.finish import finish
    from downstream.classify.model import build_classifier
    from downstream.classify.optim import build_optimizer
    from pretrain.assemble import Parts, assemble
    from pretrain.build import build_loader
    from pretrain.engine import ds_settings, zero_stage
    from pretrain.loop import train
    from pretrain.report import conclude

    settings = ds_settings(config, world.size)
    check_pairs(config, world)
    for key, samples in {"data.shards": index, "val.shards": val}.items():
        check_labels(samples, config.head.classes, key)
    check_classes(index, val)
    # What the run has saved itself is all that it needs, even if the start has gone since.
    begins = not any(folder.checkpoints.glob("step_*"))
    classifier, started = build_classifier(config, index.classes, load_start=begins)
    if world.is_main and begins:
        print(started, flush=True)
    parts = Parts(
        classifier,
        build_optimizer(classifier.vit, config, zero_stage(settings)),
        build_average(config, classifier, device),
        build_loader(config, index, world, labels=True),
    )
    run = assemble(config, world, device, folder, index, settings, parts)
    run.evaluation = build_evaluation(run, config, val)
    train(run)
    finish(run, config, index.classes)
    conclude(run)


if __name__ == "__main__":
    main(__doc__, load, finetune)
