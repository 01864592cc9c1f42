"""One update: forward, backward, guard, optimiser, averages. Nothing here waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from engine.core import dist
from engine.core.optim import Average, Moment, cosine, share_of_peak
from engine.core.phases import Phase
from engine.core.timetable import Timetable
from engine.methods.base import Method
from engine.training import gradient_cache
from engine.training.gradient_cache import micro_batches
from engine.training.graphs import CudaGraph, Replayed
from engine.training.optimizers import (
    AdamW,
    Larc,
    drop_frozen,
    gradient_norms,
    gradient_scales,
    set_decay,
    set_lr,
)
from engine.training.precision import AUTOCAST, LossScale


class WeightAverage:
    """An exponential average of the trained weights of the encoder, and of a classifier on it (with "classifier." before the
    names), by parameter name; empty when the decay is 0."""

    def __init__(self, method: Method):
        self.decay = method.settings.weight_ema
        named = dict(method.encoder.named_parameters())
        if method.classifier is not None:
            named |= {f"classifier.{name}": parameter for name, parameter in method.classifier.named_parameters()}
        self.online = {name: parameter for name, parameter in named.items() if parameter.requires_grad and self.decay}
        self.weights = {name: parameter.detach().clone() for name, parameter in self.online.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the encoder has the averaged weights (for probing and export); afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.online.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    def averages(self, growth: float) -> Iterator[Average]:
        """As they move at an update of so many times the settings' batch (`engine.core.optim.Moment`)."""
        if self.weights:
            yield Average(list(zip(self.weights.values(), self.online.values())), 1 - self.decay**growth)


class Update:
    """Makes a method's updates, and holds what that needs: optimiser, schedule, weight average, guard.

    Args:
        method: on its device.
        total_steps: of the stage, all its epochs, by its clock; schedules end there, or past it where the settings' horizon is
            above 1.
        precision: one of `engine.training.precision.AUTOCAST`.
        accumulate: micro-batches per update. Where the settings say that the batch does not split, they are represented by
            themselves and compared together (`engine.training.gradient_cache`).
        graphs: replay forward and backward from a CUDA graph (`engine.training.graphs`); what an update reports then holds until
            the next one.
        timetable: of the stage; without one all steps are alike.

    Attributes:
        phase: what its steps are shown; the method's own is that of one step, where a phase draws.
        images_per_step: of an update in this phase, over all ranks.
        skipped, skipped_in_a_row: int64 scalars on the device: updates left out because loss or gradients were not finite.
    """

    def __init__(
        self,
        method: Method,
        total_steps: int,
        precision: str = "fp32",
        accumulate: int = 1,
        *,
        graphs: bool = False,
        timetable: Timetable | None = None,
    ):
        self.timetable, self.images_per_step = timetable, method.settings.batch_size
        self.method, self.settings, self.phase = method, method.settings, method.phase
        self.total_steps, self.accumulate = round(self.settings.horizon * total_steps), accumulate
        self.steps_per_epoch = max(1, total_steps // self.settings.epochs)
        self.warmup_steps = round(self.settings.warmup * total_steps)
        self.autocast = AUTOCAST[precision]
        groups = method.groups(self.settings.batch_size)
        larc = self.settings.optimizer == "larc"
        self.optimizer = Larc(groups, self.settings.betas[0]) if larc else AdamW(groups, self.settings.betas)
        self.peak_lr = max(group["peak_lr"] for group in self.optimizer.param_groups)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.caches = gradient_cache.needed(self.settings, accumulate)
        # DDP would wait for all gradients after one backward, and cached ones take several
        self.parallel = method if self.caches else dist.parallel(method)
        self.average = WeightAverage(method)
        device = self.trained[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_scale = LossScale(device) if precision == "fp16" else None
        self.replayed = self._graph() if graphs else None
        self._others: dict[Phase, Replayed] = {}

    def __call__(
        self, step: int, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor], logged: bool = True
    ) -> dict[str, Tensor | float]:
        """Update from this rank's rows of a batch; one that will not be `logged`, on any rank, leaves out what is only reported.

        Returns:
            What the method reports, as device scalars (this rank's mean), the gradient norm, the lr used, the weight decay where
            it changes, and how many tokens of an image the encoder learned from, where it learns.
        """
        # a graph does the same at every replay, so what is reported belongs to all of them
        moment = self.moment(step, logged or self.replayed is not None)
        self.method.begin(moment)
        rates = self._set_rates(moment.step)
        if self.replayed is None:
            report = self.gradients(images, ids, drawn)
        else:
            report = self.replayed(self.gradients, images, ids, drawn)
        drop_frozen(self.optimizer, moment.epoch)
        unscale = None if self.loss_scale is None else 1 / self.loss_scale.scale
        norms = gradient_norms(self.optimizer, unscale)
        norm = norms.total()
        applied = dist.all_true(torch.isfinite(norm) & torch.isfinite(report["loss"]))
        scales = gradient_scales(self.optimizer, norms, self.settings.clip_norm, self.settings.clip_over, unscale)
        averages = [*self.method.averages(), *self.average.averages(moment.growth)]
        self.optimizer.step(applied, scales, averages)
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(applied)
        if self.loss_scale is not None:
            self.loss_scale.move(applied)
        self.skipped += ~applied
        self.skipped_in_a_row = torch.where(applied, 0, self.skipped_in_a_row + 1)
        return report | {"gradient_norm": norm} | rates

    def begin_phase(self, phase: Phase, images_per_step: int) -> None:
        """Show the method what this phase shows, form by form where it has several, at its learning rates for so many images; a
        graph of other steps is captured anew."""
        if self.replayed is not None and (phase.forms[0], images_per_step) != (self.method.phase, self.images_per_step):
            self.replayed = self._graph()
        self._others.clear()
        self.phase, self.method.phase, self.images_per_step = phase, phase.forms[0], images_per_step
        for group, wanted in zip(self.optimizer.param_groups, self.method.groups(images_per_step), strict=True):
            group["peak_lr"] = wanted.peak_lr
        self.peak_lr = max(group["peak_lr"] for group in self.optimizer.param_groups)

    def show(self, form: Phase) -> None:
        """Show the method what this form of the phase shows; each has a graph of its own."""
        if self.replayed is not None and form != self.method.phase:
            self._others[self.method.phase] = self.replayed
            self.replayed = self._others.pop(form, None) or self._graph()
        self.method.phase = form

    def flops_per_image(self) -> float:
        """Of a step of the phase, as the method has it; on average, where steps draw."""
        return self.method.flops_in(self.phase)

    def _graph(self) -> Replayed:
        return Replayed(self.method, self.trained, CudaGraph(self.trained[0].device))

    def moment(self, step: int, logged: bool = False) -> Moment:
        """Of an update in this phase, before which the stage made so many."""
        batch = self.settings.batch_size
        growth = self.images_per_step / batch
        if self.timetable is None:
            return Moment(step, self.total_steps, self.steps_per_epoch, logged, step * batch, growth)
        place = self.timetable.place(step)
        return Moment(place.clock, self.total_steps, self.steps_per_epoch, logged, place.seen, growth)

    def _set_rates(self, step: float) -> dict[str, float]:
        """Learning rate and weight decay, as functions of what the clock shows."""
        settings = self.settings
        start, end = settings.start_lr / self.peak_lr, settings.end_lr / self.peak_lr
        share = share_of_peak(
            settings.schedule, step, self.total_steps, self.warmup_steps, start, end, settings.drops, settings.warmup_form
        )  # fmt: skip
        rates = {"lr": set_lr(self.optimizer, share, self.method.moment.epoch)}
        if settings.weight_decay_end is not None:
            ahead = settings.warmup_form == "to-peak"  # MSN counts a step before it sets anything
            decay = cosine(step + ahead, self.total_steps, settings.weight_decay, settings.weight_decay_end)
            set_decay(self.optimizer, decay / settings.weight_decay)
            rates["weight_decay"] = decay
        return rates

    def gradients(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """The batch's gradients, averaged over ranks, and what is reported of it."""
        encoder = self.method.encoder
        encoder.tokens_learned_from = 0
        report = self._gradients(images, ids, drawn)
        tokens = encoder.tokens_learned_from / len(ids)
        return report | ({"tokens_per_image": tokens} if tokens else {})

    def _gradients(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = micro_batches(images, ids, drawn, self.accumulate)
        if self.caches:
            report = gradient_cache.backward(self.method, parts, ids, drawn, self._autocast, self._scaled)
            dist.average([p.grad for p in self.trained if p.grad is not None])
            return {name: value.detach() for name, value in report.items()}
        reports = []
        for part in parts:
            with dist.without_sync(self.parallel) if part is not parts[-1] else nullcontext():
                with self._autocast():
                    report = self.parallel(*part)
                self._scaled(report["loss"] / self.accumulate).backward()
            reports.append({name: value.detach() for name, value in report.items()})
        return {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.skipped.device.type, dtype=self.autocast, enabled=self.autocast is not None)
