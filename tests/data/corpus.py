"""Small image files of every kind: good, odd and hostile."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, the same for the same seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path, count: int, suffix: str = "jpg") -> list[Path]:
    """`count` pictures of different content and size in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo{index:03d}.{suffix}" for index in range(count)]
    for index, path in enumerate(paths):
        picture(48 + 5 * (index % 7), 40 + 3 * (index % 5), seed=index).save(path)
    return paths


def png_bytes(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file as its chunks, for what Pillow does not write: 16-bit colour, lying headers."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _damaged(suffix: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        picture().save(path, format=suffix)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    return write


def _animated(format: str) -> Callable[[Path], None]:
    return lambda path: picture().save(path, format=format, save_all=True, append_images=[picture(seed=1)])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.jpg": (_damaged("jpeg"), "unreadable"),
    "truncated.png": (_damaged("png"), "unreadable"),
    "truncated.webp": (_damaged("webp"), "unreadable"),
    "truncated.tif": (_damaged("tiff"), "unreadable"),
    "truncated.bmp": (_damaged("bmp"), "unreadable"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty file"),
    "random.jpg": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(3000)), "not a JPEG"),
    "text.png": (lambda path: path.write_text("no image"), "not a JPEG"),
    "animated_gif.jpg": (_animated("gif"), "not a JPEG"),
    "animated.png": (_animated("png"), "animated"),
    "animated.webp": (_animated("webp"), "animated"),
    "pages.tif": (_animated("tiff"), "multi-page"),
    "bomb.png": (lambda path: path.write_bytes(png_bytes(20_000, 10_000, 8, 2, b"")), "megapixels"),
    "large.png": (lambda path: path.write_bytes(png_bytes(8_001, 8_000, 8, 2, b"")), "megapixels"),
    "bits.tif": (lambda path: picture().convert("1").save(path), "pixel type 1"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
}


def write_hostile(folder: Path) -> dict[str, str]:
    """Writes every hostile file; returns {name: what the reason must contain}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (write, _) in HOSTILE.items():
        write(folder / name)
    return {name: reason for name, (_, reason) in HOSTILE.items()}


def with_bad_file(root, bad):
    """Two classes of ten photos; `bad` names the files to be damaged, of which only the pixel data are."""
    for name in ("a", "b"):
        write_photos(root / "train" / name, 10)
    for path in bad:
        HOSTILE["truncated.jpg"][0](root / "train" / path)
    return root
