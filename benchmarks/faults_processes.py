"""Faults of processes: killed, stopped, told to stop, or without memory, descriptors or room for their files."""

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
    """A generator over a scene, which leaves its ranks with a fault and takes it away after the yield, as an `Inject`.

    What follows the scene among its arguments is given first.
    """
    return lambda *args, **keys: lambda scene: contextmanager(function)(scene, *args, **keys)


@fault
def kill(scene: Scene, *ranks: int, step: int = 7) -> Iterator[None]:
    """SIGKILL to these ranks alone, or to all with their workers."""
    scene.start().until_step(step).kill(*ranks)
    yield


@fault
def kill_worker(scene: Scene, rank: int) -> Iterator[None]:
    scene.start().until_step(7).workers(rank)[0].kill()
    yield


@fault
def stop(scene: Scene, rank: int) -> Iterator[None]:
    """SIGSTOP; the others have to end, and the rank too, once it may go on."""
    scene.start("watchdog.silent_minutes=0.25").until_step(7).send(signal.SIGSTOP, rank)
    scene.watched = [other for other in range(len(scene.ranks.all)) if other != rank]
    yield
    scene.send(signal.SIGCONT, rank)


@fault
def pause(scene: Scene, rank: int, seconds: float) -> Iterator[None]:
    """SIGSTOP for less than the watchdog's patience."""
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
    """Signals one after the other, to these ranks or to all."""
    scene.start().until_step(7)
    for number in signals:
        scene.send(number, *ranks)
        time.sleep(gap)
    yield


@fault
def kill_while_starting(scene: Scene, said: str) -> Iterator[None]:
    """SIGKILL to all when a start that resumes says this."""
    scene.killed_run(12).start().until_said(said).kill()
    yield


@fault
def kill_while_saving(scene: Scene, seed: int, *ranks: int) -> Iterator[None]:
    """SIGKILL at a random moment from the step before a save on, to these ranks or to all."""
    rng = np.random.default_rng(seed)
    step = int(rng.integers(1, 5)) * EVERY
    scene.start().until_step(step - 1)
    time.sleep(float(rng.uniform(0, 0.3)))
    scene.kill(*ranks)
    yield


@fault
def kill_at_the_end(scene: Scene, seed: int) -> Iterator[None]:
    """SIGKILL to all at a random moment after the last step, while results are written."""
    scene.start().until_step(40)
    time.sleep(float(np.random.default_rng(seed).uniform(0, 1)))
    scene.kill()
    yield


@fault
def never_comes(scene: Scene) -> Iterator[None]:
    """A rank ends before it has joined the others."""
    scene.start("watchdog.start_minutes=0.3").kill(1)
    yield


@fault
def limit(scene: Scene, what: int, ranks: tuple[int, ...], room: int | None = None, of: str = "rank") -> Iterator[None]:
    """From step 7 on a limit of the kernel: no more memory or descriptors than there are, or files of `room` bytes."""
    scene.start().until_step(7)
    limited = []
    for rank in ranks:
        process = psutil.Process(scene.ranks.all[rank].pid) if of == "rank" else scene.workers(rank)[0]
        now = {resource.RLIMIT_AS: process.memory_info().vms // 2, resource.RLIMIT_NOFILE: process.num_fds()}
        before = process.rlimit(what)
        process.rlimit(what, (now[what] if room is None else room, before[1]))
        limited.append((process, before))
    if what == resource.RLIMIT_FSIZE:  # for one save, and then there is room again
        scene.until_said("could not be written")
        for process, before in limited:
            process.rlimit(what, before)
    yield


@fault
def no_room_at_the_end(scene: Scene) -> Iterator[None]:
    """From step 7 on no file of a checkpoint can be written, until the run gives up."""
    scene.start().until_step(7)
    for rank in scene.ranks.all:
        process = psutil.Process(rank.pid)
        process.rlimit(resource.RLIMIT_FSIZE, (50_000, process.rlimit(resource.RLIMIT_FSIZE)[1]))
    yield


@fault
def port_taken(scene: Scene) -> Iterator[None]:
    """Something else listens where the ranks are to meet."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        scene.port = other.getsockname()[1]
        scene.start("watchdog.start_minutes=0.3")
        yield
    scene.port = None


@fault
def two_runs(scene: Scene) -> Iterator[None]:
    """The same command while the run goes on: the second is refused, the first goes on."""
    first: Any = scene.start().until_step(3).ranks
    scene.send(signal.SIGSTOP)  # or it would be over before the second has looked
    scene.start()
    yield
    for rank in first.all:
        psutil.Process(rank.pid).resume()
    scene.ranks = first


@fault
def kill_launcher(scene: Scene, launcher: str) -> Iterator[None]:
    """SIGKILL to the processes of a launcher alone: its ranks end, or go on."""
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
    """The time of day jumps while ranks train."""
    ranks = WithClock(
        scene.run.with_suffix(".clock"), scene.run.parents[1] / f"small_{scene.training}.py", scene.arguments
    )
    scene.adopt(ranks).until_step(7)
    ranks.jump(seconds)
    yield


@fault
def poisoned(scene: Scene) -> Iterator[None]:
    """A loss that is not finite, on one rank in one step; and then all are killed."""
    scene.script = str(scene.run.parents[1] / f"poisoned_{scene.training}.py")
    scene.start().until_step(17)
    if "the gradient is not finite" not in scene.said():
        raise RuntimeError("no gradient was not finite")
    scene.kill()
    yield
