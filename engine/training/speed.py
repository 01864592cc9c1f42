"""How fast a stage trains: images per second, MFU and waiting between two logged steps, time set aside left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class Speed:
    """Measures one stage after another.

    Args:
        peak_flops: peak FLOP/s of all devices of the run together; MFU is known only with it and a stage's cost.
    """

    def __init__(self, peak_flops: float | None):
        self._peak_flops = peak_flops
        self._aside = 0.0
        self._mark: tuple[float, int] | None = None

    def begin(self, images_per_step: int, flops_per_image: float | None) -> None:
        """A stage begins."""
        self._images_per_step, self._flops_per_image = images_per_step, flops_per_image
        self._mark, self._began = None, self._clock()
        self._since = 0, 0.0  # images and operations since the mark, of steps that cost otherwise
        self._seconds, self._images, self._waited = 0.0, 0, 0.0

    def cost(self, step: int, images_per_step: int, flops_per_image: float) -> None:
        """After `step`, what an image costs has changed, or how many a step has."""
        if self._mark is not None:
            self._since = self._done(step)
            self._mark = (self._mark[0], step)
        self._images_per_step, self._flops_per_image = images_per_step, flops_per_image

    def tick(self, step: int) -> float | None:
        """`step` is finished. A stage's first update compiles and loads kernels: rates are measured from its end on. Returns the
        seconds that it took, else None."""
        if self._mark is not None:
            return None
        self._mark = (self._clock(), step)
        return self._mark[0] - self._began

    def rates(self, step: int, waited: float | None = None) -> dict[str, float]:
        """images_per_second since the last call or the stage's first tick; mfu and waiting_for_data (0 to 1) where known.

        Args:
            waited: seconds of this time in which steps waited for images.
        """
        if self._mark is None:
            return {}
        now, (then, marked_step) = self._clock(), self._mark
        if step <= marked_step or now <= then:
            return {}
        seconds, (images, flops) = now - then, self._done(step)
        self._mark, self._since = (now, step), (0, 0.0)
        self._seconds, self._images, self._waited = (
            self._seconds + seconds,
            self._images + images,
            self._waited + (waited or 0),
        )
        rates = {"images_per_second": images / seconds}
        if flops and self._peak_flops:
            rates["mfu"] = flops / seconds / self._peak_flops
        if waited is not None:
            rates["waiting_for_data"] = min(1.0, waited / seconds)
        return rates

    def _done(self, step: int) -> tuple[int, float]:
        """Images and operations since the mark."""
        images, flops = self._since
        more = (step - self._mark[1]) * self._images_per_step
        return images + more, flops + more * (self._flops_per_image or 0.0)

    def of_stage(self) -> dict[str, float]:
        """images_per_second and waiting_for_data of all that `rates` was asked of this stage; nothing where it never was."""
        if not self._seconds:
            return {}
        waiting = min(1.0, self._waited / self._seconds)
        return {"images_per_second": self._images / self._seconds, "waiting_for_data": waiting}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside is left out."""
        began = monotonic()
        try:
            yield
        finally:
            self._aside += monotonic() - began

    def _clock(self) -> float:
        return monotonic() - self._aside
