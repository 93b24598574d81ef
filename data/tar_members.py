"""Every member of a tar, by its header, and where its bytes are, also for hard links and for tars joined into one."""

import tarfile
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO, NamedTuple

from data.names import readable
from data.storage.location import Location

FOLDER, SYMBOLIC_LINK, HARD_LINK, SPARSE = "folder", "symbolic link", "hard link out of the tar", "sparse file"
MAX_PADDING = 1 << 20  # bytes of zeros that a writer with large records may leave after the last member
HEADER = tarfile.BLOCKSIZE
_MAX_EXTENSIONS, _MAX_EXTENSION = 8, 1 << 20  # headers before a member's own (long names, pax), bytes of each
_EXTENSION_TYPES = (b"L", b"K", b"x", b"g", b"X")
_MAGICS = (b"ustar", bytes(5))  # POSIX and GNU; tars from before POSIX have none
_CHUNK = 1 << 20
_DECOMPRESSORS = {  # first bytes -> what decompresses it
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ\0": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
    b"\x04\x22\x4d\x18": "lz4 -dc",
    b"\x1f\x9d": "uncompress -c",
    b"PK\x03\x04": "unzip -p",
}


class Member(NamedTuple):
    """One member of a tar."""

    name: str  # bytes that are not UTF-8 are surrogates
    header: int  # byte at which its header begins
    offset: int  # first byte of its content
    size: int  # bytes of its content
    kind: str  # '' for a file whose content is in the tar as it is, otherwise what the member is


def read_members(path: Location, file: BinaryIO) -> Iterator[Member]:
    """Yields every member, seeking over the contents; a hard link has the content of the member that it names.

    Does not use ``TarFile.next``, which takes a broken header in mid-file for the end. Continues after the zero blocks
    that end a tar, where another tar may follow if two were joined by `cat`.

    Raises:
        ValueError: the file is not a complete, uncompressed tar; says where and what to do.
    """
    size, offset, end = file.seek(0, 2), 0, 0
    files: dict[str, tuple[int, int]] = {}
    try:
        # Made from an empty tar, as it reads the first header at once. Not in the locale's encoding: a name is the same
        # everywhere.
        tar = tarfile.TarFile(fileobj=BytesIO(bytes(2 * HEADER)), encoding="utf-8", errors="surrogateescape")
        tar.fileobj = file
        while True:
            _check_extensions(path, file, offset)
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
            except (ValueError, LookupError, OverflowError) as error:  # numbers of pax headers and maps of sparse files
                raise tarfile.InvalidHeaderError(f"bad extended header: {error}") from error  # type: ignore[attr-defined]
            if info.size < 0 or tar.offset <= offset:  # reading would go back and never end
                raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
            member = _member(info, files)
            last = member.offset + member.size if not member.kind else tar.offset
            if last > size:
                raise ValueError(
                    f"{path}: truncated, '{readable(info.name)}' at byte {info.offset} should end at byte {last} but "
                    f"the file ends at {size}; copy or write the shard again"
                )
            yield member
            offset = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path}: {_problem(file, offset, end, size, error)}") from error


def header_problem(header: bytes, length: int) -> str:
    """Why the block right before a file's `length` bytes is not the tar header of such a file; '' if it is.

    Training sees nothing else of the tar. A size given only in a pax header is refused when the index is made.
    """
    if len(header) != HEADER or header[257:262] not in _MAGICS:
        return "there is no tar header right before its bytes"
    try:
        size = _size(header)
    except ValueError:
        return "the size in its tar header is not a number"
    return "" if size == length else f"its tar header says {size} bytes, but its pax header {length}"


def _size(header: bytes) -> int:
    """Reads the size: octal digits, or binary if the first bit is set, as GNU tar writes it."""
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    digits = field.strip(b" \0")
    if not set(digits) <= set(b"01234567"):
        raise ValueError(f"size {digits!r}")
    return int(digits or b"0", 8)


def _check_extensions(path: Location, file: BinaryIO, offset: int) -> None:
    """Raises ValueError for too many or too large extension headers, which `tarfile` reads whole and recursively."""
    position = offset
    for _ in range(_MAX_EXTENSIONS):
        file.seek(position)
        header = file.read(HEADER)
        if len(header) < HEADER or header[156:157] not in _EXTENSION_TYPES:
            return
        try:
            size = _size(header)
        except ValueError:
            return  # `tarfile` says what is wrong
        if not 0 <= size <= _MAX_EXTENSION:
            problem = f"{size} bytes at byte {position}, where up to {_MAX_EXTENSION} are usual"
            break
        position += HEADER + -(-size // HEADER) * HEADER
    else:
        problem = f"at least {_MAX_EXTENSIONS} of them in a row"
    raise ValueError(
        f"{path}: the long name or pax header at byte {offset} is damaged: {problem}; copy or write the shard again"
    )


def _member(info: tarfile.TarInfo, files: dict[str, tuple[int, int]]) -> Member:
    """Makes the member of a header; `files` has those before it, by name, and gets this one."""
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


def _after_zeros(path: Location, file: BinaryIO, offset: int, size: int) -> int | None:
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
            f"{path}: {size - offset} bytes of zeros from byte {offset} on, as left by an unfinished copy: copy "
            f"the shard again; if nothing is missing, cut them off with `truncate -s {offset + 1024}`"
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
            return f"compressed, but shards are uncompressed tars: decompress it first with `{command} SHARD > NEW.tar`"
    where = f"unexpected data after the end of the tar at byte {end}" if end else "no readable tar header"
    return f"{where} ({error}) at byte {offset}; shards are uncompressed tars: copy or write it again"
