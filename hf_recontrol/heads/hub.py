"""Heads on the Hub and in folders: finding their files, the card, the push."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

# HTTPError is that of the HTTP library which huggingface_hub uses: a connection that broke is no error of its own.
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from .._version import __version__
from .seen_prompts import PROMPTS_NAME

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
# What is said of a file that a head can be thought to do without.
_WHAT_FOR = {
    PROMPTS_NAME: (
        f", and {CONFIG_NAME} says that the head has one: it tells which prompts the head was trained on, so that "
        "nothing is measured on them. Copy it from where the head came from, beside the other files"
    )
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LOG_IN = "If the repo is private or gated, log in with `hf auth login` or pass `token`"
_REMEDIES = {
    401: f"Check the name. {_LOG_IN}.",
    403: f"{_LOG_IN}; accept its terms on its page, or use a token that may do this.",
    404: f"Check the name and the revision. {_LOG_IN}.",
    409: "Somebody else changed it at the same time: try again.",
    412: "Somebody else changed it at the same time: try again.",
    429: "Too many requests: wait some minutes and try again.",
    500: "The Hub has trouble of its own: wait and try again.",
}


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
        `OSError`: if the folder, the repo or the file in it cannot be found; says what was asked for and what to do.
    """
    name_or_path = os.fspath(name_or_path)
    _check_subfolder(name_or_path, subfolder)
    folder = Path(name_or_path, subfolder)
    if Path(name_or_path).exists():
        path = folder / filename
        if path.is_file():
            _check_link(path, Path(name_or_path))
            return path
        if not folder.is_dir():
            raise OSError(f"{folder} is not a folder: name the folder that holds {filename}.")
        message = f"No {filename} in {folder}{_WHAT_FOR.get(filename, '')}"
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if filename == WEIGHTS_NAME and pickles:
            message += f". {', '.join(pickles)} would have to be unpickled, which could run code: save as safetensors"
        raise OSError(f"{message}.")
    where = f"{filename}{f' in {subfolder}' if subfolder else ''}{f' at revision {revision}' if revision else ''}"
    try:
        with explained(f"get {where} from", name_or_path):
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
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(f"get {where} from", name_or_path, error.__cause__) from error
        raise OSError(
            f"Could not get {where} from {name_or_path!r}: it is no local folder, it is not in the cache, and the Hub "
            "could not be reached or was not to be asked. Check the name and the connection."
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"The Hub repo {name_or_path!r} has no {where}{_WHAT_FOR.get(filename, '')}.") from error


def _check_subfolder(name_or_path: str, subfolder: str) -> None:
    if os.path.isabs(subfolder) or ".." in re.split(r"[/\\]", subfolder):
        raise OSError(f"`subfolder` must lie inside {name_or_path}, got {subfolder!r}.")


def _check_link(path: Path, folder: Path) -> None:
    """Raise `OSError` if a folder, which may be from anybody, has its file elsewhere by a link."""
    target, root = path.resolve(), folder.resolve()
    blobs = _blobs(root)
    # What several repos of a cache share: blobs/ab/ab12..., where a link in a repo's own blobs leads.
    shared = [own.parent.parent / "blobs" / target.name[:2] for own in blobs]
    if not target.is_relative_to(root) and target.parent not in [*blobs, *shared]:
        raise OSError(f"{path} is a link to {target}, outside {folder}: put the file itself there.")


def _blobs(folder: Path) -> list[Path]:
    """Where the files are that a snapshot in the Hub's cache is links to: beside the snapshots."""
    return [parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"]


def is_cached(folder: Path) -> bool:
    """Whether a folder is a snapshot in the Hub's cache, which must stay as the Hub has it."""
    return any(blobs.is_dir() for blobs in _blobs(folder.resolve()))


@contextmanager
def explained(action: str, repo_id: str) -> Iterator[None]:
    """Raise what the Hub or the way there refuses as an `OSError` that names the repo and says what to do."""
    try:
        yield
    except EntryNotFoundError:
        raise  # the caller knows which file, and whether it matters
    except HFValidationError as error:
        raise OSError(f"{repo_id!r} is neither a local folder nor the name of a Hub repo.") from error
    except LocalTokenNotFoundError as error:
        raise OSError(f"Could not {action} {repo_id!r}: no token was found. {_REMEDIES[401]}") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"Could not {action} {repo_id!r}: offline mode is on, unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise _refused(action, repo_id, error) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise OSError(
            f"Could not {action} {repo_id!r}: the connection failed ({type(error).__name__}: {error}). Check it, and "
            "try again."
        ) from error
    except (RuntimeError, ValueError) as error:
        # huggingface_hub wraps what ends the upload of a large file, or a download that was forced.
        if isinstance(error.__cause__, (HTTPError, ConnectionError, TimeoutError)):
            with explained(action, repo_id):
                raise error.__cause__ from error
        if isinstance(error, RuntimeError):
            raise
        # The Hub finds the card's metadata wrong, or what answers is no Hub.
        raise OSError(f"Could not {action} {repo_id!r}: {error}") from error


def _refused(action: str, repo_id: str, error: HfHubHTTPError) -> OSError:
    status = 404 if error.response is None else error.response.status_code
    if isinstance(error, GatedRepoError):
        # Who is not logged in gets 401 here, and would learn only from the second try that there are terms.
        status = 403
    return OSError(f"Could not {action} {repo_id!r}: {error}. {_REMEDIES.get(min(status, 500), '')}".strip())


def is_repo_id(name: str) -> bool:
    """Whether a repo on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_no_model(folder: Path) -> None:
    """
    Raise `OSError` if a folder holds the `config.json` of something else than a head, such as the head's own base:
    saving a head there would replace that file and the weights beside it.
    """
    path = folder / CONFIG_NAME
    if path.is_file() and not _is_of_head(path.read_text(encoding="utf-8", errors="replace")):
        raise OSError(
            f"{folder} holds a {CONFIG_NAME} that is not a head's, such as that of a model. A head saved there would "
            f"replace it, and {WEIGHTS_NAME} too: name another folder."
        )


def _is_of_head(config: str) -> bool:
    """Whether the text of a `config.json` is that of a head, of whatever release."""
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "hidden_size" in values and not {"model_type", "architectures"} & values.keys()


def portable_name(name_or_path: str) -> str | None:
    """A base model's name as a head records it: a local folder by its whole path, so that any folder finds it."""
    if not name_or_path:
        return None
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path


def write_custom_generate(folder: Path, repo_id: str) -> None:
    """Write what `generate(..., custom_generate=repo_id)` of a plain transformers runs, for the head in `folder`."""
    source = Path(__file__).parents[1] / "custom_generate"
    target = folder / source.name
    target.mkdir()
    for path in source.glob("*.*"):
        text = path.read_text(encoding="utf-8").replace("REPO = None", f"REPO = {json.dumps(repo_id)}")
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
    subfolder: str,
    make_card: Callable[[str | None], str | None],
):
    """
    Push the files of `folder` as one commit to the Hub repo `repo_id`, created if need be. `make_card` gives, for the
    text of the card that is in the repo, if there is one, the card to put there, or `None` to keep it.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        `OSError`: if the Hub refuses, or cannot be reached, or what is there is no head; names the repo and says what
        to do. The repo's files and branches are then as they were; a repo that had to be created stays, empty.
    """
    _check_subfolder(repo_id, subfolder)
    api = HfApi(token=token, library_name="hf-recontrol", library_version=__version__)
    with explained("push to", repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise OSError(
                f"{repo_id!r} is there already and is public, and `private` makes new repos alone: make it private on "
                "its page first, or name another repo."
            )
        if not subfolder:
            write_custom_generate(folder, repo_id)
        # What a pull request has is there already, and is no branch.
        is_branch = not create_pr and not (revision or "").startswith("refs/")
        with _branch(api, repo_id, revision if is_branch else None):
            old_config, old_card = (
                _text_of(name, repo_id, subfolder, revision, token) for name in (CONFIG_NAME, CARD_NAME)
            )
            if old_config is not None and not _is_of_head(old_config):
                raise OSError(
                    f"{repo_id!r} holds a {CONFIG_NAME} that is not a head's, such as that of a model. A head pushed "
                    f"there would replace it, and {WEIGHTS_NAME} too: name another repo, or a `subfolder`."
                )
            card = make_card(old_card)
            if card is not None:
                (folder / CARD_NAME).write_text(card, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder or None,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=None if card is not None else [CARD_NAME],
            )


@contextmanager
def _branch(api: HfApi, repo_id: str, branch: str | None) -> Iterator[None]:
    """Make a branch for what is pushed inside the block, if it has a name and is new; take it back if that fails."""
    is_new = False
    if branch is not None:
        try:
            api.create_branch(repo_id, branch=branch)
            is_new = True
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(HfHubHTTPError, HTTPError):
                api.delete_branch(repo_id, branch=branch)
        raise


def _text_of(name: str, repo_id: str, subfolder: str, revision: str | None, token: str | bool | None) -> str | None:
    """What a file of a repo says, if it is there."""
    try:
        # By force: else a file in the cache, or none, would be the answer where the Hub gives no answer.
        file = hf_hub_download(
            repo_id, name, subfolder=subfolder or None, revision=revision, token=token, force_download=True
        )
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8", errors="replace")
