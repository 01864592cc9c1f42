"""What number formats a run computes in, and the scaling that keeps fp16 gradients from vanishing. Weights and optimiser are
fp32 always."""

import torch
from torch import Tensor

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def automatic(device: torch.device) -> str:
    """fp32 on CPUs, bf16 on GPUs that multiply it (compute capability 8.0 and above), fp16 on older ones."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def described(precision: str, device: torch.device) -> str:
    """In words, with what fp32 products are: TF32 on GPUs since 8.0, as torch is set."""
    words = {"fp32": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast with loss scaling"}[precision]
    if device.type != "cuda":
        return words
    tf32 = torch.get_float32_matmul_precision() != "highest" and torch.cuda.get_device_capability(device) >= (8, 0)
    return f"{words}, fp32 products in {'TF32' if tf32 else 'full fp32'}"


class LossScale:
    """What the loss is multiplied by before backward, so that its gradients lie within fp16: as much as goes, found by trying
    (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2).

    Gradients that are not finite leave an update out, as always, and halve the scale; 2,000 updates without double it.

    Attributes:
        scale: fp32 [] on the device.
        good: int32 [], updates since it changed.
    """

    FIRST, INTERVAL = 2.0**16, 2000

    def __init__(self, device: torch.device):
        self.scale = torch.full((), self.FIRST, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)

    def move(self, applied: Tensor) -> None:
        """After an update, or one that was left out."""
        torch._amp_update_scale_(self.scale, self.good, (~applied).to(torch.float32), 2.0, 0.5, self.INTERVAL)

    def state(self) -> dict[str, Tensor]:
        """By name, the tensors themselves."""
        return {"loss_scale": self.scale, "loss_scale_good": self.good}
