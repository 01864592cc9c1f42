"""What keeps clusterings apart, each against a short plain restatement; over ranks; and a skipped update changes nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from engine.methods.parts.collapse import CHOICES, Collapse, Targets, _meetings, usage

TEACHER, STUDENT = 0.05, 0.1
ROWS, PROTOTYPES, VIEWS = 6, 12, (2, 5)


def published_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """The loop of SwAV, with the rows of all ranks."""
    q = (scores / temperature).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_targets(choice: str, scores: Tensor, centre: Tensor, from_probabilities: bool = False) -> Tensor:
    if choice == "centring":
        return ((scores - centre) / TEACHER).softmax(1)
    if "sinkhorn" in choice:
        if from_probabilities:
            return published_sinkhorn((scores / TEACHER).softmax(1).log(), 1.0)
        return published_sinkhorn(scores, TEACHER)
    return (scores / TEACHER).softmax(1)


def plain_regulariser(choice: str, student: Tensor) -> Tensor:
    mean = (student / STUDENT).softmax(1).mean(0)
    return math.log(PROTOTYPES) + (mean * mean.log()).sum() if "me-max" in choice else torch.zeros(())


def unit_scores(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, PROTOTYPES, dtype=torch.float64, generator=generator) * 2 - 1


def make(choice: str, **options: object) -> Collapse:
    guard = Collapse(choice, PROTOTYPES, **options)
    if guard.centre is not None:
        guard.centre.copy_(unit_scores(1, 9)[0] / 2)
    return guard


def whole_loss(guard: Collapse, scores: Tensor, student: Tensor, views: tuple[int, int] = VIEWS) -> Tensor:
    loss = guard.across_views(guard.targets(scores, TEACHER), student, STUDENT, views)
    guard.observe(scores)
    return loss + guard.regulariser(student, STUDENT)


@pytest.mark.parametrize("from_probabilities", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_loss_and_gradient_equal_a_plain_restatement(choice: str, from_probabilities: bool):
    guard = make(choice, from_probabilities=from_probabilities)
    scores = unit_scores(VIEWS[0] * ROWS).requires_grad_()
    student = unit_scores(VIEWS[1] * ROWS, 1).requires_grad_()
    targets = guard.targets(scores, TEACHER)
    loss = guard.across_views(targets, student, STUDENT, VIEWS) + guard.regulariser(student, STUDENT)
    centre = torch.zeros(PROTOTYPES) if guard.centre is None else guard.centre
    q = plain_targets(choice, scores.detach(), centre, from_probabilities)
    torch.testing.assert_close(targets.probabilities, q)
    terms = [
        -(target * F.log_softmax(view / STUDENT, dim=1)).sum(1).mean()
        for i, target in enumerate(q.split(ROWS))
        for j, view in enumerate(student.split(ROWS))
        if i != j
    ]
    assert len(terms) == VIEWS[0] * VIEWS[1] - VIEWS[0]
    plain = sum(terms) / len(terms) + plain_regulariser(choice, student)
    torch.testing.assert_close(loss, plain)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, plain))
    torch.testing.assert_close(ours, theirs)
    assert not targets.probabilities.requires_grad


def test_rows_name_targets_and_weights_replace_the_mean():
    targets, student = Targets(unit_scores(3), TEACHER), unit_scores(4, 1)
    rows = torch.tensor([[2, 0], [1, -1], [-1, -1], [0, 0]])
    weights = torch.tensor([0.5, 2.0, 3.0, 0.1])
    per_row = []
    for row, mine in zip(student, rows.tolist(), strict=True):
        met = [(targets.scores[index] / TEACHER).softmax(0) for index in mine if index >= 0]
        per_row.append(sum((-(q * (row / STUDENT).log_softmax(0)).sum() for q in met), torch.zeros(())))
    losses = torch.stack([loss.double() for loss in per_row])
    torch.testing.assert_close(make("none").cross_entropy(targets, student, STUDENT, rows), losses.mean())
    torch.testing.assert_close(
        make("none").cross_entropy(targets, student, STUDENT, rows, weights), (losses * weights).sum()
    )


def test_all_pairs_meet_where_no_view_is_shared():
    scores, student = unit_scores(ROWS), unit_scores(3 * ROWS, 1)
    loss = make("none").across_views(Targets(scores, TEACHER), student, STUDENT, (1, 3), skip_same=False)
    q = (scores / TEACHER).softmax(1)
    plain = [-(q * F.log_softmax(view / STUDENT, dim=1)).sum(1).mean() for view in student.split(ROWS)]
    torch.testing.assert_close(loss, sum(plain) / 3)


@pytest.mark.parametrize("views", [(2, 5), (1, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("skip_same", [False, True])
def test_the_host_knows_how_many_pairs_meet(views: tuple[int, int], skip_same: bool):
    """A meta tensor has no values, so nothing can have been read from it."""
    rows, pairs = _meetings(*views, 4, skip_same, torch.device("cpu"))
    assert pairs * 4 == (rows >= 0).sum()
    unread, again = _meetings(*views, 4, skip_same, torch.device("meta"))
    assert (unread.shape, again) == (rows.shape, pairs)


def test_targets_of_different_centres_are_joined():
    guard = make("sinkhorn")
    parts = [guard.targets(unit_scores(6, seed), TEACHER) for seed in range(2)]
    assert not torch.equal(parts[0].centre, parts[1].centre)
    torch.testing.assert_close(
        Targets.stack(parts).probabilities, torch.cat([part.probabilities for part in parts]), check_dtype=False
    )


def test_targets_are_cut_and_joined_by_rows():
    for targets in (Targets(unit_scores(6), TEACHER), make("sinkhorn").targets(unit_scores(6), TEACHER)):
        again = Targets.stack([targets[:2], targets[2:]])
        assert torch.equal(again.probabilities, targets.probabilities)
        assert torch.equal(targets[4:].probabilities, targets.probabilities[4:])


def test_the_centre_moves_after_its_use_and_only_if_the_update_was_applied():
    guard = make("centring", centre_momentum=0.9)
    start, first, second = guard.centre.clone(), unit_scores(4), unit_scores(4, 1)
    guard.observe(first)
    assert torch.equal(guard.centre, start)
    guard.commit(torch.tensor(False))
    assert torch.equal(guard.centre, start)
    assert not guard.pending
    guard.observe(first), guard.observe(second)  # micro-batches of one update
    guard.commit(torch.tensor(True))
    mean = torch.cat([first, second]).mean(0).float()
    torch.testing.assert_close(guard.centre, 0.9 * start + 0.1 * mean)
    moved = guard.centre.clone()
    guard.commit(torch.tensor(True))
    assert torch.equal(guard.centre, moved)
    guard.observe(torch.full((4, PROTOTYPES), math.nan))
    guard.commit(torch.tensor(False))
    assert torch.equal(guard.centre, moved)


def test_only_centring_has_something_to_save():
    assert {choice: list(Collapse(choice, 4).state_dict()) for choice in CHOICES} == {
        choice: ["centre"] if choice == "centring" else [] for choice in CHOICES
    }


def test_me_max_is_zero_for_an_even_mean_and_log_k_for_one_prototype():
    guard = Collapse("me-max", 4, me_max_weight=2.0)
    even = guard.regulariser(50 * torch.eye(4), STUDENT)
    assert even.item() == pytest.approx(0, abs=1e-6)
    one = torch.zeros(4, 4)
    one[:, 2] = 1000
    one.requires_grad_()
    regulariser = guard.regulariser(one, STUDENT)
    assert regulariser.item() == pytest.approx(2 * math.log(4))
    regulariser.backward()
    assert one.grad.isfinite().all(), "prototypes of no mass have no infinite slope"


def test_health_tells_even_from_collapsed_use():
    guard = make("none")
    even = guard.health(Targets(torch.eye(PROTOTYPES), TEACHER))
    assert even["prototype_usage"] == pytest.approx(1)
    same = guard.health(Targets(torch.eye(PROTOTYPES)[:1].expand(PROTOTYPES, -1), TEACHER))
    assert same["prototype_usage"] == pytest.approx(1 / PROTOTYPES)
    flat = guard.health(Targets(torch.zeros(5, PROTOTYPES), TEACHER), "patch_")
    assert flat["patch_target_entropy"] == pytest.approx(1)
    assert even["target_entropy"] < 0.01
    assert "centre_norm" not in even
    centred = make("centring")
    assert centred.health(Targets(torch.zeros(5, PROTOTYPES), TEACHER))["centre_norm"] == centred.centre.norm()


def test_choices_are_made_above_the_centre():
    guard = Collapse("centring", 3)
    guard.centre.copy_(torch.tensor([0.9, 0.0, 0.0]))
    assert guard.choose(torch.tensor([[1.0, 0.5, 0.2]])).item() == 1
    assert Collapse("none", 3).choose(torch.tensor([[1.0, 0.5, 0.2]])).item() == 0
    assert usage(guard.choose(torch.eye(3)), 3) == pytest.approx(1)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="me-max\\+sinkhorn"):
        Collapse("centering", 4)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for choice in CHOICES:
        guard = make(choice)
        teacher, student = (
            torch.cat([view.chunk(2)[rank] for view in unit_scores(views * ROWS, views).split(ROWS)]) for views in VIEWS
        )
        loss = whole_loss(guard, teacher, student.requires_grad_())
        (gradient,) = torch.autograd.grad(loss, student)
        guard.commit(torch.tensor(True))
        results[choice] = [loss.detach(), gradient, torch.zeros(1) if guard.centre is None else guard.centre]
    uneven = make("centring")  # masked patches: ranks hold different numbers of them
    uneven.observe(unit_scores(5).split((1, 4))[rank])
    uneven.commit(torch.tensor(True))
    torch.save((results, uneven.centre), f"{folder}/{rank}.pt")
    td.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(tmp_path: Path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for choice in CHOICES:
        guard, teacher = make(choice), unit_scores(VIEWS[0] * ROWS, VIEWS[0])
        student = unit_scores(VIEWS[1] * ROWS, VIEWS[1]).requires_grad_()
        loss = whole_loss(guard, teacher, student)
        (gradient,) = torch.autograd.grad(loss, student)
        guard.commit(torch.tensor(True))
        torch.testing.assert_close(sum(found[choice][0] for found, _ in ranks) / 2, loss.detach())
        for rank, (found, _) in enumerate(ranks):
            mine = torch.cat([view.chunk(2)[rank] for view in gradient.split(ROWS)])
            torch.testing.assert_close(found[choice][1] / 2, mine)  # gradients are averaged over ranks
            if guard.centre is not None:
                torch.testing.assert_close(found[choice][2], guard.centre)
    uneven = make("centring")
    uneven.observe(unit_scores(5))
    uneven.commit(torch.tensor(True))
    for _, centre in ranks:
        torch.testing.assert_close(centre, uneven.centre)
