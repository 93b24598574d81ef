"""Profiles which kernels a step spends its time in."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_session import Session
from benchmarks.gpu_table import IMAGES, Cell
from benchmarks.variants import load_variant, trainee

SHOWN = 14


def profiled(cell: Cell) -> Callable[[Session], None]:
    """The section that records milliseconds and calls of each kernel in one step, the slowest first."""

    def section(session: Session) -> None:
        if session.dry:
            return session.say("kernels run only on GPUs")
        torch._dynamo.reset()
        config = load_variant(cell.variant, cell.arch, cell.size, *cell.overrides(session))
        model = trainee(config, IMAGES[cell.arch, cell.size], session.device)
        for _ in range(3):
            model.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            model.step()
            torch.cuda.synchronize()
        rows = sorted(
            (
                {"kernel": event.key, "ms": event.self_device_time_total / 1e3, "calls": event.count}
                for event in found.key_averages()
            ),
            key=lambda row: -row["ms"],
        )
        session.keep("profiles", session.table("profiles") | {cell.name: rows})
        total = sum(row["ms"] for row in rows)
        session.say(f"{cell.name}: {sum(row['calls'] for row in rows)} kernels, {total:.1f} ms")
        for row in rows[:SHOWN]:
            session.say(f"  {row['ms']:7.2f} ms {row['ms'] / total:4.0%} {row['calls']:5} x {row['kernel'][:120]}")

    return section
