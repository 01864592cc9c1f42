"""The forms of a multi-crop step that `benchmarks.multicrop` times: they compute the same; and the command itself."""

import importlib.util
import json

import pytest
import torch

from benchmarks import multicrop, rounds
from benchmarks.peers.plain_dino import PlainDino
from engine.core.draws import Draws
from engine.methods.dino import Dino, Settings
from engine.model import vit
from engine.training.step import Update
from tests.methods.small import small


def three_forms(**encoder: object) -> dict[str, Dino]:
    """With the same weights; teachers have gone their own way."""
    settings = Settings(**small(Settings, epochs=1, freeze_last_layer=0, weight_decay_end=0.4, batch_size=4))
    torch.manual_seed(0)
    ours = Dino(vit.create("vit_micro_patch8_32", depth=3, global_pool="token", **encoder), settings)
    with torch.no_grad():
        for parameter in (*ours.teacher.parameters(), *ours.encoder.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
        ours.collapse.centre.normal_(std=0.3)
    forms = {"packed": ours}
    for name in ("per-size", "padded"):
        plain = PlainDino(vit.create("vit_micro_patch8_32", depth=3, global_pool="token", **encoder), settings,
                          padded=name == "padded")  # fmt: skip
        plain.load_state_dict(ours.state_dict())
        forms[name] = plain
    return forms


def batch(method: Dino) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, 3, *view.size, generator=generator) for view in method.views()), torch.arange(4)


@pytest.mark.parametrize("encoder", [{}, {"reg_tokens": 2, "init_values": 0.5}], ids=["plain", "registers and scale"])
def test_all_forms_compute_the_same(encoder: dict[str, object]):
    forms = three_forms(**encoder)
    assert [view.size for view in forms["packed"].views()] == [(32, 32)] * 2 + [(16, 16)] * 2
    losses, gradients, teachers = {}, {}, {}
    for name, method in forms.items():
        images, ids = batch(method)
        report = method(images, ids, {})
        report["loss"].backward()
        losses[name] = report["loss"].item()
        gradients[name] = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        Update(method, 4)(1, images, ids, {})
        teachers[name] = dict(method.teacher.named_parameters())
    for name in ("per-size", "padded"):
        assert losses[name] == pytest.approx(losses["packed"], abs=1e-5)
        assert gradients[name].keys() == gradients["packed"].keys()
        for parameter, gradient in gradients["packed"].items():
            torch.testing.assert_close(gradients[name][parameter], gradient, atol=1e-5, rtol=1e-3, msg=parameter)
        for parameter, moved in teachers["packed"].items():
            torch.testing.assert_close(teachers[name][parameter], moved, atol=1e-5, rtol=1e-4, msg=parameter)


def test_padding_without_its_mask_is_seen(monkeypatch: pytest.MonkeyPatch):
    """What the comparison above rests on: keys that are padding would change the loss."""
    from benchmarks.peers import plain_dino

    padded, run = three_forms()["padded"], plain_dino._run
    loss = padded(*batch(padded), {})["loss"]
    monkeypatch.setattr(plain_dino, "_run", lambda encoder, x, mask, generator: run(encoder, x, None, generator))
    assert abs(padded(*batch(padded), {})["loss"] - loss) > 1e-3


@pytest.mark.parametrize("name", ["per-size", "padded"])
def test_the_peers_drop_branches_of_the_student_at_the_rate_of_the_block(name: str):
    method, seen = three_forms(drop_path=0.5)[name], []
    drawn = method.draw(Draws(0, batch=4, rows=slice(None), device=torch.device("cpu")))
    for tower in (method.encoder, method.teacher.encoder):
        for index, block in enumerate(tower.blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: seen.append((index, args[2])))
    loss = method(*batch(method), drawn)["loss"]
    assert torch.equal(loss, method(*batch(method), drawn)["loss"])
    assert loss != method(*batch(method), {})["loss"]
    worth = [torch.cat([w.flatten() for i, w in seen if i == index and w is not None]) for index in range(3)]
    assert [len(values) for values in worth] == [64] * 3  # of two steps: two branches, four crops of four images
    for rate, values in zip((0, 0.25, 0.5), worth, strict=True):
        torch.testing.assert_close(values.unique(), torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
    # nothing is drawn for the teacher, and none of the third step
    student_passes = 2 if name == "per-size" else 1
    assert sum(w is None for _, w in seen) == 3 * (3 + student_passes)


@pytest.mark.long
def test_the_command_times_all_forms_and_writes_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))
    out = tmp_path / "record.json"
    arguments = [
        "--model",
        "vit_micro_patch8_32",
        "--batch-size",
        "2",
        "--prototypes",
        "32",
        "--no-compile",
        "--rounds",
        "2",
    ]
    assert multicrop.main([*arguments, "--out", str(out)]) == 0
    record, shown = json.loads(out.read_text()), capsys.readouterr().out
    installed = importlib.util.find_spec("lightly") is not None
    assert set(record["median"]) == {"packed", "per-size", "padded"} | ({"lightly"} if installed else set())
    assert ("lightly is left out" in shown) == (not installed)
    assert record["median"]["per-size"]["ratio"] == 1
    for name, found in record["rounds"].items():
        assert len(found) == 2
        assert record["peak_memory"][name] > 2**20
        for one, usual in zip(found, record["rounds"]["per-size"], strict=True):
            assert one["ratio"] == pytest.approx(one["images_per_second"] / usual["images_per_second"])
            share = one["images_per_second"] * record["flops_per_image"] / one["peak"]
            assert one["share_of_peak"] == pytest.approx(share)


def test_a_peer_that_fails_is_told_and_ours_fails_the_command(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("out of memory")

    arguments = ["--model", "vit_micro_patch8_32", "--batch-size", "1", "--prototypes", "8", "--no-compile", "--no-memory",
                 "--rounds", "1", "--forms", "packed", "padded"]  # fmt: skip
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))
    monkeypatch.setitem(multicrop.FORMS, "padded", broken)
    assert multicrop.main(arguments) == 0
    assert "padded is left out: RuntimeError: out of memory." in capsys.readouterr().out
    monkeypatch.setitem(multicrop.FORMS, "packed", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        multicrop.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forms", "dense"], "--forms has no 'dense'; choose from packed, per-size, padded, lightly"),
        (["--batch-size", "0"], "--batch-size is 0; it must be a whole number from 1"),
        (["--rounds", "0"], "--rounds is 0; it must be a whole number from 1"),
        (["--precision", "fp8"], "--precision is 'fp8'; choose auto, fp32, bf16"),
        (["--out", "nowhere/record.json"], "--out is 'nowhere/record.json', but there is no folder 'nowhere'"),
        (["--out", "."], "--out is '.', which is a folder; give a file in it"),
        (["--prototypes", "1"], "prototypes is 1; it must be a whole number from 2"),
        (["--model", "vit_smal"], "unknown model 'vit_smal'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments: list[str], sentence: str, capsys):
    assert multicrop.main(arguments) == 2
    assert sentence in capsys.readouterr().err
