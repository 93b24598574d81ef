"""A run's checkpoints: `python -m pretrain.checkpoints RUN` lists them, and says which are kept and why.

    --verify            reads all of their bytes, and reports checkpoints that differ from what was written
    --prune             deletes what the run itself would delete under the `checkpoint` section of its config.yaml, and
                        everything damaged or left behind by a kill; refused while the run is active
    --export STEP OUT   writes the encoder of one of them for timm, as downstream.checkpoints.export does

Without --verify, only sizes and the manifest are checked. The exit code is 1 if a checkpoint is damaged.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from data.messages import counted
from data.parallel import report_errors
from pretrain.trainer.checkpoint_layout import (
    DELETED,
    LATEST,
    MANIFEST,
    UNFINISHED,
    checkpoint_name,
    checkpoint_names,
    checkpoint_step,
    damage,
)
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.durable import remove_folder, write_durably
from pretrain.trainer.retention import Stored, folder_size, leftovers, set_aside, stored, why_kept
from pretrain.trainer.run_folder import RunFolder


def read_config(run: RunFolder) -> CheckpointConfig:
    """The `checkpoint` section of a run; raises ValueError if there is no run."""
    if not run.config.is_file():
        raise ValueError(f"{run.root} is not the folder of a run: it has no {run.config.name}")
    return CheckpointConfig.model_validate(yaml.safe_load(run.config.read_text()).get("checkpoint", {}))


def describe(run: RunFolder, read: bool) -> tuple[list[str], bool]:
    """One line per checkpoint, latest step first, and whether all of them are sound."""
    config, found = read_config(run), stored(run.checkpoints, read)
    aside = set_aside(run.checkpoints)
    newest = next((one for one in found if one.damage is None), None)
    others = sum(map(folder_size, aside))
    reasons = why_kept(found, newest, config, others) if newest else {}
    sound = "sound" if read else "complete"
    lines = [
        f"{one.name:28}  {_written(run.checkpoints / one.name):16}  {one.size / 1e9:8.2f} GB  "
        + (f"damaged: {one.damage}" if one.damage else f"{sound}; {reasons.get(one.name, 'the next save deletes it')}")
        for one in found
    ]
    lines += [f"{path.name:28}  {_written(path):16}  {folder_size(path) / 1e9:8.2f} GB  set aside" for path in aside]
    lines += [
        f"{UNFINISHED}/{path.name:17}  {'':16}  {folder_size(path) / 1e9:8.2f} GB  being written, or left by a kill"
        for path in sorted((run.checkpoints / UNFINISHED).glob("*"))
    ]
    total = (others + sum(one.size for one in found)) / 1e9
    lines.append(f"{counted(len(found), 'checkpoint')}, {total:.2f} GB in all" if found else "no checkpoint yet")
    return lines, not any(one.damage for one in found)


def _written(checkpoint: Path) -> str:
    manifest = checkpoint / MANIFEST
    return time.strftime("%F %R", time.localtime(manifest.stat().st_mtime)) if manifest.is_file() else "unknown"


def prune(run: RunFolder) -> list[str]:
    """Deletes what need not be kept; returns what was deleted.

    Raises:
        ValueError: the run is still going on, or has no sound checkpoint.
        OSError: something could not be deleted.
    """
    config = read_config(run)
    with run.locked(patience=0):
        found = stored(run.checkpoints, read=True)
        newest = next((one for one in found if one.damage is None), None)
        if newest is None:
            raise ValueError(f"{run.checkpoints} has no sound checkpoint: nothing was deleted")
        reasons = why_kept(found, newest, config)
        write_durably(run.checkpoints / LATEST, newest.name)
        gone: list[str] = []
        for one in (one for one in found if one.damage or one.name not in reasons):
            remove_folder(run.checkpoints / one.name, run.checkpoints / f"{DELETED}{one.name}")
            gone.append(_described(one))
        for path in [*set_aside(run.checkpoints), *leftovers(run.checkpoints)]:
            shutil.rmtree(path)
            gone.append(path.name)
    return gone


def _described(one: Stored) -> str:
    return f"{one.name}, {one.size / 1e9:.2f} GB{' (damaged)' if one.damage else ''}"


def export(run: RunFolder, step: str, out: Path) -> int:
    """Writes the encoder of a checkpoint; returns the exit code of the export command.

    Args:
        step: a number, a checkpoint's name, or `latest`, the newest sound one.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    read_config(run)
    checkpoint = newest_sound(run.checkpoints) if step == LATEST else sound(run.checkpoints, step)
    # In a separate process: the package that reads all kinds of weights depends on this one.
    command = [sys.executable, "-m", "downstream.checkpoints.export", str(checkpoint), str(out), "--format", "timm"]
    return subprocess.run(command).returncode


def sound(checkpoints: Path, step: str) -> Path:
    """The checkpoint of a step, given as a number or name; raises ValueError if there is none or it is damaged."""
    checkpoint = checkpoints / (checkpoint_name(int(step)) if step.isdigit() else step)
    if not checkpoint.is_dir():
        there = ", ".join(str(checkpoint_step(name)) for name in checkpoint_names(checkpoints)) or "none"
        raise ValueError(f"--export {step}: no such checkpoint; steps in {checkpoints}: {there}")
    if problem := damage(checkpoint):
        raise ValueError(f"--export {step}: {checkpoint} is damaged: {problem}; `--export latest` takes a sound one")
    return checkpoint


def newest_sound(checkpoints: Path) -> Path:
    """The newest checkpoint that is not damaged, after a warning about each newer one; raises ValueError if none is."""
    for name in checkpoint_names(checkpoints):
        if not (problem := damage(checkpoints / name)):
            return checkpoints / name
        print(f"{name} is damaged and skipped: {problem}", file=sys.stderr)
    raise ValueError(f"{checkpoints} has no sound checkpoint: nothing was exported")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="read all bytes")
    what.add_argument("--prune", action="store_true", help="delete what need not be kept")
    what.add_argument("--export", metavar=("STEP", "OUT"), nargs=2, help="a step or `latest`, and OUT.safetensors")
    options = parser.parse_args(argv)

    def command() -> int:
        run = RunFolder(options.run)
        if options.export:
            step, out = options.export
            return export(run, step, Path(out))
        if options.prune:
            print("\n".join(f"deleted {gone}" for gone in prune(run)) or "nothing to delete")
            return 0
        lines, all_sound = describe(run, options.verify)
        print("\n".join(lines))
        return 0 if all_sound else 1

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
