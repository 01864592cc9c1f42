"""Writes an encoder as an ONNX file, and leaves it only where onnxruntime computes what torch does.

Our own operations on packed tokens are not ONNX's, so what is traced is timm's model of the same weights.

Shapes: B images, L tokens of one, C channels, K classes.
"""

import importlib.util
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.core.durable import flush
from engine.core.errors import BadInput
from engine.model.twins import twin_of
from engine.model.vit import VisionTransformer

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the largest value of an output, in fp32; other orders of summation alone make about 1e-6 of it
BATCHES = (1, 3)  # neither is the one that is traced


@dataclass(frozen=True)
class Output:
    """One output as it was compared: its shape for one image, its largest difference from torch's, torch's largest value."""

    shape: tuple[int, ...]
    difference: float
    largest: float


@dataclass(frozen=True)
class Written:
    """What `write` left: its files (weights too large for one, since ONNX ends at 2 GB, lie in a second); each output by name."""

    files: tuple[Path, ...]
    outputs: dict[str, Output]


def check(path: Path) -> None:
    """Raise BadInput where what is needed is not installed, or where `path` is no name for a new ONNX file."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"an ONNX file needs {', '.join(missing)}, not installed here: use uv run --group export python -m engine.export, or "
            f"pip install {' '.join(missing)}."
        )
    if path.suffix != ".onnx":
        raise BadInput(f"{path} is no name for an ONNX file; choose one that ends in .onnx.")
    for taken in (path, _beside(path)):
        if taken.exists():
            raise BadInput(f"{taken} is there already; choose another name.")


@torch.no_grad()
def write(
    model: VisionTransformer,
    path: Path,
    *,
    classifier: nn.Linear | None = None,
    about: Mapping[str, str] | None = None,
) -> Written:
    """Writes `path`: images fp32 [B, 3, H, W] of the model's size, B free -> features [B, C] as the model pools them, tokens
    [B, L, C] after the final norm, and with a `classifier` on the features its scores [B, K].

    onnxruntime then runs it on random images, and only if every output equals that of `model`, which lies on the CPU, to within
    TOLERANCE of its largest value is it renamed into place. `about` becomes the file's metadata. Raises BadInput as `check` does,
    or if an output differs.
    """
    check(path)
    model.eval()
    traced = _Traced(model, classifier).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    try:
        aside = folder / path.name  # the file names the one beside it, which must therefore have its last name already
        _export(traced, model.img_size, aside, about or {})
        outputs = _compare(model, classifier, aside)
        files = [name for name in (_beside(aside), aside) if name.exists()]
        for file in files:
            flush(file)
            file.replace(path.parent / file.name)
        flush(path.parent)
    finally:
        shutil.rmtree(folder)
    return Written(tuple(path.parent / file.name for file in files), outputs)


class _Traced(nn.Module):
    """timm's model of the same weights, with all that is asked of it as a tuple."""

    def __init__(self, model: VisionTransformer, classifier: nn.Linear | None) -> None:
        super().__init__()
        self.twin = twin_of(model.architecture, "cpu")
        state = model.architecture.timm_state(model.state_dict())
        self.twin.load_state_dict(state, assign=True)
        self.classifier = classifier

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        tokens_BLC = self.twin.forward_features(images_B3HW)
        features_BC = self.twin.forward_head(tokens_BLC, pre_logits=True)
        scores = () if self.classifier is None else (self.classifier(features_BC),)
        return features_BC, tokens_BLC, *scores


def _names(classifier: nn.Linear | None) -> list[str]:
    return ["features", "tokens"] if classifier is None else ["features", "tokens", "scores"]


def _beside(path: Path) -> Path:
    """Where torch puts weights that one file cannot hold."""
    return path.with_name(f"{path.name}.data")


def _export(traced: _Traced, size: tuple[int, int], path: Path, about: Mapping[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter against torch's own trees
        program = torch.onnx.export(
            traced, (torch.zeros(2, 3, *size),), dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=({0: "batch"},), input_names=["images"], output_names=_names(traced.classifier),
        )  # fmt: skip
    program.model.metadata_props.update(about)
    program.save(path)


def _compare(model: VisionTransformer, classifier: nn.Linear | None, path: Path) -> dict[str, Output]:
    """The file's outputs beside torch's, of random images; BadInput where a shape is another or a difference too large."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    draw = torch.Generator().manual_seed(0)
    names, outputs = _names(classifier), {}
    for batch in BATCHES:
        images = torch.randn(batch, 3, *model.img_size, generator=draw)
        tokens = model(images)
        features = model.pool(tokens)
        wanted = [features, tokens] if classifier is None else [features, tokens, classifier(features)]
        found = session.run(names, {"images": images.numpy()})
        if [output.shape for output in found] != [tuple(output.shape) for output in wanted]:
            theirs, ours = ([tuple(output.shape) for output in outputs] for outputs in (found, wanted))
            raise BadInput(
                f"the ONNX file was not kept: the shapes of its {', '.join(names)} are {theirs}, torch's {ours}."
            )
        for name, theirs, ours in zip(names, map(torch.from_numpy, found), wanted, strict=True):
            difference, value = float((theirs - ours).abs().max()), float(ours.abs().max())
            if not difference <= TOLERANCE * value < math.inf:  # so that NaN is refused, too
                raise BadInput(
                    f"the ONNX file was not kept: its {name} differ from torch's by {difference:.1e}, more than {TOLERANCE:g} of "
                    f"their largest value {value:.3g}; look for weights that are not finite, or try other versions of "
                    f"{', '.join(NEEDED)}."
                )
            before = outputs.get(name, Output((), 0.0, 0.0))
            outputs[name] = Output(
                tuple(ours.shape[1:]), max(before.difference, difference), max(before.largest, value)
            )
    return outputs
