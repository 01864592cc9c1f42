"""A run judges itself at its end: the encoder of every stage that trains one, and raw pixels to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from engine import methods
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.evals import judging, registry, report
from engine.evals.command_line import RAW, Eval, command
from engine.evals.features import raw_pixels
from engine.model import vit, weights
from engine.training.folder import of_stage
from engine.training.parts import Parts

PROTOCOLS = ("knn", "linear", "lowshot", "cluster")
EVALUATED_HERE = 100_000  # training images up to which a run evaluates itself at the end
PIXELS = "raw pixels"


def evaluate(parts: Parts, folder: Path, extras: Extras) -> dict[str, dict[str, float]]:
    """Judge the encoder of every stage that trains one, and raw pixels; by weights, the figures by name. Each protocol, and the
    report, is one of the `extras`; one that does not go with the data is told and no failure."""
    say = extras.say
    command = f"python -m engine.eval --weights {folder}" + (
        f" --data {parts.plan.train.data}" if parts.plan.train.data else ""
    )
    if parts.val_images is None or parts.val_images.labels is None:
        say("no labelled val split: nothing to evaluate on.")
        return {}
    if len(parts.train_images) > EVALUATED_HERE:
        say(f"more than {EVALUATED_HERE:,} images: evaluate at leisure with {command}")
        return {}
    encoders: dict[str, object] = {}
    sources = {"given weights": parts.plan.train.weights} if parts.plan.train.weights else {}
    for stage in parts.stages:
        if methods.get(stage.name).trains_encoder:
            sources[stage.name] = of_stage(folder, stage)
    for name, source in sources.items():
        encoder = vit.create(parts.plan.model, **parts.plan.encoder)
        weights.load(encoder, source)
        encoders[name] = encoder.to(parts.ranks.device)
    encoders[PIXELS] = raw_pixels()  # last: differences are those to the first
    how = {"device": parts.ranks.device, "precision": parts.precision, "threads": parts.plan.train.threads or None}
    fitting = []
    for name, settings in registry.settings_for(PROTOCOLS, seed=parts.plan.train.seed).items():
        try:
            registry.protocol(name).check(parts.train_images, parts.val_images, settings)
            fitting.append(name)
        except BadInput as error:
            say(f"evaluation by {name} is left out: {error}")
    if not fitting:
        return {}
    features = judging.encode(encoders, parts.train_images, parts.val_images, **how)
    results = []
    for name in fitting:
        with extras.of(f"evaluation by {name}"):
            try:
                results += judging.evaluate(
                    features, protocols=(name,), seed=parts.plan.train.seed, device=parts.ranks.device
                )
            except BadInput as error:
                say(f"evaluation by {name} is left out: {error}")
    if not results:
        return {}
    results.sort(key=lambda result: list(encoders).index(result.weights))
    results = [replace(result, data=parts.plan.train.data or "digits") for result in results]
    with extras.of("report"):
        report.write(
            folder / "evaluation",
            results,
            {"device": str(parts.ranks.device), "precision": parts.precision},
            features,
            extras,
            commands=_commands(parts, sources, fitting),
        )
    shown = [
        replace(result, weights=f"{PIXELS}\n(no model)") if result.weights == PIXELS else result for result in results
    ]
    Console().print(report.table(shown, f"held-out {parts.val_images.split} split, {len(parts.val_images):,} images"))
    figures: dict[str, dict[str, float]] = {}
    for result in results:
        figures.setdefault(result.weights, {}).update({f"{result.protocol} {k}": v for k, v in result.values.items()})
    return figures


def _commands(parts: Parts, sources: Mapping[str, str | Path], fitting: Sequence[str]) -> dict[tuple[str, str], str]:
    """By weights and protocol, what `engine.eval` repeats the figures of this run with."""
    train = parts.plan.train
    shared = {name: getattr(train, name) for name in ("data", "seed", "bad_limit", "precision", "device")}
    settings = registry.settings_for(fitting, seed=train.seed)
    found = {}
    for name, source in {**sources, PIXELS: RAW}.items():
        own = {"image_size": train.image_size, "model": parts.plan.model} if name == "given weights" else {}
        flags = Eval(weights=(str(source),), **shared, **own)
        for protocol, chosen in settings.items():
            found[name, protocol] = command(flags, str(source), protocol, chosen)
    return found
