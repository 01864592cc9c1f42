"""One update: forward, backward, guard, optimiser, averages. Nothing here waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from engine.core import dist
from engine.core.optim import Average, Moment, cosine, share_of_peak
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

    def averages(self) -> Iterator[Average]:
        if self.weights:
            yield Average(list(zip(self.weights.values(), self.online.values())), 1 - self.decay)


class Update:
    """Makes a method's updates, and holds what that needs: optimiser, schedule, weight average, guard.

    Args:
        method: on its device.
        total_steps: of the stage, all its epochs; schedules end there, or past it where the settings' horizon is above 1.
        precision: one of `engine.training.precision.AUTOCAST`.
        accumulate: micro-batches per update. Where the settings say that the batch does not split, they are represented by
            themselves and compared together (`engine.training.gradient_cache`).
        graphs: replay forward and backward from a CUDA graph (`engine.training.graphs`); what an update reports then holds until
            the next one.

    Attributes:
        skipped, skipped_in_a_row: int64 scalars on the device: updates left out because loss or gradients were not finite.
    """

    def __init__(
        self, method: Method, total_steps: int, precision: str = "fp32", accumulate: int = 1, *, graphs: bool = False
    ):
        self.method, self.settings = method, method.settings
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
        self.replayed = Replayed(method, self.trained, CudaGraph(device)) if graphs else None

    def __call__(
        self, step: int, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor], logged: bool = True
    ) -> dict[str, Tensor | float]:
        """Update from this rank's rows of a batch; one that will not be `logged`, on any rank, leaves out what is only reported.

        Returns:
            What the method reports, as device scalars (this rank's mean), the gradient norm, the lr used, and the weight decay
            where it changes.
        """
        # a graph does the same at every replay, so what is reported belongs to all of them
        moment = Moment(step, self.total_steps, self.steps_per_epoch, logged or self.replayed is not None)
        self.method.begin(moment)
        rates = self._set_rates(step)
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
        self.optimizer.step(applied, scales, [*self.method.averages(), *self.average.averages()])
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(applied)
        if self.loss_scale is not None:
            self.loss_scale.move(applied)
        self.skipped += ~applied
        self.skipped_in_a_row = torch.where(applied, 0, self.skipped_in_a_row + 1)
        return report | {"gradient_norm": norm} | rates

    def _set_rates(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay of a step, as functions of it alone."""
        settings = self.settings
        start, end = settings.start_lr / self.peak_lr, settings.end_lr / self.peak_lr
        share = share_of_peak(settings.schedule, step, self.total_steps, self.warmup_steps, start, end, settings.drops)
        rates = {"lr": set_lr(self.optimizer, share)}
        if settings.weight_decay_end is not None:
            decay = cosine(step, self.total_steps, settings.weight_decay, settings.weight_decay_end)
            set_decay(self.optimizer, decay / settings.weight_decay)
            rates["weight_decay"] = decay
        return rates

    def gradients(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch's gradients, averaged over ranks, and what the method reports of it."""
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
