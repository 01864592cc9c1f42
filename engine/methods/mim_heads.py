"""Nearest-neighbour heads on several late blocks of a frozen encoder: the first stage of MIM-Refiner (Alkin et al.,
"MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations", ICLR 2025).

Shapes: b rows of this rank, B rows of all ranks, V views (the 2 large ones first), O views other than one, H heads, C encoder
width, E embedding width, L tokens of a view.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.methods.base import Method, Rows
from engine.methods.crops import CropSettings, MultiCrop
from engine.methods.nnclr import DroppingSettings
from engine.methods.parts.contrast import own_places
from engine.methods.settings import depth_on_host
from engine.model.heads import BatchNorm, head_flops, predictor, projector
from engine.model.initialisation import initialise
from engine.model.memory import Queue
from engine.model.tokens import Packed, View
from engine.model.vit import VisionTransformer

LARGE = 2  # views whose projections are queries


@dataclass(frozen=True)
class Settings(CropSettings, DroppingSettings):
    """Training of the heads alone; the defaults are MIM-Refiner's for ViT-L (see engine/recipes/mim_refiner.md for sources)."""

    global_crops: ClassVar[int] = LARGE
    epochs: int = 20
    base_lr: float = 2e-4
    end_lr: float = 1e-6
    weight_decay: float = 1e-5
    """Of the heads."""
    warmup: float = 0.2
    crop_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the image's area that each of the two large crops covers."""
    local_crops: int = 10
    """Small crops of an image: they are predicted from, never looked up."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    local_pairs: str = "released"
    """Which views beside the other one a large view's neighbour must pick its image from: the small ones (intended), or the first
    of all views, as many as there are small ones, which is what MIM-Refiner's code does (released): the large ones, itself among
    them, stand in for the last two small ones."""
    temperature: float = 0.2
    head_blocks: tuple[int, ...] = ()
    """Blocks, counted from 1, with a head on what they put out; the encoder's last one, always among them, after its final norm.
    None named: the upper third, at least two."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        own = {
            "local-pairs": (self.local_pairs in ("released", "intended"), "released or intended"),
            "head-blocks": (
                all(block > 0 for block in self.head_blocks)
                and self.head_blocks == tuple(sorted(set(self.head_blocks))),
                "rising whole numbers from 1",
            ),
        }
        return super().rules() | self.crop_rules() | own

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks with a head, counted from 1, of an encoder of so many."""
        count = max(min(2, depth), depth // 3)
        return self.head_blocks or tuple(range(depth - count + 1, depth + 1))

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_crops(stage, encoder)
        if self.blocks(encoder.depth)[-1] != encoder.depth:
            raise BadInput(
                f"--{stage}.head-blocks ends with {self.head_blocks[-1]}; it must end with the encoder's last block, "
                f"{encoder.depth}."
            )


class NeighbourHead(nn.Module):
    """Projector, predictor and queue of one block. GELU between layers, batch norm after the last one of both as well."""

    def __init__(self, features: int, settings: Settings):
        super().__init__()
        self.projector = projector(features, settings.projector_hidden, settings.embedding, nn.GELU)
        self.predictor = nn.Sequential(
            *predictor(settings.embedding, settings.predictor_hidden, nn.GELU), BatchNorm(settings.embedding)
        )
        initialise(self)
        self.queue = Queue(settings.queue_size, settings.embedding)

    def forward(self, pooled_VbC: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors: the large views' projections without gradient [2, b, E], and all views' predictions [V, b, E].

        All views share batch statistics, as in MIM-Refiner.
        """
        projected_RE = self.projector(pooled_VbC.flatten(0, 1))
        predicted_RE = F.normalize(self.predictor(projected_RE).float(), dim=-1)
        shape = pooled_VbC.shape[:2]
        projected_VbE = projected_RE.detach().unflatten(0, shape)
        return F.normalize(projected_VbE[:LARGE].float(), dim=-1), predicted_RE.unflatten(0, shape)


class MimHeads(MultiCrop):
    """Every head learns by itself, from what its block makes of the crops, to tell an image by its neighbour."""

    name = "mim_heads"
    Settings = Settings
    shrinks = drops_patches = True
    trains_encoder = False

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.blocks = settings.blocks(encoder.depth)
        self.heads = nn.ModuleDict({str(block): NeighbourHead(encoder.embed_dim, settings) for block in self.blocks})
        encoder.requires_grad_(False)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return super().draw(draws) | {
            f"choice{block}": torch.stack([draws.integers(self.settings.top_k) for _ in range(LARGE)], 1)
            for block in self.blocks
        }

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """All views through the encoder as one packed batch; for each head, by the number of its block, [b, C] per view."""
        views = self.left_of([View(view) for view in images], drawn)
        packed, done, rows = self.encoder.embed(views, self.patch_size), 0, {}
        for block in self.blocks:
            packed, done = self.encoder.run_blocks(packed, done, block), block
            rows[str(block)] = [self.summary(tokens_bLC, block) for tokens_bLC in self.tokens(packed, block)]
        return rows

    def tokens(self, packed: Packed, block: int) -> list[Tensor]:
        """What a block put out [b, L, C] per view; the last block's through the encoder's final norm."""
        if block == self.encoder.depth:
            packed = Packed(self.encoder.norm(packed.tokens_TC), packed.layout)
        return packed.unpack()

    def summary(self, tokens_bLC: Tensor, block: int) -> Tensor:
        """[b, C], as the encoder pools, but with a norm after the last block only."""
        if block == self.encoder.depth:
            return self.encoder.pool(tokens_bLC)
        patches = tokens_bLC[:, self.encoder.num_prefix_tokens :]
        return tokens_bLC[:, 0] if self.encoder.global_pool == "token" else patches.mean(dim=1)

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        projected, predicted, neighbours, similarities = [], [], [], []
        for block in self.blocks:
            head = self.heads[str(block)]
            own_2bE, predicted_VbE = head(torch.stack(rows[str(block)]))
            choice_R = drawn[f"choice{block}"].T.flatten()
            found_RE, slot_R, similarity = head.queue.lookup(
                own_2bE.flatten(0, 1), ids.repeat(LARGE), choice_R, self.settings.top_k
            )
            self.neighbours = head.queue.ids[slot_R[: len(ids)]]
            head.queue.offer(own_2bE[0], ids)
            projected.append(own_2bE)
            predicted.append(predicted_VbE.transpose(0, 1))
            neighbours.append(found_RE.unflatten(0, own_2bE.shape[:2]))
            similarities.append(similarity)
        everyone_BHVE = dist.all_gather(torch.stack(predicted, 1))
        losses = [
            self.align(own_2bE, found_2bE, everyone_BVE)
            for own_2bE, found_2bE, everyone_BVE in zip(projected, neighbours, everyone_BHVE.unbind(1), strict=True)
        ]
        report = {"loss": torch.stack(losses).sum()}
        if self.moment.logged:
            report["neighbour_similarity"] = torch.stack(similarities).mean()
            report["queue_filled"] = (head.queue.ids >= 0).float().mean()
        return report | {f"loss_block{block}": loss.detach() for block, loss in zip(self.blocks, losses, strict=True)}

    def align(self, own_2bE: Tensor, neighbours_2bE: Tensor, everyone_BVE: Tensor) -> Tensor:
        """Nearest neighbour alignment: a view's neighbour must pick its image's prediction from another view, the
        predictions of other images are pushed from the view itself. Mean over rows and pairs of a large view with another."""
        mine_b, losses = own_places(own_2bE[0]), []
        with torch.autocast(own_2bE.device.type, enabled=False):
            for view in range(LARGE):
                other = everyone_BVE[:, 1 - view : 2 - view]
                others_OBE = torch.cat([other, self.beside(everyone_BVE)], 1).transpose(0, 1)
                positive_Ob = (neighbours_2bE[view] * others_OBE[:, mine_b]).sum(-1) / self.settings.temperature
                logits_ObB = own_2bE[view] @ others_OBE.mT / self.settings.temperature
                place_Ob1 = mine_b[None, :, None].expand(len(others_OBE), -1, -1)
                logits_ObB = logits_ObB.scatter(2, place_Ob1, positive_Ob[..., None])
                losses.append((logits_ObB.logsumexp(2) - positive_Ob).mean())
        return torch.stack(losses).mean()

    def beside(self, everyone_BVE: Tensor) -> Tensor:
        """What both large views are compared with, beside each other: a view for each small one."""
        if self.settings.local_pairs == "intended":
            return everyone_BVE[:, LARGE:]
        return everyone_BVE[:, : everyone_BVE.shape[1] - LARGE]

    def groups(self, images_per_step: int) -> Iterator[Group]:
        return self.head_groups(images_per_step, self.settings.base_lr, self.settings.weight_decay)

    def head_groups(self, images_per_step: int, base_lr: float, weight_decay: float) -> Iterator[Group]:
        named = [(f"heads.{name}", parameter) for name, parameter in self.heads.named_parameters()]
        return with_decay(named, scaled_lr(base_lr, images_per_step), weight_decay)

    def flops_per_image(self) -> float:
        views = self.views()
        encoder = sum(self.encoder_flops(self.shown(view)) for view in views)
        return encoder + 3 * len(views) * head_flops(self.heads)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        super().after_step(applied)
        for head in self.heads.values():
            head.queue.commit(applied)

    def inherit(self, earlier: Method) -> None:
        if isinstance(earlier, MimHeads):
            try:
                self.heads.load_state_dict(earlier.heads.state_dict())
            except RuntimeError as error:
                raise BadInput(
                    f"{self.name} takes its heads from {earlier.name}, so both stages need the same blocks and sizes of them."
                ) from error

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self, "align"
