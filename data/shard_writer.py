"""Writes shards in parallel; each image is decoded once to check it, and each shard gets a report of its files."""

import errno
import io
import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.channels import is_npy
from data.image_facts import ImageFacts, check_image, check_opened, rewrite_16_bits
from data.image_file import BadImage, check_length, open_image
from data.names import readable, shown
from data.pack_report import PackReport
from data.parallel import run_parallel
from data.pixel_format import RGB, PixelFormat
from data.scan import ARRAY_EXTENSION, NO_LABEL
from data.shrink import Shrink, shrink_image
from data.sources import Source, SourceFile
from data.storage.files import upload
from data.storage.location import Remote

_EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "GIF": "gif",
    "JPEG2000": "jp2",
    "AVIF": "avif",
    "HEIF": "heic",
    "NPY": ARRAY_EXTENSION,
}  # by `ImageFacts.format`
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HEADERS = 2048  # bytes of a sample in a shard besides the image, at most
_MANY_CLASSES = 100


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    root: Path
    files: tuple[SourceFile, ...]
    path: Path  # in the staging folder; exists only once the shard is complete
    bits: int | None
    shrink: Shrink | None = None
    format: PixelFormat = RGB
    upload: Remote | None = None  # where it goes in a store; no local copy is kept

    @property
    def done(self) -> Path:
        """A file that exists once the shard is complete and where it should be."""
        return self.path.with_suffix(".uploaded") if self.upload else self.path


@dataclass(frozen=True)
class _Class:
    """The files of one class."""

    root: Path
    label: int
    files: tuple[SourceFile, ...]
    bits: int | None
    format: PixelFormat


def without_unreadable_classes(
    source: Source, workers: int, bits: int | None, format: PixelFormat = RGB
) -> tuple[Source, tuple[str, ...]]:
    """Leaves class folders without a readable image out of the source; also returns what to say about them."""
    if source.classes_given or not source.classes:
        return source, ()
    files = defaultdict(list)
    for file in source.files:
        files[file.label].append(file)
    classes = [_Class(source.root, label, tuple(members), bits, format) for label, members in files.items()]
    workers = workers if len(classes) > _MANY_CLASSES else 1  # usually one image per class is decoded
    found = sorted(
        label for label in run_parallel(_readable_label, classes, workers, "checking classes", "class") if label >= 0
    )
    if not found or len(found) == len(source.classes):
        return source, ()
    number = {label: position for position, label in enumerate(found)}
    lost = [name for label, name in enumerate(source.classes) if label not in number]
    return replace(
        source,
        classes=tuple(source.classes[label] for label in found),
        files=tuple(file._replace(label=number.get(file.label, NO_LABEL)) for file in source.files),
    ), (f"folders without a readable image are not classes: {shown(lost)}",)


def _readable_label(images: _Class) -> int:
    """The label of a class that has a readable image, otherwise NO_LABEL."""
    for file in images.files:
        try:
            _prepare(_read(images.root, file), images.bits, None, images.format)
            return images.label
        except BadImage:
            continue
    return NO_LABEL


def _read(root: Path, file: SourceFile) -> bytes:
    """Reads a file's bytes; raises BadImage without reading it for a length that no image has."""
    check_length(file.size)
    data = (root / file.name).read_bytes()
    if len(data) != file.size:
        raise ValueError(f"{root / readable(file.name)}: changed while it was being packed: start again")
    return data


def _prepare(
    data: bytes, bits: int | None, shrink: Shrink | None, format: PixelFormat
) -> tuple[bytes, ImageFacts, bool]:
    """Returns the bytes to pack, what they hold, and whether the image was shrunk; raises BadImage."""
    if format != RGB or is_npy(data):
        return data, check_image(data, format), False
    image = open_image(data)
    facts = check_opened(image, data)
    has_16_bits = facts.is_gray or facts.used_bits is not None
    if bits is not None and has_16_bits:
        data, facts = rewrite_16_bits(data, bits), facts._replace(format="PNG", used_bits=None)
    if shrink is None:
        return data, facts, False
    smaller = shrink_image(open_image(data) if has_16_bits else image, shrink)  # already decoded by Pillow
    if smaller is None:
        return data, facts, False
    return smaller, facts._replace(format="JPEG", is_turned=False), True


def write_shards(tasks: Sequence[ShardTask], out: Path, workers: int) -> None:
    """Writes shards into the staging folder of ``out``.

    Raises:
        ValueError: there is no room for them, or a file has changed.
    """
    needed, free = sum(file.size + _HEADERS for task in tasks for file in task.files), shutil.disk_usage(out).free
    if needed > free and not any(task.shrink or task.upload for task in tasks):  # otherwise their size is not known
        raise ValueError(
            f"{out}: the shards need {needed / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free: make room, or give "
            "another OUT"
        )
    try:
        for _ in run_parallel(_write_shard, tasks, workers, "packing", "shard"):
            pass
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"{out}: the disk or quota is full ({error.strerror}): make room and run the same command again; it "
            "continues after the finished shards"
        ) from error


def _write_shard(task: ShardTask) -> None:
    """Writes one shard and, next to it, the report of its files."""
    report = PackReport()
    temporary = task.path.with_name(f"{task.path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for source in task.files:
                try:
                    data, facts, is_smaller = _prepare(_read(task.root, source), task.bits, task.shrink, task.format)
                except BadImage as error:
                    report.rejected.append(f"{readable(source.name)}\t{error.kind}\t{readable(str(error))}")
                    continue
                report.shrunk += is_smaller
                report.add(facts)
                _add(tar, f"{source.key}.{_EXTENSIONS[facts.format]}", data)
                if source.label != NO_LABEL:
                    _add(tar, f"{source.key}.cls", str(source.label).encode())
        file.flush()
        os.fsync(file.fileno())
    report.write(report_path(task.path))  # before the rename, which marks the shard as complete
    os.replace(temporary, task.path)
    if task.upload:
        if report.images:
            upload(task.path, task.upload)
        task.done.touch()
        task.path.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same files give the same shard, byte for byte
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def report_path(shard: Path) -> Path:
    """The path of the report of a shard in the staging folder."""
    return shard.with_suffix(".json")
