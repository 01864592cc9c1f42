"""A file that makes scipy's reader crash ends in a sentence."""

import io
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from engine.core.errors import BadInput
from engine.data.sets import matlab


def labels() -> bytes:
    written = io.BytesIO()
    savemat(written, {"labels": np.arange(1, 6, dtype=np.uint8)[None], "text": np.array(["ab"], object)})
    return written.getvalue()


def test_arrays_come_back_from_the_process_that_read_them(tmp_path: Path):
    path = tmp_path / "labels \udce4.mat"  # a name that is no text
    path.write_bytes(labels())
    (found,) = matlab.read(path, "labels")
    assert found.dtype == np.uint8 and found.tolist() == [[1, 2, 3, 4, 5]]


def test_a_reader_that_crashes_takes_nothing_with_it(tmp_path: Path):
    damaged, path = bytearray(labels()), tmp_path / "labels.mat"
    damaged[145] ^= 8  # makes an opaque object of the array: by scipy 1.17, a segmentation fault
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=rf"^{path} (is no MATLAB file that can be read: |holds )"):
        matlab.read(path, "labels")
