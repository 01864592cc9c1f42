"""A range of a file reads as a file of its own; whatever the file became since is not taken for the image."""

import errno
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.data.stored import Ranges
from tests.data.corpus import encoded

CONTENT = bytes(range(256)) * 80  # more than a buffer


def ranges_in(path, places) -> Ranges:
    status = path.stat()
    stamps = np.array([[status.st_size, status.st_mtime_ns]])
    starts, sizes = np.array(places).T
    return Ranges((str(path),), stamps, np.zeros(len(places), np.int32), starts, sizes)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "file"
    path.write_bytes(CONTENT)
    return path


@given(
    start=st.integers(0, 20_000),
    size=st.integers(0, 480),
    calls=st.lists(st.tuples(st.integers(-600, 600), st.sampled_from([0, 1, 2]), st.integers(-1, 600)), max_size=6),
)
def test_a_range_reads_as_its_bytes_do(file, start, size, calls):
    ranges, expected = ranges_in(file, [(start, size)]), io.BytesIO(CONTENT[start : start + size])
    assert ranges.read(0).tobytes() == expected.getvalue()
    with ranges.open(0) as found:
        for offset, whence, count in calls:
            place = offset + (0, expected.tell(), size)[whence]
            if place < 0:
                continue  # what a file refuses, and bytes in memory do not
            assert found.seek(offset, whence) == expected.seek(place)
            assert found.read(count) == expected.read(count)


def test_before_the_start_there_is_nothing(file):
    with ranges_in(file, [(5, 5)]).open(0) as found, pytest.raises(OSError) as caught:
        found.seek(-1)
    assert caught.value.errno == errno.EINVAL


def test_pillow_reads_every_format_from_a_range(tmp_path):
    for kind in ("jpeg", "png", "webp", "bmp", "tiff"):
        content = encoded(3, kind)
        (tmp_path / kind).write_bytes(b"before" + content + b"behind")
        with ranges_in(tmp_path / kind, [(6, len(content))]).open(0) as found, Image.open(found) as image:
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(content))))


def test_parts_are_the_ranges_of_their_ids(file):
    ranges = ranges_in(file, [(0, 3), (10, 4), (20, 5)])
    assert [ranges.take(np.array([2, 0])).read(place).tobytes() for place in (0, 1)] == [CONTENT[20:25], CONTENT[:3]]


def test_another_file_is_not_read_and_nothing_stays_open(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    ranges, before = ranges_in(tmp_path / "file", [(0, 9)]), len(os.listdir("/proc/self/fd"))
    with ranges.open(0) as found:
        assert found.read() == CONTENT[:9]
    (tmp_path / "other").write_bytes(CONTENT[::-1])
    os.utime(tmp_path / "other", ns=(1, 1))  # the clock of files may not have moved on
    os.replace(tmp_path / "other", tmp_path / "file")
    for use in (ranges.read, ranges.open):
        with pytest.raises(OSError, match="was changed since it was listed"):
            use(0)
    past = ranges_in(tmp_path / "file", [(len(CONTENT) - 3, 9)])
    with pytest.raises(OSError, match="ends before the image does"):
        past.read(0)
    assert len(os.listdir("/proc/self/fd")) == before
