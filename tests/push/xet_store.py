"""The storage behind the Hub's large files, as far as an upload needs it.

Uploads follow the Xet protocol: a client cuts files into chunks, sends chunks packed into xorbs,
then a shard that says which chunks of which xorbs make which file. Every file is put together here
from what was sent, and taken only if its sha256 is the one that the shard gives.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator

from tests.push.lz4 import decompress_frame, ungroup_bytes

_HEADER = 48
_ENTRY = 48
_WITH_VERIFICATION = 1 << 31
_WITH_METADATA = 1 << 30
_DECOMPRESS: dict[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: decompress_frame,
    2: lambda data: ungroup_bytes(decompress_frame(data)),
}
_BOOKEND = b"\xff" * 32


class RefusedError(Exception):
    """What was sent is not as the protocol has it."""


class XetStore:
    """Xorbs by hash, and finished files by sha256.

    Attributes:
        files: Content by sha256 in hexadecimal.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, data: bytes) -> bool:
        """Takes a xorb; whether it is new."""
        new = name not in self._xorbs
        self._xorbs[name] = list(_chunks(data))
        return new

    def has_xorb(self, name: str) -> bool:
        """Whether it need not be sent."""
        return name in self._xorbs

    def add_shard(self, data: bytes) -> None:
        """Puts the files of a shard together."""
        place = _HEADER
        while data[place : place + 32] != _BOOKEND:
            flags, count = struct.unpack_from("<II", data, place + 32)
            place += _ENTRY
            content = b""
            for _ in range(count):
                name = _hash_text(data[place : place + 32])
                _, size, start, stop = struct.unpack_from("<IIII", data, place + 32)
                part = b"".join(self._xorbs[name][start:stop])
                if len(part) != size:
                    raise RefusedError(f"{len(part)} bytes of {name}, not {size}")
                content += part
                place += _ENTRY
            if flags & _WITH_VERIFICATION:
                place += _ENTRY * count
            if not flags & _WITH_METADATA:
                raise RefusedError("a file without its sha256")
            digest = _hash_text(data[place : place + 32])
            place += _ENTRY
            if hashlib.sha256(content).hexdigest() != digest:
                raise RefusedError(f"sha256 is not {digest}")
            self.files[digest] = content


def _chunks(data: bytes) -> Iterator[bytes]:
    """A xorb's chunks: each after its version, stored size, compression, and size, in 8 bytes."""
    place = 0
    while place < len(data):
        version, compression = data[place], data[place + 4]
        stored = int.from_bytes(data[place + 1 : place + 4], "little")
        size = int.from_bytes(data[place + 5 : place + 8], "little")
        if version != 0 or compression not in _DECOMPRESS:
            raise RefusedError(f"version {version}, compression {compression}")
        place += 8
        chunk = _DECOMPRESS[compression](data[place : place + stored])
        if len(chunk) != size:
            raise RefusedError(f"a chunk of {len(chunk)} bytes, not {size}")
        yield chunk
        place += stored


def _hash_text(data: bytes) -> str:
    """32 bytes as four little-endian numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))
