import pytest
import torch

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.gpus import peak_flops, unusable


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak


def test_one_that_is_there_and_cannot_be_used_is_told_apart_from_none(monkeypatch):
    def says(error: Exception) -> str:
        def init():
            raise error

        monkeypatch.setattr(torch.cuda, "init", init)
        return unusable()

    assert unusable() == ""
    assert says(RuntimeError("Found no NVIDIA driver on your system. Please check that you have a GPU")) == ""
    assert says(RuntimeError("No CUDA GPUs are available")) == ""
    assert says(AssertionError("Torch not compiled with CUDA enabled")) == ""
    assert says(RuntimeError("CUDA unknown error - this may be due to a bad setup. Setting the")) == (
        "CUDA unknown error - this may be due to a bad setup"
    )
    for device in ("auto", "cuda"):
        with pytest.raises(
            BadInput, match=r"has a GPU that torch .* cannot use: CUDA unknown error .*--device cpu goes"
        ):
            dist.start(device)
    assert dist.start("cpu").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),
    ],
)
def test_one_that_this_torch_has_no_code_for_is_told(monkeypatch, capability, runs):
    codes = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100f"]
    found = {
        "init": None,
        "device_count": 1,
        "get_arch_list": codes,
        "get_device_capability": capability,
        "get_device_name": "Some GPU",
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = "Some GPU is sm_{}{}, and it has code for sm_75, sm_80, sm_86, sm_90a, sm_100f".format(*capability)
    assert unusable() == ("" if runs else told)
    assert unusable(1) == ""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*codes, "compute_100"])
    assert unusable() == ("" if runs or capability > (10, 0) else told.replace("100f", "100f, compute_100"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert unusable() == ""
