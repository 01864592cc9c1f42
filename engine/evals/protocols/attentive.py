"""Attentive probes: a small head learns which patch tokens of a frozen encoder to look at, and to classify what it saw there.

Three forms. AIM's (El-Nouby et al. 2024, arXiv 2401.08541, and the released head): batch norm without affine, one query, keys and
values without bias, no other projection, a linear layer without bias. V-JEPA's (Bardes et al. 2024, arXiv 2404.08471): one query
through a whole cross-attention block, then a linear layer. Efficient probing (Psomas et al. 2025, arXiv 2506.10178, and released
code): many queries, the tokens themselves as keys, each query with its own share of the channels of the values, batch norm
without affine, a linear layer. All of them on tokens extracted once, so without crops and flips, and in fp32.

A learned query is the same for every image. So the projection of keys is applied to the query, and that of values to the mean
that attention makes of the tokens: the same numbers (tests hold that), for 2 H products per channel of a token instead of 2 C.
A bias of keys would add one number to all scores of a query, which softmax takes away; there is none.

Shapes: n training images, m test images, B batch, L patch tokens of an image, C width, H heads or queries, D = C / H, K classes.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.evals.features import Features, Labelled, check_labelled, number_of_classes, threads_for
from engine.evals.protocols.linear import schedule
from engine.evals.result import Result, as_chosen
from engine.evals.subject import Subject

WANTS = "tokens"


@dataclass(frozen=True)
class Recipe:
    """How one form is trained: linear warm-up, half a cosine to 0, no weight decay of vectors.

    Args:
        lr: at the peak.
        warmup: share of the steps.
        source: whose numbers these are.
    """

    optimiser: str
    lr: float
    batch_size: int
    epochs: int
    warmup: float
    weight_decay: float
    source: str


RECIPES = {
    "aim": Recipe("adamw", 1e-3, 1024, 20, 0.0, 1e-3, "ours, after V-JEPA's: AIM's was not found"),
    "vjepa": Recipe("adamw", 1e-3, 1024, 20, 0.0, 1e-3, "V-JEPA's for ImageNet"),
    "ep": Recipe("lars", 0.1 * 4096 / 256, 4096, 90, 10 / 90, 0.0, "efficient probing's for ImageNet"),
}
_MOMENTUM, _TRUST = 0.9, 0.001  # of LARS, MAE's
_STEPS = 32  # least of an epoch, where the set is large enough: ours
_MOST_HEADS = 12


@dataclass(frozen=True)
class Settings:
    """Attentive probe settings. Where 0 is the form's own, that is 20 epochs, batch 1024 and AdamW at 1e-3 for aim and vjepa;
    90 epochs, batch 4096 and LARS at 1.6 for ep."""

    form: str = "ep"
    """aim, vjepa or ep (efficient probing)."""
    queries: int = 32
    """Queries of the form ep; they must divide the encoder's width. The other forms have one."""
    epochs: int = 0
    """Passes over the training tokens; 0 is the form's own."""
    batch_size: int = 0
    """Images per step; 0 is the form's own. At most a 32nd of the training set, or 16 images if that is more."""
    lr: float = 0.0
    """Peak learning rate, whatever the batch; 0 is the form's own."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        if self.form not in RECIPES:
            raise BadInput(f"attentive form = {self.form!r} must be one of {', '.join(RECIPES)}.")
        if self.queries < 1:
            raise BadInput(f"attentive queries = {self.queries} must be at least 1.")
        if self.epochs < 0:
            raise BadInput(f"attentive epochs = {self.epochs} must be at least 1, or 0 for the form's own.")
        if self.batch_size < 0 or self.batch_size == 1:
            raise BadInput(f"attentive batch_size = {self.batch_size} must be at least 2, or 0 for the form's own.")
        if not 0 <= self.lr <= 1e30:
            raise BadInput(f"attentive lr = {self.lr} must be above 0 and at most 1e30, or 0 for the form's own.")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("attentive", train, test)
    if len(train.labels) < 8:
        raise BadInput(f"attentive needs at least 8 training images for its batch norm; there are {len(train.labels)}.")


def check_model(subject: Subject, train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput where the queries do not divide the width."""
    check_queries(settings, subject.vit.embed_dim)


def check_queries(settings: Settings, width: int) -> None:
    """Raise BadInput where they do not divide the width."""
    if settings.form == "ep" and width % settings.queries:
        raise BadInput(
            f"attentive queries = {settings.queries} must divide the encoder's width, {width}; choose another number."
        )


def heads_for(width: int) -> int:
    """AIM's 12 heads, or the largest number below that divides the width."""
    return max(heads for heads in range(1, _MOST_HEADS + 1) if width % heads == 0)


def asked(query_C: Tensor, key_CC: Tensor, heads: int) -> Tensor:
    """[H, C]: what each head of a query looks for among tokens; scores are these times a token, scaled by D^-.5 already."""
    query_HD, key_HDC = query_C.unflatten(0, (heads, -1)), key_CC.unflatten(0, (heads, -1))
    return torch.einsum("hd,hdc->hc", query_HD, key_HDC) * query_HD.shape[1] ** -0.5


def attend(x_BLC: Tensor, asked_HC: Tensor) -> Tensor:
    """[B, H, C]: means of an image's tokens, weighed by the softmax of their scores."""
    return (x_BLC @ asked_HC.T).softmax(1).transpose(1, 2) @ x_BLC


def answered(means_BHC: Tensor, value_CC: Tensor) -> Tensor:
    """[B, C]: D values from the mean of each head, by its own rows of the projection, one after the other."""
    value_HDC = value_CC.unflatten(0, (means_BHC.shape[1], -1))
    return torch.einsum("bhc,hdc->bhd", means_BHC, value_HDC).flatten(1)


class Aim(nn.Module):
    """AIM's head: [B, L, C] to logits [B, K]."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(0.02 * torch.randn(1, width))
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.linear = nn.Linear(width, classes, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = self.norm(x_BLC.flatten(0, 1)).view_as(x_BLC)
        means_BHC = attend(x_BLC, asked(self.query[0], self.key.weight, self.heads))
        return self.linear(answered(means_BHC, self.value.weight))


class VJepa(nn.Module):
    """V-JEPA's head, a pre-norm cross-attention block with MLP: [B, L, C] to logits [B, K]. Starts as V-JEPA's."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.question, self.value, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.linear = nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            for last in (self.proj, self.mlp[2]):
                last.weight.div_(math.sqrt(2))

    def forward(self, x_BLC: Tensor) -> Tensor:
        means_BHC = attend(self.norm1(x_BLC), asked(self.question(self.query)[0], self.key.weight, self.heads))
        seen_BC = self.query + self.proj(answered(means_BHC, self.value.weight) + self.value.bias)
        return self.linear(seen_BC + self.mlp(self.norm2(seen_BC)))


class EfficientProbing(nn.Module):
    """The head of efficient probing: [B, L, C] to logits [B, K]."""

    def __init__(self, width: int, classes: int, queries: int):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(queries, width))
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)

    def forward(self, x_BLC: Tensor) -> Tensor:
        means_BHC = attend(x_BLC, self.query * x_BLC.shape[-1] ** -0.5)
        return self.linear(self.norm(answered(means_BHC, self.value.weight)))


def head(settings: Settings, width: int, classes: int) -> nn.Module:
    """A new head of the form that the settings name, on the CPU; its weights depend on the seed alone.

    Raises:
        BadInput: the queries do not divide the width.
    """
    check_queries(settings, width)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(settings.seed)  # torch.manual_seed would also seed every GPU
        if settings.form == "ep":
            return EfficientProbing(width, classes, settings.queries)
        return {"aim": Aim, "vjepa": VJepa}[settings.form](width, classes, heads_for(width))


def optimiser_for(probe: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or LARS; vectors have no weight decay, and no trust ratio under LARS (as in MAE's)."""
    matrices, vectors = ([p for p in probe.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    for group in groups:
        group["always_adapt"] = group["params"] is matrices
    return Lars(groups, lr=recipe.lr, momentum=_MOMENTUM, trust_coeff=_TRUST)


@torch.no_grad()
def correct(probe: nn.Module, features: Features, batch: int) -> np.ndarray:
    """float64 [m]: 1 where a head names an image's class, else 0."""
    probe.eval()
    device, rows_m = features.values.device, np.arange(len(features.values))
    found = [probe(features.tokens.rows(rows_m[i : i + batch], device)).argmax(1) for i in range(0, len(rows_m), batch)]
    return (torch.cat(found) == features.labels).double().cpu().numpy()


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Accuracy after the last epoch, and the best over epochs. In memory at a time: one batch of tokens, in fp32.

    Raises:
        BadInput: labels or tokens are missing, a class has no training image, there are fewer than 8 images, the queries do
            not divide the width, or the head diverged.
    """
    check(train, test, settings)
    for which, features in (("training", train), ("test", test)):
        if features.tokens is None:
            raise BadInput(
                f"protocol attentive needs patch tokens and the {which} features of {features.name} have none; "
                "give a VisionTransformer, not pixels or pooled features."
            )
    recipe = RECIPES[settings.form]
    epochs, lr = settings.epochs or recipe.epochs, settings.lr or recipe.lr
    n, length, width = train.tokens.values.shape
    batch = min(settings.batch_size or recipe.batch_size, max(n // _STEPS, min(n, 16)))
    classes, device = number_of_classes(train, test), train.values.device
    probe = head(settings, width, classes).to(device)
    optimiser = optimiser_for(probe, recipe)
    heads = settings.queries if settings.form == "ep" else heads_for(width)
    per_epoch = n // batch
    top1_E = []
    with threads_for(2 * batch * max(length * heads, width) * width):
        for epoch in range(epochs):
            probe.train()
            order = np.random.default_rng([settings.seed, epoch]).permutation(n)
            for i in range(per_epoch):
                rows = np.sort(order[i * batch : (i + 1) * batch])  # a disk reads faster in order
                logits_BK = probe(train.tokens.rows(rows, device))
                loss = nn.functional.cross_entropy(logits_BK, train.labels[torch.from_numpy(rows).to(device)])
                for group in optimiser.param_groups:
                    group["lr"] = lr * schedule(epoch * per_epoch + i, epochs * per_epoch, recipe.warmup)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            correct_m = correct(probe, test, batch)
            top1_E.append(float(correct_m.mean()))
    if not all(torch.isfinite(parameter).all() for parameter in probe.parameters()):
        raise BadInput(f"attentive: the head did not stay finite; choose an lr below {lr:g}.")
    used = {
        "epochs": epochs,
        "batch_size": batch,
        "lr": lr,
        "queries": settings.queries if settings.form == "ep" else 1,
    }
    return Result(
        protocol="attentive",
        values={"last-epoch top-1": top1_E[-1], "best-epoch top-1": max(top1_E)},
        settings=asdict(settings)
        | used
        | {
            "heads": 1 if settings.form == "ep" else heads,
            "optimiser": recipe.optimiser,
            "weight decay": recipe.weight_decay,
            "warm-up": round(recipe.warmup, 4),
            "recipe": recipe.source + _departures(settings, recipe, batch),
            "tokens": train.tokens.what,
        },
        details={
            "top-1 by epoch": tuple(top1_E),
            "best epoch": int(np.argmax(top1_E)) + 1,
            "best-epoch top-1 is": "over epochs, on the test set",
        },
        samples={"last-epoch top-1": correct_m},
    )


def _departures(settings: Settings, recipe: Recipe, batch: int) -> str:
    """How a training differs from its recipe's numbers, in words."""
    said = as_chosen(name for name in ("epochs", "batch_size", "lr") if getattr(settings, name))
    if batch < (settings.batch_size or recipe.batch_size):
        said += f"; batch cut from {settings.batch_size or recipe.batch_size} to {batch} for a small set, lr kept"
    return said
