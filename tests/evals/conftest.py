"""What tests of evaluations share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """24 noisy images of two classes per split, and a cache of its own."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("dark", "light"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 150, (32, 32, 3)) + 100 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / split / label / f"{i:02}.png")
    return tmp_path / "data"
