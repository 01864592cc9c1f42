"""Pushes an exported folder to the Hugging Face Hub through timm, whose loaders then find it there.

The token is the one that huggingface_hub finds: of `hf auth login`, or of the environment variable HF_TOKEN.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import push_to_hf_hub

from engine.core.errors import BadInput

# What a repository of an export may hold; in one with anything else something of another's would be replaced.
_OURS = {".gitattributes", "README.md", "LICENSE", "config.json", "model.safetensors"}
_KEPT = ("label_names", "tessera", "extra")  # of config.json, what timm does not write of itself


def check(name: str, private: bool) -> str:
    """The whole name of the repository, OWNER/NAME, that `name` means for who is logged in; it need not exist yet.

    Raises:
        BadInput: the name cannot be one, nobody is logged in, the Hub is out of reach, the repository holds something else
            than an export, or is public where a private one is wanted.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(
            f"{name!r} is no name of a repository; give NAME or ORGANISATION/NAME ({_line(error)})."
        ) from error
    if get_token() is None:
        raise BadInput(
            "nobody is logged in to the Hugging Face Hub: run hf auth login, or set HF_TOKEN to a token with write access."
        )
    api = HfApi()
    with _reached("the Hugging Face Hub cannot be asked, so nothing was pushed"):
        owner = api.whoami()["name"]
        name = name if "/" in name else f"{owner}/{name}"
        try:
            found = api.repo_info(name)
        except RepositoryNotFoundError:
            return name
    if private and not found.private:
        raise BadInput(
            f"{name} is there already and public; make it private on its page, choose another name, or leave out --private."
        )
    foreign = sorted({file.rfilename for file in found.siblings or ()} - _OURS)
    if foreign:
        raise BadInput(f"{name} is there already and holds {foreign[0]}, which is of no export; choose another name.")
    return name


def push(folder: Path, name: str, *, private: bool, card: Mapping[str, object]) -> str:
    """Pushes the exported `folder` in one commit to the repository `name`, made where it is not there; returns its address.

    `card` is timm's dictionary of a model card; a README.md that the repository has stays. Raises BadInput where the Hub refuses
    or is lost on the way; the repository is then as it was, or empty where it is new.
    """
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model.pretrained_cfg.pop("label_names", None)  # which timm has copied there from where they belong
    with _reached(f"{name} was not pushed, what the Hub has of that name is as before or empty"):
        push_to_hf_hub(
            model, name, commit_message="Add model", private=private, safe_serialization=True, model_card=dict(card),
            model_config={key: config[key] for key in _KEPT if key in config},
            task_name="image-classification" if config["num_classes"] else "image-feature-extraction",
            data_config={key: config["pretrained_cfg"][key] for key in ("mean", "std", "interpolation", "crop_pct")},
        )  # fmt: skip
    return f"https://huggingface.co/{name}"


@contextmanager
def _reached(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # httpx's, requests' or the client's own, by its version
        raise BadInput(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
