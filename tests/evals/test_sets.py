"""What Sets remember: what was opened, and what was found to fit."""

import pytest

from engine import evals
from engine.core.errors import BadInput
from engine.evals import Sets


class Looks:
    """In the place of a protocol's check: counts, and refuses a k of 9."""

    def __init__(self):
        self.count = 0

    def __call__(self, train, test, settings):
        self.count += 1
        if settings.k == 9:
            raise BadInput("nine are too many.")


@pytest.fixture
def looks(monkeypatch):
    counted = Looks()
    monkeypatch.setattr(evals.protocol("knn"), "check", counted)
    return counted


def test_what_was_found_to_fit_is_not_looked_at_again(looks, folder):
    sets, settings = Sets(data=str(folder)), evals.settings_for(("knn",))
    evals.check(settings, sets)
    evals.check(evals.settings_for(("knn",)), sets)
    assert looks.count == 1
    evals.check({"knn": evals.protocol("knn").Settings(k=3)}, sets)
    assert looks.count == 2
    evals.check(settings, Sets(data=str(folder)))
    assert looks.count == 3


def test_what_was_refused_is_refused_again(looks, folder):
    sets, settings = Sets(data=str(folder)), {"knn": evals.protocol("knn").Settings(k=9)}
    for _ in range(2):
        with pytest.raises(BadInput, match="knn: nine are too many"):
            evals.check(settings, sets)
    assert looks.count == 2


def test_sets_are_opened_when_they_are_asked_for_and_once(folder):
    sets = Sets(data=str(folder))
    assert sets.opened == {} and sets.unreadable == []
    train, test = sets.pair("classes")
    assert sets.pair("classes") == (train, test) and list(sets.opened) == ["classes"]
    assert sets.name("classes") == str(folder) and sets.name("video") == "clips" and sets.unreadable == []


def test_unreadable_images_are_named_with_the_reason(folder):
    (folder / "val" / "dark" / "broken.png").write_bytes(b"no picture")
    sets = Sets(0.5, data=str(folder))
    sets.pair("classes")
    ((path, reason),) = sets.unreadable
    assert path == "val/dark/broken.png" and reason
