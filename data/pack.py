"""Packs an image folder or a list of files into WebDataset shards: ``python -m data.pack SOURCE OUT``.

The files' bytes are copied unchanged (except with ``--bits`` and ``--short-side``), in sorted order; training shuffles
all samples anyway. Every image is decoded once to check it. Shards are written to ``OUT/.pack`` and published together
at the end, so a killed run leaves no partial data where training looks, and the next run continues after the finished
shards.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.class_list import CLASSES_FILE
from data.cores import available_cores
from data.file_lock import lock_now
from data.index import Index, build_index, index_paths, load_index
from data.index_file import digest_of
from data.names import shown, write_lines
from data.pack_report import PackReport, class_table, empty_classes, note, summary
from data.parallel import report_errors
from data.pixel_format import RGB, PixelFormat, add_format, given_format
from data.remote_index import build_remote_index
from data.shard_writer import ShardTask, report_path, without_unreadable_classes, write_shards
from data.shrink import PLAN_FILE, Shrink
from data.sources import Source, describe_ignored, list_source
from data.storage.cache import CacheSettings, cache_home
from data.storage.client import StoreError
from data.storage.files import list_files, upload
from data.storage.location import Location, Remote, parse_location

STAGING = ".pack"
REJECTED_FILE = "rejected.txt"
UPLOADED = "uploaded"  # a file in `upload_folder`: everything is in the store
DEFAULT_QUALITY = 90


def pack(
    source: Source,
    out: Path,
    *,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    workers: int = 1,
    bad: str = "refuse",
    bits: int | None = None,
    shrink: Shrink | None = None,
    format: PixelFormat = RGB,
    remote: Remote | None = None,
) -> Index:
    """Writes the shards, ``classes.txt`` and the index of ``source`` into ``out``; continues an interrupted run.

    Class folders without any readable image are not classes, unless the classes were given.

    Args:
        source: from ``list_source``.
        out: folder, created if necessary.
        prefix: shards are called ``prefix-000000.tar``.
        samples_per_shard: files per shard; a shard with rejected files is smaller.
        workers: processes.
        bad: 'refuse' publishes nothing if any file is not a readable image; 'skip' lists them in ``rejected.txt``.
        bits: 16-bit images are rewritten as 8-bit PNGs, with 2**bits - 1 as white.
        shrink: how to shrink larger photographs.
        format: required of the images; formats other than RGB are packed unchanged.
        remote: a folder in a store that each shard is uploaded to once written; `out` only keeps the state to resume.

    Raises:
        ValueError: images are unreadable, or ``out`` holds other shards or has no room for these.
    """
    assert bad in ("refuse", "skip")
    _check(out, samples_per_shard, bits, shrink, format)
    out.mkdir(parents=True, exist_ok=True)
    staging = out / STAGING
    plan: dict[str, str | int] = {"prefix": prefix, "samples_per_shard": samples_per_shard, "source": source.digest()}
    with _plan(out, plan | _pixels_plan(bits, shrink, format)):
        if not staging.exists() and (any(out.glob("*.tar")) or (out / UPLOADED).exists()):
            return load_index(str(remote or out))  # complete already
        if remote and not staging.exists():
            check_empty(remote)
        staging.mkdir(exist_ok=True)
        for leftover in staging.glob("*.tmp"):
            leftover.unlink()
        source, unreadable = without_unreadable_classes(source, workers, bits, format)
        starts = range(0, len(source.files), samples_per_shard)
        parts = {f"{prefix}-{n:06d}.tar": source.files[i : i + samples_per_shard] for n, i in enumerate(starts)}
        tasks = [
            ShardTask(source.root, files, staging / name, bits, shrink, format, remote / name if remote else None)
            for name, files in parts.items()
        ]
        missing = [task for task in tasks if not (task.done.exists() or (out / task.path.name).exists())]
        write_shards(missing, out, workers)
        report = PackReport.merge(PackReport.read(report_path(task.path)) for task in tasks)
        if report.rejected and (bad == "refuse" or len(report.rejected) == len(source.files)):
            raise ValueError(report.refusal(len(source.files), out))
        note([*unreadable, *report.remarks()])
        publish = functools.partial(_publish_remote, out, remote) if remote else functools.partial(_publish, out, tasks)
        return publish(source.classes, report.rejected)


def _pixels_plan(bits: int | None, shrink: Shrink | None, format: PixelFormat) -> dict[str, str | int]:
    plan: dict[str, str | int] = {} if bits is None else {"bits": bits}
    return plan | ({} if shrink is None else shrink._asdict()) | ({} if format == RGB else format._asdict())


def _check(out: Path, samples_per_shard: int, bits: int | None, shrink: Shrink | None, format: PixelFormat) -> None:
    format.check()
    if format != RGB and (bits is not None or shrink is not None):
        raise ValueError(
            f"--bits and --short-side are for photographs, but images of {format} are packed unchanged: leave them out"
        )
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {samples_per_shard} must be at least 1")
    if bits is not None and not 1 <= bits <= 16:
        raise ValueError(f"--bits {bits} must be from 1 to 16")
    if shrink is not None:
        shrink.check()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the shards")


def upload_folder(remote: Remote) -> Path:
    """The local folder from which packing into a store resumes after it was killed."""
    return cache_home() / "pack" / digest_of(str(remote))


def check_empty(remote: Remote) -> None:
    """Raises ValueError if a store's folder already holds shards, or is read-only for us."""
    if remote.scheme == "hf":
        raise StoreError(f"{remote}: hf:// is read-only: pack into a folder, and upload it with `hf upload`")
    if any(name.endswith(".tar") for name in list_files(remote) or {}):
        raise ValueError(f"{remote}: already holds other shards: give another OUT")


@contextmanager
def _plan(out: Path, plan: dict[str, str | int]) -> Iterator[None]:
    """Holds the plan file as a lock on ``out``; refuses an ``out`` with another plan."""
    with open(out / PLAN_FILE, "a+", encoding="utf-8") as file:
        try:
            no_locks = lock_now(file.fileno())
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is packing into this folder: wait for it to end") from error
        if no_locks:
            note([f"{out}: its file system has no locks ({no_locks}): make sure that nothing else packs into it"])
        file.seek(0)
        text = file.read()
        if text and text != json.dumps(plan):
            raise ValueError(
                f"{out}: holds shards of other files or settings ({text}, now {json.dumps(plan)}): "
                f"give another OUT, or delete {out}"
            )
        if not text:
            if any(out.glob("*.tar")):
                raise ValueError(f"{out}: already holds other shards: give another OUT")
            file.write(json.dumps(plan))
            file.flush()
            os.fsync(file.fileno())
        yield


def _publish(out: Path, tasks: Sequence[ShardTask], classes: tuple[str, ...], rejected: list[str]) -> Index:
    """Moves the shards to where training looks, continuing a killed run; removes the staging folder last."""
    staging = out / STAGING
    for task in tasks:
        if not task.path.exists():
            continue  # already moved
        if len(PackReport.read(report_path(task.path)).rejected) < len(task.files):
            os.replace(task.path, out / task.path.name)
    if classes:
        write_lines(out / CLASSES_FILE, classes)
    if rejected:
        write_lines(out / REJECTED_FILE, rejected)
    index_paths(out)[0].unlink(missing_ok=True)  # a run may have indexed the first shards already
    index = build_index(out, checksums=True)
    shutil.rmtree(staging)
    return index


def _publish_remote(out: Path, remote: Remote, classes: tuple[str, ...], rejected: list[str]) -> Index:
    """Uploads the files next to the shards, which are already there; the index last, as nothing trains without it."""
    if classes:
        write_lines(out / CLASSES_FILE, classes)
    if rejected:
        write_lines(out / REJECTED_FILE, rejected)
    for name in (PLAN_FILE, CLASSES_FILE, REJECTED_FILE):
        if (out / name).exists():
            upload(out / name, remote / name)
    index, _ = build_remote_index(str(remote), CacheSettings())
    (out / UPLOADED).touch()
    shutil.rmtree(out / STAGING)
    return index


def _list(path: Path, out: Location, classes_file: Path | None, labels: bool, arrays: bool) -> Source:
    """Like `list_source`; reports what will not be packed.

    Raises:
        ValueError: also if ``out`` lies in the folder, or if the meaning of its folders is unclear.
    """
    if path.is_dir() and isinstance(out, Path) and out.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{out} is inside {path}, whose images are packed: give an OUT outside it")
    source = list_source(path, classes_file, labels, arrays=arrays)
    if source.unsorted:
        raise ValueError(
            f"{path}: images ({source.unsorted}) are next to folders of images, so it is unclear whether the folders "
            "are classes: move the images into class folders, or give --no-labels if there are no classes"
        )
    if source.ignored:
        note([f"ignored, not named like images: {describe_ignored(source.ignored)}"])
    note(source.remarks)
    return source


def _shrink(short_side: int | None, quality: int | None) -> Shrink | None:
    if short_side is not None:
        return Shrink(short_side, DEFAULT_QUALITY if quality is None else quality)
    if quality is not None:
        raise ValueError(f"--quality {quality} only applies to photographs that --short-side shrinks: give both")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.pack", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="image folder, or a list file of path[<TAB>label] lines"
    )
    parser.add_argument("out", metavar="OUT", help="folder for the shards, local or at a URL")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument("--num-workers", type=int, default=available_cores(), metavar="N")
    parser.add_argument("--bad", choices=("refuse", "skip"), default="refuse", help="what to do with unreadable files")
    parser.add_argument("--prefix", default="train", help="shards are called PREFIX-000000.tar")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of all classes, one per line, in label order"
    )
    labels.add_argument(
        "--no-labels", action="store_true", help="do not use folders as classes; ignore the labels of a list"
    )
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="rewrite 16-bit images as 8-bit PNGs, with the largest N-bit number as white",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="shrink photographs whose short side is over N pixels to N, turn them upright, and write them as JPEGs",
    )
    parser.add_argument("--quality", type=int, metavar="N", help=f"quality of these JPEGs (default: {DEFAULT_QUALITY})")
    add_format(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        out = parse_location(args.out)  # not by argparse, which would repeat a URL with a password
        format = given_format(args)
        source = _list(args.source, out, args.classes, not args.no_labels, arrays=args.channels is not None)
        index = pack(
            source,
            upload_folder(out) if isinstance(out, Remote) else out,
            remote=out if isinstance(out, Remote) else None,
            prefix=args.prefix,
            samples_per_shard=args.samples_per_shard,
            workers=args.num_workers,
            bad=args.bad,
            bits=args.bits,
            shrink=_shrink(args.short_side, args.quality),
            format=format,
        )
        left_out = len(source.files) - len(index)
        if empty := empty_classes(index):
            note([f"classes without images: {shown(empty)}"])
        print(summary(index, out), *class_table(index), sep="\n")
        if left_out:
            print(f"{left_out} unreadable files left out, see {out / REJECTED_FILE}")
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
