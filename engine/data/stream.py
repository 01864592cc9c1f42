"""Runs a DALI pipeline over numbered steps, and goes on without a file that it cannot decode.

A thread of its own asks the pipeline for the next step while the last one is used: what is drawn of a step, handing it to DALI
and waiting for the images take nothing of the time of who trains. What fails there is mended where the step is asked for.
"""

import os
import sys
import time
import warnings
from collections.abc import MutableSequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode

from engine.core.errors import BadInput
from engine.data import screen
from engine.data.batch import Batch
from engine.data.encoded import ByName, Plan, ReadAhead, source
from engine.data.graph import Graph, decode, with_header
from engine.data.sources import ImageSet, check_bad, substitutes, usable_cpus

MAX_THREADS = 16
QUEUE = 2  # batches made ahead
PAUSES = (1, 2, 4, 8, 16, 32, 60)  # s: storage that is away comes back soon, or somebody has to see to it


class Files:
    """What is known of the files by now: the verdicts of screening and those of training.

    Args:
        patient: go on with more bad files than the limit, as long as there is a good one: who reads asks for `too_many`, so that
            a run can end where all its processes do, with all that it has.
    """

    def __init__(self, images: ImageSet, ledger: MutableSequence[tuple[str, str]], patient: bool = False):
        self.images, self.ledger, self.patient = images, ledger, patient
        self.good, self.substitute = images.good, images.substitute
        self.bad = (*images.bad, *ledger)
        if ledger:  # a resumed run knows what it had found
            found = {path for path, _ in ledger}
            self.good &= np.array([path not in found for path in images.paths])
            self.substitute = substitutes(self.good)

    def condemn(self, index: int, reason: str) -> None:
        """Note a file as bad. Raises BadInput where these are too many now, or all."""
        entry = (self.images.paths[index], reason)
        self.ledger.append(entry)
        self.bad += (entry,)
        self.good[index] = False
        check_bad(self.bad, len(self.images), 1.0 if self.patient else self.images.bad_limit)
        self.substitute = substitutes(self.good)

    @property
    def too_many(self) -> bool:
        """Whether more files are bad than the limit allows."""
        return len(self.bad) > self.images.bad_limit * len(self.images)


class Stream:
    """Runs a pipeline over numbered steps; builds it anew, at the same step, without a file that it cannot decode.

    `branches`: whether the graph has an `if` about a node, which costs the build a rewriting of its functions.
    """

    def __init__(
        self,
        files: Files,
        graph: Graph,
        branches: bool,
        plan: Plan,
        batch: int,
        device: torch.device,
        threads: int | None,
        start: int,
    ):
        self._files, self._graph, self._branches, self._plan, self._batch = files, graph, branches, plan, batch
        on_gpu = device.type == "cuda"
        self._device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._threads = threads or max(1, min(MAX_THREADS, usable_cpus() // local_processes))
        self._step, self._retried = start, -1
        self._flying: dict[int, np.ndarray] = {}
        self._pipeline: Pipeline | None = None
        self._source: ByName | ReadAhead | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Future | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        while True:
            coming, self._coming = self._coming or self._ask(), None
            try:
                outputs = coming.result()
                break
            except RuntimeError as error:
                self._mend(error)
        step, ids = self._step, self._flying.pop(self._step)
        self._step += 1
        # the dynamic executor gives the buffers away: they are not written again while a tensor refers to them, nor before a GPU
        # has done what was launched until then
        views = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        self._coming = self._ask()
        return Batch.of(self._files.images, step, ids, views)

    def _ask(self) -> Future:
        self._pipeline = self._pipeline or self._build()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="images")
        # without a stream the thread waits for what is made on a GPU, and the stream of the steps doesn't
        return self._thread.submit(self._pipeline.run)

    def close(self) -> None:
        """Frees the pipeline; batches already given stay valid."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._coming = None
        self._pipeline = None
        if self._source is not None:
            self._source.close()
        self._flying.clear()

    def _build(self) -> Pipeline:
        first = self._step
        names = list(self._plan(first)[1])
        read = self._source = source(self._files.images, self._plan, self._threads)

        def give(iteration: int) -> list:
            step = read(first + iteration)
            self._flying[first + iteration] = step.ids
            return [step.images(), *(step.inputs[name] for name in names)]

        def define() -> tuple[DataNode, ...]:
            images, *given = fn.external_source(give, num_outputs=1 + len(names), batch=True)
            return self._graph(with_header(read.encoded(images)), dict(zip(names, given)), self._decoder)

        pipeline = pipeline_def(define, enable_conditionals=self._branches)(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=QUEUE,
            exec_dynamic=True,
        )
        return _built(pipeline)

    @property
    def _decoder(self) -> str:
        return "cpu" if self._device_id is None else "mixed"

    def _mend(self, error: RuntimeError) -> None:
        """Finds the bad files of the first failing step in flight; without one, tries the step once more."""
        flying, self._flying = self._flying, {}
        self.close()
        for step in sorted(flying):
            if found := self._undecodable(flying[step]):
                for index, reason in found.items():
                    self._files.condemn(index, reason)
                return
        if self._retried == self._step:
            raise error
        self._retried = self._step

    def _undecodable(self, ids: np.ndarray) -> dict[int, str]:
        """{id: reason} of the files that fail when decoded alone. Where most cannot even be read, it is the storage that is away:
        that is waited for, and is no fault of theirs.

        Raises:
            BadInput: it stays away.
        """
        root, ids = self._files.images.root, np.unique(ids)
        for pause in (*PAUSES, None):
            found, unread = self._looked_at(ids)
            if unread <= len(ids) // 2 and (not unread or root.is_dir()):
                return found
            what = f"{unread} of {len(ids)} images of a batch in {root} cannot be read ({next(iter(found.values()))})"
            if pause is None:
                raise BadInput(
                    f"{what}, after {sum(PAUSES)} s of waiting; see whether the storage is there, then --resume."
                )
            print(f"{what}: waiting {pause} s for the storage", file=sys.stderr, flush=True)
            time.sleep(pause)
        raise AssertionError

    def _looked_at(self, ids: np.ndarray) -> tuple[dict[int, str], int]:
        """{id: reason} of those that the pipeline's decoder refuses, and how many of them could not be read at all."""
        images, found, pipeline, unread = self._files.images, {}, None, 0
        for index in ids.tolist():
            pipeline = pipeline or _one_file_pipeline(self._device_id, self._decoder)
            try:
                (pixels,) = pipeline.run(encoded=[images.read(index)])
                height, width, _ = pixels.shape()[0]
                if (width, height) != tuple(images.sizes[index]):
                    found[index] = f"changed: {width}x{height} pixels now"
            except (RuntimeError, OSError) as error:
                unread += isinstance(error, OSError)
                _, reason = screen.inspect(partial(images.open, index), decode=True)
                found[index], pipeline = reason or "unreadable: the decoder refuses it", None
        return found, unread


def _one_file_pipeline(device_id: int | None, decoder: str) -> Pipeline:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(decode(with_header(fn.external_source(name="encoded")), decoder))
    return _built(pipeline)


def _built(pipeline: Pipeline) -> Pipeline:
    """Before the first one of a process that has a GPU, DALI warns where NPP isn't installed: a library that only two of its
    operators call (debayer, remap), neither of them here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* NPP is typically")
        pipeline.build()
    return pipeline
