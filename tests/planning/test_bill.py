"""Time, energy and memory of a counted step, against the same by hand."""

import json

import pytest

from engine.planning import bill, cards
from engine.planning.bill import Spread
from engine.planning.cards import CARDS, LAUNCH
from engine.planning.counting import Count
from engine.planning.peak import GROWING
from tests.planning.counts import GB, made


def by_hand(card: cards.Card, reached: cards.Reached) -> float:
    bandwidth, rate = card.bandwidth * reached.bandwidth, card.half * reached.products
    products = 2 * max(GB / bandwidth, 1e12 / rate) + 4 * max(2 * GB / bandwidth, 1e12 / rate)
    attention = max(GB / bandwidth, 1e11 / (card.half * reached.attention))
    return products + 3 * 5 * GB / bandwidth + attention + 10 * LAUNCH


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_step_takes_what_it_takes_by_hand(card: cards.Card):
    step = bill.step_seconds(made(), card, 1)
    assert step.likely == pytest.approx(by_hand(card, card.reached[1]))
    assert step.low == pytest.approx(by_hand(card, card.reached[2]))
    assert step.high == pytest.approx(by_hand(card, card.reached[0]))
    assert step.low < step.likely < step.high


def test_a_step_takes_at_least_what_its_host_needs():
    step = bill.step_seconds(made(launches=10**6), CARDS["H200"], 1)
    assert (step.high, step.likely, step.low) == pytest.approx([10**6 * host for host in bill.HOST])


def test_what_is_longer_than_backward_adds_to_a_step():
    card = CARDS["A100-80"]
    alone, little = bill.step_seconds(made(), card, 1), bill.step_seconds(made(gradient_bytes=10**6), card, 8)
    assert little.likely == alone.likely and little.high > alone.high  # at worst nothing is hidden
    much = bill.step_seconds(made(gradient_bytes=100 * GB), card, 8)
    backward = bill.seconds([row for row in made().rows if row.part == "backward"], card, card.reached[1])
    sending = 2 * 7 / 8 * 100 * GB / (card.link * card.reached[1].bandwidth)
    assert much.likely == pytest.approx(alone.likely + sending - backward)


def test_memory_fits_up_to_the_card_and_no_further():
    card, count = CARDS["A100-40"], made()
    assert bill.fits(count, card)
    images = bill.images_that_fit(count, 100, card)

    def with_images(number: int) -> Count:
        return made(peak={part: size * number // 100 if part in GROWING else size for part, size in count.peak.items()})

    assert bill.fits(with_images(images), card) and not bill.fits(with_images(images + 1), card)
    nothing = made(peak=count.peak | {"optimiser": 100 * GB})
    assert not bill.fits(nothing, card) and bill.images_that_fit(nothing, 100, card) == 0


def test_the_lowest_becomes_the_highest_of_a_rate():
    assert Spread(1.0, 2.0, 4.0).inverse(8.0) == Spread(2.0, 4.0, 8.0)
    assert Spread(1.0, 2.0, 3.0) + Spread(1.0, 1.0, 1.0) == Spread(2.0, 3.0, 4.0)


def test_costs_are_shares_of_the_whole_and_the_largest_come_first():
    shares = bill.costliest(made(), CARDS["H100"], 10)
    assert sum(share for _, share in shares) == pytest.approx(1.0)
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)
    assert {name for name, _ in shares} == {
        "matrix products, forward, update", "matrix products, backward", "triton_gelu, backward", "attention, forward, update",
    }  # fmt: skip
    assert bill.costliest(made(), CARDS["H100"], 1) == shares[:1]


def test_a_count_outlives_a_file():
    assert Count.from_json(json.loads(json.dumps(made().as_json()))) == made()


@pytest.mark.parametrize(
    ("name", "found"), [("a100", "A100-80"), ("A100-40", "A100-40"), ("h200", "H200"), ("t4", "T4")]
)
def test_cards_by_name(name: str, found: str):
    assert cards.named(name).name == found


def test_a_loader_feeds_the_fastest_steps_and_those_that_mix_sizes_on_average():
    def stage(name: str, steps: int, seconds: float, mixed: str) -> bill.StageBill:
        return bill.StageBill(name, made(), 10, steps, Spread(seconds, seconds, seconds), 1, mixed)

    small, large = stage("a, sides x 0.5", 3, 1.0, "a"), stage("a, sides x 1", 1, 5.0, "a")
    assert bill.images_needed([small, large, stage("b", 4, 4.0, "b")]) == pytest.approx(40 / 8)
    assert bill.images_needed([small, large, stage("b", 4, 1.0, "b"), stage("c", 0, 0.1, "c")]) == pytest.approx(10)
