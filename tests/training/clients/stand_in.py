"""What the stand-ins of this folder share.

They have what a run uses of wandb, trackio and mlflow, under the names of the real arguments, and write each call down as a
line of JSON in the file that STAND_IN_CALLS names; the call that STAND_IN_FAILS names fails.
"""

import json
import os
from pathlib import Path


def note(call: str, **what: object) -> None:
    if call == os.environ.get("STAND_IN_FAILS"):
        raise OSError(f"{call}: no answer\nfrom http://me:secret@tracking.test")
    with open(os.environ["STAND_IN_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **what}) + "\n")


def noted(call: str) -> list[dict]:
    path = Path(os.environ["STAND_IN_CALLS"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["call"] == call]
