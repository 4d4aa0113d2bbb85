"""What a cubin says of itself: its sections, and the constants that a kernel's file exports."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple


class Section(NamedTuple):
    name: str
    data: bytes


_OBJECT = 1  # STT_OBJECT


def sections(path: Path) -> list[Section]:
    """All sections of a 64-bit ELF file, by their number."""
    data = path.read_bytes()
    (start,) = struct.unpack_from("<Q", data, 0x28)
    count, names_at = struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", data, start + 64 * i) for i in range(count)]
    names = headers[names_at][4]
    return [
        Section(_text(data, names + name), data[offset : offset + size])
        for name, _, _, _, offset, size in headers
    ]


def constants(path: Path) -> dict[str, int]:
    """name -> value of each ``extern "C" __constant__ const int`` of a cubin."""
    found = sections(path)
    by_name = dict(found)
    symbols, names = by_name.get(".symtab", b""), by_name.get(".strtab", b"")
    values = {}
    for name, info, _, section, value, size in struct.iter_unpack("<IBBHQQ", symbols):
        if info & 15 == _OBJECT and size == 4 and found[section].name == ".nv.constant3":
            (values[_text(names, name)],) = struct.unpack_from("<i", found[section].data, value)
    return values


def _text(data: bytes, begin: int) -> str:
    return data[begin : data.index(b"\0", begin)].decode()
