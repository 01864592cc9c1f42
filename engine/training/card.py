"""What a run folder says about itself, in the words of a model card."""

import json
from pathlib import Path

from engine.core.errors import BadInput

FIGURES = ("knn ", "linear ")  # of the evaluation, what a card shows


def is_run(folder: Path) -> bool:
    """Whether this is a run's folder, rather than an exported one."""
    return (folder / "export").is_dir() and (folder / "config.json").is_file()


def describe(folder: Path) -> dict[str, str]:
    """Method, recipe, data and, of a run that was finished, steps and figures of its last encoder, by what they are called.

    Of the data only the name is told, not where it lay. Raises BadInput where config.json or summary.json cannot be read.
    """
    config = _read(folder / "config.json")
    if not {"train", "source", "stages"} <= config.keys():
        raise BadInput(
            f"{folder / 'config.json'} is not that of a run, so it cannot be described; export {folder / 'export'}."
        )
    summary = _read(folder / "summary.json") if (folder / "summary.json").exists() else {}
    train, stages = config["train"], [stage["method"] for stage in config["stages"]]
    data = Path(train["data"].partition(":")[0]).name or "the handwritten digits that ship inside scikit-learn"
    told = {
        "Method": train["method"] + (f" (stages {', '.join(stages)})" if len(stages) > 1 else ""),
        "Recipe": config["source"],
        "Data": data,
        "Epochs": ", ".join(str(stage["epochs"]) for stage in config["stages"]),
        "Seed": str(train["seed"]),
    }
    told |= {"Steps": f"{summary['steps']:,}"} if summary else {"Steps": "not finished when it was exported"}
    judged = list(summary.get("evaluation", {}).values())
    figures = judged[-1] if judged else {}  # in the order of the stages
    return told | {
        f"{name}, held-out val split": f"{100 * value:.1f} %"
        for name, value in figures.items()
        if name.startswith(FIGURES)
    }


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read, so the run cannot be described: {error}") from error
