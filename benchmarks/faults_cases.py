"""The faults that `faults.py` injects, and how a run must end after each."""

import re
import resource
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import faults_files as files
from benchmarks import faults_processes as processes
from benchmarks.faults_processes import Inject
from benchmarks.faults_scene import EVERY, SCRIPTS
from pretrain.trainer.watchdog import HUNG

KILLED = -signal.SIGKILL
TRAININGS = ("pretrain", "finetune")
EVERYWHERE = tuple((training, stage) for stage in range(4) for training in TRAININGS)
EACH_STAGE = (("pretrain", 0), ("finetune", 1), ("pretrain", 2), ("finetune", 3))
OTHER_STAGES = (("finetune", 0), ("pretrain", 1), ("finetune", 2), ("pretrain", 3))
TWO = (("pretrain", 1), ("finetune", 2))
OTHER_TWO = (("finetune", 0), ("pretrain", 3))

# Runs a training with an encoder as small as in tests, optionally with a non-finite loss on rank 1 in step 4.
_SMALL = """
import os, runpy, sys
sys.path[:0] = {paths!r}
import deepspeed, torch
from helpers.processes import SMALL

def poison(engine, inputs, losses):
    if isinstance(engine, deepspeed.DeepSpeedEngine) and engine.global_steps == 3 and os.environ["RANK"] == "1":
        return {{**losses, "loss": losses["loss"] * float("inf")}}

if {poisoned}:
    torch.nn.modules.module.register_module_forward_hook(poison)
with SMALL:
    runpy.run_path({script!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Case:
    """A fault, and the expected outcome.

    Attributes:
        kind: of the fault; a row of the table.
        inject: starts the ranks and injects the fault; leaving the context removes it.
        training, stage: `pretrain` or `finetune`, and the ZeRO stage.
        codes: permitted exit codes of the ranks.
        says: what one of the ranks must print.
        stops: whether the run refuses to start, or stops by itself.
        seconds: time limit for all ranks to end.
        most_repeated: steps that the run may repeat: two save intervals, because one save may be incomplete; all, if
            none can be written.
        poisoned: whether a loss is non-finite, also in the run to compare with.
        overrides: of the recipe.
        number: index among the cases that one call of `_cases` makes.
    """

    kind: str
    inject: Inject
    training: str
    stage: int
    codes: tuple[int, ...] = (0,)
    says: re.Pattern[str] | None = None
    stops: bool = False
    seconds: float = 90
    most_repeated: int = 2 * EVERY
    poisoned: bool = False
    needs_root: bool = False
    overrides: tuple[str, ...] = ()
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind} ({self.training}, ZeRO {self.stage}, {self.number})"


def _cases(
    kind: str,
    injects: Inject | Iterable[Inject],
    where: Iterable[tuple[str, int]],
    codes: tuple[int, ...] = (0,),
    says: str = "",
    **others: object,
) -> Iterator[Case]:
    """Combines the injections with the places; the shorter list is repeated."""
    given, places = [injects] if callable(injects) else list(injects), list(where)
    pattern = re.compile(says) if says else None
    for number in range(max(len(given), len(places))):
        training, stage = places[number % len(places)]
        inject = given[number % len(given)]
        yield Case(kind, inject, training, stage, codes, pattern, number=number, **others)  # type: ignore[arg-type]


def write_scripts(folder: Path) -> None:
    """Writes entry scripts for both trainings, `small_NAME.py` and `poisoned_NAME.py`."""
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), str(root / "tests")]
    for training, script in SCRIPTS.items():
        for name in ("small", "poisoned"):
            text = _SMALL.format(paths=paths, script=script, poisoned=name == "poisoned")
            (folder / f"{name}_{training}.py").write_text(text)


def _process_cases() -> Iterator[Case]:
    lost = r"another rank has ended|rank \d+ has ended|rank 0, or the launcher, has ended"
    yield from _cases("SIGKILL of a rank", [processes.kill(0), processes.kill(1)], EVERYWHERE, (KILLED, 1), lost)
    several = ("data.num_workers=3",)
    yield from _cases(
        "SIGKILL of a rank with three data workers", processes.kill(1), TWO, (KILLED, 1), lost, overrides=several
    )
    yield from _cases("SIGKILL of all ranks", processes.kill(), EVERYWHERE, (KILLED,))
    saves = [processes.kill_while_saving(seed) for seed in range(16)]
    yield from _cases("SIGKILL of all ranks while saving", saves, EVERYWHERE, (KILLED,))
    saves = [processes.kill_while_saving(seed, seed % 2) for seed in range(100, 108)]
    yield from _cases("SIGKILL of a rank while saving", saves, EVERYWHERE, (KILLED, 1))
    moments = ("", "samples, ", "computes with", "resumes from")
    starts = [processes.kill_while_starting(moment) for moment in moments]
    yield from _cases("SIGKILL of all ranks while starting", starts, EACH_STAGE, (KILLED,))
    ends = [processes.kill_at_the_end(seed) for seed in range(4)]
    yield from _cases("SIGKILL of all ranks at the end", ends, OTHER_STAGES, (KILLED, 0))
    launchers = [processes.kill_launcher("deepspeed"), processes.kill_launcher("torchrun")]
    yield from _cases("SIGKILL of the launcher", launchers, TWO, (0,))
    yield from _cases("the clock jumps", [processes.clock(86400), processes.clock(-86400)], OTHER_TWO)
    killed = r"a data worker \(process \d+\) was killed by SIGKILL"
    workers = [processes.kill_worker(0), processes.kill_worker(1)]
    yield from _cases("SIGKILL of a data worker", workers, EACH_STAGE, (1,), killed, stops=True)
    stop = [processes.stop(1), processes.stop(0)]
    silent = r"nothing was heard from rank 1|rank 0, or the launcher, has (ended or does not answer|not answered)"
    yield from _cases("SIGSTOP of a rank", stop, EACH_STAGE, (HUNG, 1), silent, stops=True)
    yield from _cases("SIGSTOP of a rank for 5 s", processes.pause(1, 5), OTHER_TWO)
    stopped = r"\(stopped\): it was stopped \(SIGSTOP\)"
    yield from _cases("SIGSTOP of a data worker", processes.stop_worker(1), TWO, (HUNG,), stopped, stops=True)
    storm = (signal.SIGTERM,) * 30
    stormy = [processes.tell(signals=storm), processes.tell(1, signals=storm)]
    yield from _cases("storm of SIGTERM", stormy, EVERYWHERE, (0,), "saved and stopped after step", stops=True)
    mixed = [
        processes.tell(signals=(signal.SIGHUP,)),
        processes.tell(0, signals=(signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)),
    ]
    yield from _cases("SIGHUP, SIGUSR1", mixed, TWO, (0,), "saved and stopped after step", stops=True)
    yield from _cases(
        "a rank that never comes", processes.never_comes(), OTHER_TWO, (KILLED, HUNG, 1), "start_minutes", stops=True
    )
    yield from _cases("port taken", processes.port_taken(), TWO, (1, HUNG), r"port \d+ is already in use", stops=True)
    yield from _cases(
        "two runs in one folder", processes.two_runs(), EACH_STAGE, (1,), "another run is writing", stops=True
    )
    yield from _cases(
        "non-finite loss on a rank, then SIGKILL", processes.poisoned(), EACH_STAGE, (KILLED,), poisoned=True
    )


def _limit_cases() -> Iterator[Case]:
    memory = processes.limit(resource.RLIMIT_AS, (1,), of="worker")
    yield from _cases("no more memory for a data worker", memory, TWO, (0, 1), "emory")
    descriptors = processes.limit(resource.RLIMIT_NOFILE, (1,))
    told = "oo many open files"
    yield from _cases("no descriptor left", descriptors, OTHER_TWO, (1,), told, stops=True, most_repeated=40)
    room = [processes.limit(resource.RLIMIT_FSIZE, ranks, 50_000) for ranks in ((0, 1), (0,), (1,), (0, 1))]
    yield from _cases("no room for a save, then room", room, EACH_STAGE, (0,), "could not be written")
    yield from _cases(
        "no room for any save",
        processes.no_room_at_the_end(),
        TWO,
        (1,),
        "could not be written",
        stops=True,
        most_repeated=40,
    )
    full = [files.full_disk("tmpfs", True), files.full_disk("ext4", True)]
    told = "No space left|could not be written"
    yield from _cases("disk full, then room", full, EACH_STAGE, (0, 1), told, needs_root=True)
    full = [files.full_disk("ext4", False), files.full_disk("tmpfs", False)]
    yield from _cases("disk full for good", full, OTHER_TWO, (1,), "No space left", stops=True, needs_root=True)
    yield from _cases("no inodes, then some", files.no_inodes(), TWO, (0, 1), told, needs_root=True)
    yield from _cases("disk read-only", files.read_only(), OTHER_TWO, (1,), "Read-only", stops=True, needs_root=True)
    yield from _cases("disk stalls for 10 s", files.frozen_disk(10), TWO, needs_root=True)
    yield from _cases("disk slow", files.slow_disk(), OTHER_TWO, needs_root=True)


def _checkpoint_cases() -> Iterator[Case]:
    skipped = "is damaged and skipped"
    weights, moments = "*model_states.pt", "*optim_states.pt"
    cut = [files.damage(files.truncate(weights)), files.damage(files.truncate(moments))]
    stages = EVERYWHERE[2:]  # stage 0 stores the optimizer's state with the weights
    yield from _cases("checkpoint truncated", cut, stages, says=skipped)
    flipped = [files.damage(files.flip(moments)), files.damage(files.flip(weights))]
    yield from _cases("a bit of a checkpoint flipped", flipped, stages, says=skipped)
    yield from _cases("a bit of a checkpoint flipped", files.damage(files.flip(weights)), EVERYWHERE[:2], says=skipped)
    yield from _cases("a rank's file missing", files.damage(files.remove(moments)), stages, says=skipped)
    average = [files.damage(files.flip("ema*")), files.damage(files.remove("ema*"))]
    yield from _cases("moving average damaged", average, (("finetune", 0), ("finetune", 3)), says=skipped)
    manifests = [
        files.damage(files.remove("manifest.json")),
        files.damage(files.truncate("manifest.json")),
        files.damage(files.edit_manifest(files={})),
        files.damage(files.edit_manifest(step=16)),
        files.damage(files.edit_manifest(state=None)),
        files.damage(files.write("manifest.json", b"\xff\x00\n")),
    ]
    yield from _cases("manifest wrong", manifests, EACH_STAGE[:3], says=skipped)
    latest = [
        files.damage(files.remove("../latest")),
        files.damage(files.write("../latest", b"step_00000099")),
        files.damage(files.write("../latest", b"\xff\xfe")),
        files.damage(files.write("../latest", b"step_00000005")),
    ]
    yield from _cases("latest wrong", latest, OTHER_STAGES)
    two = files.damage(files.truncate(weights), files.flip(weights))
    yield from _cases("two generations damaged", two, EACH_STAGE, says=skipped)
    refused = "no intact checkpoint"
    everything = files.damage_all(files.flip(weights))
    yield from _cases("all generations damaged", everything, OTHER_STAGES, (1,), refused, stops=True)
    remains = [
        files.damage(files.write("../unfinished/rubbish.pt", b"x")),
        files.damage(files.write("../latest.tmp", b"x")),
        files.damage(files.copy_beside),
        files.damage(files.append("../../metrics.jsonl", b"\xff\x00\n{")),
    ]
    yield from _cases("remains in the run's folder", remains, EACH_STAGE)


def _shard_cases() -> Iterator[Case]:
    yield from _cases("shards gone while training", files.shards_gone(True), TWO, (0, 1))
    gone = "no such shard"
    yield from _cases("shards gone before a resume", files.shards_gone(False), TWO, (1,), gone, stops=True)
    cut = files.shard_changed("truncated", True)
    yield from _cases("shard truncated while training", cut, OTHER_TWO, (1,), "does not match", stops=True)
    other = [files.shard_changed("replaced", False), files.shard_changed("truncated", False)]
    told = "different samples|does not match|changed|truncated|index"
    yield from _cases("shard replaced before a resume", other, TWO, (1,), told, stops=True)
    pixels = files.shard_changed("pixels", False)
    yield from _cases("pixels of a shard changed before a resume", pixels, OTHER_TWO, (1,), told, stops=True)
    told = r"127\.0\.0\.1"
    yield from _cases(
        "store of shards gone", files.store(signal.SIGKILL), TWO, (1, HUNG), told, stops=True, seconds=150
    )
    yield from _cases(
        "store of shards stalls", files.store(signal.SIGSTOP), OTHER_TWO, (1, HUNG), told, stops=True, seconds=150
    )


CASES = (*_process_cases(), *_limit_cases(), *_checkpoint_cases(), *_shard_cases())

_QUICK = (
    ("SIGKILL of a rank", "finetune", 3),
    ("SIGKILL of all ranks while saving", "finetune", 3),
    ("SIGKILL of a data worker", "finetune", 1),
    ("storm of SIGTERM", "pretrain", 1),
    ("no room for a save, then room", "finetune", 3),
    ("checkpoint truncated", "pretrain", 1),
    ("two generations damaged", "finetune", 1),
)
QUICK = tuple(next(case for case in CASES if (case.kind, case.training, case.stage) == wanted) for wanted in _QUICK)
