"""How far an evaluation of several weights by several protocols has come: what a failure, or Ctrl-C, must not lose."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.core.errors import BadInput
from engine.core.extras import complaint
from engine.evals.result import Result

Pairing = tuple[str, str]  # weights, protocol


@dataclass
class Course:
    """Filled while `engine.evals.evaluate` runs.

    Attributes:
        lenient: a protocol that does not go with some weights is left out; else that is refused before anything is encoded.
        tell: is given a line when a protocol begins, and one when it ends.
        plan: what is judged, the name of its set.
        results: found so far.
        left_out: why a protocol does not go with the weights.
        failures: why a protocol, once begun, has no result; the others go on.
        defects: whether a failure was another one than bad input.
        started: when, on `time.perf_counter`.
    """

    lenient: bool = False
    tell: Callable[[str], None] = lambda line: None
    plan: dict[Pairing, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    left_out: dict[Pairing, str] = field(default_factory=dict)
    failures: dict[Pairing, str] = field(default_factory=dict)
    defects: bool = False
    started: float = field(default_factory=time.perf_counter)

    @property
    def missing(self) -> list[str]:
        """Whatever has no result, and why."""
        found = {(result.weights, result.protocol) for result in self.results} | self.failures.keys()
        stopped = {pairing: "the evaluation was stopped" for pairing in self.plan if pairing not in found}
        return _said("left out", self.left_out) + _said("failed", self.failures) + _said("not finished", stopped)

    @property
    def failed(self) -> str:
        """The first failure, and how many more there are; "" where there is none."""
        if not self.failures:
            return ""
        (weights, protocol), why = next(iter(self.failures.items()))
        others = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return f"{protocol} of {weights} failed{others}: {why}" if self.results else why

    def announce(self) -> None:
        """Tell what will be run, and what not."""
        if len(self.plan) + len(self.left_out) < 2:
            return
        by_set: dict[str, dict[str, None]] = {}
        for (_, protocol), name in self.plan.items():
            by_set.setdefault(name, {})[protocol] = None
        weights = ", ".join(dict.fromkeys(weights for weights, _ in self.plan))
        where = "; ".join(f"{', '.join(protocols)} on {name}" for name, protocols in by_set.items())
        for line in (f"judging {weights} by {where}", *_said("left out", self.left_out)):
            self.tell(line)

    @contextmanager
    def step(self, weights: str, protocol: str) -> Iterator[None]:
        """Around one protocol: tells of it, and notes a failure."""
        tell = self.tell if len(self.plan) > 1 else lambda line: None
        place = f"{list(self.plan).index((weights, protocol)) + 1} of {len(self.plan)}"
        whose = f" of {weights}" if len({weights for weights, _ in self.plan}) > 1 else ""
        began = time.perf_counter()
        minutes = (began - self.started) / 60
        so_far = f" ({minutes:.1f} min so far)" if minutes >= 1 else ""
        tell(f"{place}: {protocol}{whose} on {self.plan[weights, protocol]}{so_far}")
        try:
            yield
        except Exception as error:
            self.failures[weights, protocol] = why = complaint(error)
            self.defects |= not isinstance(error, BadInput)
            tell(f"{place}: failed after {time.perf_counter() - began:.1f} s: {why}")
        else:
            tell(f"{place}: done in {time.perf_counter() - began:.1f} s")


def _said(what: str, reasons: dict[Pairing, str]) -> list[str]:
    """A line for each weights and reason."""
    together: dict[tuple[str, str], list[str]] = {}
    for (weights, protocol), reason in reasons.items():
        together.setdefault((weights, reason), []).append(protocol)
    return [f"{', '.join(names)} of {weights}, {what}: {reason}" for (weights, reason), names in together.items()]
