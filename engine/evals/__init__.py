"""Judging what an encoder learned with the papers' protocols.

A protocol is a file in `protocols/`, found by its name. It has
    Settings                                   a frozen dataclass with defaults; raises BadInput for numbers that make no sense
    READS = "objects"                          the kind of set it reads: a key of KINDS; left out, images with classes
    WANTS = "tokens" or "model"                left out, pooled features are all that is extracted
    check(train, test, settings)               raises BadInput if these sets can't be judged, before any feature exists
    evaluate(train, test, settings) -> Result  of `Features`, computed on the device that holds them; with WANTS = "model"
    evaluate(subject, train, test, settings)   of a `Subject` and the sets themselves
and maybe
    check_model(subject, train, test, settings)  raises BadInput if these weights can't be judged, before anything is encoded
so adding a protocol is adding a file. Of videos there is no training set: `train` is None.
"""

import importlib
import pkgutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine.core.errors import BadInput
from engine.data.annotated import opening as annotations
from engine.data.sources import BAD_LIMIT, ImageSet, open_images
from engine.evals import protocols as _protocols
from engine.evals.course import Course
from engine.evals.features import Encoder, Features, Tokens, check_tokens, encoder_of, raw_pixels
from engine.evals.result import Result, over_seeds
from engine.evals.subject import Subject
from engine.model.vit import VisionTransformer

__all__ = [
    "ALL", "KINDS", "Course", "Encoder", "Features", "Result", "Sets", "Subject", "Tokens", "check", "encode", "evaluate",
    "extract_together", "protocol", "protocols", "raw_pixels", "reads", "settings_for", "wants",
]  # fmt: skip

ALL = "all"
# kinds of sets, and the flag of engine.eval that names them
KINDS = {"classes": "data", "objects": "objects", "masks": "objects", "semantic": "objects", "video": "video"}

Pair = tuple[Features, Features]


def protocols() -> tuple[str, ...]:
    """Names of all protocols, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(_protocols.__path__)))


def protocol(name: str) -> ModuleType:
    """The module of one protocol.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in protocols():
        raise BadInput(f"unknown protocol {name!r}; choose from {', '.join((*protocols(), ALL))}.")
    return importlib.import_module(f"{_protocols.__name__}.{name}")


def reads(name: str) -> str:
    """The kind of set that a protocol reads."""
    return getattr(protocol(name), "READS", "classes")


def wants(name: str) -> str:
    """What of the weights a protocol works on: "pooled" features, those and patch "tokens", or the "model"."""
    return getattr(protocol(name), "WANTS", "pooled")


def settings_for(names: Sequence[str], given: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """Settings by protocol: those given, or the defaults; `seed` goes into each that draws anything. "all" names every protocol.

    Raises:
        BadInput: an unknown protocol, or none at all.
    """
    if not names:
        raise BadInput(f"no protocol is named; choose from {', '.join((*protocols(), ALL))}.")
    names = protocols() if ALL in names else names
    settings = {name: (given or {}).get(name) or protocol(name).Settings() for name in names}
    return {name: replace(chosen, seed=seed) if _draws(chosen) else chosen for name, chosen in settings.items()}


def _draws(settings: Any) -> bool:
    return any(field.name == "seed" for field in fields(settings))


class Sets:
    """The sets that protocols read, by kind; each is opened when it is first asked for.

    Args:
        sources: by the names that KINDS gives: what `open_images` (data) or `annotations.open_pair` (the others) take, or an
            opened pair of a training and a test set, or None for the embedded ones.
    """

    def __init__(self, bad_limit: float = BAD_LIMIT, **sources: Any):
        self._sources, self._bad_limit, self._opened = sources, bad_limit, {}

    def pair(self, kind: str) -> tuple[Any, Any]:
        """The training and the test set of a kind. Raises BadInput as what opens them."""
        if kind not in self._opened:
            source = self._sources.get(KINDS[kind])
            if isinstance(source, Sequence) and not isinstance(source, str):
                self._opened[kind] = tuple(source)
            elif kind == "classes":
                self._opened[kind] = tuple(open_images(source, split, self._bad_limit) for split in ("train", "val"))
            else:
                self._opened[kind] = annotations.open_pair(kind, source, self._bad_limit)
        return self._opened[kind]

    def name(self, kind: str) -> str:
        """What to call the sets of a kind."""
        source = self._sources.get(KINDS[kind])
        if isinstance(source, Sequence) and not isinstance(source, str):
            return str(getattr(source[1], "images", source[1]).root)
        return str(source or ("digits" if kind == "classes" else annotations.DEFAULTS[kind]))

    @property
    def opened(self) -> dict[str, tuple[Any, Any]]:
        """By kind, what has been asked for."""
        return dict(self._opened)


def check(settings: Mapping[str, Any], sets: Sets) -> None:
    """Raise BadInput for sets that cannot be opened, or that one of these protocols cannot judge; its name is in the sentence."""
    for name, setting in settings.items():
        pair = sets.pair(reads(name))
        try:
            protocol(name).check(*pair, setting)
        except BadInput as error:
            raise BadInput(str(error) if name in str(error) else f"{name}: {error}") from error


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
    known = {
        name: encoder if isinstance(encoder, tuple) else _subject(name, encoder, how)
        for name, encoder in encoders.items()
    }
    for name, subject in known.items():
        if tokens and isinstance(subject, Subject):
            check_tokens(subject.encoder, name)
    return {
        name: subject
        if isinstance(subject, tuple)
        else tuple(subject.features(images, tokens) for images in (train, test))
        for name, subject in known.items()
    }


def _subject(name: str, encoder: Encoder | VisionTransformer, how: Mapping[str, Any]) -> Subject:
    encoder = encoder_of(encoder) if isinstance(encoder, VisionTransformer) else encoder
    return Subject(name, encoder, **{**how, "device": torch.device(how.get("device", "cpu"))})


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
    subjects = {name: _subject(name, encoder, {**how, "together": True}) for name, encoder in encoders.items()}
    left_out = _left_out(subjects, source, settings, course)
    for name, subject in subjects.items():
        fitting = [protocol for protocol in settings if (name, protocol) not in left_out]
        for kind in dict.fromkeys(reads(protocol) for protocol in fitting if wants(protocol) != "model"):
            for split in source.pair(kind):
                features_of(subject, split, _tokens_wanted(kind, fitting))


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
    chosen = settings_for(protocols, settings, seed)
    given = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, tuple)}
    sets = source if isinstance(source, Sets) else Sets(data=source)
    if len(given) < len(encoders):
        check(chosen, sets)
    subjects = {name: _subject(name, e, how) for name, e in encoders.items() if name not in given}
    left_out = _left_out(subjects, sets, chosen, course)
    plan = {
        (weights, name): "features as given" if weights in given else sets.name(reads(name))
        for weights in encoders
        for name in chosen
        if (weights, name) not in left_out
    }
    results = []
    if course:
        course.plan, results = plan, course.results
        course.announce()
    for weights in encoders:
        found: dict[str, Pair] = {}
        if weights in given:
            found["classes"] = tuple(split.to(how.get("device", "cpu")) for split in given[weights])
        fitting = {name: setting for name, setting in chosen.items() if (weights, name) in plan}
        for name, setting in fitting.items():
            kind, judged = reads(name), (subjects.get(weights),)
            with course.step(weights, name) if course else nullcontext():
                if wants(name) == "model":
                    if weights in given:
                        raise BadInput(f"protocol {name} works on a model, and {weights} are features.")
                    judged += sets.pair(kind)
                else:
                    if kind not in found:
                        tokens = _tokens_wanted(kind, fitting)
                        found[kind] = tuple(features_of(subjects[weights], split, tokens) for split in sets.pair(kind))
                    judged = found[kind]
                result = _over_seeds(protocol(name), judged, setting, seeds)
                about = {} if weights in given else {"data": sets.name(kind)}
                if wants(name) != "model":
                    train, test = found[kind]
                    about["feature"] = result.feature or test.pooling
                    about["counts"] = {
                        "training images": len(train.values),
                        "test images": len(test.values),
                    } | result.counts
                results.append(replace(result, weights=weights, **about))
            if features is not None and "classes" in found:
                features[weights] = found["classes"]
    return results


def _tokens_wanted(kind: str, protocols: Iterable[str]) -> bool:
    """Whether one of these protocols reads patch tokens of a kind of set."""
    return any(reads(name) == kind and wants(name) == "tokens" for name in protocols)


def _left_out(
    subjects: Mapping[str, Subject], sets: Sets, settings: Mapping[str, Any], course: Course | None
) -> dict[tuple[str, str], str]:
    """By weights and protocol, why they do not go together; before anything is encoded.

    Raises:
        BadInput: some do not, and the course is not lenient; or none do; or weights are not finite.
    """
    found: dict[tuple[str, str], str] = {}
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
    if wants(name) == "tokens":
        check_tokens(subject.encoder, subject.name)
    if wants(name) == "model":
        _ = subject.vit
    elif reads(name) != "classes" and subject.encoder.model is not None and subject.object_size:
        subject.check_input(*subject.object_size)
    if hasattr(protocol(name), "check_model"):
        protocol(name).check_model(subject, *sets.pair(reads(name)), setting)


def _over_seeds(module: ModuleType, judged: tuple, settings: Any, seeds: int) -> Result:
    """The result of a protocol, over several seeds where it draws anything."""
    runs, first = [], getattr(settings, "seed", 0)
    numbers = range(first, first + (seeds if _draws(settings) else 1))
    for number in numbers:
        start = time.perf_counter()
        result = module.evaluate(*judged, replace(settings, seed=number) if _draws(settings) else settings)
        runs.append(replace(result, seconds=time.perf_counter() - start))
    return runs[0] if len(runs) == 1 else over_seeds(runs, numbers)
