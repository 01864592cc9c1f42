"""A cache of the tests' own, so that the user's is neither read nor filled, and small sets to read."""

import pytest

from engine.data import sources
from tests.data.corpus import write_photos


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits_train(private_cache) -> sources.ImageSet:
    return sources.open_images("digits", "train")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name in ("a", "b"):
        write_photos(root / "train" / name, 20)
    return sources.open_images(root, "train")
