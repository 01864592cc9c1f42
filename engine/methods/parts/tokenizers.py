"""What says which of K codes each patch of an image is: the visual tokenizers that BEiT learns from (Bao et al., "BEiT: BERT
Pre-Training of Image Transformers", ICLR 2022, section 2.1).

Shapes: B images, N patches of an image, E elements of a patch (P * P * 3), R patches of a sample, M patches that are asked for, K
codes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import kernels
from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.data.pipeline import TrainLoader
from engine.data.sources import ImageSet, usable_cpus
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation

PATCHES_PER_CODE = 50
PATCHES_PER_CROP = 16
CROPS_AT_ONCE = 256
CROPS_OF_AN_IMAGE = 32  # more show nothing new, and of a few images would be cut for minutes
KIND = "tessera codebook"
CELL = 8  # pixels of the discrete VAE's input for one code


class Codebook(nn.Module):
    """K patches found by k-means: the code of a patch is the nearest one's index. Ours, in place of a trained discrete VAE.

    Args:
        normalise: compare patches less their mean, over their standard deviation (as MAE's targets are), not as they are.

    The patches `centres`, fp32 [K, E] in the order (row, column, channel), are random until they are fitted or read.
    """

    def __init__(self, codes: int, patch_size: int, normalise: bool = True):
        super().__init__()
        self.patch_size, self.normalise = patch_size, normalise
        self.register_buffer("centres", torch.randn(codes, patch_size**2 * 3))

    @property
    def codes(self) -> int:
        return len(self.centres)

    @torch.no_grad()
    def forward(self, images: Tensor, asked_M: Tensor | None = None) -> Tensor:
        """The codes int64 [M] of the patches `asked_M` among all B * N of normalised images [B, 3, H, W]; [B * N] without."""
        rows, columns = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        every = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        patches_ME = kernels.gather_patches(images, every, self.patch_size).flatten(0, 1)
        return self.nearest(patches_ME if asked_M is None else patches_ME.index_select(0, asked_M))

    @torch.no_grad()
    def nearest(self, patches_ME: Tensor) -> Tensor:
        """The index int64 [M] of the centre nearest to each patch; 0 for a patch that is not finite."""
        with torch.autocast(patches_ME.device.type, enabled=False):
            patches_ME = self.comparable(patches_ME.float())
            # |x - c|^2 is least where (x, 1) . (c, -|c|^2 / 2) is largest
            queries = F.pad(patches_ME, (0, 1), value=1.0)
            keys = torch.cat([self.centres, -0.5 * self.centres.square().sum(1, keepdim=True)], 1)
            return kernels.nearest_neighbours(queries, keys)[1][:, 0].clamp_min(0)  # -1 is what has no neighbour

    def comparable(self, patches_RE: Tensor) -> Tensor:
        """Patches as they are compared."""
        return F.layer_norm(patches_RE, patches_RE.shape[1:], eps=1e-6) if self.normalise else patches_RE

    def flops(self, grid: tuple[int, int]) -> float:
        """Operations that are credited for an image: none, since this is a look-up."""
        return 0.0

    def save(self, path: Path) -> None:
        """Write a file that `read` takes."""
        about = {"kind": KIND, "patch_size": str(self.patch_size), "normalise": str(int(self.normalise))}
        write_file(path, lambda aside: save_file({"centres": self.centres.cpu().contiguous()}, aside, about))

    def draw(self, path: Path) -> None:
        """Write a picture of the centres."""
        from engine.core import pictures  # brings matplotlib, which takes a second

        pictures.patches(path, self.centres, self.patch_size, normalised=self.normalise, title=f"{self.codes:,} codes")

    @staticmethod
    def read(path: str | Path, patch_size: int) -> "Codebook":
        """The codebook of a file for patches of this size.

        Raises:
            BadInput: no such file, something else in it, or patches of another size.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise BadInput(f"there is no codebook {path}; make one with python -m engine.codebook --out {path}.")
        try:
            with safe_open(path, "pt") as file:
                about, centres_KE = file.metadata() or {}, file.get_tensor("centres")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is no codebook that python -m engine.codebook wrote ({error}).") from error
        if about.get("kind") != KIND or centres_KE.ndim != 2 or not centres_KE.isfinite().all():
            raise BadInput(f"{path} is no codebook that python -m engine.codebook wrote.")
        if about.get("patch_size") != str(patch_size) or centres_KE.shape[1] != patch_size**2 * 3:
            side = about.get("patch_size")
            raise BadInput(
                f"{path} is of patches of {side} pixels, the model's have {patch_size}; make one of that size."
            )
        codebook = Codebook(len(centres_KE), patch_size, about.get("normalise") == "1")
        codebook.centres.copy_(centres_KE)
        return codebook

    def fit(
        self,
        images: ImageSet,
        view: Augmentation,
        seed: int,
        count: int = 0,
        *,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        watch: Callable[[Iterator[Tensor], int], Iterator[Tensor]] = lambda parts, total: parts,
    ) -> None:
        """Find the centres in random patches of random crops of the images: the same for the same seed on the same machine.

        Args:
            view: how crops are made.
            count: patches to find them in; 0 is 50 for each code, and of few images fewer, those of 32 crops of each.
            watch: passes on the sample as it is read, part by part; told how many parts there are.
        """
        per_image = min(PATCHES_PER_CROP, (view.size[0] // self.patch_size) * (view.size[1] // self.patch_size))
        wanted = min(PATCHES_PER_CODE * self.codes, CROPS_OF_AN_IMAGE * per_image * len(images))
        count = max(count or wanted, self.codes)
        crops = min(CROPS_AT_ONCE, len(images))
        parts = self._sample(images, view, seed, crops, per_image, device, threads)
        total = -(-count // (crops * per_image))
        sample_RE = torch.cat([part for part, _ in zip(watch(parts, total), range(total))])[:count]
        self.centres.copy_(k_means(self.comparable(sample_RE), self.codes, seed))

    def _sample(
        self,
        images: ImageSet,
        view: Augmentation,
        seed: int,
        crops: int,
        per_image: int,
        device: torch.device | str,
        threads: int | None,
    ) -> Iterator[Tensor]:
        """Patches [crops * per_image, E] on the CPU, without end."""
        generator = torch.Generator().manual_seed(seed)
        loader = TrainLoader(images, (view,), crops, seed=seed, device=device, threads=threads)
        patches = (view.size[0] // self.patch_size) * (view.size[1] // self.patch_size)
        try:
            for batch in loader:
                chosen = torch.rand(crops, patches, generator=generator).argsort(1)[:, :per_image].to(device)
                yield kernels.gather_patches(batch.images[0], chosen, self.patch_size).flatten(0, 1).cpu()
        finally:
            loader.close()


def k_means(sample_RE: Tensor, count: int, seed: int) -> Tensor:
    """Centres fp32 [count, E] of a sample [R, E], R at least `count`, by scikit-learn's mini-batch k-means; those of the most
    points first."""
    from sklearn.cluster import MiniBatchKMeans  # takes seconds, which only a fit should spend

    batch = min(len(sample_RE), max(1024, 2 * count))
    with threadpool_limits(usable_cpus()):  # one process fits for all, while torchrun allows each one thread
        found = MiniBatchKMeans(count, batch_size=batch, max_iter=20, n_init=1, random_state=seed).fit(
            sample_RE.numpy()
        )
    sizes_K = torch.from_numpy(found.labels_).long().bincount(minlength=count)
    return torch.from_numpy(found.cluster_centers_).float()[sizes_K.argsort(descending=True, stable=True)]


class Bottleneck(nn.Module):
    """A residual block of the discrete VAE: three 3x3 convolutions of a quarter of its width and a 1x1 one, ReLU before each."""

    def __init__(self, before: int, after: int, gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        narrow = after // 4
        sizes = ((before, narrow, 3), (narrow, narrow, 3), (narrow, narrow, 3), (narrow, after, 1))
        self.res_path = nn.ModuleDict(
            {f"conv_{i}": nn.Conv2d(a, b, side, padding=side // 2) for i, (a, b, side) in enumerate(sizes, 1)}
        )

    def forward(self, x: Tensor) -> Tensor:
        change = x
        for convolution in self.res_path.values():
            change = convolution(F.relu(change))
        return self.id_path(x) + self.gain * change


class DiscreteVae(nn.Module):
    """The encoder of DALL-E's discrete VAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021, appendix A.3), which
    says what is in every 8x8 pixels; parameter names of the released one, but for `weight` and `bias`.

    Four groups of bottlenecks of width C, 2C, 4C and 8C, with a 7x7 convolution before, max pooling of 2 between and a 1x1
    convolution to scores after; a bottleneck's change counts one over the square of their number.

    It sees the model's own view, resized (bicubic, antialiased) so that a patch of the model has 8 pixels; BEiT resizes the crop
    itself (Lanczos). On a GPU all but the last layer compute in fp16, as released.
    """

    groups = 4

    def __init__(self, patch_size: int, width: int = 256, per_group: int = 2, codes: int = 8192):
        super().__init__()
        self.patch_size, self.codes = patch_size, codes
        gain = 1 / (self.groups * per_group) ** 2
        parts: dict[str, nn.Module] = {"input": nn.Conv2d(3, width, 7, padding=3)}
        before = width
        for group in range(1, self.groups + 1):
            after, blocks = 2 ** (group - 1) * width, {}
            for block in range(1, per_group + 1):
                blocks[f"block_{block}"] = Bottleneck(before, after, gain)
                before = after
            parts[f"group_{group}"] = nn.Sequential(OrderedDict(blocks))
        parts["output"] = nn.ModuleDict({"conv": nn.Conv2d(before, codes, 1)})
        self.blocks = nn.ModuleDict(parts)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, asked_M: Tensor | None = None) -> Tensor:
        """The codes int64 [M] of the patches `asked_M` among all B * N of normalised images [B, 3, H, W]; [B * N] without."""
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        codes = self.scores(self.pixels(images, grid)).argmax(1).flatten()
        return codes if asked_M is None else codes.index_select(0, asked_M)

    def pixels(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the encoder reads, [B, 3, 8 * rows, 8 * columns] in [0.1, 0.9], of normalised images."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        size = (CELL * grid[0], CELL * grid[1])
        small = F.interpolate((images * std + mean).float(), size, mode="bicubic", antialias=True)
        return 0.8 * small.clamp(0, 1) + 0.1

    def scores(self, pixels: Tensor) -> Tensor:
        """Scores fp32 [B, K, rows, columns] of pixels in [0.1, 0.9]."""
        device = pixels.device.type
        with torch.autocast(device, torch.float16 if device == "cuda" else None, enabled=device == "cuda"):
            x = self.blocks["input"](pixels)
            for group in range(1, self.groups + 1):
                x = self.blocks[f"group_{group}"](x)
                x = x if group == self.groups else F.max_pool2d(x, 2)
        with torch.autocast(device, enabled=False):
            return self.blocks["output"]["conv"](F.relu(x.float()))

    def flops(self, grid: tuple[int, int]) -> float:
        """Operations for an image whose codes form this grid: matrix products only."""
        cells, operations = grid[0] * grid[1], 0.0
        for name, part in self.blocks.items():
            side = {"input": 8, "output": 1}.get(name) or 2 ** (self.groups - int(name.rpartition("_")[2]))
            weights = sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Conv2d))
            operations += 2.0 * weights * cells * side**2
        return operations

    @staticmethod
    def read(path: str | Path, patch_size: int) -> "DiscreteVae":
        """The encoder in a file: DALL-E's released encoder.pkl, or its state dict, saved by torch or as safetensors.

        The released file is a pickled module. It is read by torch's restricted unpickler: the classes that it names become inert
        objects, of which the tensors are taken; nothing in it is run.

        Raises:
            BadInput: no such file, or something else in it.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise BadInput(f"there is no tokenizer {path}; give DALL-E's encoder.pkl or its state dict.")
        state = {
            key.removesuffix(short) + {".w": ".weight", ".b": ".bias"}.get(short, ""): value.float()
            for key, value in _tensors_of(path).items()
            for short in [key[-2:] if key.endswith((".w", ".b")) else ""]
        }
        try:
            codes, width = len(state["blocks.output.conv.weight"]), len(state["blocks.input.weight"])
            per_group = len({key.split(".")[2] for key in state if key.startswith("blocks.group_1.")})
            with torch.device("meta"):
                encoder = DiscreteVae(patch_size, width, per_group, codes)
            encoder.load_state_dict(state, assign=True)
        except (KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BadInput(f"{path} does not hold the encoder of DALL-E's discrete VAE ({reason}).") from error
        return encoder.requires_grad_(False)


class _Inert:
    """What an object of a pickled module becomes: it has what the file says of it, and does nothing."""


_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in a state dict."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _CLASSES]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = str(error).strip().partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"{path} is neither DALL-E's encoder as released nor a state dict ({reason}); where the original code runs, make one "
            'by torch.save(encoder.state_dict(), "encoder.pth").'
        ) from error
    found = tree if isinstance(tree, Mapping) else dict(_walk(tree, ""))
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _walk(part: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters of an inert module and its parts, by name."""
    content = vars(part) if isinstance(part, _Inert) else {}
    for key, value in (content.get("_parameters") or {}).items():
        if value is not None:
            yield f"{name}{key}", value.detach()
    for key, value in (content.get("_modules") or {}).items():
        yield from _walk(value, f"{name}{key}.")
