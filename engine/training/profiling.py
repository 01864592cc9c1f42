"""`--profile N`: what N steps do with time and memory, in the run folder's profile/.

* operators.txt, to be read first: the costliest operators, with their time and the memory they take and give back.
* trace.json.gz: when every operator and kernel ran, for ui.perfetto.dev or chrome://tracing.
* memory.pickle, on GPUs: every piece of device memory that was taken, and the lines of code that took it. It is the format of
  pytorch.org/memory_viz, which shows it in the browser; nothing here ever reads it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import monotonic

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from engine.core.durable import write_folder
from engine.training.log import RunLog

# of a stage in this process: steps before it compile and fill caches, and the profiler warms up in the last of them
FIRST = 4
ROWS = 60  # operators in the table
ALLOCATIONS = 1_000_000  # the record of device memory goes back so far

Watch = Callable[[], AbstractContextManager[None]]


class Profile:
    """Watches `steps` steps once: from the fourth on of the first stage in this process that has as many; 0 watches none.

    A probe or a checkpoint between two of these steps is watched with them. Steps under watch take longer, so the rates logged of
    them are lower.

    Args:
        steps: how many; fewer where the stage ends before, or is stopped.
        folder: the run folder.
        device: whose time and memory.
        log: told where the profile lies; writing it doesn't count as training time.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, log: RunLog):
        self._steps, self._folder, self._device, self._log = steps, folder / "profile", device, log
        self._profiler: profile | None = None

    @contextmanager
    def stage(self, name: str, done: int, left: int) -> Iterator[Watch]:
        """What to enter around each of a stage's `left` steps, which follow step `done` of the run."""
        if self._steps and left < FIRST:
            self._log.message(f"stage {name} is not profiled: fewer than {FIRST} of its steps are left")
        if not self._steps or left < FIRST:
            yield nullcontext
            return
        self._name, self._done, self._seen = name, done, 0
        self._last = min(FIRST - 1 + self._steps, left)
        try:
            yield self._step
        finally:
            self._end()  # a stop or a failure came first: what was seen until then is kept

    def _step(self) -> AbstractContextManager[None]:
        return self._watched() if self._steps else nullcontext()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._seen += 1
        if self._seen == FIRST - 1:
            self._start()
        elif self._seen == FIRST:
            self._begin()
        elif self._seen > FIRST:
            self._profiler.step()
        yield
        if self._seen == self._last:
            self._end()

    def _start(self) -> None:
        """The profiler warms up for a step, which it forgets."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        turns = schedule(wait=0, warmup=1, active=self._last - FIRST + 1)
        self._profiler = profile(
            activities=kinds, schedule=turns, on_trace_ready=self._write, profile_memory=True, acc_events=True
        )
        self._profiler.start()

    def _begin(self) -> None:
        """The warm-up ends here, so that a probe or a checkpoint after it is forgotten as well."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATIONS)
        self._profiler.step()
        self._began = monotonic()

    def _end(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._took = monotonic() - self._began if self._seen >= FIRST else 0.0
            with self._log.aside():
                profiler.stop()
        except (OSError, RuntimeError) as error:
            self._log.message(f"the profile is left out: {' '.join(str(error).split())}")
            self._steps = 0
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: profile) -> None:
        count, first, last = self._seen - FIRST + 1, self._done + FIRST, self._done + self._seen
        which = f"step {first:,}" if count == 1 else f"steps {first:,} to {last:,}"
        files = ["operators.txt", "trace.json.gz", *(["memory.pickle"] if self._device.type == "cuda" else [])]

        def fill(folder: Path) -> None:
            of_device = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=of_device, row_limit=ROWS, max_name_column_width=80)
            took = f"{self._took / count * 1000:,.1f} ms each under watch"
            (folder / files[0]).write_text(
                f"{which} of the run, stage {self._name}, on {self._device}: {took}\n{table}"
            )
            profiler.export_chrome_trace(str(folder / files[1]))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(folder / files[2]))

        write_folder(self._folder, fill)
        self._steps = 0
        self._log.message(f"profile of {which}: {', '.join(files)} in {self._folder}")
