"""Process faults: killed, stopped, told to stop, or out of memory, descriptors or disk space."""

import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import psutil

from benchmarks.faults_launchers import Launched, WithClock
from benchmarks.faults_scene import EVERY, Scene

Inject = Callable[[Scene], AbstractContextManager[None]]


def fault(function: Callable[..., Iterator[None]]) -> Callable[..., Inject]:
    """Turns a generator over a scene, which injects a fault and removes it after the yield, into an `Inject` factory.

    The factory takes the generator's arguments after the scene.
    """
    return lambda *args, **keys: lambda scene: contextmanager(function)(scene, *args, **keys)


@fault
def kill(scene: Scene, *ranks: int, step: int = 7) -> Iterator[None]:
    """Sends SIGKILL to these ranks only, or to all ranks and their workers."""
    scene.start().until_step(step).kill(*ranks)
    yield


@fault
def kill_worker(scene: Scene, rank: int) -> Iterator[None]:
    scene.start().until_step(7).workers(rank)[0].kill()
    yield


@fault
def stop(scene: Scene, rank: int) -> Iterator[None]:
    """Sends SIGSTOP; the other ranks must end, and so must this one after SIGCONT."""
    scene.start("watchdog.silent_minutes=0.25").until_step(7).send(signal.SIGSTOP, rank)
    scene.watched = [other for other in range(len(scene.ranks.all)) if other != rank]
    yield
    scene.send(signal.SIGCONT, rank)


@fault
def pause(scene: Scene, rank: int, seconds: float) -> Iterator[None]:
    """Sends SIGSTOP for less time than the watchdog waits."""
    scene.start().until_step(7).send(signal.SIGSTOP, rank)
    time.sleep(seconds)
    scene.send(signal.SIGCONT, rank)
    yield


@fault
def stop_worker(scene: Scene, rank: int) -> Iterator[None]:
    scene.start("watchdog.step_minutes=0.15").until_step(7).workers(rank)[0].suspend()
    yield


@fault
def tell(scene: Scene, *ranks: int, signals: tuple[int, ...] = (signal.SIGTERM,), gap: float = 0.01) -> Iterator[None]:
    """Sends signals one after the other, to these ranks or to all."""
    scene.start().until_step(7)
    for number in signals:
        scene.send(number, *ranks)
        time.sleep(gap)
    yield


@fault
def kill_while_starting(scene: Scene, said: str) -> Iterator[None]:
    """Sends SIGKILL to all ranks when a resuming run prints this text."""
    scene.killed_run(12).start().until_said(said).kill()
    yield


@fault
def kill_while_saving(scene: Scene, seed: int, *ranks: int) -> Iterator[None]:
    """Sends SIGKILL to these ranks or to all, at a random moment after the step before a save."""
    rng = np.random.default_rng(seed)
    step = int(rng.integers(1, 5)) * EVERY
    scene.start().until_step(step - 1)
    time.sleep(float(rng.uniform(0, 0.3)))
    scene.kill(*ranks)
    yield


@fault
def kill_at_the_end(scene: Scene, seed: int) -> Iterator[None]:
    """Sends SIGKILL to all ranks at a random moment after the last step, while results are written."""
    scene.start().until_step(40)
    time.sleep(float(np.random.default_rng(seed).uniform(0, 1)))
    scene.kill()
    yield


@fault
def never_comes(scene: Scene) -> Iterator[None]:
    """Kills a rank before it has joined the others."""
    scene.start("watchdog.start_minutes=0.3").kill(1)
    yield


@fault
def limit(scene: Scene, what: int, ranks: tuple[int, ...], room: int | None = None, of: str = "rank") -> Iterator[None]:
    """Sets a kernel limit from step 7 on: no more memory or descriptors, or files of at most `room` bytes."""
    scene.start().until_step(7)
    limited = []
    for rank in ranks:
        process = psutil.Process(scene.ranks.all[rank].pid) if of == "rank" else scene.workers(rank)[0]
        now = {resource.RLIMIT_AS: process.memory_info().vms // 2, resource.RLIMIT_NOFILE: process.num_fds()}
        before = process.rlimit(what)
        process.rlimit(what, (now[what] if room is None else room, before[1]))
        limited.append((process, before))
    if what == resource.RLIMIT_FSIZE:  # for one save only
        scene.until_said("could not be written")
        for process, before in limited:
            process.rlimit(what, before)
    yield


@fault
def no_room_at_the_end(scene: Scene) -> Iterator[None]:
    """Prevents writing any checkpoint file from step 7 on, until the run gives up."""
    scene.start().until_step(7)
    for rank in scene.ranks.all:
        process = psutil.Process(rank.pid)
        process.rlimit(resource.RLIMIT_FSIZE, (50_000, process.rlimit(resource.RLIMIT_FSIZE)[1]))
    yield


@fault
def port_taken(scene: Scene) -> Iterator[None]:
    """Occupies the port where the ranks are to meet."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        scene.port = other.getsockname()[1]
        scene.start("watchdog.start_minutes=0.3")
        yield
    scene.port = None


@fault
def two_runs(scene: Scene) -> Iterator[None]:
    """Starts the same command during a run: the second one is refused, the first one continues."""
    first: Any = scene.start().until_step(3).ranks
    scene.send(signal.SIGSTOP)  # otherwise it could finish before the second one checks
    scene.start()
    yield
    for rank in first.all:
        psutil.Process(rank.pid).resume()
    scene.ranks = first


@fault
def kill_launcher(scene: Scene, launcher: str) -> Iterator[None]:
    """Sends SIGKILL to a launcher's own processes only: its ranks end or continue."""
    folder = scene.run.parents[1]
    script, said = folder / f"small_{scene.training}.py", scene.run.with_suffix(".txt")
    launched = Launched(launcher, script, scene.arguments, said)
    scene.adopt(launched).until_step(3)
    launchers = launched.adopt()
    scene.adopt(launched)
    for process in launchers:
        process.kill()
    launched.process.wait()
    yield


@fault
def clock(scene: Scene, seconds: int) -> Iterator[None]:
    """Makes the time of day jump while ranks train."""
    ranks = WithClock(
        scene.run.with_suffix(".clock"), scene.run.parents[1] / f"small_{scene.training}.py", scene.arguments
    )
    scene.adopt(ranks).until_step(7)
    ranks.jump(seconds)
    yield


@fault
def poisoned(scene: Scene) -> Iterator[None]:
    """Makes the loss non-finite on one rank in one step, and later kills all ranks."""
    scene.script = str(scene.run.parents[1] / f"poisoned_{scene.training}.py")
    scene.start().until_step(17)
    if "the gradient is not finite" not in scene.said():
        raise RuntimeError("no non-finite gradient was reported")
    scene.kill()
    yield
