"""Is the encoder learning, or collapsing? Measures of features, their verdict in words, and the probe that takes them
while training.

Shapes: n samples, C feature dims, B queries, k neighbours.

None of the label-free measures judges alone. Pooled features of an untrained or young ViT point almost the same way,
and MAE's have a low rank, while k-NN already reads classes from them; contrastive tuning lowers the rank as it gathers
classes. So `verdict` looks at their course, and lets k-NN overrule them where labels exist.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.data.pipeline import eval_batches
from engine.data.sources import ImageSet
from engine.data.subsets import subset
from engine.methods.parts.collapse import usage

LOW_STD = 0.05  # 1 is isotropic; SimSiam's collapsed runs are at 0 (Chen & He 2021, figure 2)
LOW_RANK = 2.0  # all features on one line have rank 1
LOW_USAGE = 0.01  # one prototype in a hundred does all the work
# even one of 64 is more than LOW_USAGE: fewer than three of thirty or more are too few as well
FEW_USED, OF_MANY = 3, 0.1
HALVED = 0.5  # a rank below this share of its best is a sharp drop
MANY_SKIPPED, SOME_SKIPPED = 0.5, 0.1  # of the updates; the scale of an fp16 loss is found by skipping a few
AT_LN_K = 1e-3  # of ln K: nearer than that, a loss is what equal scores for all K prototypes give
LOST = 0.1  # of the k-NN accuracy above chance, and 2 points at least: less is noise of a small probe
CACHE_BYTES = 256 * 2**20
CHOOSING = 512  # samples at once: scores of 65,536 prototypes are large


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023, eq. 1).

    Args:
        features: [n, C], n >= 2, any float dtype; not centred, as in the paper.

    Returns:
        Between 1 (all on one line) and about min(n, C); 0 where all features are zero; NaN where any isn't finite.
    """
    _check(features)
    x = features.double()
    if not x.isfinite().all():
        return math.nan
    # Eigenvalues of the smaller Gram matrix in fp64: far cheaper than an SVD, and exact to about 1e-8 of the largest.
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if singular.sum() == 0:
        return 0.0
    p = singular / singular.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of directions: std per dimension of the L2-normalised features, mean over dimensions, times sqrt(C).

    SimSiam's measure of collapse (Chen & He 2021, section 4.1): about 1 where directions are isotropic, 0 where there
    is only one.

    Args:
        features: [n, C], n >= 2, any float dtype.
    """
    _check(features)
    return (F.normalize(features.double(), dim=1).std(dim=0).mean() * features.shape[1] ** 0.5).item()


@torch.no_grad()
def neighbour_agreement(labels_of_queries: Tensor, labels_of_neighbours: Tensor) -> Tensor:
    """Percentage of neighbours that have their query's label: the cheapest sign of learning for methods with a queue.

    Args:
        labels_of_queries: int64 [B].
        labels_of_neighbours: int64 [B] or [B, k]. Negative labels, here or there, are unknown and don't count.

    Returns:
        fp32 scalar on the device of the labels (no host sync); NaN where nothing is known.
    """
    neighbours = labels_of_neighbours.reshape(len(labels_of_queries), -1)
    queries = labels_of_queries[:, None].expand_as(neighbours)
    known = (queries >= 0) & (neighbours >= 0)
    return 100 * ((queries == neighbours) & known).sum() / known.sum()


@dataclass(frozen=True)
class Health:
    """Measures of one moment. Percentages are 0 to 100; None was not measured."""

    step: int
    rank_me: float
    feature_std: float
    feature_dim: int
    knn_top1: float | None = None
    knn_chance: float | None = None
    usage: float | None = None
    prototypes_used: float | None = None
    loss: float | None = None
    loss_over_ln_k: float | None = None
    prototypes: int = 0
    skipped_share: float | None = None
    """Of the updates since the probe before, those that were left out because loss or gradients were not finite; from 0 to 1."""

    @classmethod
    def of(cls, step: int, values: Mapping[str, float]) -> "Health":
        """From what `OnlineProbe.measure` returned; "loss" is added by whoever has it."""
        known = {field.name for field in dataclasses.fields(cls)} - {"step"}
        return cls(step, **{name: value for name, value in values.items() if name in known})

    @property
    def finite(self) -> bool:
        measured = (self.rank_me, self.feature_std, self.knn_top1, self.loss)
        return all(value is None or math.isfinite(value) for value in measured)

    @property
    def narrow(self) -> bool:
        return self.feature_std < LOW_STD or self.rank_me < LOW_RANK

    @property
    def low_usage(self) -> bool:
        few = self.prototypes_used is not None and self.prototypes_used < FEW_USED and self.usage < OF_MANY
        return few or (self.usage is not None and self.usage < LOW_USAGE)

    @property
    def at_ln_k(self) -> bool:
        return self.loss_over_ln_k is not None and abs(self.loss_over_ln_k - 1) < AT_LN_K

    @property
    def chance(self) -> float:
        return self.knn_chance or 0.0

    def lost_against(self, best: "Health") -> bool:
        """Whether k-NN is clearly below that of `best`."""
        above_chance = None if self.knn_top1 is None else best.knn_top1 - self.chance
        return above_chance is not None and best.knn_top1 - self.knn_top1 > max(2.0, LOST * above_chance)

    def reads_classes(self, best: "Health") -> bool:
        """Whether k-NN works, though features may look alike."""
        above = None if self.knn_top1 is None else self.knn_top1 - self.chance
        return above is not None and above >= 10 and above >= (best.knn_top1 - self.chance) / 2

    def __str__(self) -> str:
        spread = f"rank {self.rank_me:.1f} of {self.feature_dim:.0f}, spread {self.feature_std:.2g}"
        if self.knn_top1 is None:
            return f"{spread}, unlabelled data: k-NN not measured"
        return f"k-NN {self.knn_top1:.1f} % (chance {self.chance:.1f} %), {spread}"


def loss_over_ln_k(record: Mapping[str, float | str | None], prototypes: int) -> dict[str, float]:
    """Of a line of metrics.jsonl, the cross-entropy over `prototypes` that is nearest to ln K, over ln K: 1 is what a student
    gives that says the same of every image. A loss of several terms counts term by term. Nothing where there is no such number.
    """
    terms = [name for name in record if name.endswith("_loss")] or [name for name in record if name == "loss"]
    shares = [record[name] / math.log(prototypes) for name in terms if record[name] is not None] if prototypes else []
    return {"loss_over_ln_k": min(shares, key=lambda share: abs(share - 1))} if shares else {}


def skipped_since(records: Sequence[Mapping], stage: str, first_step: int, step: int, skipped: int) -> dict[str, float]:
    """What a probe notes of updates that were left out, if any were: how many of the stage, and their share since the probe
    before, or since the stage's `first_step`, by the lines of metrics.jsonl."""
    probes = (record for record in reversed(records) if record["kind"] == "probe" and record["stage"] == stage)
    before = next(probes, {"step": first_step})
    if not skipped or step <= before["step"]:
        return {}
    since = skipped - before.get("skipped_updates", 0)
    return {"skipped_updates": skipped, "skipped_share": since / (step - before["step"])}


def history(records: Iterable[Mapping]) -> list[Health]:
    """The course so far, from the "probe" lines of metrics.jsonl: a resumed run judges as an uninterrupted one does."""
    probes = (r for r in records if r["kind"] == "probe" and "rank_me" in r)
    # A measure that was not finite is null in the file.
    return [Health.of(r["step"], {k: math.nan if v is None else v for k, v in r.items()}) for r in probes]


def verdict(course: Sequence[Health]) -> str:
    """One line in words on the last of the measures, given those before it (oldest first).

    It begins with "healthy:", "watch:" (unusual, wait for the next probe), "collapsing:" or "broken:" and says why and
    what to try.

    - broken: the loss or a feature isn't finite; or half of the updates since the probe before were left out, for theirs weren't.
    - collapsing: feature_std < 0.05 or RankMe < 2, and no wider than at the probe before; or RankMe below half its best
      while k-NN lost a tenth of its best (above chance) at two probes in a row, without labels while feature_std halved
      too; or usage < 1 %, or fewer than 3 of many prototypes in use, at two probes in a row. Features are not called
      narrow where k-NN keeps over half its best and 10 points above chance.
    - watch: any of these for the first time; a tenth of the updates left out; a loss that stands at ln K, as it does while the
      student says the same of all; k-NN alone falling; k-NN no better than chance.

    The untrained network (step 0) is no yardstick: on small images its k-NN and rank may be the run's highest.
    """
    now, before = course[-1], [health for health in course[:-1] if health.finite]
    if not now.finite:
        return (
            f"broken: the loss or the features are not finite at step {now.step}. Go back to the last good checkpoint "
            "and lower the learning rate, lengthen the warm-up, or train with --precision fp32."
        )
    left_out = f"{now.skipped_share or 0:.0%} of the updates were left out, since loss or gradients were not finite"
    if (now.skipped_share or 0) >= MANY_SKIPPED:
        return (
            f"broken: {left_out}; what is measured here is what was there before. {now}. Go back to the last good checkpoint and "
            "lower the learning rate, lengthen the warm-up, or train with --precision fp32."
        )
    previous = before[-1] if before else None
    trained = [health for health in before if health.step > 0]
    best_rank = max((health.rank_me for health in trained), default=0.0)
    best_std = max((health.feature_std for health in trained), default=0.0)
    best = max((h for h in trained if h.knn_top1 is not None), key=lambda h: h.knn_top1, default=now)
    fallen = now.lost_against(best)
    falls_again = fallen and previous.step > best.step and previous.lost_against(best)
    narrow = now.narrow and not now.reads_classes(best)
    widening = previous and (now.rank_me > 1.1 * previous.rank_me or now.feature_std > 1.1 * previous.feature_std)
    low_rank = now.rank_me < HALVED * best_rank

    same = "features of all images are almost the same"
    fell = f"the rank fell from {best_rank:.1f} to {now.rank_me:.1f}"
    few = f"few prototypes get all images, usage is {now.usage or 0:.1%}"
    stuck = f"loss = ln K ({math.log(now.prototypes):.4f} = ln {now.prototypes})" if now.at_ln_k else ""
    if stuck:
        stuck += ": the student says the same of everything"
        same, few = f"{same}, {stuck}", f"{few}, {stuck}"
    remedy = "lower the learning rate or the temperature, lengthen the warm-up, or strengthen what keeps features apart"

    if (now.skipped_share or 0) >= SOME_SKIPPED:
        return f"watch: {left_out}. {now}. If it lasts: {remedy}, or train with --precision fp32."
    if narrow and previous is None:
        return f"watch: {same}. {now}. If the next probe agrees: {remedy}."
    if narrow and widening:
        return f"watch: {same}, but widening. {now}."
    if narrow:
        since = "and not widening" if previous.narrow else f"since step {previous.step} or soon after"
        return f"collapsing: {same} {since}. {now}. {remedy.capitalize()}."
    if now.low_usage and previous is not None and previous.low_usage:
        return f"collapsing: {few} and was as low before. {now}. {remedy.capitalize()}."
    if now.low_usage:
        return f"watch: {few}. {now}. It should rise soon."
    if low_rank and (falls_again or (now.knn_top1 is None and now.feature_std < HALVED * best_std)):
        return f"collapsing: {fell} and the features lose what they knew. {now}. {remedy.capitalize()}."
    if low_rank and fallen:
        return f"watch: {fell} and k-NN from {best.knn_top1:.1f} %. {now}. If the next probe agrees: {remedy}."
    if stuck and previous is not None and previous.at_ln_k:
        return f"watch: {stuck}. {now}. If the next probe agrees: {remedy}."
    if falls_again:
        advice = f"The learning rate may be too high, or the checkpoint of step {best.step} the better one"
        return (
            f"watch: k-NN is below its {best.knn_top1:.1f} % of step {best.step}, features are spread. {now}. {advice}."
        )
    if now.step > 0 and now.knn_top1 is not None and now.knn_top1 <= 1.5 * now.chance:
        return f"watch: features are spread but say nothing of the classes yet. {now}. If it lasts: {remedy}."
    if now.narrow:
        return f"healthy: images lie close together, as often early in training, yet k-NN tells them apart. {now}."
    return f"healthy: {now}."


class OnlineProbe:
    """k-NN accuracy, rank and spread of an encoder's features on fixed, evenly spaced samples of a data set.

    With labels the queries are the val split's samples and the keys those of train; without a val split, train against
    itself, each sample left out for itself. Votes as in Wu et al. 2018 and DINO: k nearest by cosine, weighted with
    exp(similarity / temperature). Decoded batches stay in memory where they fit into 256 MiB.

    Args:
        train_images: train split.
        val_images: val split; None where there is none, as in a flat unlabelled folder.
        size: (height, width) the images are brought to.
        device: where batches are wanted, the encoder's.
        batch_size: images a rank encodes at once.
        max_train: samples of train; RankMe uses 25,600.
        max_val: samples of val.
        k: neighbours that vote.
        temperature: of the votes.
        threads: decoding threads, None for the pipeline's own choice.
        rank: of this process; it encodes its share.
        world: processes.
        gather: [b, C] of every rank -> [world * b, C] in rank order, on every rank.
    """

    def __init__(
        self,
        train_images: ImageSet,
        val_images: ImageSet | None,
        size: tuple[int, int],
        *,
        device: torch.device | str,
        batch_size: int,
        max_train: int = 25_600,
        max_val: int = 10_000,
        k: int = 20,
        temperature: float = 0.07,
        threads: int | None = None,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.device, self.k, self.temperature, self.gather = device, k, temperature, gather
        options = {"size": size, "batch_size": batch_size, "device": device, "threads": threads}
        self.train = _Samples(train_images, max_train, rank, world, options)
        labelled = train_images.labels is not None and val_images is not None and val_images.labels is not None
        self.val = _Samples(val_images, max_val, rank, world, options) if labelled else None

    @torch.no_grad()
    def measure(
        self,
        encode: Callable[[Tensor], Tensor],
        choose: Callable[[Tensor], Tensor] | None = None,
        prototypes: int = 0,
        classify: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """Encode the samples and judge the features; equal on all ranks.

        Args:
            encode: images fp32 [b, 3, H, W], normalised -> features [b, C] of any float dtype. The caller sets the mode
                (eval); gradients are off in here.
            choose: features [n, C] -> the prototype of each, int64 [n]; None where the method has none.
            prototypes: how many there are to choose from.
            classify: features [n, C] -> scores of the classes [n, K]; None where the method learns none.

        Returns:
            rank_me, feature_std and feature_dim of the train samples; with prototypes their `usage`, and the number that are
            in use (the perplexity of the choices) as prototypes_used; where labels exist
            also knn_top1 and knn_chance (the share of the commonest class), both in percent, and with a labelled val split and
            `classify` the classifier's accuracy on that split's samples, top1, in percent.
        """
        train, train_labels = self._features(self.train, encode)
        values = {"rank_me": rank_me(train), "feature_std": feature_std(train), "feature_dim": train.shape[1]}
        if choose is not None:
            chosen = torch.cat([choose(rows) for rows in train.split(CHOOSING)])
            values["usage"] = usage(chosen, prototypes).item()
            values["prototypes_used"] = values["usage"] * min(prototypes, len(chosen))
        if train_labels is None:
            return values
        alone = self.val is None
        queries, labels = (train, train_labels) if alone else self._features(self.val, encode)
        if classify is not None and not alone:
            # A maximum that is not a number is no answer.
            scores = torch.cat([classify(rows).float() for rows in queries.split(CHOOSING)])
            right = (scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)
            values["top1"] = 100 * right.double().mean().item()
        values["knn_chance"] = 100 * labels.bincount().max().item() / len(labels)
        if not (train.isfinite().all() and queries.isfinite().all()):
            return values | {"knn_top1": math.nan}
        ids = torch.arange(len(train), device=train.device) if alone else None
        similarity, index = kernels.nearest_neighbours(
            F.normalize(queries, dim=1), F.normalize(train, dim=1), min(self.k, len(train) - alone), ids, ids
        )
        votes = torch.zeros(len(queries), int(train_labels.max()) + 1, device=train.device)
        # The largest weight of a row is 1: a common factor changes no vote, and exp cannot overflow.
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp().float()
        votes.scatter_add_(1, train_labels[index], weights)
        return values | {"knn_top1": 100 * (votes.argmax(dim=1) == labels).double().mean().item()}

    def _features(self, samples: "_Samples", encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """fp32 [n, C] of all ranks and their labels [n]; files found bad while decoding are left out."""
        rows = None
        for ids, images in samples.batches():
            encoded = encode(images).float()
            if rows is None:
                # One more column tells which rows are there: every rank has to gather equally many.
                rows = encoded.new_zeros(len(samples.images), encoded.shape[1] + 1)
            rows[ids.to(rows.device)] = F.pad(encoded, (0, 1), value=1.0)
        gathered = self.gather(rows)[: samples.count]
        there = gathered[:, -1] == 1
        labels = None if samples.labels is None else samples.labels.to(there.device)[there]
        return gathered[there, :-1], labels


class _Samples:
    """Evenly spaced samples of a split, of which a rank decodes one contiguous share."""

    def __init__(self, images: ImageSet, limit: int, rank: int, world: int, options: dict):
        self.count = min(limit, len(images))
        # Files come sorted by class, so even spacing keeps the classes' shares; the label is that of the file read.
        ids = images.substitute[np.arange(self.count) * len(images) // self.count]
        self.labels = None if images.labels is None else torch.from_numpy(images.labels[ids])
        share = -(-self.count // world)
        # Shares are equal, so that they gather: the last sample fills them up, and the surplus is cut off again.
        mine = ids[(np.arange(share) + rank * share).clip(max=self.count - 1)]
        self.images, self.options = subset(images, mine), options
        height, width = options["size"]
        self.small = share * 3 * height * width * 4 <= CACHE_BYTES
        self.kept: list[tuple[Tensor, Tensor]] = []

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(places in this share int64 [b], images [b, 3, H, W])."""
        if self.kept:
            yield from self.kept
            return
        decoded = []
        for batch in eval_batches(self.images, **self.options):
            yield batch.ids, batch.images[0]
            if self.small:
                decoded.append((batch.ids, batch.images[0]))
        self.kept = decoded


def _check(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [n, C] with n of 2 or more, not {list(features.shape)}")
