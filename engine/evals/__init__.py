"""Judging frozen features with the papers' protocols: k-NN, linear probe, low-shot, clustering.

A protocol is a file in this folder, found by its name. It has
    Settings                                   a frozen dataclass with defaults; raises BadInput for numbers that make no sense
    check(train, test, settings)               raises BadInput if these sets can't be judged, before any feature exists
    evaluate(train, test, settings) -> Result  computes on the device that holds the features
    WANTS = "tokens"                           if it reads Features.tokens; left out, pooled features are all that is extracted
so adding a protocol is adding a file.
"""

import importlib
import pkgutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine.data.sources import ImageSet, open_images
from engine.errors import BadInput
from engine.evals.features import Encoder, Features, Result, Tokens, check_tokens, encoder_of, extract, raw_pixels
from engine.vit import VisionTransformer

__all__ = [
    "Encoder", "Features", "Result", "Tokens", "encode", "evaluate", "protocol", "protocols", "raw_pixels", "settings_for",
    "wants_tokens",
]  # fmt: skip

_NOT_PROTOCOLS = {"features", "report"}

Pair = tuple[Features, Features]


def protocols() -> tuple[str, ...]:
    """Names of all protocols, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_PROTOCOLS))


def protocol(name: str) -> ModuleType:
    """The module of one protocol.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in protocols():
        raise BadInput(f"unknown protocol {name!r}; choose from {', '.join(protocols())}.")
    return importlib.import_module(f"{__name__}.{name}")


def wants_tokens(names: Sequence[str]) -> bool:
    """Whether one of these protocols reads patch tokens."""
    return any(getattr(protocol(name), "WANTS", "pooled") == "tokens" for name in names)


def settings_for(names: Sequence[str], given: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """Settings by protocol: those given, or the defaults; `seed` goes into each that draws anything.

    Raises:
        BadInput: an unknown protocol, or none at all.
    """
    if not names:
        raise BadInput(f"no protocol is named; choose from {', '.join(protocols())}.")
    settings = {name: (given or {}).get(name) or protocol(name).Settings() for name in names}
    return {
        name: replace(chosen, seed=seed) if any(field.name == "seed" for field in fields(chosen)) else chosen
        for name, chosen in settings.items()
    }


def encode(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair],
    train: ImageSet,
    test: ImageSet,
    *,
    tokens: bool = False,
    **how: Any,
) -> dict[str, Pair]:
    """Train and test features of each encoder; `how` goes to `features.extract`. A pair of Features passes through.

    Raises:
        BadInput: with `tokens`, an encoder has none; that is found before the first image is encoded.
    """
    known = {name: encoder_of(e) if isinstance(e, VisionTransformer) else e for name, e in encoders.items()}
    pairs = {}
    for name, encoder in known.items():
        if tokens and isinstance(encoder, Encoder):
            check_tokens(encoder, name)
    for name, encoder in known.items():
        if isinstance(encoder, Encoder):
            encoder = tuple(extract(encoder, images, name=name, tokens=tokens, **how) for images in (train, test))
        pairs[name] = encoder
    return pairs


def evaluate(
    encoders: Mapping[str, Encoder | VisionTransformer | Pair],
    source: str | Path | Sequence[ImageSet] | None = None,
    protocols: Sequence[str] = ("knn", "linear", "lowshot", "cluster"),
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch_size: int = 256,
    threads: int | None = None,
    cache: Path | None = None,
    features: dict[str, Pair] | None = None,
) -> list[Result]:
    """Judge several encoders by several protocols on one data set.

    Args:
        encoders: by name; a VisionTransformer on `device`, an Encoder such as `raw_pixels()`, or (train, test) Features.
        source: as for `open_images`, or the (train, test) sets it gave; not used when all encoders are Features.
        settings: by protocol; the others take their defaults.
        device: where images are encoded and protocols compute.
        cache: folder for extracted features; None keeps nothing.
        features: a dict that receives what was extracted, for pictures.

    Returns:
        One Result per encoder and protocol, encoders in the given order.

    Raises:
        BadInput: anything that a protocol cannot work with, found before the first image is encoded where possible.
    """
    chosen = settings_for(protocols, settings, seed)
    if all(isinstance(encoder, tuple) for encoder in encoders.values()):
        pairs = dict(encoders)
    else:
        opened = isinstance(source, Sequence) and not isinstance(source, str)
        train, test = source if opened else (open_images(source, split) for split in ("train", "val"))
        for name, setting in chosen.items():
            protocol(name).check(train, test, setting)
        how = {"device": device, "precision": precision, "batch_size": batch_size, "threads": threads, "cache": cache}
        pairs = encode(encoders, train, test, tokens=wants_tokens(list(chosen)), **how)
    if features is not None:
        features.update(pairs)
    results = []
    for weights, pair in pairs.items():
        train_features, test_features = (split.to(device) for split in pair)
        for name, setting in chosen.items():
            start = time.perf_counter()
            result = protocol(name).evaluate(train_features, test_features, setting)
            results.append(replace(result, weights=weights, seconds=time.perf_counter() - start))
    return results
