"""What methods with a teacher share. No method itself; `engine.methods.names` leaves it out."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from engine.core.optim import Average, cosine
from engine.methods.base import Method
from engine.model.memory import Teacher


@dataclass(frozen=True)
class TeacherSettings:
    """What a method's settings take over to have a teacher."""

    teacher_momentum: float = 0.996
    """Share of itself that the teacher keeps at the first update; it rises along half a cosine."""
    teacher_momentum_end: float = 1.0

    def teacher_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        return {
            "teacher-momentum": (0 <= self.teacher_momentum <= 1, "a number from 0 to 1"),
            "teacher-momentum-end": (0 <= self.teacher_momentum_end <= 1, "a number from 0 to 1"),
        }


class Taught(Method):
    """A method with a teacher, an exponential average of encoder and heads, which it sets when its heads are there."""

    teacher: Teacher

    def teacher_momentum(self) -> float:
        """Of this step, for the settings' batch."""
        s = self.settings
        return cosine(self.moment.step, self.moment.total_steps, s.teacher_momentum, s.teacher_momentum_end)

    def averages(self) -> Iterator[Average]:
        yield from super().averages()
        yield Average(self.teacher.pairs(self), 1 - self.teacher_momentum() ** self.moment.growth)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        for block in self.teacher.encoder.blocks:
            yield block, "forward"

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        yield from super().regions_on_gpus()
        if isinstance(self.teacher.encoder.norm, nn.LayerNorm):
            yield self.teacher.encoder.norm, "forward"
