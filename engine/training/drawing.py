"""The random choices of a stage's steps: made one step ahead in another thread, where they are work for the host."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.core.phases import Phase
from engine.methods.base import Method

Drawn = dict[str, Tensor]


def drawn(method: Method, draws: Draws) -> Drawn:
    """What a method draws of a step; what is drawn ahead lies, for a GPU, in pinned memory."""
    made = method.draw(draws)
    if not (method.draws_ahead and draws.device.type == "cuda"):
        return made
    return {name: tensor.pin_memory() for name, tensor in made.items()}


@contextmanager
def drawing(
    method: Method,
    draws: Callable[[int], Draws],
    first: int,
    end: int,
    form: Callable[[int], Phase] | None = None,
) -> Iterator[Callable[[int], Drawn]]:
    """Inside, a function that gives what is drawn of a step, asked for each from `first` up to before `end`, in order.

    A method that draws ahead does so in one thread, with one of torch's threads, which is gone afterwards, whatever ends the
    context; an exception there is raised where the step is asked for. As every choice is a function of seed, stage and step, what
    is drawn is the same. Any other method draws where it is asked.

    Args:
        form: of the phase, what a step is shown; by default all that the method is.
    """

    def made(step: int) -> Drawn:
        return drawn(method if form is None else method.in_phase(form(step)), draws(step))

    if not method.draws_ahead:
        yield made
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "draws", initializer=_take_one_thread) as pool:
        try:
            pool.submit(int).result()  # the thread has begun once this ran
        finally:
            torch.set_num_threads(threads)  # for those that begin later, which is the other call's doing as well
        waiting = {first: pool.submit(made, first)}

        def take(step: int) -> Drawn:
            taken = waiting.pop(step).result()
            if step + 1 < end:
                waiting[step + 1] = pool.submit(made, step + 1)
            return taken

        try:
            yield take
        finally:
            pool.shutdown(cancel_futures=True)


def _take_one_thread() -> None:
    """Of torch's, for the thread that calls."""
    torch.get_num_threads()  # a thread's first call takes the process's number, and would after the next line
    torch.set_num_threads(1)
