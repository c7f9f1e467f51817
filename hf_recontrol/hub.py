"""Heads on the Hub and in folders: finding their files, the card, the push."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ._version import __version__
from .configuration import ValueHeadConfig
from .files import atomic_path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def find_file(
    name_or_path: str | os.PathLike,
    filename: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """
    Path of one file of a head, from a local folder or (downloaded and cached) from a Hub repo.

    Raises:
        `OSError`: if the folder, the repo or the file in it cannot be had; says what was asked for and what to do.
    """
    name_or_path = os.fspath(name_or_path)
    folder = Path(name_or_path, subfolder)
    if Path(name_or_path).exists():
        path = folder / filename
        if path.is_file():
            return path
        if not folder.is_dir():
            raise OSError(f"{folder} is not a folder: name the folder that holds {filename}.")
        message = f"No {filename} in {folder}"
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if filename == WEIGHTS_NAME and pickles:
            message += f". {', '.join(pickles)} would have to be unpickled, which could run code: save as safetensors"
        raise OSError(f"{message}.")
    where = f"{filename}{f' in {subfolder}' if subfolder else ''}{f' at revision {revision}' if revision else ''}"
    try:
        return Path(
            hf_hub_download(
                name_or_path,
                filename,
                subfolder=subfolder or None,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        )
    except HFValidationError as error:
        raise OSError(f"{name_or_path!r} is neither a local folder nor the name of a Hub repo.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"Could not get {where} from {name_or_path!r}: it is no local folder, it is not in the cache, and the Hub "
            "could not be reached or was not to be asked. Check the name and the connection."
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"The Hub repo {name_or_path!r} has no {where}.") from error
    except HfHubHTTPError as error:
        raise OSError(
            f"Could not get {where} from {name_or_path!r}: {error}. If the repo is private or gated, log in with "
            "`hf auth login` or pass `token`."
        ) from error


def check_base(name_or_path: str | os.PathLike) -> None:
    """Raise `OSError` if what is named as a base model is a head, or neither a folder nor the name of a Hub repo."""
    path = Path(name_or_path)
    if not path.is_dir() and not REPO_ID.fullmatch(str(name_or_path)):
        raise OSError(f"The base model {name_or_path} is no folder, and not the name of a Hub repo.")
    try:
        config = ValueHeadConfig.from_json_file(path / CONFIG_NAME)
    except (OSError, ValueError):
        return
    raise OSError(f"{name_or_path} is a value head, not a model: its base is {config.base_model_name_or_path}.")


def portable_name(name_or_path: str) -> str | None:
    """A base model's name as a head records it: a local folder by its whole path, so that any folder finds it."""
    if not name_or_path:
        return None
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path


def model_card(config: ValueHeadConfig, repo_id: str | None = None, tags: list[str] | None = None) -> ModelCard:
    """The card of a head. It states what the configuration knows and leaves out the rest."""
    base = config.base_model_name_or_path
    base_on_hub = base if base and REPO_ID.fullmatch(base) and not Path(base).exists() else None
    data = ModelCardData(
        library_name="hf-recontrol",
        pipeline_tag="text-generation",
        base_model=base_on_hub,
        base_model_relation="adapter" if base_on_hub else None,
        tags=["re-control", "value-head", *(tags or [])],
    )
    where = (
        "the input of the LM head (after the final norm)"
        if config.hook_point == "lm_head"
        else f"the output of decoder layer {config.layer}"
    )
    widths = " - ".join(map(str, [config.hidden_size, *config.head_sizes, config.num_objectives]))
    parts = [f"- Value part V: {widths}, {config.activation}, reading {where}."]
    if config.advantage_sizes is not None:
        widths = " - ".join(map(str, [config.hidden_size, *config.advantage_sizes, config.hidden_size]))
        parts.append(f"- Advantage part g: {widths}.")
    if config.control is not None:
        settings = ", ".join(f"{key}={value!r}" for key, value in config.control.to_dict().items())
        parts.append(f"- Recommended control: `ControlConfig({settings})`.")
    if base_on_hub:
        revision = f" at revision `{config.base_model_revision}`" if config.base_model_revision else ""
        parts.insert(0, f"- Base model: `{base}`{revision}. Its weights are not changed and not in this repo.")
    name = repo_id or "path/to/this/folder"
    load = f'"{name}"' if base_on_hub else f'"path/to/the/base/model", value_head="{name}"'
    content = f"""---
{data.to_yaml()}
---

# Value head for {base_on_hub or "a causal language model"}

A value head predicts, from a language model's hidden state, the reward that the response will get. While the model
generates, the hidden state is moved so that the predicted reward grows, and no weight of the base model changes
(RE-Control, [arXiv 2406.05954](https://arxiv.org/abs/2406.05954)).

{chr(10).join(parts)}

```python
from hf_recontrol import ReControlForCausalLM

model = ReControlForCausalLM.from_pretrained({load})
```

Written by hf_recontrol {__version__}.
"""
    return ModelCard(content)


def write_card(
    folder: Path,
    config: ValueHeadConfig,
    repo_id: str | None = None,
    tags: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the card into `folder`, unless there is one already: it may hold what its owner wrote."""
    path = folder / CARD_NAME
    if overwrite or not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(str(model_card(config, repo_id, tags)), encoding="utf-8")


def has_own_card(folder: Path) -> bool:
    """Whether the card in `folder` is word for word the one of the head there: nobody has edited it."""
    try:
        config = ValueHeadConfig.from_json_file(folder / CONFIG_NAME)
        return (folder / CARD_NAME).read_text(encoding="utf-8") == str(model_card(config))
    except (OSError, ValueError):
        return False


def write_custom_generate(folder: Path, repo_id: str) -> None:
    """Write what `generate(..., custom_generate=repo_id)` of a plain transformers runs, for the head in `folder`."""
    source = Path(__file__).with_name("custom_generate")
    target = folder / source.name
    target.mkdir()
    for path in source.glob("*.*"):
        text = path.read_text(encoding="utf-8").replace("REPO = None", f'REPO = "{repo_id}"')
        (target / path.name).write_text(text, encoding="utf-8")


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
):
    """
    Push the files of `folder` as one commit to the Hub repo `repo_id`, created if need be. A card that the repo
    already has is kept.

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    api = HfApi(token=token, library_name="hf-recontrol", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_custom_generate(folder, repo_id)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    has_card = api.file_exists(repo_id, CARD_NAME, revision=revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_NAME] if has_card else None,
    )
