"""What GPUs can do, by the name torch knows them by: rates from the makers' data sheets."""

import re

# Dense bf16 tensor-core peaks per GPU in FLOP/s. Hopper's data sheets print them "with sparsity": twice these.
PEAKS = (
    (r"\bA100\b", 312e12),  # NVIDIA A100 data sheet, SXM and PCIe alike
    (r"\bH[12]00 NVL\b", 835e12),  # NVIDIA H100 and H200 data sheets, NVL: 1,671 TFLOPS with sparsity
    (r"\bH100 PCIe\b", 756e12),  # NVIDIA H100 data sheet, PCIe: 1,513 with sparsity
    (r"\bH[12]00\b", 989e12),  # NVIDIA H100 and H200 data sheets, SXM: 1,979 with sparsity
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one GPU in FLOP/s by its name (`torch.cuda.get_device_name()`), None where no figure is known.

    A slice of a GPU (MIG) is unknown: its share of the peak isn't in the name.
    """
    if " MIG " in device_name:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)
