"""Malformed or unusual tars, each with the expected outcome; handwritten, since no tool writes most of them."""

import bz2
import gzip
import lzma
import struct
from collections.abc import Iterator
from typing import NamedTuple

from helpers.shard_tools import jpeg

BLOCK = 512
PHOTO = jpeg(0)
END = bytes(2 * BLOCK)
Part = tuple[bytes, tuple[str, ...], str]  # content, keys that are read, and a pattern of the error ('' if it is read)


class OddTar(NamedTuple):
    """A tar and its expected outcome."""

    name: str
    data: bytes
    keys: tuple[str, ...]
    """Of the samples that are read, in their order; none if it is refused."""
    refused: str
    """A regular expression of what is said; '' if it is read."""
    labels: tuple[int, ...] | None = None
    """Of the samples, -1 where there is none; None if they do not matter."""


def odd_tars() -> Iterator[OddTar]:
    """Yield all tars; names are unique."""
    for part in (_names, _samples, _links, _headers, _sizes, _extensions, _sparse, _ends, _no_tars):
        for name, (data, keys, refused) in part().items():
            yield OddTar(f"{part.__name__[1:]}-{name}.tar", data, keys, refused)
    for name, (data, keys, labels) in _labels().items():
        yield OddTar(f"labels-{name}.tar", data, keys, "", labels)


def block(
    name: bytes,
    size: bytes | int = 0,
    kind: bytes = b"0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    checksum: bytes | None = None,
    prefix: bytes = b"",
) -> bytes:
    """Encode a ustar header (POSIX 1003.1) with arbitrary fields."""
    size = b"%011o\0" % size if isinstance(size, int) else size
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    rest = kind + link.ljust(100, b"\0") + magic.ljust(8, b"\0") + bytes(64 + 16) + prefix.ljust(155, b"\0") + bytes(12)
    total = sum(fields) + 8 * 32 + sum(rest)
    return fields + (b"%06o\0 " % total if checksum is None else checksum) + rest


def padded(content: bytes) -> bytes:
    """Pad to a multiple of the block size."""
    return content + bytes(-len(content) % BLOCK)


def photo(name: bytes, content: bytes = PHOTO, **fields: object) -> bytes:
    """Encode a member."""
    return block(name, **({"size": len(content)} | fields)) + padded(content)  # type: ignore[arg-type]


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Encode a pax header of records with correct lengths."""
    content = b"".join(record(key, value) for key, value in records)
    return block(b"pax", len(content), kind) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    """Encode one record of a pax header: its own length and key=value."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))  # includes its own digits, of which there may now be one more
    return b"%d %s=%s\n" % (length, key, value)


def gnu_name(name: bytes, size: bytes | int | None = None) -> bytes:
    """Encode a name of any length in front of a member, as GNU tar does."""
    return block(b"././@LongLink", len(name) + 1 if size is None else size, b"L") + padded(name + b"\0")


def good(*names: bytes) -> bytes:
    """Encode members with valid photos."""
    return b"".join(map(photo, names))


def _names() -> dict[str, Part]:
    """Any name is the sample's key, and nothing is ever written under it."""
    names = {
        "traversal": b"../../../../tmp/evil.jpg",
        "traversal-within": b"a/../../b/evil.jpg",
        "absolute": b"/etc/evil.jpg",
        "home": b"~/evil.jpg",
        "windows": b"C:\\Windows\\evil.jpg",
        "slashes": b"a//b///c.jpg",
        "here": b"./a.jpg",
        "line-break": b"a\nb.jpg",
        "tab": b"a\tb.jpg",
        "escape": b"a\x1b[31m.jpg",
        "space": b" a b .jpg",
        "quote": b"'; rm -rf $HOME.jpg",
        "latin-1": b"stra\xdfe.jpg",
        "half-of-utf-8": b"stra\xc3.jpg",
        "surrogate": b"\xed\xa0\x80.jpg",
        "utf-16": "bild".encode("utf-16-le").replace(b"\0", b"") + b".jpg",
        "emoji": "\N{DOG FACE}.jpg".encode(),
        "capitals": b"A.JPG",
        "dots": b"a.b.c.jpg",
        "percent": b"%s%n%x.jpg",
        "braces": b"{0..9}.jpg",
    }
    files = {}
    for name, stored in names.items():
        key = stored.decode("utf-8", "surrogateescape")
        folder, _, base = key.rpartition("/")
        files[name] = good(stored) + END, (f"{folder}/{base.split('.')[0]}" if "/" in key else base.split(".")[0],), ""
    long = b"n" * 3000
    return files | {
        "gnu-of-3000-bytes": (gnu_name(long + b".jpg") + photo(b"n") + END, (long.decode(),), ""),
        "pax-of-3000-bytes": (pax((b"path", long + b".jpg")) + photo(b"n") + END, (long.decode(),), ""),
        "prefix": (photo(b"b.jpg", prefix=b"a" * 150) + END, ("a" * 150 + "/b",), ""),
        "without-zero-at-its-end": (photo(b"n" * 96 + b".jpg") + END, ("n" * 96,), ""),
        "pax-traversal": (pax((b"path", b"../../evil.jpg")) + photo(b"good.jpg") + END, ("../../evil",), ""),
        "pax-zero-byte": (pax((b"path", b"a\0b.jpg")) + photo(b"n") + END, ("a\0b",), ""),
        "pax-no-utf-8": (pax((b"path", b"stra\xdfe.jpg")) + photo(b"n") + END, ("stra\udcdfe",), ""),
        "pax-empty": (good(b"a.jpg") + pax((b"path", b"")) + photo(b"b.jpg") + END, ("a",), ""),
        "hidden": (good(b"a.jpg", b"._a.jpg", b"x/.b.jpg", b"__MACOSX/c.jpg", b"__d__/e.jpg") + END, ("a",), ""),
        "none": (good(b"a.jpg") + photo(b"") + END, ("a",), ""),
        "folders": (block(b"x/", kind=b"5") + block(b"x.jpg/", kind=b"5") + good(b"x/a.jpg") + END, ("x/a",), ""),
        "suffixes-that-are-none": (good(b"a.jpg", b"b.exe") + END, (), "sample 'b' .* has no image"),
    }


def _samples() -> dict[str, Part]:
    return {
        "same-key-apart": (good(b"a.jpg", b"b.jpg", b"a.cls") + END, (), "duplicate key 'a'"),
        "same-name": (good(b"a.jpg", b"a.jpg") + END, (), "duplicate key 'a', two members"),
        "same-name-in-capitals": (good(b"a.jpg", b"a.JPG") + END, (), "duplicate key 'a', two members"),
        "two-images": (good(b"a.jpg", b"a.png") + END, (), "more than one image"),
        "image-and-mask": (good(b"a.jpg", b"a.mask.png") + END, ("a",), ""),
        "label-alone": (good(b"a.jpg") + photo(b"b.cls", b"1") + END, (), "'b' .* no image"),
        "label-first": (photo(b"a.cls", b"1") + good(b"a.jpg") + END, ("a",), ""),
        "heic": (good(b"a.heic") + END, ("a",), ""),
        "heic-and-jpeg": (good(b"a.heic", b"a.jpg") + END, ("a",), ""),
        "raw": (good(b"a.dng") + END, (), "no image"),
        "avif": (good(b"a.avif") + END, ("a",), ""),
        "about-the-dataset": (photo(b"README.txt", b"text") + good(b"a.jpg") + END, ("a",), ""),
        "none": (END, (), "an empty shard, without samples"),
        "only-folders": (block(b"x/", kind=b"5") + END, (), "an empty shard, without samples"),
        "empty-image": (good(b"a.jpg") + photo(b"b.jpg", b"") + END, ("a", "b"), ""),
    }


def _links() -> dict[str, Part]:
    types = {b"2": "symbolic-link", b"3": "character-device", b"4": "block-device", b"6": "FIFO", b"7": "contiguous"}
    files: dict[str, Part] = {}
    for kind, name in types.items():
        member = good(b"a.jpg") + block(b"b.jpg", kind=kind, link=b"/etc/passwd")
        if kind == b"7":  # a regular file according to POSIX
            files[name] = good(b"a.jpg") + photo(b"b.jpg", kind=kind) + END, ("a", "b"), ""
            continue
        files[name] = member + END, (), "whose bytes are not in the tar"
        files[f"{name}-aside"] = good(b"a.jpg") + block(b"b", kind=kind, link=b"c") + END, ("a",), ""
    hard = b"1"
    return files | {
        "hard": (good(b"a.jpg") + block(b"b.jpg", kind=hard, link=b"a.jpg") + END, ("a", "b"), ""),
        "hard-chain": (
            good(b"a.jpg")
            + block(b"b.jpg", kind=hard, link=b"a.jpg")
            + block(b"c.jpg", kind=hard, link=b"./b.jpg")
            + END,
            ("a", "b", "c"),
            "",
        ),
        "hard-to-itself": (
            good(b"a.jpg") + block(b"b.jpg", kind=hard, link=b"b.jpg") + END,
            (),
            "hard link out of the",
        ),
        "hard-to-a-later-one": (
            block(b"b.jpg", kind=hard, link=b"a.jpg") + good(b"a.jpg") + END,
            (),
            "hard link out of",
        ),
        "hard-out-of-the-tar": (
            good(b"a.jpg") + block(b"b.jpg", kind=hard, link=b"/etc/passwd") + END,
            (),
            "hard link",
        ),
        "hard-with-a-size": (
            good(b"a.jpg") + block(b"b.jpg", len(PHOTO), hard, b"a.jpg") + END,
            ("a", "b"),
            "",
        ),
        "symbolic-label": (good(b"a.jpg") + block(b"a.cls", kind=b"2", link=b"../x") + END, (), "symbolic link"),
        "unknown-type": (good(b"a.jpg") + photo(b"b.jpg", kind=b"Q") + END, (), "member of type 'Q'"),
        "multi-volume": (good(b"a.jpg") + photo(b"b.jpg", kind=b"M") + END, (), "member of type 'M'"),
        "volume-label": (block(b"label", kind=b"V") + good(b"a.jpg") + END, ("a",), ""),
    }


def _headers() -> dict[str, Part]:
    bad = "behind|no readable tar header"
    changed = bytearray(good(b"a.jpg", b"b.jpg") + END)
    changed[len(photo(b"a.jpg")) + 3] ^= 1
    return {
        "checksum": (photo(b"a.jpg", checksum=b"000000\0 ") + END, (), bad),
        "checksum-of-the-second": (bytes(changed), (), bad),
        "checksum-no-number": (photo(b"a.jpg", checksum=b"??????\0 ") + END, (), bad),
        "v7": (photo(b"a.jpg", magic=b"", kind=b"\0") + END, ("a",), ""),
        "gnu": (photo(b"a.jpg", magic=b"ustar  \0") + END, ("a",), ""),
        "unknown-magic": (photo(b"a.jpg", magic=b"TARTAR") + END, (), "'a.jpg' .*no tar header right before its bytes"),
        "cpio": (b"070707" + bytes(BLOCK * 3), (), bad),
        "block-missing": (good(b"a.jpg")[:-BLOCK] + good(b"b.jpg") + END, (), bad),
        "block-too-many": (good(b"a.jpg") + b"\xff" * BLOCK + good(b"b.jpg") + END, (), bad),
        "zeros-amid": (good(b"a.jpg") + bytes(BLOCK) + good(b"b.jpg") + END, ("a", "b"), ""),
    }


def _sizes() -> dict[str, Part]:
    """Sizes in headers that do not match the content."""
    lie = "write the shard again|no readable tar header|after the end"
    binary = b"\x80" + bytes(3) + struct.pack(">Q", len(PHOTO))
    return {
        "too-long": (photo(b"a.jpg", size=10**6) + END, (), "truncated, 'a.jpg' at byte 0"),
        "of-eight-gigabytes": (photo(b"a.jpg", size=8**11 - 1) + END, (), "truncated, 'a.jpg' at byte 0"),
        "into-the-next": (
            photo(b"a.jpg", size=len(padded(PHOTO)) + BLOCK) + good(b"b.jpg") + END,
            (),
            "no readable tar header",
        ),
        "over-the-next": (
            photo(b"a.jpg", size=2 * len(padded(PHOTO)) + BLOCK) + good(b"b.jpg") + END,
            ("a",),
            "",
        ),
        "too-short": (photo(b"a.jpg", size=10) + END, (), lie),
        "short-by-a-byte": (photo(b"a.jpg", PHOTO + b"?", size=len(PHOTO)) + END, ("a",), ""),
        "negative": (photo(b"a.jpg", size=b"-0000000777") + END, (), lie),
        "negative-binary": (photo(b"a.jpg", size=b"\xff" * 12) + END, (), "negative size"),
        "back-to-the-start": (
            photo(b"a.jpg", size=b"\xff" * 10 + struct.pack(">h", -BLOCK)) + END,
            (),
            "negative size",
        ),
        "binary": (photo(b"a.jpg", size=binary) + END, ("a",), ""),
        "binary-enormous": (photo(b"a.jpg", size=b"\x80" + b"\x7f" * 11) + END, (), lie),
        "with-underscore": (
            photo(b"a.jpg", size=b"%o" % (len(PHOTO) // 512) + b"_000") + END,
            (),
            "not a number|header",
        ),
        "no-number": (photo(b"a.jpg", size=b"twelve") + END, (), lie),
        "spaces": (photo(b"a.jpg", size=b"%8o   " % len(PHOTO)) + END, ("a",), ""),
        "of-a-folder": (block(b"x/", len(PHOTO), b"5") + good(b"a.jpg") + END, ("a",), ""),
    }


def _extensions() -> dict[str, Part]:
    """GNU names and pax headers in front of members, most of them wrong."""
    lie = "write the shard again|no readable tar header|after the end"
    size = b"%d" % len(PHOTO)
    content = record(b"path", b"a.jpg")
    return {
        "size-right": (pax((b"size", size)) + photo(b"a.jpg") + END, ("a",), ""),
        "size-alone": (
            pax((b"size", size)) + photo(b"a.jpg", size=0) + END,
            (),
            "its tar header says 0 bytes, but its",
        ),
        "size-smaller": (pax((b"size", b"100")) + photo(b"a.jpg") + END, (), lie),
        "size-larger": (pax((b"size", b"9" * 15)) + photo(b"a.jpg") + END, (), "truncated, 'a.jpg'"),
        "size-negative": (pax((b"size", b"-5120")) + photo(b"a.jpg") + END, (), "negative size"),
        "size-no-number": (pax((b"size", b"many")) + photo(b"a.jpg") + END, (), lie),
        "size-of-5000-digits": (pax((b"size", b"9" * 5000)) + photo(b"a.jpg") + END, (), lie),
        "sparse-size": (pax((b"GNU.sparse.size", b"9999")) + photo(b"a.jpg") + END, (), lie),
        "sparse-size-no-number": (pax((b"GNU.sparse.size", b"x")) + photo(b"a.jpg") + END, (), lie),
        "sparse-numbers-that-are-none": (
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + photo(b"a.jpg", b"x" * 600) + END,
            (),
            lie,
        ),
        "sparse-map-that-is-none": (pax((b"GNU.sparse.map", b"a,b,c")) + photo(b"a.jpg") + END, (), lie),
        "record-too-long": (
            block(b"pax", 30, b"x") + padded(b"999999 path=b.jpg\n") + photo(b"a.jpg") + END,
            (),
            "no image",
        ),
        "record-of-length-zero": (block(b"pax", 30, b"x") + padded(b"0 path=b.jpg\n") + photo(b"a.jpg") + END, (), lie),
        "record-of-5000-digits": (
            block(b"pax", 5020, b"x") + padded(b"9" * 5000 + b" path=b.jpg\n") + photo(b"a.jpg") + END,
            (),
            lie,
        ),
        "rubbish": (block(b"pax", 30, b"x") + padded(b"?" * 30) + photo(b"a.jpg") + END, ("a",), ""),
        "unknown-charset": (pax((b"hdrcharset", b"KOI8-R"), (b"path", b"b.jpg")) + photo(b"a.jpg") + END, ("b",), ""),
        "times-that-are-none": (pax((b"mtime", b"noon"), (b"uid", b"me")) + photo(b"a.jpg") + END, ("a",), ""),
        "nothing-behind": (block(b"pax", len(content), b"x") + padded(content) + END, (), lie),
        "cut": (block(b"pax", len(content), b"x") + content, (), lie),
        "of-two-gigabytes": (block(b"pax", 2**31, b"x") + padded(content) + photo(b"a.jpg") + END, (), "damaged"),
        "of-negative-size": (
            block(b"pax", b"\xff" * 12, b"x") + padded(content) + photo(b"a.jpg") + END,
            (),
            "damaged",
        ),
        "hundred-in-a-row": (gnu_name(b"a.jpg") * 100 + photo(b"a.jpg") + END, (), "at least 8 of them in a row"),
        "thousands-in-a-row": (gnu_name(b"a.jpg") * 3000 + photo(b"a.jpg") + END, (), "at least 8 of them in a row"),
        "name-of-two-gigabytes": (gnu_name(b"a.jpg", 2**31) + photo(b"a.jpg") + END, (), "damaged"),
        "name-of-negative-size": (gnu_name(b"a.jpg", b"\xff" * 12) + photo(b"a.jpg") + END, (), "damaged"),
        "global-comment": (pax((b"comment", b"0" * 40), kind=b"g") + good(b"a.jpg", b"b.jpg") + END, ("a", "b"), ""),
        "global-path": (pax((b"path", b"a.jpg"), kind=b"g") + good(b"b.jpg", b"c.jpg") + END, (), "duplicate key 'a'"),
        "solaris": (pax((b"path", b"b.jpg"), kind=b"X") + good(b"a.jpg") + END, ("b",), ""),
    }


def _sparse() -> dict[str, Part]:
    def old(name: bytes, more: bool = False) -> bytes:
        header = bytearray(block(name, 1024, b"S", magic=b"ustar  \0"))
        header[386:410] = b"%011o\0%011o\0" % (0, 1024)
        header[482], header[483:495] = more, b"%011o\0" % 5000
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header)

    map_10 = b"1\n0\n1024\n"
    numbers = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"5000"))
    return {
        "gnu": (good(b"a.jpg") + old(b"b.jpg") + bytes(1024) + END, (), "1 x sparse file"),
        "gnu-map-cut": (good(b"a.jpg") + old(b"b.jpg", more=True), (), "write it again|write the shard again"),
        "gnu-aside": (good(b"a.jpg") + old(b"b") + bytes(1024) + END, ("a",), ""),
        "pax-1.0": (
            good(b"a.jpg") + pax(*numbers) + block(b"b.jpg", 1536) + padded(map_10) + bytes(1024) + END,
            (),
            "1 x sparse file",
        ),
        "pax-0.1": (
            good(b"a.jpg")
            + pax((b"GNU.sparse.map", b"0,1024"), (b"GNU.sparse.size", b"5000"))
            + block(b"b.jpg", 1024)
            + bytes(1024)
            + END,
            (),
            "1 x sparse file",
        ),
        "pax-1.0-map-that-never-ends": (
            pax(*numbers) + block(b"b.jpg", 512) + b"99999999\n".ljust(BLOCK, b"1"),
            (),
            "write it again|write the shard again",
        ),
    }


def _ends() -> dict[str, Part]:
    one, two = good(b"a.jpg"), good(b"b.jpg")
    truncated = "truncated|no readable tar header"
    return {
        "joined": (one + END + two + END, ("a", "b"), ""),
        "joined-by-cat-of-records": (one + bytes(10240) + two + bytes(10240), ("a", "b"), ""),
        "joined-same-key": (one + END + one + END, (), "duplicate key 'a'"),
        "joined-not-at-a-block": (one + bytes(700) + two + END, (), "unexpected data"),
        "joined-compressed": (one + END + gzip.compress(two + END, mtime=0), (), "unexpected data"),
        "text-behind": (one + END + b"done\n" * 200, (), "unexpected data"),
        "none": (one, (), "no end-of-archive block"),
        "one-block": (one + bytes(BLOCK), ("a",), ""),
        "half-a-block": (one + bytes(100), (), truncated),
        "cut-in-a-header": (one + two[:300], (), truncated),
        "cut-behind-a-header": (one + two[:BLOCK], (), "truncated, 'b.jpg'"),
        "cut-in-an-image": (one + two[: BLOCK + 700], (), "truncated, 'b.jpg'"),
        "cut-in-the-padding": (one + two[:-1], (), truncated),
        "one-byte": (b"a", (), truncated),
        "empty": (b"", (), "an empty file"),
        "half-a-megabyte-of-zeros": (one + bytes(1 << 19), ("a",), ""),
        "two-megabytes-of-zeros": (one + bytes(1 << 21), (), "bytes of zeros"),
        "zeros-alone": (bytes(1 << 21), (), "bytes of zeros"),
    }


def _no_tars() -> dict[str, Part]:
    tar = good(b"a.jpg") + END
    unreadable = "no readable tar header"
    return {
        "gzip": (gzip.compress(tar, mtime=0), (), "compressed, .*gzip -d"),
        "bzip2": (bz2.compress(tar), (), "compressed, .*bzip2 -d"),
        "xz": (lzma.compress(tar), (), "compressed, .*xz -d"),
        "zstd": (b"\x28\xb5\x2f\xfd" + tar, (), "compressed, .*zstd -d"),
        "lz4": (b"\x04\x22\x4d\x18" + tar, (), "compressed, .*lz4 -d"),
        "zip": (b"PK\x03\x04" + tar, (), "compressed, .*unzip"),
        "jpeg": (PHOTO, (), unreadable),
        "html": (b"<html>404</html>" * 64, (), unreadable),
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n",
            (),
            "truncated|" + unreadable,
        ),
        "noise": (bytes(range(256)) * 40, (), unreadable),
        "shifted-by-a-byte": (b"\0" + tar, (), "unexpected data|" + unreadable),
        "base64": (b"YS5qcGcAAAAAAAAAAAAAAAAA" * 200, (), unreadable),
    }


def _labels() -> dict[str, tuple[bytes, tuple[str, ...], tuple[int, ...]]]:
    """Any label is accepted, since pretraining does not need it."""
    labels = {
        "missing": (None, -1),
        "right": (b"3", 3),
        "line-end": (b"3\r\n", 3),
        "empty": (b"", -1),
        "negative": (b"-7", -1),
        "name": (b"cat", -1),
        "float": (b"1.5", -1),
        "of-30-digits": (b"9" * 30, -1),
        "over-31-bits": (b"%d" % 2**31, -1),
        "no-utf-8": (b"\xff\xfe\xdf", -1),
        "of-20-megabytes": (b"1" * (20 << 20), -1),
    }
    files = {}
    for name, (content, label) in labels.items():
        member = b"" if content is None else photo(b"a.cls", content)
        files[name] = good(b"a.jpg") + member + END, ("a",), (label,)
    for name, content in {
        "cut": b'{"label": 1',
        "deep": b'{"label": ' + b"[" * 100_000,
        "list": b'["label"]',
        "huge-number": b'{"label": ' + b"9" * 5000 + b"}",
        "infinite": b'{"label": 1e999}',
        "true": b'{"label": true}',
        "both": b'{"label": 1, "labels": [2]}',
        "words": b'{"labels": "cat"}',
        "no-utf-8": b'{"label": "\xff"}',
    }.items():
        files[f"json-{name}"] = good(b"a.jpg") + photo(b"a.json", content) + END, ("a",), (-1,)
    return files
