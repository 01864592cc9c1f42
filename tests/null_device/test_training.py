"""A run of `engine.train` on a device that computes nothing: calibrated, compiled, two steps, and all that a run leaves."""

import json

import pytest

from engine.null_device import device

pytestmark = [pytest.mark.null_device, pytest.mark.long, pytest.mark.timeout(1800)]

FLAGS = (
    "--method mae --model vit_tiny_patch16_224 --data synthetic:16 --batch-size 8 --epochs 1 --device cuda --compile "
    "--calibrate auto"
)


def test_a_compiled_run_calibrates_trains_and_leaves_its_folder(on_device, tmp_path):
    out = tmp_path / "run"
    done = device.process(["-m", "tests.null_device.training", *FLAGS.split(), "--out", str(out)], on_device())
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout
    assert "1 x NVIDIA H200, bf16 autocast, fp32 products in TF32, compiled" in said
    assert "packed_attention reference" in said  # of what runs: nothing was proved
    table = json.loads((out / "kernels.json").read_text())
    assert table["machine"]["device"] == "NVIDIA H200" and table["table"] == {}
    assert any(line.startswith("packed_attention_forward") and ": reference" in line for line in table["lines"])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in steps if record["kind"] == "train"]
    assert trained[-1]["step"] == 2
    assert 0 < trained[-1]["waiting_for_data"] <= 1  # by events, a millisecond apart there
    for left in ("checkpoints/step-000000002/model.safetensors", "export/model.safetensors", "summary.json"):
        assert (out / left).is_file()
