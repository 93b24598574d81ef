"""What a run says of itself while it trains: progress bar, metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.runfolder import RunFolder


class Meter:
    """Sums over the steps since the last report. Losses stay on the device until then: no step waits for them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._micro_batches = self._steps = self._images = self._skipped = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """What a method returned for one micro-batch of this rank: `loss`, and its terms where it has several."""
        for name, value in losses.items():
            value = value.detach().double()
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._micro_batches += 1

    def add_step(self, images: int, waited: float, skipped: int) -> None:
        """One optimiser step: its global batch, the seconds this rank waited for data and the images it replaced."""
        self._steps += 1
        self._images += images
        self._waited += waited
        self._skipped += skipped

    def leave_out(self, seconds: float) -> None:
        """What was not training does not count as time of a step."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Over all ranks since the last reset: means, and the number of skipped images; called by all together."""
        seconds = time.perf_counter() - self._since
        losses = torch.stack(list(self._losses.values())) / self._micro_batches
        totals = torch.cat([losses, losses.new_tensor([self._waited / seconds, self._skipped])])
        dist.all_reduce(totals)
        *means, wait, skipped = totals.tolist()
        world = dist.get_world_size()
        named = {name: mean / world for name, mean in zip(self._losses, means, strict=True)}
        return {
            "loss": named.pop("loss"),
            **{f"loss_{name}": mean for name, mean in named.items()},
            "images_per_s": self._images / seconds,
            "step_s": seconds / self._steps,
            "data_wait": wait / world,
            "skipped_images": int(skipped),
        }


class Reporter:
    """Writes one object a logged step; the main rank's only. JSON has no NaN: what is not finite is null."""

    def __init__(self, folder: RunFolder, start: int, total: int, name: str):
        _drop_after(folder.metrics, start)
        _drop_after(folder.evaluation, start)
        self._jsonl, self._evaluation = folder.metrics.open("a"), folder.evaluation
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=start + 1)
        self._bar = tqdm(
            total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._total = total

    def step(self) -> None:
        self._bar.update()

    def report(self, values: dict[str, Any]) -> None:
        self._write(self._jsonl, values)
        line = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['images_per_s']:.1f} img/s  "
            f"wait {values['data_wait']:.0%}"
        )
        self._bar.set_postfix_str(line)
        if self._bar.disable:
            left = (self._total - values["step"]) * values["step_s"]
            print(f"step {values['step']}/{self._total}  {line}  {tqdm.format_interval(left)} left", flush=True)

    def evaluated(self, values: dict[str, Any]) -> None:
        """What was measured between two steps goes to a file of its own."""
        with self._evaluation.open("a") as file:
            self._write(file, values)
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if key not in ("step", "epoch"))
        self.say(f"step {values['step']}: {numbers}")

    def _write(self, file: TextIO, values: dict[str, Any]) -> None:
        finite = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in values.items()}
        file.write(json.dumps(finite) + "\n")
        file.flush()
        for key, value in finite.items():
            if value is not None and key != "step":
                self._tensorboard.add_scalar(key, value, values["step"])

    def say(self, message: str) -> None:
        """A line that does not break the bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._tensorboard.close()
        self._jsonl.close()


class NoReporter:
    """What the other ranks have."""

    def step(self) -> None: ...

    def report(self, values: dict[str, Any]) -> None: ...

    def evaluated(self, values: dict[str, Any]) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a kill has cut is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their lines would stand twice."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
