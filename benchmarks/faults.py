"""Injects faults into runs, and compares their results with undisturbed runs.

    python benchmarks/faults.py [--quick] [--only KIND ...] [--list] [--done FILE] [--out FOLDER]

Two CPU ranks pretrain a tiny encoder, or fine-tune one, in ZeRO 0 to 3, and a fault is injected: `--list` lists the
faults, `--only` selects some kinds. The fault is then removed, and the same command continues the run. Outcomes:

- `exact`: it ended as it should, with the expected exit code and message, and then with the same bits as an
  undisturbed run; at most the work since the last sound checkpoint was repeated, and nothing is left behind.
- `stopped_with_cause`: the same, but it refused to start or stopped by itself, with the cause in its last lines.
- `hung`: something neither ended nor made progress within its limit.
- `lost`: more than the work since the last sound checkpoint had to be repeated.
- `wrong`: anything else, such as different bits, a cause that is not reported, or a leftover process.

Full, read-only or slow file systems need root, and are skipped without it. The table is Markdown; the last line is one
JSON object; the exit code is 1 if anything hung, was lost or was wrong.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.processes import preload, starter
from tqdm import tqdm

from benchmarks.faults_cases import CASES, QUICK, Case, write_scripts
from benchmarks.faults_scene import Hung, Lost, Scene, Wrong, differences, make_data, write_recipes

OUTCOMES = ("exact", "stopped_with_cause", "hung", "lost", "wrong")


class Campaign:
    """Runs cases in a folder.

    Args:
        start: starts the ranks of a run, like `helpers.processes.starter`.
        folder: for all runs, their shards and recipes.
    """

    def __init__(self, start: Callable[..., Any], folder: Path):
        self._start, self._folder = start, folder
        self._recipes = write_recipes(folder, make_data(folder))
        self._whole: dict[tuple[str, int, bool], Path] = {}
        self._numbers = Counter[str]()
        write_scripts(folder)

    def judge(self, case: Case) -> tuple[str, str]:
        """One of `OUTCOMES`, and why."""
        whole = self._uninterrupted(case)
        scene = self._scene(case, f"{case.kind}-{case.training}{case.stage}")
        try:
            return self._injected(case, scene, whole)
        except Hung as why:
            return "hung", str(why)
        except Lost as why:
            return "lost", str(why)
        except Wrong as why:
            return "wrong", str(why)
        except Exception as error:  # from the injection; other cases continue
            return "wrong", f"could not be injected: {error!r}"
        finally:
            scene.end()

    def _scene(self, case: Case, name: str) -> Scene:
        name = re.sub(r"\W+", "-", name)
        self._numbers[name] += 1
        run = self._folder / "runs" / f"{name}-{self._numbers[name]}"
        overrides = [f"train.ds_config=zero{case.stage}", *case.overrides]
        return Scene(self._start, self._recipes[case.training], case.training, run, overrides)

    def _uninterrupted(self, case: Case) -> Path:
        """The undisturbed run of this training and stage, with the same non-finite loss if the case has one."""
        key = (case.training, case.stage, case.poisoned)
        if key not in self._whole:
            scene = self._scene(case, f"whole-{case.training}{case.stage}{'-poisoned' * case.poisoned}")
            if case.poisoned:
                scene.script = str(self._folder / f"poisoned_{case.training}.py")
            scene.start().wait(300)
            if any(scene.codes()):
                raise RuntimeError(f"the undisturbed run failed:\n{scene.said()}")
            self._whole[key] = scene.run
        return self._whole[key]

    def _injected(self, case: Case, scene: Scene, whole: Path) -> tuple[str, str]:
        with case.inject(scene):
            began, ranks = time.monotonic(), scene.ranks
            scene.wait(case.seconds, scene.watched)
            took, codes, said = time.monotonic() - began, scene.codes(), scene.told()
            if scene.watched is not None:
                codes = [codes[rank] for rank in scene.watched]
            _check_resume(scene, said)
        if scene.ranks is ranks or not scene.is_over:
            scene.wait(case.seconds)
        if left := scene.left_processes():
            raise Wrong(f"left behind: {left}")
        if not set(codes) <= set(case.codes):
            raise Wrong(f"exit codes {codes} instead of {list(case.codes)}: {_last(said)}")
        if case.says and not case.says.search(said):
            raise Wrong(f"no message matches '{case.says.pattern}': {_last(said)}")
        if not scene.is_over or -signal.SIGKILL in codes:
            _continue(scene, case)
        if different := differences(whole, scene.run):
            raise Wrong(f"different bits: {different}")
        if left_files := scene.left_files():
            raise Wrong(f"left behind: {left_files}")
        return ("stopped_with_cause" if case.stops else "exact"), f"exit codes {codes} after {took:.0f} s"


def _check_resume(scene: Scene, said: str) -> None:
    """Raises Lost if ranks resumed from anything but the newest sound checkpoint."""
    resumed = [
        int(line.partition("resumes from step_")[2][:8]) for line in said.splitlines() if "resumes from step_" in line
    ]
    if resumed and resumed[0] != scene.before:
        raise Lost(f"resumed from step {resumed[0]}, although step {scene.before} was sound")


def _continue(scene: Scene, case: Case) -> None:
    """Continues the run with the same command, after the fault is gone."""
    at = scene.last_step()
    scene.start().wait(180)
    said = scene.said()
    if any(scene.codes()):
        verdict = Lost if "no intact checkpoint" in said else Wrong
        raise verdict(f"did not continue ({scene.codes()}): {_last(said)}")
    if scene.before and f"resumes from step_{scene.before:08d}" not in said:
        raise Lost(f"step {scene.before} was sound, but the run did not resume from it: {_last(said)}")
    if left := scene.left_processes():
        raise Wrong(f"left behind at the end: {left}")
    if at - scene.before > case.most_repeated:
        raise Lost(f"{at - scene.before} steps were repeated, starting at step {scene.before}")


def _last(said: str, lines: int = 6) -> str:
    return " / ".join([line for line in said.splitlines() if line.strip()][-lines:])[-900:]


def table(results: Iterable[tuple[Case, str]]) -> str:
    """A Markdown table of how many cases of each kind had each outcome."""
    counts: dict[str, Counter[str]] = {}
    for case, outcome in results:
        counts.setdefault(case.kind, Counter())[outcome] += 1
    names = [outcome.replace("_", " ") for outcome in OUTCOMES]
    lines = ["| fault | injected | " + " | ".join(names) + " |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
    for kind, count in counts.items():
        lines.append(f"| {kind} | {count.total()} | " + " | ".join(str(count[o] or "") for o in OUTCOMES) + " |")
    return "\n".join(lines)


def read_done(log: Path) -> list[tuple[Case, str]]:
    """The cases of an earlier campaign's results.jsonl, with their outcomes."""
    outcomes = {row["case"]: row["outcome"] for row in map(json.loads, log.read_text().splitlines())}
    return [(case, outcomes[str(case)]) for case in CASES if str(case) in outcomes]


def run_cases(
    campaign: Campaign, cases: Sequence[Case], done: Sequence[tuple[Case, str]] = (), log: Path | None = None
) -> dict[str, int]:
    """Runs the remaining cases one by one, prints the table and what went wrong, and returns the last line's object."""
    results = list(done)
    cases = [case for case in cases if case not in dict(results)]
    bar = tqdm(cases, desc="faults", unit="fault", file=sys.stderr)
    for case in bar:
        bar.set_postfix_str(f"{case}")
        outcome, why = campaign.judge(case)
        results.append((case, outcome))
        if outcome not in ("exact", "stopped_with_cause"):
            bar.write(f"{case}: {outcome}: {why}", file=sys.stdout)
        if log:
            with log.open("a") as file:
                file.write(json.dumps({"case": str(case), "outcome": outcome, "why": why}) + "\n")
    print(table(sorted(results, key=lambda result: CASES.index(result[0]))))
    counts = Counter(outcome for _, outcome in results)
    return {"injected": len(results), **{outcome: counts[outcome] for outcome in OUTCOMES}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/faults.py", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--only", nargs="+", metavar="KIND", default=[""], help="cases that contain one of these")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--done", type=Path, metavar="FILE", help="results.jsonl of a campaign to continue")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the runs and results.jsonl here; must be new")
    args = parser.parse_args(argv)
    chosen = [case for case in (QUICK if args.quick else CASES) if any(part in str(case) for part in args.only)]
    chosen.sort(key=lambda case: case.number)  # some of each kind first
    chosen = [case for case in chosen if not case.needs_root or os.geteuid() == 0]
    done = read_done(args.done) if args.done else []
    if args.list:
        print(*chosen, sep="\n")
        return 0
    os.environ["DS_ACCELERATOR"] = "cpu"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # otherwise ranks would inherit nohup's handling
    preload("deepspeed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=args.out is None)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        with starter(folder) as start:
            figures = run_cases(Campaign(start, folder), chosen, done, folder / "results.jsonl")
    print(json.dumps(figures))
    return int(any(figures[outcome] for outcome in ("hung", "lost", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
