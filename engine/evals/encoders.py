"""The encoders that the flag --weights names."""

from pathlib import Path

import torch

from engine.core.errors import BadInput
from engine.evals.command_line import RANDOM, RAW, TIMM, WEIGHTS, Eval
from engine.evals.features import Encoder, encoder_of, raw_pixels
from engine.model import vit, weights

RAW_SIZE = (32, 32)


def encoder(source: str, flags: Eval, device: torch.device) -> tuple[str, Encoder]:
    """The name and the encoder that a source of weights, --model, --pool, --image-size and --interpolation describe.

    Raises:
        BadInput: no such weights or model, or they do not fit each other.
    """
    size = (flags.image_size * 2)[:2]
    # what models know by themselves is said to them: `finetune` trains by it, too
    own = flags.pool in ("token", "avg")
    given = {"global_pool": flags.pool if own else "", "img_size": size, "interpolation": flags.interpolation}
    overrides, pool = {name: value for name, value in given.items() if value}, "" if own else flags.pool
    if source == RAW:
        return "raw pixels", raw_pixels(size or RAW_SIZE)
    if source.startswith(RANDOM):
        name = source.removeprefix(RANDOM)
        model = vit.create(name, generator=torch.Generator().manual_seed(flags.seed), **overrides)
        return f"random {name}", encoder_of(model.to(device), pool)
    path = Path(source).expanduser()
    if not path.exists() and not source.startswith(TIMM):
        raise BadInput(f"--weights {source} does not exist; give {WEIGHTS}.")
    if path.is_dir() and not any((folder / "model.safetensors").is_file() for folder in (path, path / "export")):
        raise BadInput(f"--weights {source} holds no exported model; give {WEIGHTS}.")
    if path.is_file() and not flags.model:
        raise BadInput(f"--weights {source} is a file and needs --model NAME, such as vit_large_patch16_224.")
    if flags.model and not any(Path(judged).expanduser().is_file() for judged in flags.judged):
        raise BadInput(f"--model belongs to a file; {source} says itself what it holds.")
    if path.is_file():
        model, _ = weights.create(path, flags.model, **overrides)
    else:
        model, _ = weights.create(source, **overrides)
    return path.stem if path.is_file() else path.resolve().name, encoder_of(model.to(device), pool)


def encoders(flags: Eval, device: torch.device) -> dict[str, Encoder]:
    """All weights by name; those of one name are told apart by what stands before it."""
    found = [(source, *encoder(source, flags, device)) for source in flags.judged]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else source: encoder for source, name, encoder in found}
