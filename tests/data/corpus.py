"""Small image files and tar archives of every kind: good, odd and hostile."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2


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


def _bmp_of_16_bits() -> bytes:
    """50x40 pixels of five bits a colour, as Windows writes them without saying so by masks."""
    header = struct.pack("<IiiHHIIiiII", 40, 50, 40, 1, 16, 0, 4000, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 4054, 0, 0, 54) + header + np.random.default_rng(0).bytes(4000)


def _tiff_of_bands(count: int) -> bytes:
    tags = ImageFileDirectory_v2()
    rows = {256: 50, 257: 40, 258: (8,) * count, 259: 1, 262: 1, 273: 1000, 277: count, 278: 40, 279: 2000 * count}
    for tag, value in rows.items():
        tags[tag] = value
    stream = io.BytesIO()
    tags.save(stream)
    return stream.getvalue().ljust(1000, b"\0") + bytes(2000 * count)


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
    "lzma.tif": (lambda path: picture().save(path, compression="lzma"), "compressed by lzma"),
    "signed.tif": (lambda path: picture().convert("L").save(path, tiffinfo={339: 2}), "signed numbers"),
    "near_infrared.tif": (lambda path: picture().convert("RGBX").save(path), "of 4 bands"),
    "satellite.tif": (lambda path: path.write_bytes(_tiff_of_bands(13)), "of 13 bands"),
    "five_bits.bmp": (lambda path: path.write_bytes(_bmp_of_16_bits()), "without bit masks"),
    "pipe.jpg": (os.mkfifo, "no regular file"),
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


def tar_bytes(files: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
    """A tar of these files; `fields` are set on every member's `TarInfo`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="surrogateescape") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def forged(archive: bytes, start: int, field: bytes, at: int = 0) -> bytes:
    """A tar whose header at byte `at` has this field from its byte `start` on, with the check sum that goes with it."""
    header = bytearray(archive[at : at + 512])
    header[start : start + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return archive[:at] + bytes(header) + archive[at + 512 :]


def encoded(seed: int = 0, suffix: str = "jpeg") -> bytes:
    """The bytes of a picture."""
    stream = io.BytesIO()
    picture(48 + 5 * (seed % 7), 40 + 3 * (seed % 5), seed).save(stream, format=suffix)
    return stream.getvalue()


_ONE = {"a/one.jpg": encoded(1)}
_TWO = {**_ONE, "b/two.jpg": encoded(2)}
_SECOND = 512 + -(-len(encoded(1)) // 512) * 512  # where the second member of _TWO begins
_PAX = {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}

# bytes of archives that must be refused whole, and what the sentence must say
HOSTILE_TARS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no tar"),
    "words": (b"no archive at all\n" * 99, "is no tar"),
    "an image": (encoded(1) * 9, "is no tar"),
    "gzip": (gzip.compress(tar_bytes(_ONE)), "is compressed by gzip"),
    "bzip2": (bz2.compress(tar_bytes(_ONE)), "is compressed by bzip2"),
    "xz": (lzma.compress(tar_bytes(_ONE)), "is compressed by xz"),
    "torn in a header": (tar_bytes(_TWO)[: _SECOND + 100], "is torn"),
    "torn between members": (tar_bytes(_TWO)[:_SECOND], "is torn: it stops before the mark"),
    "torn in an image": (tar_bytes(_TWO)[: _SECOND + 600], "'b/two.jpg' is declared to have"),
    "damaged in the middle": (tar_bytes(_TWO)[:_SECOND] + b"x" * 512 + tar_bytes(_TWO)[_SECOND + 512 :], "no header at byte"),
    "one behind the other": (tar_bytes(_ONE) + tar_bytes({"b/two.jpg": b"x"}), "goes on behind the mark"),
    "larger than the file": (forged(tar_bytes(_ONE), 124, b"00000777777\0"), "'a/one.jpg' is declared to have 262143 bytes"),
    "larger than any file": (forged(tar_bytes(_ONE), 124, b"\x80" + b"\xff" * 11), "beyond its end"),
    "of a negative size": (forged(tar_bytes(_ONE), 124, b"\xff" * 12), "declares no size"),
    "of no size": (forged(tar_bytes(_ONE), 124, b"9" * 11 + b"\0"), "declares no size"),
    "symbolic link": (tar_bytes({"a.jpg": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "which is a symbolic link"),
    "hard link": (tar_bytes({"a.jpg": b""}, type=tarfile.LNKTYPE, linkname="b.jpg"), "which is a hard link"),
    "character device": (tar_bytes({"a.jpg": b""}, type=tarfile.CHRTYPE), "which is a device"),
    "block device": (tar_bytes({"a.jpg": b""}, type=tarfile.BLKTYPE), "which is a device"),
    "pipe": (tar_bytes({"a.jpg": b""}, type=tarfile.FIFOTYPE), "which is a pipe"),
    "old sparse file": (forged(tar_bytes(_ONE), 156, b"S"), "which is a sparse file"),
    "new sparse file": (tar_bytes(_ONE, tarfile.PAX_FORMAT, **_PAX), "which is a sparse file"),
    "unknown kind": (forged(tar_bytes(_ONE), 156, b"Z"), "unknown kind b'Z'"),
    "absolute name": (tar_bytes({"/etc/one.jpg": b"x"}), "'/etc/one.jpg', whose name leads out"),
    "name that leads up": (tar_bytes({"a/../../one.jpg": b"x"}), "whose name leads out"),
    "long name that leads up": (tar_bytes({"../" + "x" * 200: b""}, tarfile.GNU_FORMAT), "whose name leads out"),
    "pax name that leads up": (tar_bytes({"../" + "é" * 200: b""}, tarfile.PAX_FORMAT), "whose name leads out"),
    "folder that leads up": (tar_bytes({"../a": b""}, type=tarfile.DIRTYPE), "whose name leads out"),
    "no name": (forged(tar_bytes(_ONE), 0, b"\0" * 100), "is named ''"),
    "a name of 5000 bytes": (tar_bytes({"x" * 5000: b""}, tarfile.GNU_FORMAT), "is named 'xxx"),
    "one name twice": (tar_bytes(_ONE)[:_SECOND] + tar_bytes({"a/one.jpg": b"else"}), "'a/one.jpg' twice"),
    "pax header of no record": (forged(tar_bytes({"x": b"words" * 9}), 156, b"x"), "damaged pax header"),
    "pax header of a lying record": (forged(tar_bytes({"x": b"99 path=a\n"}), 156, b"x"), "damaged pax header"),
    "pax size that is none": (tar_bytes(_ONE, tarfile.PAX_FORMAT, pax_headers={"size": "-5"}), "as the size of"),
    "pax size beyond the end": (tar_bytes(_ONE, tarfile.PAX_FORMAT, pax_headers={"size": "123456789"}), "beyond its end"),
    "one name for all": (forged(tar_bytes({"x": b"10 path=a\n"}), 156, b"g"), "gives all members one path"),
    "header of 2 MB": (forged(tar_bytes({"x": bytes(1 << 21)}), 156, b"L"), "more than any name needs"),
    "header before nothing": (forged(tar_bytes({"x": b"name\0"}), 156, b"L"), "stands before nothing"),
}  # fmt: skip
