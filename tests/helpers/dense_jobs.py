"""Trainings of tiny models, one after the other in the ranks of one launch: a start costs more than a training.

As a script this is one rank. A job is a list of changes, as a user writes them behind CONFIG. Among them may be
`config=FILE`, `signal=N,R`, which rank R gets before iteration N, and `full=N,R`, from which on it can write no large
files. What a job ended with is in `<name>-rank<N>.txt`.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent / "tiny_mask_rcnn.py"
ACCIDENTS = ("signal=", "full=")


def run_jobs(
    start: Callable[..., Any], folder: Path, jobs: dict[str, list[str]], config: Path = CONFIG, task: str = "detect"
) -> None:
    """Each job in its work_dir `folder`/<name>, unless it names another.

    Args:
        start: of `processes.starter`.
        folder: where the data are and work_dirs will be.
        jobs: by their names.
        config: of those that do not name another.
        task: the package in downstream.
    """
    jobs = {name: [f"config={config}", *changes] for name, changes in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps({"task": task, "jobs": jobs}))
    start(folder, script=__file__, processes=2).finish(timeout=400)


def main(folder: Path) -> None:
    import torch

    from pretrain.trainer import faults
    from pretrain.trainer.launch import exit_process, find_world

    faults.watch_signals()
    world = find_world()
    start(world)
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
    from yapf.yapflib import yapf_api

    from downstream.dense.mmengine.config_file import load
    from downstream.dense.mmengine.job import run

    plan = json.loads((folder / "jobs.json").read_text())
    check = importlib.import_module(f"downstream.{plan['task']}.checks").check
    spread = importlib.import_module(f"downstream.{plan['task']}.settings").propagate_keys
    # A configuration is laid out for readers whenever it is logged or saved, which takes longer than these trainings.
    yapf_api.FormatCode = lambda text, **style: (text, False)

    @OPTIM_WRAPPER_CONSTRUCTORS.register_module()
    class TwoRates:
        """The heads learn at half the rate, and a group between them not at all."""

        def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
            self.wrapper = dict(optim_wrapper_cfg)

        def __call__(self, model: Any) -> Any:
            model = getattr(model, "module", model)
            groups: dict[float, list[Any]] = {1.0: [], 2.0: [], 0.5: []}
            for name, parameter in model.named_parameters():
                scale = 0.5 if name.startswith("roi_head") else 1.0
                groups[scale if parameter.requires_grad else 2.0].append(parameter)
            optimizer = dict(self.wrapper.pop("optimizer"))
            groups_ = [{"params": params, "lr": optimizer["lr"] * scale} for scale, params in groups.items()]
            optimizer = OPTIMIZERS.build({**optimizer, "params": groups_})
            return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": optimizer})

    @HOOKS.register_module()
    class Accident(Hook):
        """What happens to one rank before an iteration: a scheduler's signal, or a disk that takes no more."""

        priority = "VERY_HIGH"

        def __init__(self, kind: str, before: int, rank: int):
            self.kind, self.before, self.rank = kind, before, rank

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if (runner.iter, runner.rank) != (self.before, self.rank):
                return
            if self.kind == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))

    for name, changes in plan["jobs"].items():
        faults._received.clear()
        accidents = [change for change in changes if change.startswith(ACCIDENTS)]
        config = [change.removeprefix("config=") for change in changes if change.startswith("config=")][-1]
        changes = [change for change in changes if not change.startswith((*ACCIDENTS, "config="))]
        changes = [f"data_root={folder}/data/", f"work_dir={folder / name}", *changes]
        job = load(config, changes, CONFIG.parent, spread)
        job.cfg.experiment_name = name  # mmengine keeps what one run logged for the next of that name
        job.cfg.custom_hooks = [*job.cfg.get("custom_hooks", []), *map(accident_hook, accidents)]
        said = Path(folder / f"{name}-rank{world.rank}.txt")
        said.write_text("")
        try:
            run(job, world, check)
        except (ValueError, OSError, faults.Stopped) as words:
            said.write_text(str(words))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        end_workers()
        gc.collect()
        gc.freeze()  # mmengine collects before each data set, through all that has been imported
        torch.distributed.barrier()
    exit_process(0)


def end_workers() -> None:
    """The garbage collector would end them too, but it closes their queues first: each waits 5 s for its last word."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    for passing in [thing for thing in gc.get_objects() if isinstance(thing, _MultiProcessingDataLoaderIter)]:
        passing._shutdown_workers()


def accident_hook(accident: str) -> dict[str, Any]:
    kind, _, place = accident.partition("=")
    before, rank = place.split(",")
    return {"type": "Accident", "kind": kind, "before": int(before), "rank": int(rank)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
