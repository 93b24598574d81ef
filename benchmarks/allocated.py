"""Measures what a real DeepSpeed engine allocates in a step: every tensor's storage, from creation to release."""

import os
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import PretrainConfig
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT
from pretrain.trainer.meeting import free_port


def draw_batch(method: Method | LUT, config: PretrainConfig, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Random images and masks."""
    views = (len(config.augmentations),) if config.lut else ()
    images = torch.randint(0, 256, (size, *views, *config.data.height_width, 3), dtype=torch.uint8)
    samples = [method.mask_sampler()(np.random.default_rng(i)) for i in range(size)]
    return images, {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


class Allocated(TorchDispatchMode):
    """Counts the bytes of live storages created within this context, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive and self._alive[key]() is not None:
            return

        def end(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank, after a step and at the peak."""

    after: int
    peak: int


def measure_step(config: PretrainConfig, ranks: int) -> Measured:
    """Measures the third step of a run with CPU processes; returns the rank with the highest peak."""
    port = free_port()
    context = mp.get_context("spawn")
    receivers, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(rank, ranks, port, config, sender))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    measured = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return max(measured, key=lambda found: found.peak)


def _run(rank: int, ranks: int, port: int, config: PretrainConfig, sender: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    from pretrain.build import build_method
    from pretrain.trainer.engine import build_engine, ds_settings, zero_stage
    from pretrain.trainer.launch import exit_process, find_world, init_distributed
    from pretrain.trainer.optim import build_adamw, parameter_groups

    init_distributed(find_world())
    settings = ds_settings(config, ranks)
    with Allocated() as allocated:
        method = build_method(config)
        groups = parameter_groups(method, config.optim.weight_decay)
        optimizer = build_adamw(groups, config, zero_stage(settings))
        engine = build_engine(method, optimizer, config, settings)
        del method, groups, optimizer
        images, mask_indices = draw_batch(engine.module, config, 1)
        for _ in range(3):
            allocated.peak = allocated.now
            for _ in range(config.train.gradient_accumulation_steps):
                losses = engine(images, mask_indices)
                engine.backward(losses["loss"])
                del losses
                engine.step()
    sender.send(Measured(allocated.now, allocated.peak))
    exit_process(0)
