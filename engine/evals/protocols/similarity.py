"""How alike patches of one object are, and patches of different ones: two distributions of cosines, and how far they overlap.

After "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (Wu et al. 2023, arXiv 2308.11448), whose
abstract names this comparison and no more: which patches and pairs count, and the figures, are our proposal.

Three comparisons, each of pairs that belong together (intra) with pairs that do not (inter):
    objects      two patches of one object; of two objects in one image
    background   the same, where all patches of an image that no object touches count as one more object
    classes      patches of two objects in different images: of one class; of two classes
Each image has the same weight in either distribution of a comparison.

Shapes: h x w patches, C width, n patches of one object, N objects.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data.annotated.objects import ObjectSet
from engine.evals import patches
from engine.evals.metrics.overlap import BIN, Scores, auroc, d_prime, equal_error, histogram, overlap
from engine.evals.result import Result
from engine.evals.subject import Subject

WANTS, READS = "model", "masks"
SOURCE = "proposal after arXiv 2308.11448, not a reproduction: the paper's numbers were not found"
COMPARISONS = {
    "objects": ("two patches of one object", "of two objects in one image"),
    "background": ("two patches of one object or of the background", "of two of them in one image"),
    "classes": ("two objects of one class in two images", "of two classes"),
}
BACKGROUND = -1  # the label of the patches that no object touches
_PIXELS = (
    4  # of a small set's images that a patch is wide: objects of 16 pixels and more then have patches of their own
)
_MOST_D = 999.0  # where nothing varies, d' is infinite
_KEPT = 16  # patches of an object that are compared with those in other images
_COSINES = ("d'", "intra", "intra std", "inter", "inter std", "equal-error threshold")  # figures that are no shares
_APART = ("overlap", "AUROC", "d'", "equal-error threshold", "equal error")
_TABLES = ("how far apart the two kinds of pairs lie", "cosines of the two kinds of pairs")
_IN_IMAGE = "objects AUROC, mean of images"


@dataclass(frozen=True)
class Settings:
    """Similarity of patches within objects and between them."""

    layers: tuple[str, ...] = ("norm", "keys")
    """Patch features: norm (tokens after the last norm), keys (of the last block's attention)."""
    inputs: tuple[str, ...] = ()
    """MODE:PIXELS, several are reported apart: crop (short side, then the centre), short (short side, all of it), square.
    Default: crop:224 short:480, or images of a small set enlarged until a patch covers 4 of their pixels."""
    share: float = 0.9
    """A patch belongs to an object that covers at least this share of it."""
    pairs: int = 200
    """Pairs of each kind that are drawn for an object, at most."""
    most_images: int = 2000
    """Images judged, drawn at random, the same for all weights; 0 for all."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        patches.check_inputs(self.inputs, self.layers)
        if not 0.5 < self.share <= 1:
            raise BadInput(f"similarity share = {self.share} must be above 0.5 and at most 1.")
        if self.pairs < 1:
            raise BadInput(f"similarity pairs = {self.pairs} must be at least 1.")
        if self.most_images < 0:
            raise BadInput(f"similarity most images = {self.most_images} must be 0 or more.")


def check(train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    patches.check_objects("similarity", test, "test")


def check_model(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the inputs."""
    patches.check_model(subject, test, inputs_for(test, settings, subject.vit.patch_size))


@dataclass(frozen=True, eq=False)
class Group:
    """The patches of one object, or of an image's background.

    Attributes:
        image: of the object.
        label: its class, or BACKGROUND.
        features: [n, C], of length one.
    """

    image: int
    label: int
    features: Tensor


def groups(
    map_hwC: Tensor, masks: np.ndarray, labels: np.ndarray, ignored: np.ndarray, share: float, image: int = 0
) -> list[Group]:
    """The objects of an image that have a patch, then its background if that has one.

    A patch that two overlapping objects cover belongs to neither. Background is what no object and nothing ignored touches.

    Args:
        masks: bool [objects, H, W]; only objects that count.
        labels: int64 [objects].
        ignored: bool [H, W].
        share: of a patch that its object covers, more than a half.
    """
    grid, directions_hwC = tuple(map_hwC.shape[:2]), patches.directions(map_hwC)
    owned = patches.shares(masks, grid) >= share - 1e-9
    owned &= owned.sum(0) < 2
    touched = np.concatenate([masks, ignored[None]]).any(0)
    background = patches.shares(touched[None], grid)[0] < 1e-9
    found = [*zip(labels.tolist(), owned, strict=True), (BACKGROUND, background)]
    return [Group(image, label, directions_hwC[torch.from_numpy(mine_hw)]) for label, mine_hw in found if mine_hw.any()]


@dataclass(frozen=True)
class Pairs:
    """Cosines of one kind of pairs, and the image of each; gathered object by object."""

    values: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)

    def add(self, one: Group, rows: np.ndarray, others: Tensor) -> None:
        """Pairs of one object's patches `rows` with as many others [pairs, C]."""
        self.values.append(patches.cosines(one.features[rows], others))
        self.images.append(np.full(len(rows), one.image))

    def extend(self, more: "Pairs") -> None:
        """Add those of another image."""
        self.values.extend(more.values)
        self.images.extend(more.images)

    def __len__(self) -> int:
        return sum(map(len, self.values))

    def scores(self) -> Scores:
        """All of them, each image with the same weight. Raises ValueError where there are none."""
        if not len(self):
            raise ValueError("there are no pairs")
        _, image, count = np.unique(np.concatenate(self.images), return_inverse=True, return_counts=True)
        return Scores(np.concatenate(self.values), 1 / count[image])

    def means(self, images: Sequence[int]) -> np.ndarray:
        """float64, of each of these images; NaN where it has no pair."""
        values, of = np.concatenate([[], *self.values]), np.concatenate([[], *self.images])
        return np.array([values[of == image].mean() if (of == image).any() else np.nan for image in images])


Kinds = dict[str, tuple[Pairs, Pairs]]  # intra and inter by comparison


def no_pairs() -> Kinds:
    """Of each comparison, none yet."""
    return {comparison: (Pairs(), Pairs()) for comparison in COMPARISONS}


def within(image: Sequence[Group], most: int, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
    """Pairs in one image: of the patches of each object, none with itself; and of those of each with those of the others."""
    intra, inter = Pairs(), Pairs()
    for place, one in enumerate(image):
        n = len(one.features)
        if n > 1:
            drawn = _drawn(n * (n - 1) // 2, most, rng)
            later = ((1 + np.sqrt(1 + 8 * drawn)) // 2).astype(np.int64)
            intra.add(one, later, one.features[drawn - later * (later - 1) // 2])
        others = [other.features for other in (*image[:place], *image[place + 1 :])]
        if others:
            between(one, torch.cat(others), most, rng, inter)
    return intra, inter


def between(one: Group, others_nC: Tensor, most: int, rng: np.random.Generator, pairs: Pairs) -> None:
    """Add pairs of an object's patches with others."""
    if len(others_nC):
        drawn = _drawn(len(one.features) * len(others_nC), most, rng)
        pairs.add(one, drawn // len(others_nC), others_nC[drawn % len(others_nC)])


def across(objects: Sequence[Group], most: int, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
    """Pairs of patches in different images: of one class, and of two."""
    same, other = Pairs(), Pairs()
    sizes = [len(one.features) for one in objects]
    features_nC = torch.cat([one.features for one in objects])
    labels_n, images_n = (np.repeat(each, sizes) for each in zip(*((o.label, o.image) for o in objects), strict=True))
    for one in objects:
        elsewhere = images_n != one.image
        for alike, pairs in ((labels_n == one.label, same), (labels_n != one.label, other)):
            rows = np.flatnonzero(elsewhere & alike)
            # so many others are enough for as many pairs, and taking all would copy the set for each object
            between(one, features_nC[rows[_drawn(len(rows), most, rng)]], most, rng, pairs)
    return same, other


def _drawn(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """int64: so many of `count` numbers, none twice."""
    return rng.choice(count, min(count, most), replace=False, shuffle=False)


def compare(intra: Scores, inter: Scores) -> dict[str, float]:
    """The figures of one comparison."""
    threshold, error = equal_error(intra, inter)
    return {
        "overlap": overlap(intra, inter),
        "AUROC": auroc(intra, inter),
        "d'": float(np.clip(d_prime(intra, inter), -_MOST_D, _MOST_D)),
        "intra": intra.mean,
        "intra std": intra.variance**0.5,
        "inter": inter.mean,
        "inter std": inter.variance**0.5,
        "equal-error threshold": threshold,
        "equal error": error,
    }


def inputs_for(objects: ObjectSet, settings: Settings, patch: int) -> tuple[str, ...]:
    """Those of the settings, or what suits the set; sides are rounded to a multiple of the patch size."""
    return settings.inputs or patches.default_inputs(objects, patch, patch / _PIXELS)


@dataclass(frozen=True, eq=False)
class Found:
    """What one input found.

    Attributes:
        kinds: by layer.
        in_image: by layer, float64 [images], AUROC among the objects of each; NaN where it has no pairs of one kind.
        patches: of each object that counts, how many are its own; int64 [N].
    """

    kinds: dict[str, Kinds]
    in_image: dict[str, np.ndarray]
    patches: np.ndarray


def gather(subject: Subject, test: ObjectSet, images: Sequence[int], text: str, settings: Settings) -> Found:
    """Pairs of every image, and across images, for each layer; the same ones for all layers."""
    how = patches.frame(text, subject.vit.patch_size)
    kinds = {layer: no_pairs() for layer in settings.layers}
    kept: dict[str, list[Group]] = {layer: [] for layer in settings.layers}
    in_image: dict[str, list[float]] = {layer: [] for layer in settings.layers}
    owned: list[int] = []
    for shown in patches.shown(subject, test, images, how, settings.layers):
        counted = ~test.objects[shown.index].ignored
        about = shown.masks[counted], test.objects[shown.index].labels[counted], shown.ignored, settings.share
        for layer, map_hwC in shown.maps.items():
            rng = np.random.default_rng([settings.seed, shown.index])
            every = groups(map_hwC, *about, shown.index)
            objects = [group for group in every if group.label != BACKGROUND]
            intra, inter = within(objects, settings.pairs, rng)
            in_image[layer].append(auroc(intra.scores(), inter.scores()) if len(intra) and len(inter) else np.nan)
            with_background = within(every, settings.pairs, rng)
            for comparison, found in (("objects", (intra, inter)), ("background", with_background)):
                for kind, more in zip(kinds[layer][comparison], found, strict=True):
                    kind.extend(more)
            kept[layer] += [_thinned(group, rng) for group in objects]
            if layer == settings.layers[0]:
                owned += [len(group.features) for group in objects]
    for layer, objects in kept.items():
        if objects:
            rng = np.random.default_rng([settings.seed, len(test)])  # no image has that number
            kinds[layer]["classes"] = across(objects, settings.pairs, rng)
    return Found(kinds, {layer: np.array(each) for layer, each in in_image.items()}, np.array(owned, np.int64))


def _thinned(group: Group, rng: np.random.Generator) -> Group:
    rows = _drawn(len(group.features), _KEPT, rng)
    return Group(group.image, group.label, group.features[rows].float())


def evaluate(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings = Settings()) -> Result:
    """Overlap, AUROC and the like of pairs that belong together and pairs that do not, for each input and layer.

    Raises:
        BadInput: no image has pairs of both kinds, an image or a mask cannot be read, or the weights are no ViT that takes
            these inputs.
    """
    check(train, test, settings)
    inputs = inputs_for(test, settings, subject.vit.patch_size)
    images = [index for index, each in enumerate(test.objects) if (~each.ignored).any()]
    if 0 < settings.most_images < len(images):
        images = np.sort(np.random.default_rng(0).permutation(images)[: settings.most_images]).tolist()
    total = sum(int((~test.objects[index].ignored).sum()) for index in images)
    values, samples, counts, plain, shown = {}, {}, {}, set(_COSINES), []
    tables: dict[str, list[dict]] = {title: [] for title in _TABLES}
    # all figures stand in the tables; these are those compared between weights
    named = dict.fromkeys(COMPARISONS, ("overlap", "AUROC", "d'"))
    named["objects"] += ("intra", "inter", "equal-error threshold", "equal error")
    for text in inputs:
        found = gather(subject, test, images, text, settings)
        at = f" at {text}" if len(inputs) > 1 else ""
        if not all(map(len, found.kinds[settings.layers[0]]["objects"])):
            raise BadInput(
                f"similarity: at {text}, no object has two patches of its own or no image two objects with one; give "
                "larger --similarity.inputs or a lower --similarity.share."
            )
        counts |= {
            f"objects with a patch of their own{at}": len(found.patches),
            f"objects with two or more{at}": int((found.patches > 1).sum()),
            f"left out, objects without{at}": total - len(found.patches),
            f"patches of objects{at}": int(found.patches.sum()),
        }
        for layer in settings.layers:
            where = layer + at
            for comparison, (intra, inter) in found.kinds[layer].items():
                if not (len(intra) and len(inter)):
                    continue
                figures = compare(intra.scores(), inter.scores())
                values |= {f"{comparison} {name}: {where}": figures[name] for name in named[comparison]}
                plain |= {f"{comparison} {name}: {where}" for name in _COSINES}
                row = {"pairs": f"{comparison}, {where}"}
                tables[_TABLES[0]].append(row | {name: figures[name] for name in _APART})
                cosines = {name: value for name, value in figures.items() if name not in _APART}
                tables[_TABLES[1]].append(row | cosines | {"intra pairs": len(intra), "inter pairs": len(inter)})
                shown.append((comparison, where, intra.scores(), inter.scores(), figures))
                if comparison == "objects":
                    for name, pairs in (("intra", intra), ("inter", inter)):
                        samples[f"objects {name}: {where}"] = pairs.means(images)
                    if not np.isnan(found.in_image[layer]).all():
                        samples[f"{_IN_IMAGE}: {where}"] = found.in_image[layer]
                        values[f"{_IN_IMAGE}: {where}"] = float(np.nanmean(found.in_image[layer]))
    where = settings.layers[0] + (f" at {inputs[0]}" if len(inputs) > 1 else "")
    return Result(
        protocol="similarity",
        values=values,
        settings=asdict(settings)
        | {
            "inputs": inputs,
            "patch size": subject.vit.patch_size,
            "bin": BIN,
            "intra and inter": {name: ", ".join(kinds) for name, kinds in COMPARISONS.items()},
            "source": SOURCE,
        },
        details=tables,
        headline=tuple(f"objects {name}: {where}" for name in ("overlap", "AUROC", "d'")),
        plain=frozenset(plain),
        lower=frozenset(name for name in values if " overlap:" in name or " equal error:" in name),
        samples=samples,
        counts={"test images": len(images), **counts},
        feature=f"patch tokens of the last layer: {' and '.join(settings.layers)}",
        pictures={"similarities within and between": _draw(shown)},
    )


def _draw(shown: Sequence[tuple[str, str, Scores, Scores, dict[str, float]]]) -> Figure:
    """Histograms of both kinds of pairs: a row for each of the features, a column for each comparison."""
    comparisons, wheres = (list(dict.fromkeys(each[place] for each in shown)) for place in (0, 1))
    figure = Figure(figsize=(9.5, 2.4 * len(wheres) + 0.5), layout="constrained")
    grid_of_axes = figure.subplots(len(wheres), len(comparisons), squeeze=False, sharex=True)
    for axes in grid_of_axes.flat:
        axes.set(xlim=(-1, 1), yticks=[])
    edges = np.linspace(-1, 1, round(2 / BIN) + 1)
    for comparison, where, intra, inter, figures in shown:
        axes = grid_of_axes[wheres.index(where), comparisons.index(comparison)]
        for name, scores in (("intra", intra), ("inter", inter)):
            axes.stairs(histogram(scores), edges, fill=True, alpha=0.55, label=name)
        axes.axvline(figures["equal-error threshold"], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(
            f"{comparison}, {where}\noverlap {100 * figures['overlap']:.0f} %, AUROC {100 * figures['AUROC']:.0f} %",
            fontsize=8,
        )
    for axes in grid_of_axes[-1]:
        axes.set_xlabel("cosine", fontsize=8)
    grid_of_axes[0, 0].legend(fontsize=8)
    return figure
