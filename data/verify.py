"""Reads shards back and compares them with their index: ``python -m data.verify SHARDS``."""

import argparse
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from data.class_list import read_classes_of_shards
from data.cores import available_cores
from data.image_facts import check_image
from data.image_file import OTHER_CHANNELS, OTHER_TYPE, BadImage, check_length
from data.index import build_index, index_paths, load_index
from data.index_file import Index, check_names, is_current, read_index
from data.multi_labels import MultiLabels
from data.names import readable
from data.parallel import report_errors, run_parallel
from data.pixel_format import RGB, PixelFormat, add_format, given_format
from data.remote_index import build_remote_index, read_remote_index
from data.scan import NO_LABEL, ShardContent, describe_unused, scan_shard
from data.shard_files import find_shards
from data.storage.cache import CacheSettings
from data.storage.client import Object
from data.storage.files import look_up, open_shard
from data.storage.location import Location, is_url

SHOWN_PROBLEMS = 50
_OTHER_FORMATS = (OTHER_CHANNELS, OTHER_TYPE)


@dataclass(frozen=True)
class _Task:
    """One shard and its entries in the index."""

    path: Location
    what: Object  # size and version according to the index
    recorded: ShardContent
    numbers: dict[str, int]  # of the classes
    decode: bool
    format: PixelFormat


@dataclass(frozen=True)
class Verified:
    """What was found in shards."""

    problems: list[str]  # one line each with shard, key and byte
    unused: Counter[str]  # unused members, by kind


def check_shards(index: Index, *, decode: bool = False, workers: int = 1, format: PixelFormat = RGB) -> Verified:
    """Finds all problems of the shards of an index.

    Args:
        index: as read; it may be out of date.
        decode: also decode every image, and compare its checksum, if the index has one.
        workers: processes.
        format: required of the images.
    """
    numbers = {name: number for number, name in enumerate(index.classes)}
    multi_labels = index.multi_labels or MultiLabels.of([()] * len(index))
    tasks = []
    for number, (name, end) in enumerate(zip(index.shards, index.shard_ends.tolist(), strict=True)):
        part = slice(end - int(index.shard_sizes[number]), end)
        keys = tuple(index.keys[sample] for sample in range(part.start, part.stop))
        arrays = (index.offset[part], index.length[part], index.label[part])
        lists = multi_labels.part(part.start, part.stop)
        checksum = None if index.checksum is None else index.checksum[part]
        recorded = ShardContent(keys, *arrays, lists, np.diff(lists.ends, prepend=0) > 0, checksum)
        version = index.versions[number] if index.versions else ""
        what = Object(int(index.shard_bytes[number]), version)
        tasks.append(_Task(index.root / name, what, recorded, numbers, decode, format))
    results = dict(run_parallel(_check_shard, tasks, workers, "verifying", "shard"))
    return Verified(
        [problem for task in tasks for problem in results[task.path].problems],
        sum((result.unused for result in results.values()), Counter[str]()),
    )


def _check_shard(task: _Task) -> tuple[Location, Verified]:
    try:
        now = look_up(task.path)
        found = scan_shard(task.path, task.numbers, now)
        problems = [*_differences(task, found, now), *_bad_images(task, found, now)]
    except (ValueError, OSError) as error:
        return task.path, Verified([str(error)], Counter())
    return task.path, Verified(problems, found.unused)


def _differences(task: _Task, found: ShardContent, now: Object) -> list[str]:
    problems, recorded = [], task.recorded
    if now.size != task.what.size:
        problems.append(f"{task.path}: {now.size} bytes, the index says {task.what.size}")
    elif task.what.version and now.version and now.version != task.what.version:
        problems.append(f"{task.path}: version {now.version}, the index says {task.what.version}")
    if len(found.keys) != len(recorded.keys):
        problems.append(f"{task.path}: {len(found.keys)} samples, the index says {len(recorded.keys)}")
    for i, (key, expected) in enumerate(zip(found.keys, recorded.keys, strict=False)):
        actual, indexed = (
            (name, int(content.offset[i]), int(content.length[i]), content.multi_labels[i] or int(content.label[i]))
            for name, content in ((key, found), (expected, recorded))
        )
        if actual != indexed:
            problems.append(
                f"{task.path}: (key, byte, length, label) of sample {i} is {actual}, the index says {indexed}"
            )
            break  # everything after it has moved too
    return problems


def _bad_images(task: _Task, found: ShardContent, now: Object) -> list[str]:
    """Lists images that training would skip, or refuse for their bytes; without `decode` only by their length."""
    problems, checksums = [], task.recorded.checksum
    if not np.array_equal(found.offset, task.recorded.offset) or not np.array_equal(found.length, task.recorded.length):
        checksums = None  # they are of other images
    with open_shard(task.path, now) as file:  # makes no request to a store before it is read
        for number, key in enumerate(found.keys):
            offset, length = int(found.offset[number]), int(found.length[number])
            where = f"{task.path}: '{readable(key)}' at byte {offset}"
            try:
                check_length(length)
                if task.decode:
                    file.seek(offset)
                    image = file.read(length)
                    if checksums is not None and zlib.crc32(image) != checksums[number]:
                        problems.append(f"{where}: its bytes differ from those indexed")
                    check_image(image, task.format)
            except BadImage as error:
                problems.append(f"{where} cannot be decoded ({error.kind}): {error}")
    return problems


def _read_or_build(shards: str, reindex: bool) -> Index:
    """Reads the index as stored; ``load_index`` would refuse shards that have changed."""
    if is_url(shards):
        return build_remote_index(shards, CacheSettings())[0] if reindex else read_remote_index(shards, CacheSettings())
    root, names = find_shards(shards)
    paths = index_paths(shards)
    if reindex:
        for path in paths:
            path.unlink(missing_ok=True)
        return build_index(shards, checksums=True)
    for path in paths:
        if is_current(path, read_classes_of_shards(root)):
            index = read_index(path, root)
            check_names(index, path, names)
            return index
    return load_index(shards)


def _summary(index: Index, unused: Counter[str]) -> str:
    labeled = index.label[index.label != NO_LABEL]
    labels, without = f"{labeled.min()} to {labeled.max()}" if len(labeled) else "none", len(index) - len(labeled)
    if index.multi_labels is not None:
        classes, empty = index.multi_labels.classes, np.diff(index.multi_labels.ends, prepend=0) == 0
        labels = f"{classes.min()} to {classes.max()} in lists" if len(classes) else "lists"
        labels, without = f"{labels} of {len(classes) / len(index):.1f} on average", int(empty.sum())
    problem = f"; labels cannot be used: {index.label_problem}" if index.label_problem else ""
    return (
        f"{len(index)} samples in {len(index.shards)} shards, {index.shard_bytes.sum() / 1e9:.3f} GB; "
        f"mean image {index.length.mean() / 1e3:.1f} kB; labels {labels}, {without} without, "
        f"{len(index.classes)} class names; fingerprint {index.fingerprint}"
        f"{f'; unused members: {describe_unused(unused)}' if unused else ''}"
        f"{f'; {index.shrunk}' if index.shrunk else ''}{problem}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.verify", description=__doc__.split(":")[0])
    parser.add_argument(
        "shards", metavar="SHARDS", help="folder of *.tar, one tar, or a brace pattern, local or at a URL"
    )
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    add_format(parser)
    parser.add_argument("--reindex", action="store_true", help="delete and rebuild the index first")
    parser.add_argument("--num-workers", type=int, default=available_cores(), metavar="N")
    args = parser.parse_args(argv)

    def command() -> int:
        format = given_format(args)
        index = _read_or_build(args.shards, args.reindex)
        verified = check_shards(index, decode=args.decode, workers=args.num_workers, format=format)
        problems = verified.problems
        print(_summary(index, verified.unused))
        for problem in islice(problems, SHOWN_PROBLEMS):
            print(f"wrong: {problem}", file=sys.stderr)
        if len(problems) > SHOWN_PROBLEMS:
            print(f"... and {len(problems) - SHOWN_PROBLEMS} more", file=sys.stderr)
        if format == RGB and any(f"({kind})" in problem for problem in problems for kind in _OTHER_FORMATS):
            print("give the --channels and --dtype of the images", file=sys.stderr)
        unread = "" if args.decode else "; the images were not read: --decode reads them"
        print(f"{len(problems)} problems{unread}" if problems else f"ok{unread}")
        return 1 if problems else 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
