"""What GPUs can do, by the name torch knows them by: rates from the makers' data sheets; why one cannot be used, and what to do
where one is full."""

import re

import torch

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


# What torch says where there is no GPU, where none is shown to it (CUDA_VISIBLE_DEVICES), and where it was built without CUDA.
_NONE = ("Found no NVIDIA driver", "No CUDA GPUs are available", "Torch not compiled with CUDA enabled")


def unusable(index: int = 0) -> str:
    """Why a GPU that is there cannot be used, such as that its driver is too old, or that this torch has no code for it; "" where
    there is none, and where it can."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        said = str(error).partition(". ")[0].strip()
        return "" if said.startswith(_NONE) else said
    if index >= torch.cuda.device_count():
        return ""
    built, (major, minor) = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(index)
    if torch.version.cuda is None or any(_runs(code, major, minor) for code in built):  # None: of another maker
        return ""
    return f"{torch.cuda.get_device_name(index)} is sm_{major}{minor}, and it has code for {', '.join(built)}"


def _runs(code: str, major: int, minor: int) -> bool:
    """Whether a GPU takes code for sm_XY (of its generation, and no later than it), or compiles code for compute_XY itself."""
    kind, of_major, of_minor = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", code).groups()
    made_for = int(of_major), int(of_minor)
    return made_for <= (major, minor) and (kind == "compute" or made_for[0] == major)


def of_full_memory(error: torch.OutOfMemoryError) -> str:
    """What torch said, as far as it is about the memory, and what needs less."""
    said = ". ".join(str(error).split(". ")[:3])
    return (
        f"{said}; --accumulate N takes a batch in N parts for the same gradients, --recompute selective keeps less of each: "
        "docs/faq.md has more, python -m engine.plan --fit says what fits"
    )
