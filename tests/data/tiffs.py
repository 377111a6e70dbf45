"""TIFFs of every kind, written byte by byte so that each tag is as a test wants it, and what they show."""

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

MINISWHITE, MINISBLACK, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5
NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
UNSPECIFIED, PREMULTIPLIED, STRAIGHT = 0, 1, 2
NUM_COLOURS = {MINISWHITE: 1, MINISBLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4}

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def lzw(data: bytes) -> bytes:
    """A stream that never looks back: codes of 9 bits, the table cleared before they would grow."""
    codes = [code for i in range(0, len(data), 250) for code in (256, *data[i : i + 250])]
    bits = "".join(f"{code:09b}" for code in (*codes, 257))
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def packbits(data: bytes) -> bytes:
    """Literal runs alone."""
    return b"".join(bytes([len(data[i : i + 128]) - 1]) + data[i : i + 128] for i in range(0, len(data), 128))


COMPRESS: dict[int, Callable[[bytes], bytes]] = {
    NONE: bytes,
    LZW: lzw,
    DEFLATE: zlib.compress,
    PACKBITS: packbits,
}


def pack(rows: np.ndarray, bits: int, order: str) -> bytes:
    """Rows [y, numbers], each row from a new byte on."""
    if bits in (8, 16):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    digits = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def page(
    pixels: np.ndarray,
    photometric: int,
    bits: int,
    *,
    order: str = "<",
    compression: int = NONE,
    planar: int = 1,
    extra: Sequence[int] = (),
    fill_order: int = 1,
    rows: int = 4,
    tags: Mapping[int, tuple[int, Sequence[int]] | None] | None = None,
) -> tuple[list[bytes], dict[int, tuple[int, Sequence[int]]]]:
    """Strips and tags (number: (3 for short or 4 for long, values)); `tags` adds some, None takes one away."""
    height, width, samples = pixels.shape
    planes = [pixels] if planar == 1 else np.split(pixels, samples, axis=2)
    strips = []
    for plane in planes:
        for first in range(0, height, rows):
            part = plane[first : first + rows]
            strip = COMPRESS[compression](pack(part.reshape(len(part), -1), bits, order))
            strips.append(strip.translate(REVERSED) if fill_order == 2 else strip)
    all_tags: dict[int, tuple[int, Sequence[int]] | None] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * samples),
        259: (3, [compression]),
        262: (3, [photometric]),
        266: (3, [fill_order]),
        277: (3, [samples]),
        278: (4, [rows]),
        284: (3, [planar]),
        338: (3, list(extra)) if extra else None,
        **(tags or {}),
    }
    return strips, {number: tag for number, tag in all_tags.items() if tag is not None}


def tiff(*pages: tuple[list[bytes], dict[int, tuple[int, Sequence[int]]]], order: str = "<") -> bytes:
    """A file of pages, each of `page` with the same byte order."""
    data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 0))
    link = 4  # where the place of the next page is to be written

    def append(block: bytes) -> int:
        data.extend(block + b"\0" * (len(block) % 2))
        return len(data) - len(block) - len(block) % 2

    for strips, tags in pages:
        places = [append(strip) for strip in strips]
        stored = {**tags, 273: (4, places), 279: (4, [len(strip) for strip in strips])}
        entries = b""
        for number, (kind, values) in sorted(stored.items()):
            value = struct.pack(f"{order}{len(values)}{'HI'[kind - 3]}", *values)
            if len(value) > 4:
                value = struct.pack(f"{order}I", append(value))
            entries += struct.pack(f"{order}HHI", number, kind, len(values)) + value.ljust(4, b"\0")
        start = append(struct.pack(f"{order}H", len(stored)) + entries + bytes(4))
        struct.pack_into(f"{order}I", data, link, start)
        link = start + 2 + len(entries)
    return bytes(data)


def shown(
    pixels: np.ndarray,
    photometric: int,
    bits: int,
    extra: Sequence[int] = (),
    palette: np.ndarray | None = None,
) -> np.ndarray:
    """What pixels show over white, by the standard, not rounded."""

    def eight_bits(values: np.ndarray) -> np.ndarray:
        return values >> (bits - 8) if bits >= 8 else np.rint(values * 255 / (2**bits - 1)).astype(int)

    colours = eight_bits(pixels[..., : NUM_COLOURS[photometric]])
    if palette is not None:
        colours = palette[pixels[..., 0]] >> 8
    elif photometric == CMYK:
        light = 255 - colours[..., 3:]
        colours = light - colours[..., :3] * light / 255
    elif photometric == MINISWHITE:
        colours = 255 - colours
    colours = np.broadcast_to(colours, (*pixels.shape[:2], 3))
    for number, kind in enumerate(extra, NUM_COLOURS[photometric]):
        alpha = eight_bits(pixels[..., number])[..., None]
        if kind == STRAIGHT:
            colours = (colours * alpha + 255 * (255 - alpha)) / 255
        if kind == PREMULTIPLIED:
            colours = np.minimum(colours + (255 - alpha), 255)
    return colours
