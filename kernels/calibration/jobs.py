"""What calibration has its guarded child do: prove an implementation right, and time those that are, by way of JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels.calibration import clock, inputs
from kernels.calibration.calls import Call
from kernels.calibration.memory import Watched, as_integers, checksums, poison_cache
from kernels.calibration.tolerance import WrongAnswer, compared
from kernels.choice import bring, usable
from kernels.determinism import same_bits_from_torch


def prove(
    name: str, arguments: Mapping[str, Any], implementation: str, device: str, threads: int, deterministic: bool
) -> dict[str, Any]:
    """Compare values and gradients at full size with the reference in float64, by the tests' rule: at most twice the error of the
    reference in the same dtype. Empty outputs are NaN before, memory around them must stay as it is, inputs too, and nothing may
    be kept.

    Returns:
        "errors": by output what `tolerance.compared` returns; "stable": whether a second run gave the same bits.

    Raises:
        WrongAnswer: with what is wrong.
        ValueError: the implementation does not take this call, by its own words.
    """
    at, call = start(device, threads, deterministic), Call(name, arguments)
    why = usable(name, implementation, at)
    if why:
        raise ValueError(why)
    given = inputs.make(call, at)
    run = _runner(call, implementation)
    tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    before = checksums(tensors)
    poison_cache(sum(x.nbytes for x in tensors), at)
    with Watched() as watched:
        found = run(given)
        again = run(given)
    _wait(at)
    trespassed = watched.trespassed()
    if trespassed:
        raise WrongAnswer(trespassed)
    if checksums(tensors) != before:
        raise WrongAnswer("it changed one of its inputs")
    stable = all(torch.equal(as_integers(a), as_integers(b)) for a, b in zip(found, again, strict=True))
    del again
    errors = _errors(call, found, given)
    del found
    kept = watched.kept()
    if kept:
        raise WrongAnswer(f"it keeps {kept:,} bytes after two calls")
    return {"errors": errors, "stable": stable}


def time(
    name: str,
    arguments: Mapping[str, Any],
    implementations: Sequence[str],
    device: str,
    threads: int,
    deterministic: bool,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """By implementation, see `clock.compare`; values and gradients together where the call has gradients."""
    at, call = start(device, threads, deterministic), Call(name, arguments)
    given = inputs.make(call, at)
    runs = {implementation: _runner(call, implementation, spares=False) for implementation in implementations}
    return clock.compare({one: lambda run=run: run(given) for one, run in runs.items()}, at, seconds)


def start(device: str, threads: int, deterministic: bool) -> torch.device:
    """The device, made ready to compute as a run would."""
    at = torch.device(device)
    if deterministic:
        same_bits_from_torch(at)
    torch.set_num_threads(threads)
    if at.type == "cuda":
        torch.cuda.set_device(at)
        torch.cuda.empty_cache()
        torch.set_float32_matmul_precision("high")  # as training does
    return at


def _runner(call: Call, implementation: str, spares: bool = True) -> Callable[[Mapping[str, Any]], list[Tensor]]:
    """What runs an implementation on arguments and returns its outputs and, where the call has some, its gradients.

    What an op writes to its arguments are its outputs, then: written to copies where it `spares` what it is given.
    """
    module, own = bring(call.op, implementation), inputs.stem(call.name)
    if hasattr(module, own):  # the compiler sees through it
        function = getattr(module, own)
        if implementation == "plain":
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, dynamic=False)
    else:
        op = getattr(torch.ops.tessera, call.name)
        function = lambda *arguments: op(*arguments, implementation)  # noqa: E731
    wanted = getattr(inputs.of_op(call.op), "DIFFERENTIABLE", {}).get(call.name, ())

    changed = inputs.changed(call.name)

    def run(given: Mapping[str, Any]) -> list[Tensor]:
        if changed:
            written = {key: tree_map_only(Tensor, _copied, given[key]) if spares else given[key] for key in changed}
            function(*(given | written).values())
            return tree_leaves(written)
        if not wanted:
            with torch.no_grad():
                return _list(function(*given.values()))
        leaves = {key: given[key].detach().requires_grad_() for key in wanted}
        out = _list(function(*(given | leaves).values()))[0]
        grads = torch.autograd.grad(out, list(leaves.values()), _direction(out))
        return [out.detach(), *grads]

    return run


def _copied(x: Tensor) -> Tensor:
    """In memory that is watched."""
    return torch.empty_like(x).copy_(x)


def _direction(out: Tensor) -> Tensor:
    """A gradient from above, of numbers that all dtypes hold exactly."""
    if not out.ndim:
        return torch.ones_like(out)
    return torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().to(out.dtype).view(out.shape)


def _errors(call: Call, found: list[Tensor], given: Mapping[str, Any]) -> list[dict[str, float]]:
    words = inputs.of_op(call.op)
    comparable = getattr(words, "comparable", lambda outputs, _: outputs)
    parts = getattr(words, "slices", None)
    reference = _runner(call, "reference")
    errors: list[dict[str, float]] = []
    says_nothing = True
    for part, pick in [(given, list)] if parts is None else parts(call.name, given):
        wide = inputs.in_float64(part)
        truth = comparable(reference(wide), wide)
        says_nothing &= not any(bool(x.any()) for x in truth)
        plain, ours = (comparable(outputs, wide) for outputs in (reference(part), pick(found)))
        errors += [compared(f"output {n}", *three) for n, three in enumerate(zip(ours, plain, truth, strict=True))]
    if errors and says_nothing:
        raise WrongAnswer("the formula itself gives nothing but zeros here, of which nothing can be proved")
    return errors


def _list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
