"""What a step of each method launches and moves on the device that computes nothing, as it was counted last.

    python -m tests.null_device.figures [METHOD ...]

counts again, all methods or these, for both chips, and writes `figures.json`: do it when a change of the engine moves figures on
purpose (the difference then belongs to what is reviewed), or when torch is another one (then all of them).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from engine import methods
from engine.null_device import device

FILE = Path(__file__).with_name("figures.json")
Figures = dict[str, dict[str, dict[str, dict[str, int]]]]  # by method, chip, stage


def stored() -> tuple[str, Figures]:
    """The torch they were counted with, and the figures."""
    content = json.loads(FILE.read_text())
    return content["torch"], content["figures"]


def of_answer(answer: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By stage, from what `steps` prints."""
    return {stage: report["figures"] | {"graphs": report["graphs"]} for stage, report in answer.items()}


def main(names: list[str]) -> int:
    version, figures = stored() if FILE.exists() else ("", {})
    if version != torch.__version__:
        if figures and names:
            print(
                f"error: the figures are of torch {version}, here is {torch.__version__}; count all methods",
                file=sys.stderr,
            )
            return 2
        figures = {}
    for name in names or methods.names():
        for chip in device.CHIPS:
            # code compiled for another method's first sizes would be taken from a cache that they share
            with device.built() as on_device:
                answer = device.answer("tests.null_device.steps", [name], on_device(chip))
            for stage, report in answer.items():
                print(f"{name} sm_{chip} {stage}: {'; '.join(report['faults']) or 'sound'}", flush=True)
            figures.setdefault(name, {})[f"sm_{chip}"] = of_answer(answer)
            content = {"torch": torch.__version__, "figures": dict(sorted(figures.items()))}
            FILE.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
