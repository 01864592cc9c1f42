"""Codebooks against scikit-learn; the discrete VAE against a plain restatement, and read from a file pickled as DALL-E's is."""

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.data.views import minimal
from engine.methods.parts.tokenizers import Codebook, DiscreteVae, k_means
from tests.reliability.images import folder_of_images


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(images: Tensor, side: int) -> Tensor:
    """Patches [B * N, E] in the order (row, column, channel), by loops."""
    patches = [
        image[:, top : top + side, left : left + side].permute(1, 2, 0).flatten()
        for image in images
        for top in range(0, images.shape[2], side)
        for left in range(0, images.shape[3], side)
    ]
    return torch.stack(patches)


@pytest.mark.parametrize("normalise", [False, True])
def test_codes_are_the_nearest_centres_of_scikit_learn(normalise: bool):
    images = 2 * torch.randn(60, 3, 16, 24, generator=draw()) + 1
    patches = cut(images, 8)
    if normalise:
        patches = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    judge = MiniBatchKMeans(12, n_init=1, random_state=0).fit(patches.numpy())
    codebook = Codebook(12, 8, normalise)
    codebook.centres.copy_(torch.from_numpy(judge.cluster_centers_))
    expected = torch.from_numpy(judge.predict(patches.numpy())).long()
    assert torch.equal(codebook(images), expected) and len(expected.unique()) > 5
    asked = torch.tensor([3, 359, 0])
    assert torch.equal(codebook(images, asked), expected[asked])
    assert torch.equal(codebook(images * torch.nan), torch.zeros_like(expected))


def test_k_means_finds_separate_clusters_the_largest_first():
    truth = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    members = torch.tensor([0] * 30 + [1] * 80 + [2] * 50)
    sample = truth[members] + 0.1 * torch.randn(160, 2, generator=draw())
    found = k_means(sample, 3, seed=1)
    expected = torch.stack([sample[members == cluster].mean(0) for cluster in (1, 2, 0)])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert torch.equal(found, k_means(sample, 3, seed=1))


def test_a_fit_depends_on_its_seed_alone_and_beats_random_centres():
    images, view = open_images(None, "train"), minimal((32, 32), (0.6, 1.0))
    books = [Codebook(24, 8) for _ in range(3)]
    for book, seed in zip(books, (5, 5, 6), strict=True):
        book.fit(images, view, seed, 4096, threads=1)
    assert torch.equal(books[0].centres, books[1].centres) and not torch.equal(books[0].centres, books[2].centres)
    sample = next(books[0]._sample(images, view, 9, 64, 16, "cpu", 1))
    near = books[0].comparable(sample)
    error = (near - books[0].centres[books[0].nearest(sample)]).square().mean()
    assert error < 0.5 * (near - near.mean(0)).square().mean()
    assert len(books[0].nearest(sample).unique()) > 12


def test_a_sample_is_of_the_crops_patches():
    images, book = open_images(None, "train"), Codebook(4, 8)
    sample = book._sample(images, minimal((32, 32)), 0, 32, 3, "cpu", 1)
    first, second = next(sample), next(sample)
    assert first.shape == second.shape == (96, 192) and not torch.equal(first, second)
    assert torch.equal(first, next(book._sample(images, minimal((32, 32)), 0, 32, 3, "cpu", 1)))


@pytest.mark.parametrize("normalise", [False, True])
def test_a_codebook_is_kept_in_a_file(normalise: bool, tmp_path: Path):
    book = Codebook(10, 8, normalise)
    book.save(tmp_path / "codebook.safetensors")
    again = Codebook.read(tmp_path / "codebook.safetensors", 8)
    assert torch.equal(again.centres, book.centres) and again.normalise == normalise and again.codes == 10
    assert list(load_file(tmp_path / "codebook.safetensors")) == ["centres"]
    with pytest.raises(BadInput, match="of patches of 8 pixels, the model's have 16"):
        Codebook.read(tmp_path / "codebook.safetensors", 16)


def test_what_is_no_codebook_is_refused(tmp_path: Path):
    save_file({"centres": torch.zeros(4, 192)}, tmp_path / "other.safetensors")
    save_file({"weights": torch.zeros(4, 192)}, tmp_path / "else.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    for name, message in (
        ("none.safetensors", "there is no codebook .*python -m engine.codebook"),
        ("other.safetensors", "is no codebook"),
        ("else.safetensors", "is no codebook"),
        ("broken.safetensors", "is no codebook"),
    ):
        with pytest.raises(BadInput, match=message):
            Codebook.read(tmp_path / name, 8)


# A tiny stand-in for the released module: classes of its names, which hold what its objects hold.
class Conv2d(nn.Module):
    def __init__(self, before: int, after: int, side: int):
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = before, after, side, True
        self.device, self.requires_grad = torch.device("cpu"), False
        weight = torch.randn(after, before, side, side, generator=draw(before * side)) / (before * side**2) ** 0.5
        self.w, self.b = nn.Parameter(weight), nn.Parameter(0.3 * torch.randn(after, generator=draw(after)))


class EncoderBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.n_layers, self.post_gain, quarter = 8, 1 / 64, after // 4
        self.id_path = nn.Identity() if before == after else Conv2d(before, after, 1)
        parts = []
        for i, (a, b, side) in enumerate(
            ((before, quarter, 3), (quarter, quarter, 3), (quarter, quarter, 3), (quarter, after, 1))
        ):
            parts += [(f"relu_{i + 1}", nn.ReLU()), (f"conv_{i + 1}", Conv2d(a, b, side))]
        self.res_path = nn.Sequential(OrderedDict(parts))


class Encoder(nn.Module):
    def __init__(self, width: int = 8, codes: int = 30):
        super().__init__()
        parts, before = [("input", Conv2d(3, width, 7))], width
        for group in range(4):
            blocks = [
                (f"block_{i + 1}", EncoderBlock(width * 2**group if i else before, width * 2**group)) for i in range(2)
            ]
            pool = [("pool", nn.MaxPool2d(kernel_size=2))] if group < 3 else []
            parts.append((f"group_{group + 1}", nn.Sequential(OrderedDict(blocks + pool))))
            before = width * 2**group
        parts.append(("output", nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(before, codes, 1))]))))
        self.blocks = nn.Sequential(OrderedDict(parts))


HOMES = {Conv2d: "dall_e.utils", EncoderBlock: "dall_e.encoder", Encoder: "dall_e.encoder"}


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Path]:
    """An encoder, and the file that pickles it under the released names, which nothing can import any more."""
    torch.manual_seed(0)
    encoder, path = Encoder(), tmp_path / "encoder.pkl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        for kind, home in HOMES.items():
            patch.setattr(kind, "__module__", home)
            module = sys.modules.get(home) or types.ModuleType(home)
            patch.setitem(sys.modules, home, module)
            setattr(module, kind.__name__, kind)
        torch.save(encoder, path)
    return encoder, path


def plain_scores(encoder: Encoder, x: Tensor) -> Tensor:
    """Its forward pass, written out."""

    def convolve(x: Tensor, layer: Conv2d) -> Tensor:
        return F.conv2d(x, layer.w, layer.b, padding=layer.kw // 2)

    x = convolve(x, encoder.blocks.input)
    for group in range(1, 5):
        for block in range(1, 3):
            part = encoder.blocks.get_submodule(f"group_{group}.block_{block}")
            change = x
            for index in range(1, 5):
                change = convolve(change.relu(), part.res_path.get_submodule(f"conv_{index}"))
            x = (x if isinstance(part.id_path, nn.Identity) else convolve(x, part.id_path)) + change / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return convolve(x.relu(), encoder.blocks.output.conv)


def test_the_released_form_is_read_and_gives_its_scores(released: tuple[Encoder, Path]):
    encoder, path = released
    ours = DiscreteVae.read(path, patch_size=16)
    pixels = 0.8 * torch.rand(2, 3, 32, 48, generator=draw()) + 0.1
    expected = plain_scores(encoder, pixels)
    assert expected.shape == (2, 30, 4, 6) and ours.codes == 30
    torch.testing.assert_close(ours.scores(pixels), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("form", ["torch", "safetensors", "torch's names"])
def test_state_dicts_are_read(form: str, released: tuple[Encoder, Path], tmp_path: Path):
    encoder, path = released
    state = {key: value.detach() for key, value in encoder.state_dict().items()}
    if form == "torch's names":
        state = {key[:-1] + {"w": "weight", "b": "bias"}[key[-1]]: value for key, value in state.items()}
    if form == "safetensors":
        save_file(state, tmp_path / "encoder.safetensors")
    else:
        torch.save(state, tmp_path / "encoder.pth")
    other = tmp_path / ("encoder.safetensors" if form == "safetensors" else "encoder.pth")
    ours, same = (DiscreteVae.read(file, 16).state_dict() for file in (path, other))
    assert ours.keys() == same.keys() and all(torch.equal(value, same[key]) for key, value in ours.items())


def test_codes_are_of_the_same_crop_at_eight_pixels_a_patch(released: tuple[Encoder, Path]):
    ours = DiscreteVae.read(released[1], patch_size=16)
    images = torch.randn(2, 3, 64, 32, generator=draw())
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    small = F.interpolate(images * std + mean, (32, 16), mode="bicubic", antialias=True)
    expected = plain_scores(released[0], 0.8 * small.clamp(0, 1) + 0.1).argmax(1).flatten()
    assert torch.equal(ours(images), expected) and len(expected) == 16
    assert torch.equal(ours(images, torch.tensor([15, 2])), expected[[15, 2]])


def test_a_tiny_encoder_of_known_answer():
    """All weights zero but the last bias: every code is its largest entry. A one in its place: the brightest quarter decides."""
    ours = DiscreteVae(8, width=4, per_group=1, codes=3)
    for parameter in ours.parameters():
        parameter.zero_()
    ours.blocks["output"]["conv"].bias.copy_(torch.tensor([0.2, 0.5, 0.1]))
    assert torch.equal(ours(torch.randn(1, 3, 16, 16)), torch.ones(4, dtype=torch.int64))
    ours.blocks["input"].weight[0, 0, 3, 3] = 1.0  # the first channel is red, on through all groups
    for group in range(2, 5):
        ours.blocks[f"group_{group}"].block_1.id_path.weight[0, 0] = 1.0
    ours.blocks["output"]["conv"].weight[2, 0] = 1.0
    pixels = torch.full((1, 3, 16, 8), 0.1)
    pixels[0, 0, 3, 5] = 0.9
    assert ours.scores(pixels).argmax(1).flatten().tolist() == [2, 1]  # .1 + .9 > .5 > .1 + .1


def test_the_published_size():
    with torch.device("meta"):
        ours = DiscreteVae(16)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 53_786_240
    sides = {"input": 112, "group_1": 112, "group_2": 56, "group_3": 28, "group_4": 14, "output": 14}
    expected = sum(
        2.0 * layer.weight.numel() * sides[name.split(".")[1]] ** 2
        for name, layer in ours.named_modules()
        if isinstance(layer, nn.Conv2d)
    )
    assert ours.flops((14, 14)) == expected


class Canary:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_other_files_are_refused_and_nothing_in_them_is_run(tmp_path: Path):
    torch.save({"payload": Canary(tmp_path / "mark")}, tmp_path / "hostile.pkl")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Canary(tmp_path / "mark"), protocol=2))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pkl")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pth")
    (tmp_path / "broken.pkl").write_bytes(b"PK\3\4")
    for name, message in (
        ("none.pkl", "there is no tokenizer"),
        ("hostile.pkl", "neither DALL-E's encoder as released nor a state dict.*torch.save"),
        ("plain.pkl", "neither DALL-E's encoder"),
        ("module.pkl", "neither DALL-E's encoder"),
        ("broken.pkl", "neither DALL-E's encoder"),
        ("state.pth", "does not hold the encoder"),
    ):
        with pytest.raises(BadInput, match=message):
            DiscreteVae.read(tmp_path / name, 16)
    assert not (tmp_path / "mark").exists()


def test_a_few_images_are_not_cut_for_minutes(tmp_path: Path):
    folder_of_images(tmp_path, per_class=3)
    images, read = open_images(tmp_path, "train"), []

    def watch(parts, total):
        for part in parts:
            read.append(len(part))
            yield part

    Codebook(150, 8, True).fit(images, minimal((32, 32)), 0, threads=1, watch=watch)
    assert 32 * 16 * len(images) <= sum(read) <= 33 * 16 * len(images) < 50 * 150
    read.clear()
    Codebook(150, 8, True).fit(images, minimal((32, 32)), 0, 6000, threads=1, watch=watch)
    assert sum(read) >= 6000  # as asked for
