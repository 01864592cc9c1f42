"""Judging the encoders of a study: by which protocols, on the same splits for all, and not twice."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine import evals
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.data.sources import ImageSet
from engine.evals import report
from engine.evals.features import Encoder
from engine.studies import Study

SPLITS_SEED = 0  # the low-shot splits are the same for all runs, whatever their seed


@dataclass
class Judge:
    """Evaluates encoders by the study's protocols, and keeps what it found; equal weights are not judged twice.

    Attributes:
        images: train and test set.
        settings: of each protocol.
        extras: parts of the reports.
        data: as `engine.eval --data` takes it.
    """

    images: tuple[ImageSet, ImageSet]
    settings: dict[str, Any]
    extras: Extras
    device: torch.device
    precision: str
    threads: int | None = None
    data: str = ""

    def figures(self, name: str, encoder: Encoder, folder: Path, source: str = "") -> dict[str, list[float]]:
        """Accuracies by figure, one for each split, from `folder` or computed and left there.

        Args:
            source: what `engine.eval --weights` takes for this encoder; "" where it takes nothing.

        Raises:
            BadInput: the features are not finite.
        """
        judged = {
            "weights": encoder.fingerprint,
            "pooling": encoder.pooling,
            "data": str(self.images[0].root),
            "images": [len(images) for images in self.images],
            "settings": {protocol: asdict(chosen) for protocol, chosen in self.settings.items()},
            "precision": self.precision,
        }
        judged = json.loads(json.dumps(judged, default=str))
        try:
            stored = json.loads((folder / "results.json").read_text())
        except (OSError, ValueError):
            stored = {}
        if stored.get("run", {}).get("judged") != judged:
            features: dict = {}
            found = evals.evaluate(
                {name: encoder}, self.images, tuple(self.settings), settings=self.settings, seed=SPLITS_SEED,
                device=self.device, precision=self.precision, threads=self.threads, features=features,
            )  # fmt: skip
            command = self.command(source) if source else None
            commands = {(name, protocol): command for protocol in self.settings if command}
            report.write(
                folder, found, {"command": command, "judged": judged}, features, self.extras, commands=commands
            )
            stored = json.loads((folder / "results.json").read_text())
        return self._by_name({result["protocol"]: result for result in stored["results"]})

    def command(self, source: str) -> str:
        """What repeats an evaluation."""
        lowshot = self.settings["lowshot"]
        words = [
            "python",
            "-m",
            "engine.eval",
            "--weights",
            source,
            "--protocol",
            *self.settings,
            "--seed",
            SPLITS_SEED,
        ]
        words += ["--lowshot.shots", *lowshot.shots, "--lowshot.percents", *lowshot.percents]
        words += ["--data", self.data] if self.data else []
        return shlex.join(map(str, words))

    @staticmethod
    def _by_name(results: dict[str, dict]) -> dict[str, list[float]]:
        figures = {"k-NN": [results["knn"]["values"]["top-1"]]} if "knn" in results else {}
        lowshot = results["lowshot"]
        penalty = f"{lowshot['settings']['penalty']:g}"
        figures |= {name: sweep[penalty] for name, sweep in lowshot["details"]["top-1 by lambda"].items()}
        if "linear" in results:
            figures["linear"] = [results["linear"]["values"]["last-epoch top-1 (best lr)"]]
        if "cluster" in results:
            figures["cluster ACC"] = results["cluster"]["details"]["runs"]["ACC"]
        return figures


def protocols(study: Study, images: tuple[ImageSet, ImageSet], say: Callable[[str], None]) -> dict[str, Any]:
    """Settings of what the data allow: low-shot with the subsets that fit, and the study's other protocols.

    Raises:
        BadInput: not one low-shot subset fits, or there are no labels.
    """
    lowshot, fitting, refusals = evals.protocol("lowshot"), {"shots": [], "percents": []}, []
    for kind, size in [*(("shots", n) for n in study.shots), *(("percents", share) for share in study.percents)]:
        none = {"shots": (), "percents": ()}
        try:
            lowshot.check(*images, lowshot.Settings(**(none | {kind: (size,)})))
            fitting[kind].append(size)
        except BadInput as error:
            refusals.append(error)
    if not any(fitting.values()):
        raise refusals[0]
    for refusal in refusals:
        say(f"left out: {refusal}")
    settings = {"lowshot": lowshot.Settings(**{kind: tuple(sizes) for kind, sizes in fitting.items()})}
    for name in study.protocols:
        chosen = evals.protocol(name).Settings()
        try:
            evals.protocol(name).check(*images, chosen)
            settings[name] = chosen
        except BadInput as error:
            say(f"left out: {error}")
    return settings
