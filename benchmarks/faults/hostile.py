"""Images that are wrong in every way that images are: for the fault benchmark, and for the tests."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def oriented_exif(orientation: int) -> Image.Exif:
    """EXIF data that say how a stored image is to be turned."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    """The same JPEG with another size written into its frame header."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def write_hostile_folder(data_dir: Path, photo: Image.Image) -> None:
    """Writes `data_dir/train/a/*`: images that can be read are called good_*, the others bad_*."""
    folder = data_dir / "train" / "a"
    folder.mkdir(parents=True)
    jpeg, png = encode(photo, "JPEG", quality=95), encode(photo, "PNG")
    stored_on_its_side = photo.transpose(Image.Transpose.ROTATE_90)
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    files = {
        "good_photo.jpg": jpeg,
        "good_png_named.jpg": png,
        "good_cmyk.jpg": encode(photo.convert("CMYK"), "JPEG", quality=95),
        "good_gray.jpg": encode(photo.convert("L"), "JPEG", quality=95),
        "good_gray.png": encode(photo.convert("L"), "PNG"),
        "good_palette.png": encode(palette, "PNG"),
        "good_transparent_palette.png": encode(palette, "PNG", transparency=bytes(range(256))),
        "good_rotated.jpg": encode(stored_on_its_side, "JPEG", quality=95, exif=oriented_exif(6)),
        "good_one_pixel.png": encode(Image.new("RGB", (1, 1), (200, 200, 200)), "PNG"),
        "good_one_pixel.jpg": encode(Image.new("RGB", (1, 1)), "JPEG"),
        "good_wide.jpg": encode(Image.new("RGB", (65_500, 1)), "JPEG"),
        "good_tall.png": encode(Image.new("RGB", (1, 65_500)), "PNG"),
        "bad_truncated.jpg": jpeg[: len(jpeg) // 2],
        "bad_header_only.jpg": jpeg[:100],
        "bad_truncated.png": png[: len(png) // 2],
        "bad_empty.jpg": b"",
        "bad_html.jpg": b"<html>404 not found</html>",
        "bad_zeros.png": bytes(10_000),
        "bad_bomb.jpg": with_jpeg_size(jpeg, 20_000, 20_000),
        "bad_bomb.png": encode(Image.new("1", (20_000, 20_000)), "PNG"),
        "bad_program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "bad_folder.jpg").mkdir()
    (folder / "bad_dangling_link.jpg").symlink_to(folder / "nothing")


def originals(image: Image.Image) -> list[bytes]:
    """The image in every format and kind that is read."""
    return [
        encode(image, "JPEG"),
        encode(image, "JPEG", progressive=True, exif=oriented_exif(6)),
        encode(image.convert("L"), "JPEG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "PNG"),
        encode(image.convert("P"), "PNG", transparency=0),
        encode(image, "GIF"),
        encode(image, "WEBP"),
        encode(image, "BMP"),
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(image, "PPM"),
    ]


def mutations(files: list[bytes], count: int, *, seed: int) -> Iterator[bytes]:
    """The files in turn, each time with one to seven random changes: bytes set, bits flipped, parts cut or put in."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.integers(1, 8)):
            where = rng.integers(len(data))
            match rng.integers(4):
                case 0:
                    data[where] = rng.integers(256)
                case 1:
                    data[where] ^= 1 << rng.integers(8)
                case 2:
                    del data[where : where + rng.integers(1, 50)]
                case 3:
                    data[where:where] = rng.bytes(rng.integers(1, 50))
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)
