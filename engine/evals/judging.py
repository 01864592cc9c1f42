"""Several weights by several protocols: which go together, what of the weights is needed, and one after the other."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine.core.errors import BadInput
from engine.data.sources import ImageSet
from engine.evals.course import Course, Pairing
from engine.evals.features import Encoder, Features, check_tokens, encoder_of
from engine.evals.registry import draws, protocol, reads, seeded, settings_for, wants
from engine.evals.result import Result, over_seeds
from engine.evals.sets import Sets, check
from engine.evals.subject import Subject
from engine.model.vit import VisionTransformer

Pair = tuple[Features, Features]


def evaluate(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair],
    source: str | Path | Sequence[ImageSet] | Sets | None = None,
    protocols: Sequence[str] = ("knn", "linear", "lowshot", "cluster"),
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: int = 1,
    features: dict[str, Pair] | None = None,
    course: Course | None = None,
    **how: Any,
) -> list[Result]:
    """Judge several encoders by several protocols.

    Args:
        encoders: by name; a VisionTransformer on the device, an Encoder such as `raw_pixels()`, or (train, test) Features.
        source: as for `open_images`, or the (train, test) sets it gave, or Sets where protocols read other kinds than classes;
            not used when all encoders are Features.
        settings: by protocol; the others take their defaults.
        seed: of whatever a protocol draws.
        seeds: so many runs of each protocol that draws, with seed, seed + 1, ...; their mean and spread is reported.
        features: a dict that receives what was extracted of images with classes, for pictures.
        course: receives results as they are found; one protocol's failure is then noted there, and the others go on.
        how: device, precision, batch_size, threads and cache, as for `Subject`.

    Returns:
        One Result per encoder and protocol, encoders in the given order.

    Raises:
        BadInput: anything that a protocol cannot work with, found before the first image is encoded where possible.
    """
    sets = source if isinstance(source, Sets) else Sets(data=source)
    plan = _plan(encoders, sets, settings_for(protocols, settings, seed), course, how)
    results = []
    if course:
        course.plan, results = plan.on, course.results
        course.announce()
    for weights, judged in plan.judged.items():
        known: dict[str, Pair] = {}  # features by kind of set
        if not isinstance(judged, Subject):
            known["classes"] = tuple(split.to(how.get("device", "cpu")) for split in judged)
        for name in plan.fitting(weights):
            with course.step(weights, name) if course else nullcontext():
                results.append(_step(plan, weights, name, _wanted(plan, weights, name, known), seeds))
            if features is not None and "classes" in known:
                features[weights] = known["classes"]
    return results


@dataclass(frozen=True)
class _Plan:
    """What is judged by what.

    Attributes:
        judged: by weights: a Subject, or its features as they were given.
        sets: that protocols read.
        settings: by protocol.
        on: by weights and protocol, the name of the set; pairings that are left out are not in it.
    """

    judged: dict[str, Subject | Pair]
    sets: Sets
    settings: dict[str, Any]
    on: dict[Pairing, str]

    def fitting(self, weights: str) -> list[str]:
        """The protocols that these weights are judged by."""
        return [name for name in self.settings if (weights, name) in self.on]


def _plan(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair],
    sets: Sets,
    settings: dict[str, Any],
    course: Course | None,
    how: Mapping[str, Any],
) -> _Plan:
    """What will be judged by what; raises BadInput for what cannot be, before anything is encoded."""
    if not all(isinstance(encoder, tuple) for encoder in encoders.values()):
        check(settings, sets)
    judged = _judged(encoders, how)
    left_out = _left_out(judged, sets, settings, course)
    on = {
        (weights, name): sets.name(reads(name)) if isinstance(each, Subject) else "features as given"
        for weights, each in judged.items()
        for name in settings
        if (weights, name) not in left_out
    }
    return _Plan(judged, sets, settings, on)


def _wanted(plan: _Plan, weights: str, name: str, known: dict[str, Pair]) -> tuple[Any, ...]:
    """What the protocol wants of the weights: a Subject and the sets, or features of both sets, which `known` keeps by kind.

    Raises:
        BadInput: the protocol works on a model and features were given, or as `features_of`.
    """
    kind, judged = reads(name), plan.judged[weights]
    if wants(name, plan.settings[name]) == "model":
        if not isinstance(judged, Subject):
            raise BadInput(f"protocol {name} works on a model, and {weights} are features.")
        return judged, *plan.sets.pair(kind)
    if kind not in known:
        tokens = _tokens_wanted(kind, plan.fitting(weights), plan.settings)
        known[kind] = tuple(features_of(judged, split, tokens) for split in plan.sets.pair(kind))
    return known[kind]


def _step(plan: _Plan, weights: str, name: str, wanted: tuple[Any, ...], seeds: int) -> Result:
    """What one protocol finds about some weights, with the facts that it does not know itself."""
    result = _over_seeds(protocol(name), wanted, plan.settings[name], seeds)
    about: dict[str, Any] = {"weights": weights}
    if isinstance(plan.judged[weights], Subject):
        about["data"] = plan.sets.name(reads(name))
    if wants(name, plan.settings[name]) != "model":
        train, test = wanted
        about["feature"] = result.feature or test.pooling
        about["counts"] = {"training images": len(train.values), "test images": len(test.values)} | result.counts
    return replace(result, **about)


def _over_seeds(module: ModuleType, wanted: tuple[Any, ...], settings: Any, seeds: int) -> Result:
    """The result of a protocol, over several seeds where it draws anything."""
    judge = module.evaluate
    if hasattr(module, "evaluate_model") and isinstance(wanted[0], Subject):
        judge = module.evaluate_model
    runs, first = [], getattr(settings, "seed", 0)
    numbers = range(first, first + (seeds if draws(settings) else 1))
    for number in numbers:
        start = time.perf_counter()
        result = judge(*wanted, seeded(settings, number))
        runs.append(replace(result, seconds=time.perf_counter() - start))
    return runs[0] if len(runs) == 1 else over_seeds(runs, numbers)


def encode(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair],
    train: ImageSet,
    test: ImageSet,
    *,
    tokens: bool = False,
    **how: Any,
) -> dict[str, Pair]:
    """Train and test features of each encoder; `how` goes to `Subject`. A pair of Features passes through.

    Raises:
        BadInput: with `tokens`, an encoder has none; that is found before the first image is encoded.
    """
    judged = _judged(encoders, how)
    for name, each in judged.items():
        if tokens and isinstance(each, Subject):
            check_tokens(each.encoder, name)
    return {
        name: tuple(each.features(images, tokens) for images in (train, test)) if isinstance(each, Subject) else each
        for name, each in judged.items()
    }


def extract_together(
    encoders: Mapping[str, Encoder | VisionTransformer],
    source: Sets,
    settings: Mapping[str, Any],
    course: Course | None = None,
    **how: Any,
) -> None:
    """Fill the cache with the features that these protocols want, shared out over ranks; each rank calls this.

    `how` and `course` are as for `evaluate`.

    Raises:
        BadInput: as `evaluate`, or there is no cache.
    """
    subjects = _judged(encoders, {**how, "together": True})
    left_out = _left_out(subjects, source, settings, course)
    for weights, subject in subjects.items():
        fitting = [name for name in settings if (weights, name) not in left_out]
        for kind in dict.fromkeys(reads(name) for name in fitting if wants(name, settings[name]) != "model"):
            for split in source.pair(kind):
                features_of(subject, split, _tokens_wanted(kind, fitting, settings))


def features_of(subject: Subject, images: Any, tokens: bool = False) -> Features:
    """Features of an ImageSet, or of an ObjectSet with its targets. Raises BadInput as `features.extract`."""
    if isinstance(images, ImageSet):
        return subject.features(images, tokens)
    # pixels as features have one size, whatever is asked
    size = subject.object_size if subject.encoder.model else None
    found = subject.features(images.images, tokens, size)
    row_of = {path: row for row, path in enumerate(images.images.paths)}
    targets = torch.from_numpy(images.targets[[row_of[path] for path in found.paths]])
    return replace(found, targets=targets.to(subject.device), classes=images.categories)


def _judged(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair], how: Mapping[str, Any]
) -> dict[str, Subject | Pair]:
    """By name, what the encoders are judged as; a pair of Features passes through."""
    how = {**how, "device": torch.device(how.get("device", "cpu"))}
    judged = {}
    for name, encoder in encoders.items():
        encoder = encoder_of(encoder) if isinstance(encoder, VisionTransformer) else encoder
        judged[name] = encoder if isinstance(encoder, tuple) else Subject(name, encoder, **how)
    return judged


def _tokens_wanted(kind: str, protocols: Iterable[str], settings: Mapping[str, Any]) -> bool:
    """Whether one of these protocols reads patch tokens of a kind of set."""
    return any(reads(name) == kind and wants(name, settings[name]) == "tokens" for name in protocols)


def _left_out(
    judged: Mapping[str, Subject | Pair], sets: Sets, settings: Mapping[str, Any], course: Course | None
) -> dict[Pairing, str]:
    """By weights and protocol, why they do not go together; before anything is encoded.

    Raises:
        BadInput: some do not, and the course is not lenient; or none do; or weights are not finite.
    """
    subjects = {weights: each for weights, each in judged.items() if isinstance(each, Subject)}
    found: dict[Pairing, str] = {}
    for subject in subjects.values():
        _check_finite(subject)
    for weights, subject in subjects.items():
        for name, setting in settings.items():
            try:
                _check_model(subject, name, sets, setting)
            except BadInput as error:
                if not (course and course.lenient):
                    raise
                found[weights, name] = str(error)
    if found and len(found) == len(subjects) * len(settings):
        raise BadInput(next(iter(found.values())))
    if course:
        course.left_out.update(found)
    return found


def _check_finite(subject: Subject) -> None:
    for name, tensor in subject.encoder.model.state_dict().items() if subject.encoder.model else ():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{subject.name} contain NaN or infinity in {name}: these weights cannot be evaluated.")


def _check_model(subject: Subject, name: str, sets: Sets, setting: Any) -> None:
    """Raise BadInput for weights that a protocol cannot judge: pixels where it needs a ViT, a size that the ViT does not take."""
    if subject.aspect == "keep":
        if (wanted := wants(name, setting)) != "pooled":
            raise BadInput(f"--aspect keep is for pooled features, and protocol {name} reads another thing: {wanted}.")
        subject.check_aspect()
    if wants(name, setting) == "tokens":
        check_tokens(subject.encoder, subject.name)
    if wants(name, setting) == "model":
        _ = subject.vit
    elif reads(name) != "classes" and subject.encoder.model is not None and subject.object_size:
        subject.check_input(*subject.object_size)
    if hasattr(protocol(name), "check_model"):
        protocol(name).check_model(subject, *sets.pair(reads(name)), setting)
