"""The results of `gpu.py`, written as they come; its sections end in time and fail independently."""

import faulthandler
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.trainer.cuda_graphs import Recording, warm_up

GRACE = 90  # seconds past the deadline after which a hanging section is ended, along with the command


class Session:
    """One run of the command; if anything hangs long past the deadline, the process ends.

    Attributes:
        device: where everything is measured; the CPU in a dry run.
        results: by name; `sections` has how each section ended.
    """

    def __init__(self, out: Path, seconds: float, device: torch.device, resume: bool):
        """With `resume`, sections that succeeded or failed before are not run again, and their results are kept."""
        self.device, self._seconds, self._start = device, seconds, time.monotonic()
        self._file = out / "gpu.json"
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {"sections": {}}
        if resume and self._file.exists():
            self.results = json.loads(self._file.read_text())
        self._durations: dict[str, float] = {}

    def __enter__(self) -> "Session":
        faulthandler.dump_traceback_later(self._seconds + GRACE, exit=True, file=sys.__stderr__)
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._seconds - (time.monotonic() - self._start)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {text}", flush=True)

    def keep(self, name: str, value: Any) -> None:
        """Writes a result to the file."""
        self.results[name] = value
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1))
        temporary.replace(self._file)

    def table(self, name: str) -> dict[str, Any]:
        """A result table, for adding rows."""
        return self.results.setdefault(name, {})

    def section(self, name: str, kind: str, needs: float, function: Callable[["Session"], None]) -> None:
        """Runs a section, unless it was run before or too little time is left.

        Args:
            kind: sections of one kind take about the same time; the longest so far replaces `needs`.
            needs: seconds that it may take.
        """
        sections = self.results["sections"]
        if sections.get(name, "left out").startswith(("done", "error")):
            return
        needs = min(self._durations.get(kind, needs), self._seconds)
        if self.left() < needs:
            sections[name] = f"left out: it may take {needs:.0f} s, but only {max(self.left(), 0):.0f} s are left"
            self.say(f"{name}: {sections[name]}")
            return self.keep("sections", sections)
        self.say(f"== {name}")
        start = time.monotonic()
        try:
            function(self)
            if not self.dry:
                torch.cuda.synchronize()  # attributes errors of running kernels to this section
            sections[name] = f"done in {time.monotonic() - start:.0f} s"
        except Exception as error:  # the error is a result; other sections still run
            sections[name] = f"error: {type(error).__name__}: {error}"[:1000]
            self.keep("tracebacks", self.table("tracebacks") | {name: traceback.format_exc()})
            self.say("\n".join((*traceback.format_exc().splitlines()[-5:-1], sections[name])))
        self._durations[kind] = max(self._durations.get(kind, 0), time.monotonic() - start)
        self.keep("sections", sections)
        self._free_memory_or_restart()

    def _free_memory_or_restart(self) -> None:
        """Frees memory; continues in a new process if this one cannot use the GPU any more.

        An illegal memory access causes that; a failed CUDA graph capture breaks the random number generator.
        """
        if self.dry:
            return free_memory()
        try:
            free_memory()  # fails in that case, too
            torch.rand(1, device=self.device).item()
        except RuntimeError:
            self.say("this process can no longer use the GPU; continuing in a new one")
            words = [word for word in sys.argv if word != "--resume"]
            os.execv(sys.executable, [sys.executable, *words, "--resume", "--seconds", f"{self.left():.0f}"])

    def failed(self) -> list[str]:
        return [name for name, status in self.results["sections"].items() if status.startswith("error")]


def free_memory() -> None:
    """Releases what the last section held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphed_ms(function: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """GPU milliseconds of a call; a CUDA graph captures several calls, so that the CPU's work does not count."""
    if device.type == "cpu":
        return median_ms(function, device, repetitions=2, warmup=0)
    warm_up(function)
    recording = Recording(lambda: [function() for _ in range(calls)])
    return median_ms(recording.replay, device, repetitions=5, warmup=1) / calls


def median_ms(function: Callable[[], object], device: torch.device, repetitions: int = 10, warmup: int = 3) -> float:
    """Milliseconds of a call; on a GPU the calls are queued without waiting for each other."""
    for _ in range(warmup):
        function()
    if device.type == "cpu":
        times = [time.perf_counter()]
        for _ in range(repetitions):
            function()
            times.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
