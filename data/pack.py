"""Packs an image folder or a list of files into WebDataset shards: ``python -m data.pack SOURCE OUT``.

The files' bytes are copied unchanged, in sorted order; training shuffles all samples anyway. Every image is decoded
once to check it. Shards are written to ``OUT/.pack`` and published together at the end, so a killed run leaves no
partial data where training looks, and the next run continues after the shards that were finished.
"""

import argparse
import fcntl
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.decode import BadImage, check_image
from data.index import CLASSES_FILE, Index, index_paths, load_index
from data.parallel import default_workers, report_errors, run_parallel
from data.scan import NO_LABEL
from data.sources import Source, SourceFile, list_source

PLAN_FILE = "pack.json"
STAGING = ".pack"
REJECTED_FILE = "rejected.txt"
SHOWN_NAMES = 20
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    root: Path
    files: tuple[SourceFile, ...]
    path: Path  # in the staging folder; exists only once the shard is complete


def pack(
    source: Source,
    out: Path,
    *,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    workers: int = 1,
    bad: str = "refuse",
) -> Index:
    """Writes the shards, ``classes.txt`` and the index of ``source`` into ``out``; continues an interrupted run.

    Args:
        source: from ``list_source``.
        out: folder, created if necessary.
        prefix: shards are called ``prefix-000000.tar``.
        samples_per_shard: files per shard; a shard with rejected files is smaller.
        workers: processes.
        bad: 'refuse' publishes nothing if any file is not a readable image; 'skip' lists them in ``rejected.txt``.

    Raises:
        ValueError: unreadable images, or ``out`` holds other shards.
    """
    assert bad in ("refuse", "skip")
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {samples_per_shard} must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    staging = out / STAGING
    with _plan(out, {"prefix": prefix, "samples_per_shard": samples_per_shard, "source": source.digest()}):
        if not staging.exists() and any(out.glob("*.tar")):
            return load_index(out)  # complete already
        staging.mkdir(exist_ok=True)
        for leftover in staging.glob("*.tmp"):
            leftover.unlink()
        tasks = [
            _Task(source.root, source.files[start : start + samples_per_shard], staging / f"{prefix}-{number:06d}.tar")
            for number, start in enumerate(range(0, len(source.files), samples_per_shard))
        ]
        missing = [task for task in tasks if not task.path.exists() and not (out / task.path.name).exists()]
        for _ in run_parallel(_write_shard, missing, workers, "packing", "shard"):
            pass
        rejected = [line for task in tasks for line in _read_lines(_rejected_path(task.path))]
        if rejected and (bad == "refuse" or len(rejected) == len(source.files)):
            raise ValueError(_refusal(rejected, len(source.files), out))
        return _publish(out, tasks, source.classes, rejected)


@contextmanager
def _plan(out: Path, plan: dict[str, str | int]) -> Iterator[None]:
    """Holds the plan file as a lock on ``out``; refuses an ``out`` with another plan."""
    with open(out / PLAN_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is packing into this folder: wait for it") from error
        file.seek(0)
        text = file.read()
        if text and text != json.dumps(plan):
            raise ValueError(
                f"{out}: holds another pack, of other files or settings ({text}, now {json.dumps(plan)}): "
                "give another OUT, or delete this one"
            )
        if not text:
            if any(out.glob("*.tar")):
                raise ValueError(f"{out}: holds shards that were not packed here: give another OUT")
            file.write(json.dumps(plan))
            file.flush()
            os.fsync(file.fileno())
        yield


def _write_shard(task: _Task) -> None:
    """Writes one shard and, next to it, the list of its files that are not readable images."""
    rejected = []
    temporary = task.path.with_name(f"{task.path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for source in task.files:
                data = (task.root / source.name).read_bytes()
                if len(data) != source.size:
                    raise ValueError(f"{task.root / source.name}: changed while it was being packed: start again")
                try:
                    extension = _EXTENSIONS[check_image(data)]
                except BadImage as error:
                    rejected.append(f"{source.name}\t{error}")
                    continue
                _add(tar, f"{source.key}.{extension}", data)
                if source.label != NO_LABEL:
                    _add(tar, f"{source.key}.cls", str(source.label).encode())
        file.flush()
        os.fsync(file.fileno())
    _write_lines(_rejected_path(task.path), rejected)  # before the rename, which marks the shard as complete
    os.replace(temporary, task.path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same files give the same shard, byte for byte
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _publish(out: Path, tasks: Sequence[_Task], classes: tuple[str, ...], rejected: list[str]) -> Index:
    """Moves the shards to where training looks, continuing a killed run; removes the staging folder last."""
    staging = out / STAGING
    for task in tasks:
        if not task.path.exists():
            continue  # already moved
        if len(_read_lines(_rejected_path(task.path))) < len(task.files):
            os.replace(task.path, out / task.path.name)
    if classes:
        _write_lines(out / CLASSES_FILE, classes)
    if rejected:
        _write_lines(out / REJECTED_FILE, rejected)
    index_paths(out)[0].unlink(missing_ok=True)  # a run may have indexed the first shards already
    index = load_index(out)
    shutil.rmtree(staging)
    return index


def _rejected_path(shard: Path) -> Path:
    return shard.with_suffix(".rejected")


def _read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "surrogateescape").splitlines()


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")


def _refusal(rejected: list[str], files: int, out: Path) -> str:
    shown = "\n".join(f"  {line.replace(chr(9), ': ')}" for line in rejected[:SHOWN_NAMES])
    more = f"\n  ... and {len(rejected) - SHOWN_NAMES} more" if len(rejected) > SHOWN_NAMES else ""
    return (
        f"{len(rejected)} of {files} files are not readable images, nothing was published:\n{shown}{more}\n"
        f"run again with --bad skip to leave them out, or fix them, delete {out} and pack again"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.pack", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="image folder, or a list file of path[<TAB>label] lines")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument("--num-workers", type=int, default=default_workers(), metavar="N")
    parser.add_argument("--bad", choices=("refuse", "skip"), default="refuse", help="what to do about unreadable files")
    parser.add_argument("--prefix", default="train", help="shards are called PREFIX-000000.tar")
    args = parser.parse_args(argv)

    def command() -> int:
        source = list_source(args.source)
        if source.ignored:
            kinds = ", ".join(f"{count} {extension}" for extension, count in sorted(source.ignored.items()))
            print(f"ignored, not images by name: {kinds}", file=sys.stderr)
        index = pack(
            source,
            args.out,
            prefix=args.prefix,
            samples_per_shard=args.samples_per_shard,
            workers=args.num_workers,
            bad=args.bad,
        )
        left_out = len(source.files) - len(index)
        print(f"{len(index)} samples of {len(index.classes)} classes in {len(index.shards)} shards in {args.out}")
        if left_out:
            print(f"{left_out} unreadable files left out, see {args.out / REJECTED_FILE}")
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
