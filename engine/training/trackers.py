"""Where a run's numbers are shown beside its own record: TensorBoard."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """The folder of event files that TensorBoard reads; events past the checkpoint a run was resumed at are hidden."""

    def __init__(self, folder: Path, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: dry runs and other ranks don't

        self._writer = SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)

    def log(self, step: int, kind: str, values: Mapping[str, float | str], now: float) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(f"{kind}/{name}", value, step, now)
            else:
                self._writer.add_scalar(f"{kind}/{name}", value, step, walltime=now)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
