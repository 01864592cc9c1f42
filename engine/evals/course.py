"""How far an evaluation of several weights by several protocols has come: what a failure, or Ctrl-C, must not lose."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.errors import BadInput
from engine.evals.result import Result

Pairing = tuple[str, str]  # weights, protocol


@dataclass
class Course:
    """Filled while `engine.evals.evaluate` runs.

    Attributes:
        lenient: a protocol that does not go with some weights is left out; else that is refused before anything is encoded.
        tell: is given a line when a protocol begins, and one when it ends.
        results: found so far.
        left_out: why a protocol does not go with the weights.
        failures: why a protocol, once begun, has no result; the others go on.
        started: when, on `time.perf_counter`.
    """

    lenient: bool = False
    tell: Callable[[str], None] = lambda line: None
    results: list[Result] = field(default_factory=list)
    left_out: dict[Pairing, str] = field(default_factory=dict)
    failures: dict[Pairing, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def missing(self) -> list[str]:
        """Whatever has no result, and why."""
        groups = {"left out": self.left_out, "failed": self.failures}
        return [
            f"{protocol} of {weights}, {how}: {why}"
            for how, of in groups.items()
            for (weights, protocol), why in of.items()
        ]

    def announce(self, plan: dict[Pairing, str]) -> None:
        """Tell what will be run, and what not; `plan` has the set's name by weights and protocol."""
        if len(plan) + len(self.left_out) < 2:
            return
        by_set: dict[str, dict[str, None]] = {}
        for (_, protocol), name in plan.items():
            by_set.setdefault(name, {})[protocol] = None
        weights = ", ".join(dict.fromkeys(weights for weights, _ in plan))
        self.tell(
            f"judging {weights} by " + "; ".join(f"{', '.join(named)} on {name}" for name, named in by_set.items())
        )
        for missing in self.missing:
            self.tell(missing)

    @contextmanager
    def step(self, plan: dict[Pairing, str], weights: str, protocol: str) -> Iterator[None]:
        """Around one protocol: tells of it, and notes a failure."""
        several = len({weights for weights, _ in plan}) > 1
        tell = self.tell if len(plan) > 1 else lambda line: None
        place = f"{list(plan).index((weights, protocol)) + 1} of {len(plan)}"
        started = time.perf_counter()
        minutes = (started - self.started) / 60
        so_far = f" ({minutes:.1f} min so far)" if minutes >= 1 else ""
        tell(f"{place}: {protocol}{f' of {weights}' if several else ''} on {plan[weights, protocol]}{so_far}")
        try:
            yield
        except BadInput as error:
            self.failures[weights, protocol] = str(error)
            tell(f"{place}: failed after {time.perf_counter() - started:.1f} s: {error}")
        else:
            tell(f"{place}: done in {time.perf_counter() - started:.1f} s")
