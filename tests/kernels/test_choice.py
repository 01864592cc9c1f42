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
        "info_nce", "nearest_neighbours", "packed_attention", "patches", "relation", "sinkhorn", "soft_cross_entropy",
    }  # fmt: skip
    assert all("reference" in exist for exist in choice.AVAILABLE.values())
    lines = kernels.describe().splitlines()
    assert [line.split()[:2] for line in lines] == [[op, "reference"] for op in choice.AVAILABLE]


def test_what_no_op_has_is_refused_at_once():
    with pytest.raises(ValueError, match="no kernel has an implementation 'fast'; choose from auto, reference"):
        kernels.use("fast")
    with pytest.raises(ValueError, match="packed_attention has no implementation 'fast'; choose from auto, reference"):
        kernels.use("fast", "packed_attention")
    with pytest.raises(ValueError, match="there is no kernel 'attention'; choose from info_nce, nearest_neighbours"):
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
        "patches=triton,attention=triton": "there is no kernel 'attention'; choose from info_nce, nearest_neighbours",
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


@pytest.mark.usefixtures("a_triton_version")
def test_a_record_makes_a_default_on_its_device_only(monkeypatch):
    monkeypatch.setitem(choice.DEFAULTS, "sm_90", {"patches": "triton"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with monkeypatch.context() as a_gpu:
        a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        kernels.use("auto")
    assert choice.chosen("patches", torch.device("cuda")) == "triton"
    assert choice.load("patches", "triton") is sys.modules["kernels.patches.triton"]
    assert choice.chosen("info_nce", torch.device("cuda")) == "reference"
    assert choice.chosen("patches", torch.device("cpu")) == "reference"
    compiled = torch.compile(lambda x: kernels.gather_patches(x, INDICES, 4), fullgraph=True, backend="aot_eager")
    assert compiled(IMAGES).shape == (2, 2, 48)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert choice.chosen("patches", torch.device("cuda")) == "reference"


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
