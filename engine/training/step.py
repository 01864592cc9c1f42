"""One update: forward, backward, guard, optimiser, averages. Nothing here waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.core import dist
from engine.core.optim import Average, Moment, cosine, share_of_peak
from engine.methods.base import Method
from engine.training.optimizers import (
    AdamW,
    Larc,
    clip_scales,
    drop_frozen,
    gradient_norms,
    set_decay,
    set_lr,
    total_norm,
)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


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
        precision: "fp32", or "bf16" for autocast (weights and optimiser stay fp32).
        accumulate: micro-batches per update.

    Attributes:
        skipped, skipped_in_a_row: int64 scalars on the device: updates left out because loss or gradients were not finite.
    """

    def __init__(self, method: Method, total_steps: int, precision: str = "fp32", accumulate: int = 1):
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
        self.parallel = dist.parallel(method)
        self.average = WeightAverage(method)
        device = self.trained[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(
        self, step: int, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]
    ) -> dict[str, Tensor | float]:
        """Update from this rank's rows of a batch.

        Returns:
            What the method reports, as device scalars (this rank's mean), the gradient norm, the lr used, and the weight decay
            where it changes.
        """
        moment = Moment(step, self.total_steps, self.steps_per_epoch)
        self.method.begin(moment)
        rates = self._set_rates(step)
        reports = [self._backward(*micro) for micro in self._micro_batches(images, ids, drawn)]
        report = {name: torch.stack([r[name].detach() for r in reports]).mean() for name in reports[0]}
        drop_frozen(self.optimizer, moment.epoch)
        norms = gradient_norms(self.optimizer)
        norm = total_norm(norms.values())
        applied = dist.all_true(torch.isfinite(norm) & torch.isfinite(report["loss"]))
        s = self.settings
        scales = clip_scales(self.optimizer, norms, s.clip_norm, s.clip_over) if s.clip_norm else {}
        self.optimizer.step(applied, scales, [*self.method.averages(), *self.average.averages()])
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(applied)
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

    def _micro_batches(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Iterator[tuple]:
        size = len(ids) // self.accumulate
        for index in range(self.accumulate):
            rows = slice(index * size, (index + 1) * size)
            last = index == self.accumulate - 1
            yield tuple(view[rows] for view in images), ids[rows], {k: v[rows] for k, v in drawn.items()}, last

    def _backward(
        self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor], last: bool
    ) -> dict[str, Tensor]:
        device = ids.device.type
        with dist.without_sync(self.parallel) if not last else torch.enable_grad():
            with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
                report = self.parallel(images, ids, drawn)
            (report["loss"] / self.accumulate).backward()
        return report
