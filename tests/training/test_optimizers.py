"""The optimisers against torch's, parameters that come and go, averages, clipping."""

import copy

import pytest
import torch
from torch import nn

from engine.core.optim import Average, Group
from engine.training.optimizers import (
    AdamW,
    gradient_norms,
    gradient_scales,
    load_state_tensors,
    state_tensors,
)

BETAS = (0.9, 0.95)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    sizes = {"encoder.a": (4, 3), "encoder.b": (3,), "head.c": (5, 2), "head.d": (5,)}
    return {name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}


def optimizer(named: dict[str, nn.Parameter]) -> AdamW:
    decaying = {name: p for name, p in named.items() if p.ndim > 1}
    vectors = {name: p for name, p in named.items() if p.ndim == 1}
    made = AdamW([Group(decaying, 1.0, 0.1), Group(vectors, 1.0, 0.0, clips=False)], BETAS)
    for group in made.param_groups:
        group["lr"] = 1e-2
    return made


def with_gradients(named: dict[str, nn.Parameter], step: int, *absent: str) -> None:
    torch.manual_seed(step)
    for name, p in named.items():
        gradient = torch.randn_like(p)
        p.grad = None if name in absent else gradient


def test_steps_are_those_of_torch_also_for_a_parameter_that_misses_some_and_one_that_comes_late():
    ours, theirs = parameters(), parameters()
    optimizer_ours = optimizer(ours)
    optimizer_theirs = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ], lr=1e-2, betas=BETAS, eps=1e-8,
    )  # fmt: skip
    absent = [("head.c",), (), ("encoder.a",), ("encoder.a", "head.d"), (), ()]
    for step, names in enumerate(absent):
        for named, one in ((ours, optimizer_ours), (theirs, optimizer_theirs)):
            with_gradients(named, step, *names)
            one.step()
    for name, p in ours.items():
        torch.testing.assert_close(p.detach(), theirs[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
    counts = {name: int(optimizer_ours.state[p]["step"]) for name, p in ours.items()}
    assert counts == {"encoder.a": 4, "encoder.b": 6, "head.c": 5, "head.d": 5}


def test_state_goes_round_and_those_who_made_as_many_steps_share_their_count_again():
    named = parameters()
    one = optimizer(named)
    for step, names in enumerate([(), ("encoder.a",), ()]):
        with_gradients(named, step, *names)
        one.step()
    saved = {name: value.clone() for name, value in state_tensors(one).items()}
    again = copy.deepcopy(named)
    other = optimizer(again)
    load_state_tensors(other, saved)
    assert {name: value.tolist() for name, value in state_tensors(other).items()} == {
        name: value.tolist() for name, value in saved.items()
    }
    counts = [id(other.state[again[name]]["step"]) for name in ("encoder.b", "head.d", "head.c", "encoder.a")]
    assert counts[0] == counts[1] and len(set(counts)) == 3  # the groups' own, and one that missed a step
    for tensors, made in ((named, one), (again, other)):
        with_gradients(tensors, 9)
        made.step()
    assert all(torch.equal(named[name], again[name]) for name in named)


def test_averages_follow_weights_whether_they_move_themselves_or_not_and_several_may_follow_one():
    named = parameters()
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    averages = [
        Average([(first[name], p) for name, p in named.items()], 0.25),
        Average([(second[name], p) for name, p in named.items() if name != "head.d"], 0.5),
    ]
    one = optimizer(named)
    with_gradients(named, 0, "head.c")  # frozen in this step
    still = named["head.c"].detach().clone()
    one.step(torch.tensor(True), {}, averages)
    assert torch.equal(named["head.c"], still)
    for name, p in named.items():
        torch.testing.assert_close(first[name], 0.25 * p.detach(), msg=name)
        torch.testing.assert_close(second[name], (0.5 if name != "head.d" else 0.0) * p.detach(), msg=name)
    before = [x.clone() for x in (*named.values(), *first.values(), *second.values(), *state_tensors(one).values())]
    with_gradients(named, 1)
    one.step(torch.tensor(False), {}, averages)
    after = [*named.values(), *first.values(), *second.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))
    assert {int(one.state[p]["step"]) for p in named.values() if p is not named["head.c"]} == {1}


@pytest.mark.parametrize("over", ["all", "part", "tensor"])
def test_a_step_takes_clipped_gradients(over: str):
    named, plain = parameters(), parameters()
    one, other = optimizer(named), optimizer(plain)
    with_gradients(named, 0)
    with_gradients(plain, 0)
    norms = gradient_norms(one)
    assert norms.total() == torch.nn.utils.get_total_norm([p.grad for p in norms.parameters])
    one.step(None, gradient_scales(one, norms, 2.0, over))
    clipped = [name for name in plain if plain[name].ndim > 1]  # the others' group does not clip
    together = {
        "all": [clipped],
        "part": [[name for name in clipped if name.startswith(part)] for part in ("encoder", "head")],
        "tensor": [[name] for name in clipped],
    }[over]
    for names in together:
        torch.nn.utils.clip_grad_norm_([plain[name] for name in names], 2.0)
    other.step()
    for name in named:
        torch.testing.assert_close(named[name].detach(), plain[name].detach(), msg=name)
        torch.testing.assert_close(one.state[named[name]]["exp_avg"], other.state[plain[name]]["exp_avg"], msg=name)


def test_a_group_that_is_followed_in_part_counts_a_step_once():
    named, plain = parameters(), parameters()
    one, other = optimizer(named), optimizer(plain)
    average = torch.zeros_like(named["encoder.a"])
    for step in range(3):
        with_gradients(named, step)
        with_gradients(plain, step)
        one.step(None, {}, [Average([(average, named["encoder.a"])], 0.5)])
        other.step()
    assert {int(one.state[p]["step"]) for p in named.values()} == {3}
    assert all(torch.equal(named[name], plain[name]) for name in named)
