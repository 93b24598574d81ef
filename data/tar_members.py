"""Every member of a tar, by its header, and where its bytes are: also of hard links, and of tars joined into one."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

FOLDER, SYMBOLIC_LINK, HARD_LINK, SPARSE = "folder", "symbolic link", "hard link out of the tar", "sparse file"
MAX_PADDING = 1 << 20  # bytes of zeros behind the last member that a writer with large records may leave
_CHUNK = 1 << 20
_DECOMPRESSORS = {  # first bytes -> what undoes it
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\0": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\x04\x22\x4d\x18": "lz4 -d",
    b"\x1f\x9d": "uncompress",
    b"PK\x03\x04": "unzip",
}


class Member(NamedTuple):
    """One member of a tar."""

    name: str  # bytes that are no UTF-8 are surrogates
    header: int  # byte at which its header begins
    offset: int  # first byte of its content
    size: int  # bytes of its content
    kind: str  # '' for a file whose content is in the tar as it is, otherwise what it is


def read_members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Every member, seeking over the contents; a hard link has the content of the member that it names.

    Does not use ``TarFile.next``, which takes a broken header in mid-file for the end. Goes on behind the zero blocks
    that end a tar: there is a second one where two were joined by `cat`.

    Raises:
        ValueError: the file is not a complete, uncompressed tar; says where and what to do.
    """
    size, offset, end = file.seek(0, 2), 0, 0
    files: dict[str, tuple[int, int]] = {}
    try:
        file.seek(0)
        # Not the locale's encoding: a name is the same everywhere.
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while True:
            file.seek(offset)
            try:
                info = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zero block that ends every complete tar
                end = offset
                following = _after_zeros(path, file, offset, size)
                if following is None:
                    return
                offset = following
                continue
            member = _member(info, files)
            last = member.offset + member.size if not member.kind else tar.offset
            if last > size:
                raise ValueError(
                    f"{path}: truncated, '{info.name}' at byte {info.offset} should end at byte {last} but the file "
                    f"ends at {size}; copy or write the shard again"
                )
            yield member
            offset = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {_problem(file, offset, end, size, error)}") from error


def _member(info: tarfile.TarInfo, files: dict[str, tuple[int, int]]) -> Member:
    """The member of a header; `files` are those before it, by name, and it is added to them."""
    if info.isreg() and not info.issparse():
        files[info.name] = info.offset_data, info.size
        return Member(info.name, info.offset, info.offset_data, info.size, "")
    if info.islnk():
        target = files.get(info.linkname) or files.get(f"./{info.linkname}") or files.get(info.linkname[2:])
        if target:
            files[info.name] = target
            return Member(info.name, info.offset, *target, "")
    return Member(info.name, info.offset, info.offset_data, 0, _kind(info))


def _kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return FOLDER
    if info.issym():
        return SYMBOLIC_LINK
    if info.islnk():
        return HARD_LINK
    if info.issparse():
        return SPARSE
    if info.ischr() or info.isblk():
        return "device"
    return "FIFO" if info.isfifo() else f"member of type {info.type.decode('latin-1')!r}"


def _after_zeros(path: Path, file: BinaryIO, offset: int, size: int) -> int | None:
    """The first block from `offset` on that is not all zeros; None if there is none."""
    file.seek(offset)
    position = offset
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += len(chunk) - len(rest)
            return position - (position - offset) % tarfile.BLOCKSIZE
        position += len(chunk)
    if size - offset > MAX_PADDING:
        raise ValueError(
            f"{path}: from byte {offset} on {size - offset} bytes of zeros, as a copy that was not finished leaves "
            f"them: copy the shard again; if nothing is missing, cut them off with `truncate -s {offset + 1024}`"
        )
    return None


def _problem(file: BinaryIO, offset: int, end: int, size: int, error: tarfile.TarError) -> str:
    """Why there is no header at `offset`, and what to do."""
    if size == 0:
        return "an empty file; delete it or write the shard again"
    if offset >= size:
        return f"truncated, no end-of-archive block at byte {offset}; copy or write the shard again"
    file.seek(0)
    start = file.read(8)
    for magic, command in _DECOMPRESSORS.items():
        if offset == 0 and start.startswith(magic):
            return f"compressed, and shards are uncompressed tars: undo it first with `{command}`"
    where = f"behind the end of the tar at byte {end} there is something else" if end else "no readable tar header"
    return f"{where} ({error}) at byte {offset}; shards are uncompressed tars: copy or write it again"
