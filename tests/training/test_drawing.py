"""What a step draws, one step ahead: the same as in place, in one thread that takes one of torch's and is gone afterwards."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.ibot import Ibot, Settings
from engine.model import vit
from engine.training.drawing import drawing
from tests.methods.small import small

END = 6


def make() -> Ibot:
    torch.manual_seed(0)
    encoder = vit.create("vit_micro_patch8_32", depth=2, drop_path=0.1)
    return Ibot(encoder, Settings(**small(Settings, epochs=4, augmentation="minimal")))


def draws(step: int) -> Draws:
    return Draws(0, step, batch=8, rows=slice(2, 6), device=torch.device("cpu"))


@contextmanager
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@contextmanager
def seen_by(draw: Callable[[int], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, an iBOT that draws by this function of the step."""
    monkeypatch.setattr(Ibot, "draw", lambda method, given: {"seen": torch.tensor(draw(given.seed_keys[1]))})
    yield


def test_every_step_is_drawn_as_in_place():
    method = make()
    for first in (0, 3):
        with no_thread_stays(), drawing(method, draws, first, END) as drawn:
            for step in range(first, END):
                made, wanted = drawn(step), method.draw(draws(step))
                assert made.keys() == wanted.keys() == {"depth", "masks"}
                assert all(torch.equal(value, made[name]) for name, value in wanted.items())


def test_the_next_step_is_drawn_while_this_one_trains(monkeypatch: pytest.MonkeyPatch):
    where, done = {}, {step: threading.Event() for step in range(END)}

    def draw(step: int) -> int:
        where[step] = threading.current_thread()
        done[step].set()
        return step

    with seen_by(draw, monkeypatch), drawing(make(), draws, 0, END) as drawn:
        for step in range(END):
            assert drawn(step)["seen"] == step
            assert step + 1 == END or done[step + 1].wait(10)  # although nobody has asked for it
            assert step + 2 >= END or not done[step + 2].is_set()
    assert len(set(where.values())) == 1 and threading.current_thread() not in where.values()


def test_what_is_not_drawn_ahead_is_drawn_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ibot, "draws_ahead", False)
    asked = []
    with (
        seen_by(lambda step: asked.append(threading.current_thread()) or step, monkeypatch),
        no_thread_stays(),
        drawing(make(), draws, 0, END) as drawn,
    ):
        assert not asked and drawn(4)["seen"] == 4
    assert asked == [threading.current_thread()]


@pytest.mark.parametrize("broken", [0, 2])
def test_an_exception_of_the_thread_is_raised_as_itself(broken: int, monkeypatch: pytest.MonkeyPatch):
    error = BadInput("--ibot.mask-ratio cannot be had")

    def draw(step: int) -> int:
        if step == broken:
            raise error
        return step

    with (
        seen_by(draw, monkeypatch),
        no_thread_stays(),
        pytest.raises(BadInput) as raised,
        drawing(make(), draws, 0, END) as drawn,
    ):
        for step in range(END):
            drawn(step)
    assert raised.value is error and step == broken


@pytest.mark.parametrize("taken", [0, 1, END])
@pytest.mark.parametrize("ended_by", [None, KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_it_no_thread_stays(taken: int, ended_by: type[BaseException] | None):
    ended = False
    with no_thread_stays():
        try:
            with drawing(make(), draws, 0, END) as drawn:
                for step in range(taken):
                    drawn(step)
                if ended_by is not None:
                    raise ended_by
        except (KeyboardInterrupt, ZeroDivisionError) as error:
            ended = type(error) is ended_by
    assert ended == (ended_by is not None)


def test_the_thread_takes_one_of_torch_s_and_others_keep_theirs(monkeypatch: pytest.MonkeyPatch):
    before, later = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with seen_by(lambda _: torch.get_num_threads(), monkeypatch), drawing(make(), draws, 0, END) as drawn:
            assert drawn(0)["seen"] == 1
            other = threading.Thread(target=lambda: later.append(torch.rand(4).sum() and torch.get_num_threads()))
            other.start()
            other.join()
            assert torch.get_num_threads() == 3 and later == [3]
            assert drawn(1)["seen"] == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
