"""A cache of the tests' own, so that the user's is neither read nor filled."""

import pytest

from engine.data import sources


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits_train(private_cache) -> sources.ImageSet:
    return sources.open_images("digits", "train")
