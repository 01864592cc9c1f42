"""Where a run's numbers are shown beside its own record: TensorBoard always, and the trackers that `--track` names.

A tracker shows the same values under the same names, KIND/NAME (train/loss, probe/knn_top1), by the same step, and has
config.json as its run's configuration. It stays on this machine unless its own environment variables say otherwise:

* wandb is offline, in the run folder's wandb/, unless WANDB_MODE is set; words (a verdict) stand in its history.
* trackio keeps a database in the run folder's trackio/, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set; words
  stand beside the numbers.
* mlflow keeps a database in the run folder's mlflow/, unless MLFLOW_TRACKING_URI is set; the newest words stand in a tag.

trackers.json in the run folder says which run of each tracker this one is, so that a resumed run goes on there. A tracker that
doesn't hold what came before (it is new to the run, or wandb is offline, where what is uploaded last replaces the rest) is given
that first, from metrics.jsonl. Steps past the checkpoint are made a second time on resume, and trackio and mlflow then hold their
values, which are the same, twice.
"""

import io
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.training.metrics import read_metrics, values_of

PROJECT = "tessera"


class TensorBoard:
    """The folder of event files that TensorBoard reads; events past the checkpoint a run was resumed at are hidden."""

    def __init__(self, folder: Path, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: dry runs and other ranks don't

        _leave_it_to_the_caller()
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


@cache
def _leave_it_to_the_caller() -> None:
    """What fails in TensorBoard's writing thread is raised by the next call of its writer: the thread needn't print it, too."""
    printed = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            printed(args)

    threading.excepthook = hook


class Tracker(Protocol):
    """One run in a tracker, made of the run folder, the configuration, and the run's id there if it is known.

    Attributes:
        id: what the run is found by when it is resumed.
        fresh: whether it holds nothing yet.
        where: where to look at it, in words.
    """

    id: str
    fresh: bool
    where: str

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None): ...

    def log(self, step: int, values: Mapping[str, float | str], now: float) -> None:
        """Show the values of a step. `now`: seconds since 1970."""

    def close(self, whole: bool) -> None:
        """End it; `whole`: the run reached its last step."""


class Wandb:
    """Weights & Biases: a run by its id. Offline, every process leaves a folder of its own, of which the newest is whole."""

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None):
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        # without a network the last upload would be waited for without end; what is missing then lies in the folder
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=known,
            resume=None if mode in ("offline", "dryrun") else "allow",
            mode=mode,
            dir=folder,
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id, self.fresh = self._run.id, not self._run.resumed
        offline = f"offline, to be uploaded by: wandb sync {Path(self._run.dir).parent}"
        self.where = offline if self._run.offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float | str], now: float) -> None:
        self._run.log(dict(values), step=step)

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class Trackio:
    """trackio: a run by its name."""

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None):
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))  # read when it is imported
        import trackio

        self._trackio, self.fresh = trackio, known is None
        # it resumes by name, and a database may hold many runs
        self.id = known or f"{folder.resolve().name}-{secrets.token_hex(3)}"
        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(project=PROJECT, name=self.id, config=config, resume="allow")
        remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
        shown = f"to be seen by: TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {PROJECT}"
        self.where = f"{self.id}, where {remote[0]} says" if remote else f"{self.id}, {shown}"

    def log(self, step: int, values: Mapping[str, float | str], now: float) -> None:
        self._run.log(dict(values), step=step)

    def close(self, whole: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


class Mlflow:
    """MLflow: a run by its id, through a client of its own, so that nothing of the process's MLflow is set."""

    def __init__(self, folder: Path, config: dict[str, Any], known: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # a failure is told in one line, not in a page
        self._metric, self._tag = Metric, RunTag
        own = folder.resolve() / "mlflow"
        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store:
            own.mkdir(exist_ok=True)
        database = f"sqlite:///{own / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=store or database)
        self.fresh = known is None
        if known is None:
            experiment = self._experiment(None if store else (own / "artifacts").as_uri())
            self.id = self._client.create_run(experiment, run_name=own.parent.name).info.run_id
            self._client.log_batch(self.id, params=[Param(*pair) for pair in _flat(config).items()])
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")
        # a password may stand in the address
        shown = (
            "where MLFLOW_TRACKING_URI says" if store else f"to be seen by: mlflow ui --backend-store-uri {database}"
        )
        self.where = f"run {self.id}, {shown}"

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)

    def log(self, step: int, values: Mapping[str, float | str], now: float) -> None:
        words = {name: value for name, value in values.items() if isinstance(value, str)}
        metrics = [self._metric(n, value, round(now * 1000), step) for n, value in values.items() if n not in words]
        self._client.log_batch(self.id, metrics=metrics, tags=[self._tag(*pair) for pair in words.items()])

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if whole else "KILLED")


KNOWN: dict[str, type[Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def check(names: Sequence[str]) -> None:
    """Raise BadInput for a tracker that is unknown, or whose package is not installed. Nothing is imported."""
    for name in names:
        if name not in KNOWN:
            raise BadInput(f"--track is {name!r}; choose one or more of {', '.join(KNOWN)}.")
        # mlflow's small package comes without what its own database needs
        needed = (name, "sqlalchemy") if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") else (name,)
        for package in needed:
            if not _installed(package):
                raise BadInput(
                    f"--track {name} needs the Python package {package}, which is not installed; "
                    f"install it (pip install {name}) or leave {name} out."
                )


class Trackers:
    """The trackers of a run, each held apart from the run: one that fails is told of in a line and left out from there on.

    Args:
        names: of `KNOWN`.
        say: prints a line.
    """

    def __init__(self, names: Sequence[str], say: Callable[[str], None]):
        self._names, self._say = tuple(dict.fromkeys(names)), say
        self._running: dict[str, Tracker] = {}

    def open(self, folder: Path) -> None:
        """Begin, or go on with, a run in each; its configuration is the folder's config.json."""
        for name in self._names:
            self._guarded(name, lambda name=name: self._begin(name, folder))

    def log(self, step: int, kind: str, values: Mapping[str, float | str], now: float) -> None:
        named = _named(kind, values)
        for name, tracker in list(self._running.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, named, now))

    def close(self, whole: bool) -> None:
        for name, tracker in list(self._running.items()):
            self._guarded(name, lambda tracker=tracker: tracker.close(whole))
        self._running.clear()

    def _begin(self, name: str, folder: Path) -> None:
        listed = folder / "trackers.json"
        ids = json.loads(listed.read_text()) if listed.exists() else {}
        tracker = KNOWN[name](folder, json.loads((folder / "config.json").read_text()), ids.get(name))
        if tracker.id != ids.get(name):
            text = json.dumps(ids | {name: tracker.id}, indent=1)
            write_file(listed, lambda aside: aside.write_text(text))
        self._running[name] = tracker
        self._say(f"{name}: {tracker.where}")
        for record in read_metrics(folder / "metrics.jsonl") if tracker.fresh else ():
            tracker.log(record["step"], _named(record["kind"], values_of(record)), record["time"])

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._running.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            reason = re.sub(r"://[^/@\s]*@", "://", reason)  # no password of an address
            self._say(f"--track {name} failed and is left out from here on ({reason[:300]})")


def _named(kind: str, values: Mapping[str, float | str]) -> dict[str, float | str]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON as words by dotted name."""
    if not isinstance(value, dict | list) or not value or (isinstance(value, list) and not isinstance(value[0], dict)):
        return {name: str(value)}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in entries for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()}


def _installed(package: str) -> bool:
    spec = find_spec(package)
    return (
        spec is not None and spec.origin is not None
    )  # a mere folder of that name, such as wandb leaves, has no origin
