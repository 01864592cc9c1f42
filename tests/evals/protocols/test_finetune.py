"""Fine-tuning: the recipe that is run, what is trained of the model, sets that can be learned, several classes an image."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits

from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.evals import Subject, finetuning, raw_pixels
from engine.evals.features import encoder_of
from engine.evals.protocols import finetune, multilabel_finetune
from engine.methods.base import Labels
from engine.model import vit
from engine.model.heads import Classifier, MultiLabelClassifier
from engine.recipes.supervised import fine_tuned


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """40 images of two classes to train on, 20 to test."""
    root, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3)) + 150 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i:02}.png")
    return tuple(open_images(root, split) for split in ("train", "val"))


def subject(seed: int = 0, **overrides) -> Subject:
    model = vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(seed), depth=2, **overrides)
    return Subject("small", encoder_of(model), threads=1)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"recipe": "best"}, "choose one of auto, mae, small"),
        ({"blocks": -2}, "blocks = -2 must be -1"),
        ({"blocks": 1.5}, "blocks = 1.5"),
        ({"epochs": -1}, "epochs = -1"),
        ({"base_lr": math.inf}, "base_lr = inf"),
        ({"layer_decay": 1.1}, "layer_decay must be at most 1"),
        ({"batch_size": 3}, "batch_size even"),
        ({"percents": ()}, "percents"),
        ({"percents": (0.0,)}, "percents"),
    ],
)
def test_settings_are_checked(wrong, said):
    with pytest.raises(BadInput, match=said):
        finetune.Settings(**wrong)


def test_large_sets_take_maes_released_numbers_and_small_ones_ours():
    with torch.device("meta"):
        base = vit.VisionTransformer(vit.create("vit_base_patch16_224", depth=1).architecture)
    large = finetuning.chosen(finetuning.Settings(), base, 1_281_167)
    s = large.settings
    assert (s.base_lr, s.layer_decay, s.epochs, s.batch_size, s.weight_decay) == (5e-4, 0.65, 100, 1024, 0.05)
    assert (s.mixup, s.cutmix, s.label_smoothing, s.erase) == (0.8, 1.0, 0.1, 0.25) and "MAE" in large.source
    assert large.overrides == fine_tuned("vit_base_patch16_224").encoder and large.overrides["drop_path"] == 0.1
    small = finetuning.chosen(finetuning.Settings(), base, 1437)
    assert small.source.startswith("ours") and not small.overrides
    given = finetuning.chosen(finetuning.Settings(recipe="mae", epochs=3, base_lr=1e-3), base, 50)
    assert (given.settings.epochs, given.settings.base_lr, given.settings.batch_size) == (3, 1e-3, 50)
    assert given.source.endswith("; epochs, base lr as chosen")


@pytest.mark.parametrize("images", [15, 144, 700])
def test_a_share_is_trained_on_for_as_many_updates_as_the_whole(images):
    model = vit.create("vit_micro_patch8_32", depth=1)
    whole = finetuning.chosen(finetuning.Settings(), model, 1437).settings
    part = finetuning.chosen(finetuning.Settings(), model, images, 1437).settings
    updates = [s.epochs * (n // s.batch_size) for s, n in ((whole, 1437), (part, images))]
    assert updates[0] == 12 * 44 and abs(updates[1] - updates[0]) <= images // part.batch_size
    assert finetuning.chosen(finetuning.Settings(epochs=500), model, 2, 1437).settings.epochs == finetuning.MOST_EPOCHS


@pytest.mark.parametrize("blocks, trained", [(0, set()), (0.5, {"1.norm2", "1.mlp"}), (1, {"1"}), (2, {"0", "1"})])
def test_only_the_last_blocks_are_trained(sets, blocks, trained):
    judged = subject()
    given = finetuning.Settings(epochs=1, blocks=blocks)
    labels = Labels(torch.from_numpy(sets[0].labels), sets[0].classes)
    recipe = finetuning.chosen(given, judged.vit, 40)
    method, _ = finetuning.fine_tune(judged, sets[0], labels, recipe, given, "test")
    before = judged.vit.state_dict()
    changed = {name for name, value in method.encoder.state_dict().items() if not torch.equal(value, before[name])}
    wanted = tuple(f"blocks.{block}." for block in trained)
    listed = {name for name, _ in judged.vit.named_parameters()}
    assert changed == {n for n in listed if n.startswith(wanted) or n.startswith("norm.")}


def test_all_blocks_positions_and_patches_are_trained(sets):
    judged, given = subject(), finetuning.Settings(epochs=1)
    labels = Labels(torch.from_numpy(sets[0].labels), sets[0].classes)
    method, losses = finetuning.fine_tune(
        judged, sets[0], labels, finetuning.chosen(given, judged.vit, 40), given, "test"
    )
    before = judged.vit.state_dict()
    same = {name for name, value in method.encoder.state_dict().items() if torch.equal(value, before[name])}
    assert not same and len(losses) == 1 and "blocks.0.attn.qkv.weight" in before
    with pytest.raises(BadInput, match="has 2 blocks, so the last 3"):
        finetuning.freeze_all_but(judged.vit.copy(), 3)


def test_maes_recipe_pools_patches_behind_a_new_norm_and_keeps_the_blocks():
    judged = subject(global_pool="token")
    twin = finetuning.prepared(
        judged, {"positions": "learned", "global_pool": "avg", "fc_norm": True, "drop_path": 0.1}
    )
    assert (
        twin.fc_norm.weight.eq(1).all() and isinstance(twin.norm, torch.nn.Identity) and twin.drop_path_rates[-1] == 0.1
    )
    state = judged.vit.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items() if "norm." not in name[:8])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        blocks = judged.vit.copy().eval()
        blocks.norm = torch.nn.Identity()
        assert torch.allclose(twin.eval()(images), blocks(images), atol=1e-5)
    larger = finetuning.prepared(judged, {"img_size": (64, 64)})
    assert larger.grid == (8, 8) and larger.pos_embed.shape[1] == 65


def test_two_classes_are_learned_and_the_same_seed_gives_the_same(sets):
    settings = finetune.Settings(epochs=4, percents=(20.0, 100.0))
    found = finetune.evaluate(subject(), *sets, settings)
    again = finetune.evaluate(subject(), *sets, settings)
    other = finetune.evaluate(subject(), *sets, dataclasses.replace(settings, seed=1))
    assert found.values["100% top-1"] == 1.0 and found.values["20% top-1"] >= 0.9
    assert found.values == again.values and found.counts["training images of 20%"] == 8
    for name, samples in found.samples.items():
        assert samples.shape == (20,) and samples.mean() == pytest.approx(found.values[name])
    losses = [r.pictures["training loss"].axes[0].lines[1].get_ydata() for r in (found, again, other)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])
    assert found.settings["recipe"].startswith("ours") and "updates" in found.settings["shares"]


def test_what_cannot_be_learned_is_refused(sets):
    with pytest.raises(BadInput, match="protocol finetune needs labels"):
        finetune.check(dataclasses.replace(sets[0], labels=None), sets[1], finetune.Settings())
    with pytest.raises(BadInput, match="give the weights of a ViT"):
        finetune.evaluate(Subject("raw", raw_pixels()), *sets, finetune.Settings(epochs=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_several_classes_is_binary_cross_entropy_of_what_counts(smoothing):
    generator = torch.Generator().manual_seed(0)
    head = MultiLabelClassifier(5, 4, smoothing)
    scores = torch.randn(6, 4, generator=generator, requires_grad=True)
    targets = torch.tensor(
        [[1, 0, -1, 0], [0, 0, 1, 1], [-1] * 4, [1, 1, 1, 1], [0, 0, 0, 0], [0, -1, -1, 1]], dtype=torch.int8
    )
    loss = head.loss(scores, head.targets(targets))
    wanted, count = 0.0, 0
    for row, column in np.ndindex(6, 4):
        if targets[row, column] >= 0:
            target = float(targets[row, column]) * (1 - smoothing) + smoothing / 2
            wanted = wanted + binary_cross_entropy_with_logits(scores[row, column], torch.tensor(target))
            count += 1
    torch.testing.assert_close(loss, wanted / count)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient[targets < 0] == 0).all() and (gradient[targets >= 0] != 0).all()
    assert head.loss(scores[2:3], head.targets(targets[2:3])) == 0
    assert isinstance(head, Classifier)


@dataclasses.dataclass(frozen=True)
class Shown:
    """As much of an ObjectSet as the protocol reads."""

    images: object
    targets: np.ndarray
    categories: tuple[str, ...] = ("light", "any", "nowhere")

    def __len__(self) -> int:
        return len(self.targets)


def test_several_classes_of_an_image_are_learned(sets):
    def shown(images):
        targets = np.zeros((len(images), 3), np.int8)
        targets[:, 0], targets[:, 1] = images.labels, np.arange(len(images)) % 2
        targets[0, 0] = -1
        return Shown(dataclasses.replace(images, labels=None), targets)

    train, test = map(shown, sets)
    judged = dataclasses.replace(subject(), object_size=(16, 16))
    found = multilabel_finetune.evaluate(judged, train, test, multilabel_finetune.Settings(epochs=6))
    ap = found.samples["mAP (step)"]
    assert ap[0] == pytest.approx(1.0) and 0.2 < ap[1] < 0.9 and np.isnan(ap[2]) and found.counts["classes judged"] == 2
    assert found.values["mAP (step)"] == pytest.approx(np.nanmean(ap)) and found.settings["recipe"].startswith("after")
    with pytest.raises(BadInput, match="no category occurs both"):
        empty = Shown(test.images, np.zeros((20, 3), np.int8))
        multilabel_finetune.check(train, empty, multilabel_finetune.Settings())
