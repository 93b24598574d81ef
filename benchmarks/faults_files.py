"""File faults: damaged checkpoints, disks that fail while a run saves, and damaged shards."""

import contextlib
import http.server
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults_processes import fault
from benchmarks.faults_scene import Scene, make_data

ROOT = Path(__file__).resolve().parent.parent
Damage = Callable[[Path], None]  # takes a checkpoint's folder


@fault
def damage(scene: Scene, *damages: Damage) -> Iterator[None]:
    """Kills all ranks, damages the newest checkpoints, one with each function, and restarts the run."""
    scene.killed_run()
    for checkpoint, change in zip(scene.checkpoints(), damages, strict=False):
        change(checkpoint)
    scene.start()
    yield


@fault
def damage_all(scene: Scene, change: Damage) -> Iterator[None]:
    """Like `damage`, but for every checkpoint; they are restored after the run has refused to start."""
    scene.killed_run()
    folder = scene.run / "checkpoints"
    shutil.copytree(folder, folder.with_name("copy"))
    for checkpoint in scene.checkpoints():
        change(checkpoint)
    scene.start()
    yield
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def truncate(pattern: str) -> Damage:
    def change(checkpoint: Path) -> None:
        path = _one(checkpoint, pattern)
        os.truncate(path, path.stat().st_size // 2)

    return change


def flip(pattern: str) -> Damage:
    """Flips one bit in the middle of a file."""

    def change(checkpoint: Path) -> None:
        path = _one(checkpoint, pattern)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def remove(pattern: str) -> Damage:
    return lambda checkpoint: _one(checkpoint, pattern).unlink()


def edit_manifest(**keys: object) -> Damage:
    """Replaces keys of the manifest, or of its state if the value is an integer; None removes a key."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        for key, value in keys.items():
            place = manifest["state"] if isinstance(value, int) else manifest
            place[key] = value
        path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))

    return change


def write(name: str, content: bytes) -> Damage:
    """Writes a file into the checkpoint's folder, or beside it."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return change


def append(name: str, content: bytes) -> Damage:
    """Adds to the end of a file in the checkpoint's folder, or beside it."""

    def change(checkpoint: Path) -> None:
        with (checkpoint / name).open("ab") as file:
            file.write(content)

    return change


def copy_beside(checkpoint: Path) -> None:
    """Copies the checkpoint, like a user's backup."""
    shutil.copytree(checkpoint, checkpoint.with_name(checkpoint.name + ".bak"))


def _one(checkpoint: Path, pattern: str) -> Path:
    return sorted(checkpoint.glob(pattern))[-1]


@contextlib.contextmanager
def own_disk(scene: Scene, kind: str) -> Iterator[Path]:
    """Puts the run's folder on its own file system, 64 MiB of tmpfs or ext4; needs root."""
    scene.run.mkdir(parents=True)
    image = scene.run.with_suffix(".img")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=200", "faults", scene.run]
    if kind == "ext4":
        subprocess.run(["truncate", "-s", "64M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        command = ["mount", "-o", "loop,errors=remount-ro", image, scene.run]
    subprocess.run(command, check=True)
    try:
        yield scene.run
    finally:
        scene.end()
        kept = scene.run.with_name(scene.run.name + "-kept")
        shutil.copytree(scene.run, kept, ignore=shutil.ignore_patterns("lost+found", "filler*"))
        subprocess.run(["umount", "-l", scene.run], check=True)
        scene.run.rmdir()
        kept.rename(scene.run)
        image.unlink(missing_ok=True)


@fault
def full_disk(scene: Scene, kind: str, until_told: bool) -> Iterator[None]:
    """Fills the disk completely from step 7 on, until the run reports it or until it has ended."""
    with own_disk(scene, kind) as disk:
        scene.start().until_step(7)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        if until_told:
            scene.until_said("No space left|could not be written")
            filler.unlink()
        yield
        filler.unlink(missing_ok=True)
        if until_told or scene.is_over:
            return
        scene.start().wait(120)


@fault
def no_inodes(scene: Scene) -> Iterator[None]:
    """Uses up all inodes from step 7 on, until the run reports it."""
    with own_disk(scene, "tmpfs") as disk:
        scene.start().until_step(7)
        made = []
        with contextlib.suppress(OSError):
            for number in range(1000):
                (disk / f"filler{number}").touch()
                made.append(disk / f"filler{number}")
        scene.until_said("No space left|could not be written")
        for path in made:
            path.unlink()
        yield


@fault
def read_only(scene: Scene) -> Iterator[None]:
    """Makes the disk fail at step 7; it is read-only until remounted, and unsynced data is lost."""
    with own_disk(scene, "ext4") as disk:
        scene.start().until_step(7)
        subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
        yield
        scene.end()
        subprocess.run(["umount", "-l", disk], check=True)
        subprocess.run(["mount", "-o", "loop", disk.with_suffix(".img"), disk], check=True)
        scene.start().wait(120)


@fault
def frozen_disk(scene: Scene, seconds: float) -> Iterator[None]:
    """Blocks all writes for some seconds in the middle of the run."""
    with own_disk(scene, "ext4") as disk:
        scene.start().until_step(7)
        subprocess.run(["fsfreeze", "-f", disk], check=True)
        try:
            time.sleep(seconds)
        finally:
            subprocess.run(["fsfreeze", "-u", disk], check=True)
        yield


@fault
def slow_disk(scene: Scene) -> Iterator[None]:
    """Lets writes through for a tenth of each second, for ten seconds."""
    with own_disk(scene, "ext4") as disk:
        scene.start().until_step(7)
        for _ in range(10):
            subprocess.run(["fsfreeze", "-f", disk], check=True)
            time.sleep(0.9)
            subprocess.run(["fsfreeze", "-u", disk], check=True)
            time.sleep(0.1)
        yield


@fault
def shards_gone(scene: Scene, live: bool) -> Iterator[None]:
    """Moves the shards away while the run trains (`live`), or before it continues."""
    shards = scene.own_shards(scene.run.with_suffix(".shards"))
    scene.start().until_step(7)
    if not live:
        scene.until_step(17).kill()
    away = shards.rename(shards.with_suffix(".away"))
    if not live:
        scene.start()
    yield
    away.rename(shards)


@fault
def shard_changed(scene: Scene, how: str, live: bool) -> Iterator[None]:
    """Changes a shard: `truncated`, `replaced` by other images, or `pixels`, where only bytes of one image change."""
    shards = scene.own_shards(scene.run.with_suffix(".shards"))
    scene.start().until_step(7)
    if not live:
        scene.until_step(17).kill()
    shard = sorted(shards.glob("*.tar"))[1]
    before = shard.read_bytes()
    if how == "truncated":
        os.truncate(shard, len(before) // 2)
    elif how == "replaced":
        others = make_data(scene.run.with_suffix(".others"))
        shard.write_bytes(sorted(others.glob("*.tar"))[0].read_bytes())
    else:
        place = before.index(b"\xff\xd8\xff") + 700
        shard.write_bytes(before[:place] + bytes(8) + before[place + 8 :])
    if not live:
        scene.start()
    yield
    shard.write_bytes(before)


def _serve(folder: str, number: int, spared: int, queue: "multiprocessing.Queue[int]") -> None:
    """Serves the folder; sends itself a signal at the first request for a shard after `spared` ones."""
    asked = itertools.count()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tar") and next(asked) == spared:
                os.kill(os.getpid(), number)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        queue.put(server.server_port)
        server.serve_forever()


@fault
def store(scene: Scene, number: int) -> Iterator[None]:
    """Sends the shard server a signal when the run requests its second shard; with SIGSTOP it stalls."""
    names = [path.stem.rpartition("-") for path in sorted(scene.shards.glob("*.tar"))]
    queue: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=_serve, args=(str(scene.shards), number, len(names) + 1, queue))
    server.start()
    url = f"http://127.0.0.1:{queue.get()}/{names[0][0]}-{{{names[0][2]}..{names[-1][2]}}}.tar"
    try:
        subprocess.run([sys.executable, "-m", "data.index", url], cwd=ROOT, check=True, capture_output=True)
        scene.start(f"data.shards={url}", f"data.cache_dir={scene.run}.cache", "watchdog.first_step_minutes=0.9")
        yield
    finally:
        server.kill()
        server.join()
