"""Trains tiny models one after the other in the ranks of one launch, since starting takes longer than training.

As a script, this is one rank. A job is a list of overrides, as a user types them after CONFIG. They may include
`config=FILE`, `signal=N,R` (rank R gets a signal before iteration N) and `full=N,R` (from then on, it cannot write
large files). The error or message that a job ends with is written to `<name>-rank<N>.txt`.
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
MODULES = {
    "detect": ("downstream.detect.detector_keys", "downstream.detect.coco_checks"),
    "segment": ("downstream.segment.segmentor_keys", "downstream.segment.check_masks"),
}


def run_jobs(
    start: Callable[..., Any], folder: Path, jobs: dict[str, list[str]], config: Path = CONFIG, task: str = "detect"
) -> None:
    """Run each job in the run folder `folder`/<name>, unless it sets another `name=`.

    Args:
        start: from `processes.starter`.
        folder: contains the data, and is the parent of the run folders.
        jobs: name -> overrides.
        config: used by jobs that do not set `config=`.
        task: name of the package in downstream.
    """
    jobs = {name: [f"config={config}", *overrides] for name, overrides in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps({"task": task, "jobs": jobs}))
    start(folder, script=__file__, processes=2).finish()


def main(folder: Path) -> None:
    import torch

    from pretrain.trainer import signals
    from pretrain.trainer.launch import exit_process, find_world, init_distributed

    signals.watch_signals()
    world = find_world()
    init_distributed(world)
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
    from yapf.yapflib import yapf_api

    from downstream.dense.mmengine.config_file import load_job
    from downstream.dense.mmengine.runner import run

    plan = json.loads((folder / "jobs.json").read_text())
    keys, checks = MODULES[plan["task"]]
    propagate, check = importlib.import_module(keys).propagate_keys, importlib.import_module(checks).check
    # Formatting configs, which happens whenever one is logged or saved, would take longer than these trainings.
    yapf_api.FormatCode = lambda text, **style: (text, False)

    @OPTIM_WRAPPER_CONSTRUCTORS.register_module()
    class TwoRates:
        """The heads have half the learning rate; the group between them and the other parameters is frozen."""

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
        """Sends a scheduler's signal to one rank before an iteration, or makes its disk full."""

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

    for name, typed in plan["jobs"].items():
        signals._received.clear()
        accidents = [override for override in typed if override.startswith(ACCIDENTS)]
        config = [override.removeprefix("config=") for override in typed if override.startswith("config=")][-1]
        overrides = [override for override in typed if not override.startswith((*ACCIDENTS, "config="))]
        overrides = [f"data_root={folder}/data/", f"runs={folder}", f"name={folder_name(name)}", *overrides]
        job = load_job(config, overrides, CONFIG.parent, propagate)
        job.cfg.experiment_name = name  # mmengine keeps logged values for the next run of the same name
        job.cfg.custom_hooks = [*job.cfg.get("custom_hooks", []), *map(accident_hook, accidents)]
        ended_with = Path(folder / f"{name}-rank{world.rank}.txt")
        ended_with.write_text("")
        try:
            run(job, world, check)
        except (ValueError, OSError, signals.Stopped) as error:
            ended_with.write_text(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        end_workers()
        gc.collect()
        gc.freeze()  # mmengine collects garbage before each data set, and would go through all imported modules
        torch.distributed.barrier()
    exit_process(0)


def end_workers() -> None:
    """Shut down loader workers. The garbage collector would close their queues first and wait 5 s for each worker."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    for iterator in [thing for thing in gc.get_objects() if isinstance(thing, _MultiProcessingDataLoaderIter)]:
        iterator._shutdown_workers()


def folder_name(job: str) -> str:
    """Return the name of a job's run folder."""
    return job.replace(" ", "-")


def accident_hook(accident: str) -> dict[str, Any]:
    kind, _, when = accident.partition("=")
    before, rank = when.split(",")
    return {"type": "Accident", "kind": kind, "before": int(before), "rank": int(rank)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
