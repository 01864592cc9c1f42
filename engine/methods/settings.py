"""The settings of a stage that all methods share, and what they are checked for. No method itself; `engine.methods.names` leaves
it out."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.core.errors import BadInput
from engine.core.optim import CLIP_OVER, OPTIMIZERS, SCHEDULES, WARMUPS
from engine.core.phases import Phases
from engine.core.timetable import BATCHES, CLOCKS
from engine.data.views import ASPECTS, COLOURS, RESIZES
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class StageSettings:
    """What every stage of training has. Learning rates are per 256 images (views counted where the method says so)."""

    epochs: int = 100
    batch_size: int = 1024
    """Images of a step over all ranks."""
    base_lr: float = 1.5e-4
    start_lr: float = 0.0
    """Learning rate at the first step of the warm-up, as it is: for no number of images."""
    end_lr: float = 0.0
    """Learning rate at the end of the schedule, as it is. Parameters with a lower rate start and end in proportion."""
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    """Weight decay at the end of a cosine that starts at weight-decay; None keeps it constant."""
    optimizer: str = "adamw"
    """adamw, or larc (SGD whose steps are in proportion to each tensor's norm)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW; the first one is also larc's momentum."""
    warmup: float = 0.05
    """Share of the stage's steps with a linearly rising learning rate; the schedule follows."""
    warmup_form: str = "from-start"
    """Which ends of the warm-up are among its W steps: from-start (s/W of the peak at step s), to-peak ((s+1)/W), through
    (s/(W-1)), between ((s+1)/(W+1)) or late (from-start's, a step later)."""
    schedule: str = "cosine"
    """Of the learning rate after the warm-up: cosine (half a one, to end-lr), steps (at each of drops), quarter-cosine (over the
    whole stage, so that the warm-up ends below the peak) or late-quarter-cosine (from the warm-up on)."""
    drops: tuple[float, ...] = ()
    """Shares of the stage's steps at which the schedule steps divides the learning rate by ten."""
    horizon: float = 1.0
    """All schedules end at this multiple of the stage's steps; above 1 training stops on the way."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    clip_over: str = "all"
    """What that norm is taken over: all gradients, each part (encoder, each head), or each tensor."""
    weight_ema: float = 0.0
    """Decay of an average of the weights of encoder and classifier, which is then what is probed and exported; 0 keeps none."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers."""
    resize: str = "bicubic"
    """How crops are brought to their size: bicubic or bilinear."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    aspect: str = "crop"
    """What becomes of an image's shape: crop (views are cut out in the model's), or keep (whole images, and crops of their shape,
    on the nearest grid of at most as many patches)."""
    phases: tuple[float, ...] = (0.0,)
    """Shares of the stage, by its clock, at which phases begin that show other numbers of tokens; the first is 0."""
    phase_sides: tuple[float, ...] = (1.0,)
    """Side of all crops in each phase, as a share of their full one; the last is 1."""
    side_draws: tuple[float, ...] = (1.0,)
    """What that is multiplied with besides, before the last phase, where images keep their aspect: one of these for each crop of
    each image, of equal numbers on all ranks."""
    phase_keeps: tuple[float, ...] = (1.0,)
    """Share of a large crop's patches (of the visible ones, where some are hidden anyway) that the trained encoder is shown in
    each phase; a teacher sees all. The last is 1."""
    phase_locals: tuple[float, ...] = (1.0,)
    """Share of the small crops that an image has in each phase, perhaps none; the last is 1."""
    phase_patches: tuple[float, ...] = (1.0,)
    """Side of a patch in each phase, for the trained encoder and a teacher, as a multiple of the model's from 1 on, of whole
    pixels; the last is 1."""
    patch_draws: tuple[float, ...] = (1.0,)
    """What that is multiplied with besides, before the last phase: each step draws one of these; crops stay at their size."""
    phase_depths: tuple[float, ...] = (1.0,)
    """Rate of the trained encoder's stochastic depth in each phase, as a multiple of the model's; the last is 1."""
    phase_clock: str = "images"
    """What phases, learning rate, weight decay, temperatures and the teacher's momentum go by: images (the share that was seen)
    or compute (the share of the stage's operations that was made: for runs that spend what cheap steps save on more epochs)."""
    phase_batch: str = "same"
    """Images of a step in phases of fewer tokens: same, or grow (as many whole batches as cost what one of whole images does; the
    learning rate follows by the method's own rule, and what follows the trained weights by images, too)."""
    phase_choice: str = "given"
    """What each phase shows: given (by the settings above) or auto (as a phase begins, what the errors of a few batches'
    gradients speak for; the last one shows all)."""

    def check(self, stage: str) -> None:
        """Raise BadInput for a value that cannot be meant."""
        low, high = self.crop_scale
        rules = {
            "epochs": (self.epochs >= 1, "a whole number from 1"),
            "batch-size": (self.batch_size >= 1, "a whole number from 1"),
            "base-lr": (self.base_lr > 0, "a number above 0"),
            "start-lr": (self.start_lr >= 0, "a number from 0"),
            "end-lr": (self.end_lr >= 0, "a number from 0"),
            "weight-decay": (self.weight_decay >= 0, "a number from 0"),
            "weight-decay-end": (
                self.weight_decay_end is None or (self.weight_decay_end >= 0 and self.weight_decay > 0),
                "None, or a number from 0 where weight-decay is above 0",
            ),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1"),
            "warmup": (0 <= self.warmup <= 1, "a share from 0 to 1"),
            "warmup-form": (self.warmup_form in WARMUPS, f"one of {', '.join(WARMUPS)}"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "drops": (
                bool(self.drops) == (self.schedule == "steps")
                and list(self.drops) == sorted(self.drops)
                and all(self.warmup <= share < 1 for share in self.drops),
                "ascending shares between warmup and 1 where the schedule is steps, else nothing",
            ),
            "horizon": (self.horizon >= 1, "a number from 1"),
            "clip-norm": (self.clip_norm >= 0, "a number from 0"),
            "clip-over": (self.clip_over in CLIP_OVER, f"one of {', '.join(CLIP_OVER)}"),
            "weight-ema": (0 <= self.weight_ema < 1, "a number from 0 to below 1"),
            "crop-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "resize": (self.resize in RESIZES, f"one of {', '.join(RESIZES)}"),
            "flip": (0 <= self.flip <= 1, "a probability from 0 to 1"),
            "aspect": (
                self.aspect in ASPECTS and (self.aspect == "crop" or self.patch_draws == (1.0,)),
                "crop, or keep where no step draws the size of its patches",
            ),
            "phases": (
                self.phases[:1] == (0.0,) and list(self.phases) == sorted(set(self.phases)) and self.phases[-1] < 1,
                "ascending shares from 0 to below 1, the first 0",
            ),
            "phase-sides": (
                self._of_phases(self.phase_sides, _is_share),
                "a share above 0, up to 1, for each phase; the last 1",
            ),
            "side-draws": (
                self.side_draws == (1.0,)
                or (
                    self.aspect == "keep"
                    and len(self.phases) > 1
                    and len(set(self.side_draws)) == len(self.side_draws) > 1
                    and all(map(_is_share, self.side_draws))
                ),
                "1, or two shares above 0, up to 1, or more, where there are several phases, with aspect keep",
            ),
            "phase-keeps": (
                self._of_phases(self.phase_keeps, _is_share),
                "a share above 0, up to 1, for each phase; the last 1",
            ),
            "phase-locals": (
                self._of_phases(self.phase_locals, lambda share: 0 <= share <= 1),
                "a share from 0 to 1 for each phase; the last 1",
            ),
            "phase-patches": (
                self._of_phases(self.phase_patches, lambda patch: patch >= 1),
                "a number from 1 for each phase; the last 1",
            ),
            "patch-draws": (
                self.patch_draws == (1.0,)
                or (
                    len(self.phases) > 1
                    and len(set(self.patch_draws)) == len(self.patch_draws) > 1 <= min(self.patch_draws)
                ),
                "1, or two numbers from 1 or more, where there are several phases",
            ),
            "phase-depths": (
                self._of_phases(self.phase_depths, lambda depth: depth >= 0),
                "a number from 0 for each phase; the last 1",
            ),
            "phase-clock": (self.phase_clock in CLOCKS, f"one of {', '.join(CLOCKS)}"),
            "phase-choice": (
                self.phase_choice == "given" or (self.phase_choice == "auto" and self._left_open()),
                "given, or auto where there are phases of full size, by the clock of images, of as many images, with aspect crop",
            ),
            "phase-batch": (self.phase_batch in BATCHES, f"one of {', '.join(BATCHES)}"),
        } | self.rules()
        for name, (holds, wanted) in rules.items():
            if not holds:
                value = getattr(self, name.replace("-", "_"))
                raise BadInput(f"--{stage}.{name} is {value}; it must be {wanted}.")

    def _of_phases(self, values: tuple[float, ...], valid: Callable[[float], bool]) -> bool:
        return len(values) in (1, len(self.phases)) and all(map(valid, values)) and values[-1] == 1

    def _left_open(self) -> bool:
        """Whether nothing of the phases is fixed beforehand but where they begin, and that doesn't follow from what they show."""
        whole = self.token_phases.phases[-1]
        full = all(phase == whole for phase in self.token_phases.phases)
        alike = (self.phase_clock, self.phase_batch, self.aspect) == ("images", "same", "crop")
        return len(self.phases) > 1 and full and alike

    @property
    def token_phases(self) -> Phases:
        """What the stage's steps see of images."""
        return Phases.of(
            self.phases, self.phase_sides, self.phase_keeps, self.phase_patches, self.patch_draws, self.phase_locals,
            self.side_draws, self.phase_depths,
        )  # fmt: skip

    def rules(self) -> dict[str, tuple[bool, str]]:
        """A method's further rules: flag -> (whether it holds, what is valid)."""
        return {}

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        """Raise BadInput for a value that does not fit the encoder."""

    def ungraphed(self, encoder: VisionTransformer) -> str:
        """Why forward and backward of a step can't be captured once and then replayed (`engine.training.graphs`), in words; ""
        where they can.

        They can where all that differs from step to step lies in tensors, of shapes that stay: images, ids and draws, which are
        copied to the device before; weights and buffers, which change in place; a module's list `pending`, which may pass tensors
        on to `after_step`. The host reads none of them, and no number of Python that changes by the step is computed with. A
        method says so itself; unless it does, it can't.
        """
        return "nobody has shown that this method's step is the same at every replay"

    @property
    def splits(self) -> bool:
        """Whether the mean over micro-batches of their losses is the batch's loss: not where its images are compared, for which
        there is `Comparing`."""
        return True

    @property
    def shown_share(self) -> float:
        """Share of a large crop's patches that the trained encoder is shown where the phase leaves none out."""
        return 1.0

    @property
    def labelled(self) -> bool:
        """Whether the stage needs to know the images' classes."""
        return False

    @property
    def shots(self) -> int:
        """How many images of each class the stage trains on; 0 is all."""
        return 0


@dataclass(frozen=True)
class ColourSettings:
    """What a method's settings take over whose crops may be jittered in colour."""

    colours: str = "torchvision"
    """How colours are jittered: torchvision (step by step in an order drawn for each image, as its ColorJitter does it, and with
    it all authors) or linear (in one linear map: cheaper, and no author's)."""

    def colour_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        return {"colours": (self.colours in COLOURS, f"one of {', '.join(COLOURS)}")}


@dataclass(frozen=True)
class LabelledSettings(StageSettings):
    """Of a stage that may learn from classes."""

    labels_per_class: int = 0
    """Train on so many images of each class only, the same ones for every method of one seed; 0 trains on all."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "labels-per-class": (
                self.labels_per_class >= 0 and (self.labelled or not self.labels_per_class),
                "a whole number from 0, and 0 where no class is learned",
            )
        }

    @property
    def labelled(self) -> bool:
        return True

    @property
    def shots(self) -> int:
        return self.labels_per_class


def _is_share(value: float) -> bool:
    return 0 < value <= 1


RAGGED = "how many patches are masked differs from step to step"


def depth_on_host(encoder: VisionTransformer) -> str:
    """What `StageSettings.ungraphed` says of a step that encodes under stochastic depth."""
    return "stochastic depth is drawn on the host" if any(encoder.drop_path_rates) else ""
