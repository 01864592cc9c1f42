"""The flags of `engine.study`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from tyro.conf import Positional

from engine import studies
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.studies import Study


@dataclass(frozen=True)
class Flags:
    """Train a grid of pretext tasks, judge each alike, write one table and one figure. Run it again to go on: what is done is not
    repeated."""

    study: Annotated[Positional[str], tyro.conf.arg(help=f"Which study: {', '.join(studies.names())}.")] = ""
    data: str = ""
    """An image folder: train/CLASS/*.jpg and val/CLASS/*.jpg; or shards, train/*.tar and val/*.tar; or NAME:DIR, a published set
    as it lies in DIR, with NAME one of cifar10, cifar100, svhn, flowers102, tiny-imagenet, imagenet100, imagenet, or parquet,
    files as Hugging Face has them. Default: the embedded digits."""
    model: str = ""
    """A timm ViT name; default vit_micro_patch8_32 on the embedded digits, vit_base_patch16_224 on a folder, and ViT-S with the
    set's image and patch size on a published set."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; default: the model's."""
    patch_size: int = 0
    """Side of a patch in pixels; 0 is the model's."""
    epochs: int = 0
    """Of every run, in a study of equal conditions; 0 is the study's own on the embedded digits, and the recipe's on a folder."""
    batch_size: int = 0
    """Images of a step, for every run; 0 is the recipe's."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each."""
    arms: tuple[str, ...] = ()
    """Only these pretext tasks; default: all of the study's."""
    collapse: tuple[str, ...] = ()
    """Only these ways to keep prototypes from collapsing; default: all of the study's."""
    out: str = ""
    """Folder of the study; default studies/NAME. An earlier one there is gone on with."""
    jobs: int = 1
    """Runs side by side, each in a process of its own."""
    threads: int = 0
    """CPU threads of all of them together; 0 is what the machine has."""
    compile: bool = False
    """Compile blocks and losses with torch.compile."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def check(self, study: Study) -> None:
        """Raise BadInput for a value that cannot be meant."""
        for name, least in {"epochs": 0, "batch_size": 0, "patch_size": 0, "jobs": 1, "threads": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        if not self.seeds or min(self.seeds) < 0:
            raise BadInput("--seeds takes one whole number or more, each from 0.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise BadInput(f"--device is {self.device!r}; choose one of auto, cpu, cuda.")
        for name in self.arms:
            study.arm(name)
        for name in self.collapse:
            if not study.collapse:
                raise BadInput(f"--collapse is not for study {study.name}, where every arm has its own recipe's.")
            if name not in study.collapse:
                raise BadInput(f"--collapse has {name!r}; choose from {', '.join(study.collapse)}.")
        for name in ("seeds", "arms", "collapse"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise BadInput(f"--{name} names something twice.")


def parse(arguments: Sequence[str], find: Callable[[str], Study] = studies.get) -> tuple[Flags, Study]:
    """Command-line arguments -> checked flags, and the study they name.

    Raises:
        BadInput: a flag or study does not exist, or a value is not valid.
        SystemExit: status 0 after --help.
    """
    flags = read(Flags, arguments, prog="engine.study", description=" ".join(Flags.__doc__.split()))
    if not flags.study:
        raise BadInput(f"no study is named; choose one of {', '.join(studies.names())}.")
    study = find(flags.study)
    flags.check(study)
    return replace(flags, out=flags.out or f"studies/{study.name}"), study
