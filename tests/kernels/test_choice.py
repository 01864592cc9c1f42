"""The choice of implementation: found by name, never a silent fallback, and no graph break when it changes."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels
from kernels import choice, library

ROOT = Path(__file__).parents[2]
IMAGES, INDICES = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8), torch.tensor([[0, 3], [1, 2]])


@pytest.fixture
def a_triton_version(monkeypatch):
    """As if kernels/patches/triton.py and kernels/info_nce/triton.py were all there is; both answer 7."""
    functions = {
        "patches": {"gather": lambda images, indices, size: images.new_full((*indices.shape, 3 * size**2), 7.0)},
        "info_nce": {"forward": lambda queries, *_: (queries.new_full((), 7.0), queries.new_zeros(len(queries)))},
    }
    for op in choice.AVAILABLE:
        monkeypatch.setitem(choice.AVAILABLE, op, ("reference", "triton") if op in functions else ("reference",))
    for op, named in functions.items():
        module = ModuleType(f"kernels.{op}.triton")
        vars(module).update(named)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield
    for op in functions:
        choice._modules.pop((op, "triton"), None)


def test_every_op_has_a_reference_and_runs_it():
    assert set(choice.AVAILABLE) == {
        "adamw", "info_nce", "nearest_neighbours", "packed_attention", "patches", "relation", "sinkhorn", "soft_cross_entropy",
    }  # fmt: skip
    assert all("reference" in exist for exist in choice.AVAILABLE.values())
    lines = kernels.describe().splitlines()
    assert [line.split()[:2] for line in lines] == [[op, "reference"] for op in choice.AVAILABLE]


def test_what_no_op_has_is_refused_at_once():
    with pytest.raises(ValueError, match="no kernel has an implementation 'fast'; choose from auto, reference"):
        kernels.use("fast")
    with pytest.raises(ValueError, match="packed_attention has no implementation 'fast'; choose from auto, reference"):
        kernels.use("fast", "packed_attention")
    with pytest.raises(ValueError, match="there is no kernel 'attention'; choose from adamw, info_nce"):
        kernels.use("reference", "attention")
    assert kernels.gather_patches(IMAGES, INDICES, 4).shape == (2, 2, 48)


@pytest.mark.usefixtures("a_triton_version")
def test_a_choice_for_all_means_where_it_exists():
    kernels.use("triton")
    assert (kernels.gather_patches(IMAGES, INDICES, 4) == 7).all()
    assert kernels.sinkhorn(torch.zeros(2, 3), 0.1).shape == (2, 3)
    assert "sinkhorn            reference  (exists: reference; asked: triton, which it has not)" in kernels.describe()
    kernels.check("cuda")
    with pytest.raises(ValueError, match="sinkhorn has no implementation 'triton'; choose from auto, reference"):
        kernels.use("triton", "sinkhorn")


@pytest.mark.usefixtures("a_triton_version")
def test_a_choice_can_be_given_by_op():
    kernels.use("patches=triton, info_nce=reference")
    assert (kernels.gather_patches(IMAGES, INDICES, 4) == 7).all()
    assert choice.chosen("info_nce", torch.device("cpu")) == "reference"
    kernels.use("triton,patches=reference")
    assert choice.chosen("patches", torch.device("cpu")) == "reference"
    assert choice.chosen("info_nce", torch.device("cpu")) == "triton"
    before = kernels.describe()
    for wrong, sentence in {
        "patches=triton,attention=triton": "there is no kernel 'attention'; choose from adamw, info_nce",
        "sinkhorn=triton": "sinkhorn has no implementation 'triton'; choose from auto, reference",
        "patches=": "kernels 'patches=' is no choice; write triton, or packed_attention=cuda,sinkhorn=triton",
        "patches=triton,triton": "is no choice",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            kernels.use(wrong)
    assert kernels.describe() == before, "a refused choice changes nothing"


@pytest.mark.usefixtures("a_triton_version")
def test_a_compiled_function_follows_the_choice():
    def step(images, queries):
        targets = torch.arange(len(queries))
        return kernels.gather_patches(images, INDICES, 4).mean() + kernels.info_nce(queries, queries, targets, 1.0)

    queries = torch.eye(3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain = compiled(IMAGES, queries)
    kernels.use("triton")
    assert compiled(IMAGES, queries) == 14
    kernels.use("auto")
    assert compiled(IMAGES, queries) == plain == step(IMAGES, queries)


@pytest.fixture
def thawed():
    yield
    kernels.freeze({}, "cpu")


@pytest.mark.usefixtures("a_triton_version", "thawed")
def test_auto_is_what_the_frozen_table_says_by_class_of_shapes_and_device():
    in_patches_of_4 = {"gather_patches": {"float32 P4": "triton"}}
    kernels.freeze(in_patches_of_4, "cpu")
    assert kernels.frozen() == in_patches_of_4
    assert (kernels.gather_patches(IMAGES, INDICES, 4) == 7).all()
    assert not (kernels.gather_patches(IMAGES, INDICES, 2) == 7).all()
    assert "float32 P4: triton" in kernels.describe()
    kernels.use("reference", "patches")
    assert not (kernels.gather_patches(IMAGES, INDICES, 4) == 7).all()
    kernels.use("auto")
    kernels.freeze(in_patches_of_4, "cuda")
    assert not (kernels.gather_patches(IMAGES, INDICES, 4) == 7).all()
    for wrong, sentence in (
        ({"gather": {}}, "no kernel leaves 'gather' to calibration"),
        ({"gather_patches": {"float32 P4": "cuda"}}, "patches has no implementation 'cuda'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            kernels.freeze(wrong, "cpu")
    assert kernels.frozen() == in_patches_of_4, "a refused table changes nothing"


@pytest.mark.usefixtures("thawed")
def test_attention_reads_the_table_when_it_runs_so_that_nothing_is_compiled_again(monkeypatch):
    ran = []
    reference = choice.load("packed_attention", "reference")
    other = ModuleType("kernels.packed_attention.triton")
    for name in ("forward", "backward"):
        vars(other)[name] = lambda *inputs, of=name: ran.append(of) or getattr(reference, of)(*inputs)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setitem(choice.AVAILABLE, "packed_attention", ("reference", "triton"))
    kernels.freeze({"packed_attention_forward": {}}, "cpu")
    traced = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(kernels.packed_attention, fullgraph=True, backend=traced, dynamic=False)
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
    qkv = torch.randn(6, 3, 1, 32, requires_grad=True)
    plain = attend(qkv, cu_seqlens, 3)
    for forward, backward, runs in (("triton", "reference", ["forward"]), ("reference", "triton", ["backward"])):
        kernels.freeze(
            {
                "packed_attention_forward": {"float32 D32 L3": forward},
                "packed_attention_backward": {"float32 D32 L3": backward},
            },
            "cpu",
        )
        out = attend(qkv, cu_seqlens, 3)
        out.sum().backward()
        assert ran == runs
        assert torch.equal(out, plain)
        ran.clear()
    assert traced.frame_count == 1


def test_a_wrong_environment_variable_is_told_by_describe_and_by_the_first_call():
    code = (
        "import kernels, torch; print(kernels.describe());"
        "kernels.gather_patches(torch.zeros(1, 3, 4, 4), torch.tensor([[0]]), 4)"
    )
    environment = os.environ | {"TESSERA_KERNELS": "fast"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.count("none (fast asked)") == len(choice.AVAILABLE)
    assert result.returncode != 0
    names = ", ".join(("auto", *choice.AVAILABLE["patches"]))
    assert f"patches has no implementation 'fast'; choose from {names} (kernels.use or TESS" in result.stderr


def test_a_wrong_list_in_the_environment_breaks_no_import():
    choice.request("patchs=triton")
    try:
        with pytest.raises(ValueError, match=r"there is no kernel 'patchs' \(TESSERA_KERNELS\)"):
            kernels.check("cpu")
    finally:
        choice.request("auto")
    kernels.check("cpu")


def test_what_cannot_run_here_is_told_by_check_and_by_the_call(monkeypatch):
    monkeypatch.setattr(choice, "_needs_gpu", {("patches", "triton")})
    kernels.use("triton", "patches")
    for call in (lambda: kernels.check("cpu"), lambda: kernels.gather_patches(IMAGES, INDICES, 4)):
        with pytest.raises(ValueError, match=r"patches needs tensors on a GPU to run triton, .* TRITON_INTERPRET=1"):
            call()
    assert "none (triton asked)" in kernels.describe()
    kernels.check("cuda")
    kernels.use("auto")
    kernels.check("cpu")


def test_what_was_not_built_does_not_break_the_import(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "build" / "libtessera_kernels.so")
    monkeypatch.delitem(sys.modules, "kernels.packed_attention.cuda", raising=False)
    before = dict(choice._requested)
    with pytest.raises(ValueError, match="the CUDA kernels are not built"):
        kernels.use("cuda")
    assert choice._requested == before, "a refused choice changes nothing"
    choice.request("cuda")  # what the environment variable does at import
    with pytest.raises(ValueError, match="packed_attention cannot run cuda: the CUDA kernels are not built"):
        kernels.check("cuda")
