"""Arrays of `.npz` files that are not trusted: what a file says of itself is checked before it.

Nothing is unpickled, decompressed or made as large as a header says: an array takes the bytes that
are in the file for it.
"""

import contextlib
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 24
_DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # RecursionError and NotImplementedError are of this kind
    OSError,
    TypeError,
    ValueError,
)


class Entry(NamedTuple):
    """An array in a file, not read.

    Attributes:
      info: where it is.
      shape: of the array.
      dtype: of the array; never of objects.
    """

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """What reading a damaged or hostile file raises, as one line of a ValueError."""
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{what}: damaged or of another kind ({reason})") from None


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of a file by name.

    Raises:
      ValueError: members that are not arrays, or more bytes than the file has.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    assert archive.fp is not None
    left = archive.fp.seek(0, os.SEEK_END)
    for info in archive.infolist():
        name, dot, suffix = info.filename.rpartition(".")
        plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if not (dot and suffix == "npy" and plain) or info.compress_size != info.file_size:
            raise ValueError(f"expected arrays as they are, got a member {info.filename[:80]!r}")
        if name in found:
            raise ValueError(f"two members {info.filename[:80]!r}")
        left -= info.file_size
        if left < 0:
            raise ValueError("members of more bytes than the file has")
        found[name] = info
    return found


def entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    """Shape and dtype of an array, which are those of the bytes that are there.

    Raises:
      ValueError: a header that is damaged, or that says something else.
    """
    with archive.open(info) as member:
        shape, dtype = _header(member)
        size = info.file_size - member.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{info.filename}: {size} bytes for an array {dtype}{list(shape)}")
    return Entry(info, shape, dtype)


def read(archive: zipfile.ZipFile, entry: Entry) -> NDArray[Any]:
    """The array, whose checksum is right."""
    x = np.empty(entry.shape, entry.dtype)
    bytes_of_x = x.reshape(-1).view(np.uint8) if x.size else np.empty(0, np.uint8)
    with archive.open(entry.info) as member:
        _header(member)
        for start in range(0, bytes_of_x.size, _PIECE):
            into = bytes_of_x[start : start + _PIECE]
            into[:] = np.frombuffer(member.read(into.size), np.uint8)
        if member.read(1):  # at the end the checksum is compared
            raise ValueError(f"{entry.info.filename}: bytes behind the array")
    return x


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"npy format {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    if fortran_order:
        raise ValueError("an array in Fortran's order")
    return shape, dtype
