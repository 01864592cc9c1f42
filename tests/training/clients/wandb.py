"""Stands in for wandb."""

from pathlib import Path

from stand_in import note, noted


class Settings:
    def __init__(self, *, console: str, silent: bool):
        assert console == "off" and silent, "the terminal is the progress display's"


class Run:
    def __init__(self, id: str, resumed: bool, mode: str, folder: Path):
        self.id, self.resumed, self.offline = id, resumed, mode == "offline"
        self.dir, self.url = str(folder / "wandb" / f"run-{id}" / "files"), f"https://wandb.test/{id}"

    def log(self, data: dict, step: int | None = None) -> None:
        note("wandb.log", values=data, step=step)

    def finish(self, exit_code: int | None = None) -> None:
        note("wandb.finish", exit_code=exit_code)


def init(*, project, name, id, resume, mode, dir, config, settings) -> Run:
    assert isinstance(settings, Settings)
    online = {entry["id"] for entry in noted("wandb.init") if entry["mode"] == "online"}
    run = Run(id or f"w{len(noted('wandb.init'))}", resume == "allow" and id in online, mode, Path(dir))
    note("wandb.init", id=run.id, project=project, name=name, resume=resume, mode=mode, dir=str(dir), config=config)
    return run
