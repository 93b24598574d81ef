"""Ranks started by a launcher, and ranks whose clock can be set."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from helpers.ports import free_port

_LAUNCHERS = {
    "deepspeed": ("--num_accelerators", "2", "--master_port"),
    "torchrun": ("--nproc_per_node", "2", "--master_port"),
}

# Adds the seconds in the file CLOCK_FILE, an eight-byte integer, to the time of day.
_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static const long *jump;

__attribute__((constructor)) static void start(void) {
  int file = open(getenv("CLOCK_FILE"), O_RDONLY);
  jump = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += *jump;
  return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}
"""


class Started:
    """A process that we or a launcher started, and the file with its output."""

    def __init__(self, process: Any, said: Path):
        self._process, self._said, self.pid = process, said, process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; for a process that we did not start, 0 once it has ended in any way."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        running = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return None if running else 0

    def said(self) -> str:
        return self._said.read_text(errors="replace")


class Launched:
    """A launcher; `all` holds the launcher itself until `adopt` replaces it with the ranks."""

    def __init__(self, launcher: str, script: Path, arguments: list[str], said: Path):
        command = [str(Path(sys.executable).parent / launcher), *_LAUNCHERS[launcher], str(free_port())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with said.open("w") as file:
            self.process = subprocess.Popen(
                [*command, str(script), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._said = said
        self.all = [Started(self.process, said)]

    def adopt(self) -> list[psutil.Process]:
        """Sets `all` to the ranks; returns the launcher's own processes, the outermost first."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        ranks = [process for process in family if "RANK" in process.environ()]
        ranks = [rank for rank in ranks if rank.parent() not in ranks]  # without their workers
        self.all = [Started(rank, self._said) for rank in ranks]
        return [process for process in family if "RANK" not in process.environ()]

    def kill(self) -> None:
        for process in [psutil.Process(started.pid) for started in self.all if psutil.pid_exists(started.pid)]:
            process.kill()


class WithClock:
    """Two rank processes whose time of day `jump` changes; needs gcc."""

    def __init__(self, folder: Path, script: Path, arguments: list[str]):
        folder.mkdir(parents=True)
        (folder / "clock.c").write_text(_CLOCK)
        library, self._file = folder / "clock.so", folder / "clock"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"], check=True)
        self.jump(0)
        port = str(free_port())
        shared = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file), "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONUNBUFFERED": "1"}
        self.all = []
        for rank in ("0", "1"):
            said = folder / f"rank{rank}.txt"
            with said.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
                    start_new_session=True,
                )
            self.all.append(Started(process, said))

    def jump(self, seconds: int) -> None:
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    def kill(self) -> None:
        for rank in self.all:
            psutil.Process(rank.pid).kill()
