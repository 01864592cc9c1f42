"""Stands in for trackio, which says much."""

import os

from stand_in import note

FOLDER = os.environ["TRACKIO_DIR"]


class Run:
    def log(self, metrics: dict, step: int | None = None) -> None:
        note("trackio.log", values=metrics, step=step)


def init(project: str, name: str | None = None, config: dict | None = None, resume: str = "never") -> Run:
    print("* Trackio project initialized")
    note("trackio.init", id=name, project=project, config=config, resume=resume, folder=FOLDER)
    return Run()


def finish() -> None:
    print("* Run finished")
    note("trackio.finish")
