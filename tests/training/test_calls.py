"""The calls of a run are listed without computing it, and are those that it makes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from engine import methods
from engine.core.draws import Draws
from engine.model import vit
from engine.training import config
from engine.training.calls import calls_of, without_data

CPU = torch.device("cpu")


def listed(
    method: str, *flags: str, device: str = "cpu", world: int = 1, precision: str = "fp32"
) -> set[tuple[str, str]]:
    plan = config.parse(["--method", method, *flags])
    return {(call.name, call.shape_class) for call in calls_of(plan, torch.device(device), world, precision)}


@pytest.mark.parametrize("method", methods.names())
def test_every_method_is_listed(method):
    calls = {call.name for call in calls_of(config.parse(["--method", method]), CPU, 1, "fp32")}
    assert calls >= ({"gather_patches"} if method == "beit" else {"gather_patches", "packed_attention_forward"})


def test_a_large_model_is_listed_with_its_sizes():
    plan = config.parse(
        ["--method", "mae", "--model", "vit_small_patch16_224", "--preset", "plain", "--batch-size", "64"]
    )
    calls = calls_of(plan, CPU, 2, "bf16")
    sizes = {(call.name, call.shape_class): call.shapes for call in calls}
    assert sizes["packed_attention_forward", "bfloat16 D64 L50"] == "qkv 1600x3x6x64, cu_seqlens 33"
    assert ("packed_attention_backward", "bfloat16 D32 L197") in sizes


def test_multi_crop_lists_lengths_as_they_are():
    plan = config.parse(
        ["--method", "dino", "--model", "vit_tiny_patch16_224", "--preset", "plain", "--batch-size", "8"]
    )
    (call,) = [
        call
        for call in calls_of(plan, CPU, 1, "fp32")
        if call.name == "packed_attention_forward" and "mixed" in call.shape_class
    ][:1]
    ends = torch.tensor(call.arguments["cu_seqlens"]["values"])
    assert len(set(ends.diff().tolist())) == 2


def test_micro_batches_are_listed_by_their_sizes_and_the_whole_batch_where_it_is_compared():
    flags = ["--method", "mocov3", "--batch-size", "16"]
    whole, parts = (
        {call.name: call.shapes for call in calls_of(config.parse([*flags, "--accumulate", count]), CPU, 1, "fp32")}
        for count in ("1", "4")
    )
    compared = {name for name in whole if "info_nce" in name}
    assert compared and {name: parts[name] for name in compared} == {name: whole[name] for name in compared}
    assert whole["packed_attention_backward"].startswith("grad_out 544x")
    assert parts["packed_attention_backward"].startswith("grad_out 136x")


@pytest.mark.parametrize("name", ["dino", "beit", "relvit"])
def test_no_fake_tensor_stays_in_what_a_step_caches(name: str):
    """A run lists its calls and then makes its steps, with the same shapes."""
    plan = config.parse(["--method", name, "--model", "vit_micro_patch8_32", "--batch-size", "8"])
    calls_of(plan, CPU, 1, "fp32")
    ((kind, settings),) = plan.stages
    method = without_data(kind, settings, vit.create(plan.model, **plan.encoder), 10).train()
    images = tuple(torch.randn(8, 3, *view.size) for view in method.views())
    report = method(images, torch.arange(8), method.draw(Draws(0, batch=8, rows=slice(None), device=CPU)))
    assert not any(isinstance(value, FakeTensor) for value in report.values())
