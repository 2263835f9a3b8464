"""LZ4 frames read in plain Python, as a client that packs chunks writes them.

Sources: lz4_Frame_format.md and lz4_Block_format.md of the LZ4 project.
"""

from __future__ import annotations

_MAGIC = b"\x04\x22\x4d\x18"
_STORED = 1 << 31


def decompress_frame(data: bytes) -> bytes:
    """The content of one frame; its checksums are not looked at."""
    if data[:4] != _MAGIC:
        raise ValueError("not an LZ4 frame")
    flags = data[4]
    has_block_checksum, has_size, has_dictionary = flags & 16, flags & 8, flags & 1
    place = 7 + (8 if has_size else 0) + (4 if has_dictionary else 0)
    out = bytearray()
    while size := int.from_bytes(data[place : place + 4], "little"):
        stored, length = bool(size & _STORED), size & ~_STORED
        block = data[place + 4 : place + 4 + length]
        if stored:
            out += block
        else:
            _decompress_block(block, out)
        place += 4 + length + (4 if has_block_checksum else 0)
    return bytes(out)


def _decompress_block(block: bytes, out: bytearray) -> None:
    """Appends a block's content; matches may reach back into what stands in `out`."""
    place = 0
    while place < len(block):
        token = block[place]
        count, place = _length(token >> 4, block, place + 1)
        out += block[place : place + count]
        place += count
        if place == len(block):
            return
        distance = int.from_bytes(block[place : place + 2], "little")
        count, place = _length(token & 15, block, place + 2)
        count += 4
        while count:  # a match may overlap with what it makes
            start = len(out) - distance
            part = out[start : start + count]
            out += part
            count -= len(part)


def _length(count: int, block: bytes, place: int) -> tuple[int, int]:
    if count == 15:
        while True:
            count += block[place]
            place += 1
            if block[place - 1] != 255:
                break
    return count, place


def ungroup_bytes(data: bytes) -> bytes:
    """Undoes the grouping of every fourth byte, which makes floats easier to compress."""
    out = bytearray(len(data))
    start = 0
    for group in range(4):
        count = len(out[group::4])
        out[group::4] = data[start : start + count]
        start += count
    return bytes(out)
