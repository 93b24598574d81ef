"""The arrays of an ``.npz`` file, mapped into memory: all processes of a node share them, and nothing is read ahead."""

import mmap
import struct
import zipfile
from pathlib import Path

import numpy as np

_LOCAL_HEADER = struct.Struct("<26xHH")  # in front of a file in a zip archive: lengths of its name and extra field


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Maps the arrays of a file that ``np.savez`` wrote, read-only; it may be replaced, but not overwritten.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: not such a file, or a damaged one; array contents are not checked.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {info.filename.removesuffix(".npy"): _array(archive, info, mapped) for info in archive.infolist()}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mapped: mmap.mmap) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {info.filename} is compressed")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read(member)
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"its {info.filename} has Python objects")
    start += info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack_from(mapped, info.header_offset))
    return np.ndarray(shape, dtype, mapped, start, order="F" if in_columns else "C")
