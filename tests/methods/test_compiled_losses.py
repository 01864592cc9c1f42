"""Methods whose losses are compiled in their plain form learn what the reference learns, and nothing is compiled again when the
temperature changes."""

from collections.abc import Iterator

import pytest
import torch

import kernels
from engine import methods
from engine.core.draws import Draws
from engine.core.optim import Moment
from engine.methods.base import Method
from engine.model import vit
from engine.training.build import compile_regions
from tests.methods.small import small

STEPS = 3
# a step an epoch, so that the temperature differs from step to step
SETTINGS = {
    "epochs": STEPS, "target_temperature_start": 0.04, "target_temperature": 0.07, "target_temperature_epochs": STEPS,
    "freeze_last_layer": 0, "queue_size": 0, "augmentation": "minimal", "crop_scale": (0.4, 1.0),
    "prototypes": 50,  # no number of padded rows, since the compiler takes equal sizes for one
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiler_as_it_was() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    kernels.use("auto")
    torch._dynamo.reset()


def make(name: str, **settings: object) -> Method:
    torch.manual_seed(0)
    kind = methods.get(name)
    method = kind(
        vit.create("vit_micro_patch8_32", depth=1), kind.Settings(**small(kind.Settings, **SETTINGS | settings))
    )
    with torch.no_grad():
        for parameter in getattr(method, "teacher", torch.nn.Module()).parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def losses_and_gradients(method: Method) -> Iterator[tuple[float, float, dict[str, torch.Tensor]]]:
    """Of each step, with its temperature; weights stay as they are, what is learned of a step besides does not."""
    for step in range(STEPS):
        method.begin(Moment(step, STEPS, 1))
        generator = torch.Generator().manual_seed(step)
        images = tuple(torch.randn(8, 3, *view.size, generator=generator) for view in method.views())
        drawn = method.draw(Draws(0, step, batch=8, rows=slice(None), device=torch.device("cpu")))
        method.zero_grad()
        loss = method(images, torch.arange(8), drawn)["loss"]
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        yield getattr(method, "target_temperature", 0.0), loss.item(), gradients
        method.after_step(torch.tensor(True))


def only_losses(method: Method, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Compile its losses as a run does, and nothing else; returns the names of what is compiled."""
    found = {"regions": list(method.regions()), "ragged_regions": list(method.ragged_regions())}
    for kind, regions in found.items():
        regions = [(owner, name) for owner, name in regions if name in ("meet", "balance", "contrast")]
        monkeypatch.setattr(method, kind, lambda regions=regions: iter(regions))
        found[kind] = regions
    compile_regions(method)
    return {name for regions in found.values() for _, name in regions}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "collapse", "compiled"),
    [
        ("dino", "centring", {"meet"}),
        ("ibot", "centring", {"meet"}),
        ("swav", "sinkhorn", {"meet", "balance"}),
        ("msn", "me-max+sinkhorn", {"meet", "balance"}),
        ("dinov2", "sinkhorn", {"meet", "balance"}),
        ("nnclr", None, {"contrast"}),
    ],
)
def test_steps_equal_the_reference_and_are_compiled_once(name, collapse, compiled, monkeypatch):
    settings = {"collapse": collapse} if collapse else {"queue_size": 64}
    kernels.use("reference")
    wanted = list(losses_and_gradients(make(name, **settings)))
    kernels.use("plain")
    method = make(name, **settings)
    assert only_losses(method, monkeypatch) == compiled
    steps = losses_and_gradients(method)
    found = [next(steps)]
    # fullgraph forbids a graph break; this, a second compilation
    with torch.compiler.set_stance("fail_on_recompile"):
        found += steps
    assert not collapse or len({temperature for temperature, *_ in found}) == STEPS
    for (temperature, loss, gradients), (_, reference, theirs) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(reference, rel=1e-5), temperature
        assert gradients.keys() == theirs.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, theirs[parameter], atol=1e-6, rtol=1e-3, msg=parameter)


def test_a_number_in_place_of_the_tensor_would_be_compiled_again():
    """The control: what is guarded against does happen."""
    kernels.use("plain")
    compiled = torch.compile(kernels.soft_cross_entropy, fullgraph=True, dynamic=False, backend="eager")
    teacher, student = torch.randn(2, 4, 6)
    compiled(teacher, student, 0.04, 0.1)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(teacher, student, 0.05, 0.1)


def test_only_plain_losses_run_what_is_compiled():
    """Elsewhere the op is opaque, and a compiled region around it would only take time to compile."""
    method = make("dino", collapse="sinkhorn")
    run: list[str] = []
    for owner, name in method.regions():
        if name in ("meet", "balance"):
            own = getattr(owner, name)
            setattr(owner, name, lambda *inputs, own=own, name=name: run.append(name) or own(*inputs))
    for choice, expected in {"reference": [], "plain": ["balance", "meet"]}.items():
        kernels.use(choice)
        run.clear()
        next(losses_and_gradients(method))
        assert run == expected
