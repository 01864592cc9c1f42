"""What the steps of a stage are given, batches and draws, phase by phase (`engine.core.timetable`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

from engine.core.phases import WHOLE, Phase
from engine.data.batch import Batch
from engine.data.pipeline import TrainLoader
from engine.training.drawing import Drawn, drawing
from engine.training.parts import Parts
from engine.training.state import TrainState
from engine.training.token_choice import Measured, agreed, best, candidates, measured


class Feeding:
    """The batch of the step that the state is at, which whoever asks moves on from step to step; `drawn` then gives what is
    drawn of that step. Where a phase begins, method and update are told, and loader and draws are begun anew: so nothing
    that was made ahead belongs to another phase. Where its steps draw their form, they are told at each step.

    Where the stage chooses its phases itself, a choice is made as a stretch begins, and kept in the state.

    Args:
        changed: told of every phase but the first one that is met.
        chosen: told of every choice, and of what it was made by.
        aside: entered where a phase begins.
    """

    def __init__(
        self,
        parts: Parts,
        state: TrainState,
        changed: Callable[[Phase], object] = lambda phase: None,
        chosen: Callable[[Phase, Sequence[Measured]], object] = lambda phase, table: None,
        aside: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._parts, self._state = parts, state
        self._changed, self._told, self._aside = changed, chosen, aside
        self._stage = parts.stages[state.stage]
        self._open, self._shapes = ExitStack(), {}
        self._begin()

    def __iter__(self) -> "Feeding":
        return self

    def __next__(self) -> Batch:
        self.turn()
        self._state.update.show(self._form(self._state.step))
        batch = next(self._loader)
        self._shapes = batch.shapes
        return batch

    def turn(self) -> None:
        """Begin the phase that begins with this step, if one does; what is asked for next does so otherwise."""
        if self._state.step == self._end:
            with self._aside():
                self.close()
                self._begin()
            self._changed(self._state.update.phase)

    @property
    def over_limit(self) -> bool:
        """Whether more files are bad than the run accepts."""
        return self._loader.over_limit

    def drawn(self, step: int) -> Drawn:
        """What is drawn of the step whose batch was given last, with the shapes of its images."""
        return self._drawn(step) | self._shapes

    def close(self) -> None:
        """Ends threads and frees pipelines; batches already given stay valid."""
        self._open.close()

    def __enter__(self) -> "Feeding":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        stretch = self._stage.timetable.stretch(self._state.step)
        self._end, phase = stretch.end, stretch.phase
        if self._parts.settings(self._stage.index).phase_choice == "auto":
            phase = self._chosen(self._stage.timetable.stretches.index(stretch))
        self._state.update.begin_phase(phase, stretch.images)
        self._loader: TrainLoader = self._parts.loader(self._state)
        self._open.callback(self._loader.close)
        draws = partial(self._parts.draws, self._stage.index, batch=stretch.images)
        form = self._form if len(phase.forms) > 1 else None
        self._drawn = self._open.enter_context(drawing(self._state.method, draws, self._state.step, self._end, form))

    def _form(self, step: int) -> Phase:
        return self._state.update.phase.form(self._parts.plan.train.seed, self._stage.index, step)

    def _chosen(self, number: int) -> Phase:
        """Of a stretch of a stage that chooses; the last one shows all."""
        if number == len(self._stage.timetable.stretches) - 1:
            return WHOLE
        found = self._state.chosen.setdefault(self._stage.name, [])
        if number == len(found):
            found.append(self._choice(number))
        return found[number]

    def _choice(self, number: int) -> Phase:
        parts, state, stage = self._parts, self._state, self._stage
        phases = [*candidates(type(state.method), parts.encoder), WHOLE]
        # of orders of their own, so that nothing is looked at right before it is learned
        with ExitStack() as opened:

            def batches() -> Iterator[Batch]:
                loader = parts.samples(state, "auto", number)
                opened.callback(loader.close)
                return loader

            draws = partial(parts.draws_of, stage.index, "auto", number)
            table = measured(state.update, state.step, phases, batches, draws)
        phase = agreed(best(table), phases)
        self._told(phase, table)
        return phase
