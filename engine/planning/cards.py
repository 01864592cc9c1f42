"""The GPUs that a run can be planned for: what their makers say they do, and how much of that training is known to reach.

Sources, by field:
    memory: what torch reports as a device's total memory, in bytes, rounded down; less than the name says.
    bandwidth, half, single, watts: NVIDIA's data sheets of A100 (40 and 80 GB SXM), H100 SXM, H200 SXM, L40S, V100 SXM2 32 GB and
        T4, and the white papers of Ada (RTX 4090: with fp32 accumulation) and Turing. `half` is dense matrix products in bf16 or
        fp16, `single` those in TF32, where the card has it, else fp32 outside the matrix pipe.
    link: from the same, one direction of NVLink, or of 16 lanes of PCIe where the card has no NVLink.
    reached: assumed, low, likely and high; the likely one from published training of ViTs and language models, which
        report 75 to 85 % of the peak in large products and 85 to 92 % of the bandwidth in plain kernels.
None of them is calibrated on a card by this project yet.
"""

from dataclasses import dataclass
from typing import NamedTuple

from engine.core.errors import BadInput

NOT_CALIBRATED = "not calibrated on a card yet"
LAUNCH = 3e-6  # seconds of a GPU between two kernels


class Reached(NamedTuple):
    """Shares of a card's peaks: of its matrix products, of its memory's bandwidth, and of products within attention."""

    products: float
    bandwidth: float
    attention: float


LOW, LIKELY, HIGH = Reached(0.60, 0.78, 0.25), Reached(0.80, 0.89, 0.45), Reached(0.90, 0.94, 0.70)


@dataclass(frozen=True)
class Card:
    """One GPU: bytes, bytes per second, operations per second, watts."""

    name: str
    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    watts: float
    bf16: bool = True
    origin: str = NOT_CALIBRATED
    reached: tuple[Reached, Reached, Reached] = (LOW, LIKELY, HIGH)


GIB = 2**30
CARDS = {
    card.name: card
    for card in (
        Card("A100-40", 39.3 * GIB, 1.555e12, 312e12, 156e12, 300e9, 400),
        Card("A100-80", 79.1 * GIB, 2.039e12, 312e12, 156e12, 300e9, 400),
        Card("H100", 79.1 * GIB, 3.35e12, 989e12, 494e12, 450e9, 700),
        Card("H200", 139.7 * GIB, 4.8e12, 989e12, 494e12, 450e9, 700),
        Card("L40S", 44.3 * GIB, 0.864e12, 362e12, 183e12, 32e9, 350),
        Card("4090", 23.5 * GIB, 1.008e12, 165e12, 82.6e12, 32e9, 450),
        Card("V100", 31.7 * GIB, 0.9e12, 125e12, 15.7e12, 150e9, 300, bf16=False),
        Card("T4", 14.5 * GIB, 0.32e12, 65e12, 8.1e12, 16e9, 70, bf16=False),
    )
}


def named(name: str) -> Card:
    """The card of this name, in any case; A100 is the one with 80 GB. Raises BadInput for another."""
    wanted = {"A100": "A100-80"}.get(name.upper(), name.upper())
    if wanted not in CARDS:
        raise BadInput(f"--gpu {name} is unknown; choose one of {', '.join(CARDS)}.")
    return CARDS[wanted]
