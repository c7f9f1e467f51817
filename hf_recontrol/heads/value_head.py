"""The value head: a small MLP from a hidden state to the reward that the response will get."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..configuration import ValueHeadConfig
from ..utils.files import atomic_path, make_folder
from .card import card_in, check_license, is_untouched, license_of, model_card, write_card
from .hub import CONFIG_NAME, WEIGHTS_NAME, check_no_model, find_file, is_repo_id, portable_name, push_folder
from .seen_prompts import NEXT_PROMPTS_NAME, PROMPTS_NAME, SeenPrompts

logger = logging.get_logger(__name__)

# Those of `transformers.activations`, whose import takes seconds that a head alone does not need.
_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear layers with an activation between them: `(..., sizes[0])` to `(..., sizes[-1])`."""

    def __init__(self, sizes: list[int], activation: str):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)

    def is_plain(self, activation: str) -> bool:
        """Whether it still is what its weights say: nobody has exchanged a part of it, such as for an adapter."""
        is_as_made = type(self) is MLP and type(self.activation) is _ACTIVATIONS[activation]
        is_as_made = is_as_made and all(type(layer) is nn.Linear for layer in self.layers)
        # Traced code cannot look into what an object holds.
        return is_as_made and (
            torch.compiler.is_compiling()
            or not any("forward" in part.__dict__ for part in (self, self.activation, *self.layers))
        )


class ValueHead(nn.Module):
    r"""
    V(h) = MLP((h - state_mean) / state_scale), and optionally the advantage part g on the same scaled state.

    Args:
        config ([`ValueHeadConfig`]):
            The shape of the head. Weights start random (V) and at zero in g's last layer (so an untrained g edits
            nothing).

    Attributes:
        source (`dict[str, str]`, *optional*):
            Where it was loaded from, as arguments of [`ValueHead.from_pretrained`].
        seen_prompts (`SeenPrompts`, *optional*):
            Which prompts it was trained, validated and tuned on, if that is known. [`compare`] and [`tune`] hold
            theirs against it.

    With `config.static_vector` the buffer `static_vector` holds b, one edit for all states, and with
    `config.token_bias_size` the buffer `token_bias` holds c, one number for each token; zero until they are fitted.
    The buffers `state_mean` and `state_scale`, one value for each feature, are 0 and 1 unless training sets them.
    """

    def __init__(self, config: ValueHeadConfig):
        super().__init__()
        self.config = config
        self.source: dict[str, str] | None = None
        self.seen_prompts: SeenPrompts | None = None
        self.register_buffer("state_mean", torch.zeros(config.hidden_size))
        self.register_buffer("state_scale", torch.ones(config.hidden_size))
        self.value_mlp = MLP([config.hidden_size, *config.head_sizes, config.num_objectives], config.activation)
        if config.static_vector:
            self.register_buffer("static_vector", torch.zeros(config.hidden_size))
        if config.token_bias_size is not None:
            self.register_buffer("token_bias", torch.zeros(config.token_bias_size))
        self.advantage_mlp = None
        if config.advantage_sizes is not None:
            self.advantage_mlp = MLP(
                [config.hidden_size, *config.advantage_sizes, config.hidden_size], config.activation
            )
            nn.init.zeros_(self.advantage_mlp.layers[-1].weight)
            nn.init.zeros_(self.advantage_mlp.layers[-1].bias)

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """The state in the head's coordinates, `(hidden - state_mean) / state_scale`, in the head's dtype."""
        if hidden.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"This head reads states of width {self.config.hidden_size}, got a tensor of shape "
                f"{tuple(hidden.shape)}."
            )
        return (hidden.to(self.state_mean.dtype) - self.state_mean) / self.state_scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Standardised values, `(..., hidden_size)` to `(..., num_objectives)`. [`ValueHead.rewards`] puts them in the
        reward's own units.
        """
        return self.value_mlp(self.scaled(hidden))

    def rewards(self, values: torch.Tensor) -> torch.Tensor:
        """Standardised values in the reward's own units: `values * reward_std + reward_mean`, same shape."""
        mean, std = (values.new_tensor(x) for x in (self.config.reward_mean, self.config.reward_std))
        return values * std + mean

    def advantage(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        g(h), `(..., hidden_size)` to `(..., hidden_size)`, in the state's own units: the advantage of token y is
        `(w_y - E_π0[w])ᵀ g(h)`, in standardised values; of a head with a token bias c, `c_y - E_π0[c]` more.

        Raises:
            `ValueError`: if the head has no advantage part.
        """
        if self.advantage_mlp is None:
            raise ValueError("This head has no advantage part (`config.advantage_sizes` is None).")
        return self.advantage_mlp(self.scaled(hidden))

    def without_token_bias(self) -> ValueHead:
        """The same head without its token bias, in tensors of its own."""
        head = deepcopy(self)
        head.config = replace(self.config, token_bias_size=None)
        head._buffers.pop("token_bias", None)
        return head

    def check_finite(self, source: str = "this head") -> None:
        """Raise `ValueError` if a tensor holds NaN or infinity, or a scale is not above 0; names `source`."""
        for name, tensor in self.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"`{name}` of {source} holds NaN or infinite values: it cannot be used.")
        if not (self.state_scale > 0).all():
            raise ValueError(f"`state_scale` of {source} holds values that are not above 0: it cannot be used.")

    def save_pretrained(self, save_directory: str | os.PathLike, *, license: str | None = None) -> None:
        """
        Write `config.json`, `model.safetensors`, a card `README.md` and, if it is known which prompts the head has
        seen, `prompts.safetensors` to a folder; a card that someone else wrote or edited is kept. Each file is
        complete or absent, also when the write is interrupted.

        Args:
            save_directory (`str` or `os.PathLike`):
                A folder.
            license (`str`, *optional*):
                The licence that a new card names, such as `"apache-2.0"`. Defaults to that of the card in the local
                folder that the head was loaded from, or of the card that is replaced; else it names none.

        Raises:
            `ValueError`: if the head holds NaN or infinite values, or `license` is no identifier. `OSError`: if the
            folder cannot be written, or holds a model, such as the head's own base.
        """
        self.check_finite()
        check_license(license)
        folder = make_folder(save_directory)
        check_no_model(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        seen = self.seen_prompts
        config = replace(self.config, prompts_digest=None if seen is None else seen.digest())
        # All are written before any is renamed: new weights beside the old config would be no head.
        with ExitStack() as stack:
            config_path = stack.enter_context(atomic_path(folder / CONFIG_NAME))
            config_path.write_text(config.to_json(), encoding="utf-8")
            save_file(tensors, stack.enter_context(atomic_path(folder / WEIGHTS_NAME)), metadata={"format": "pt"})
            if seen is not None:
                seen.save(stack.enter_context(atomic_path(folder / NEXT_PROMPTS_NAME)))
        if seen is not None:
            (folder / NEXT_PROMPTS_NAME).replace(folder / PROMPTS_NAME)
        write_card(folder, model_card(config, license=self._license(license, card_in(folder))))

    def _license(self, asked: str | None, present: str | None) -> str | None:
        """The licence for a new card: as asked, else that of the local folder's card, else that of the present one."""
        if asked and present is not None and not is_untouched(present) and license_of(present) != asked:
            logger.warning(
                f"The card is not as this package wrote it, so it is kept, without `license={asked!r}`: write "
                f"`license: {asked}` into its metadata by hand."
            )
        own = None
        if self.source is not None:
            folder = Path(self.source["pretrained_model_name_or_path"], self.source.get("subfolder", ""))
            own = license_of(card_in(folder))
        return asked or own or license_of(present)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> ValueHead:
        """
        Load a head from a local folder or a Hub repo. Loading is strict: a missing, extra or misshapen tensor is an
        error, and nothing is ever unpickled.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or the name of a Hub repo.
            revision, subfolder, cache_dir, force_download, token, local_files_only:
                As in [`~huggingface_hub.hf_hub_download`].

        Raises:
            `OSError`: if a file cannot be loaded. `ValueError`: if one is no head's; both name the file.
        """
        options = {
            "revision": revision,
            "subfolder": subfolder,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "token": token,
            "local_files_only": local_files_only,
        }
        config_path = find_file(pretrained_model_name_or_path, CONFIG_NAME, **options)
        config = ValueHeadConfig.from_json_file(config_path)
        weights_path = find_file(pretrained_model_name_or_path, WEIGHTS_NAME, **options)
        # Shapes are compared before any memory is taken, so that a wrong width cannot ask for terabytes.
        try:
            with torch.device("meta"):
                head = cls(config)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{config_path}: no tensors can have the sizes that it asks for.") from error
        _check_header(weights_path, {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()})
        head.load_state_dict(load_file(weights_path), strict=True, assign=True)
        head.to(head.state_mean.dtype).requires_grad_(True)
        head.check_finite(str(weights_path))
        if config.prompts_digest is not None:
            # The digest says that there is such a file: where it cannot be had nobody knows what the head has seen.
            head.seen_prompts = _seen_prompts(pretrained_model_name_or_path, config.prompts_digest, options)
        place = {
            "pretrained_model_name_or_path": portable_name(os.fspath(pretrained_model_name_or_path)),
            "revision": revision,
            "subfolder": subfolder,
        }
        head.source = {name: value for name, value in place.items() if value}
        return head

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload value head",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        subfolder: str = "",
        tags: list[str] | None = None,
        license: str | None = None,
    ):
        """
        Push the head, its configuration and its card to a Hub repo in one commit. A card that is there and that
        somebody wrote or edited is kept; to replace it, delete it there first.

        Args:
            repo_id (`str`):
                `"user/name"`, created if it does not exist.
            commit_message, private, token, revision, create_pr:
                As in [`~huggingface_hub.HfApi.upload_folder`].
            subfolder (`str`, *optional*):
                Where in the repo, so that one repo can hold several heads. `custom_generate` finds only a head at the
                root.
            tags (`list[str]`, *optional*):
                Further tags for a new card.
            license (`str`, *optional*):
                As for [`ValueHead.save_pretrained`]; the card that is replaced is that of the repo.

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            `ValueError`: if the head holds NaN or infinite values, or `license` is no identifier. `OSError`: if the
            Hub refuses or cannot be reached, or the repo holds a model there; what the repo held is then as it was.
        """
        check_license(license)
        pushed = self._pushed()

        def card(old: str | None) -> str | None:
            named = self._license(license, old)
            if old is not None and not is_untouched(old):
                return None
            return model_card(pushed.config, repo_id, subfolder, tags, revision, named)

        with tempfile.TemporaryDirectory() as folder:
            pushed.save_pretrained(folder)
            return push_folder(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                subfolder=subfolder,
                make_card=card,
            )

    def _pushed(self) -> ValueHead:
        """This head as others get it: without a base that is a folder of this machine, which nobody else has."""
        base = self.config.base_model_name_or_path
        if base is None or is_repo_id(base):
            return self
        logger.warning(
            f"The base {base} is a folder of this machine, so the head is pushed without its name: who loads it "
            "names the base (`from_pretrained('org/base', value_head=...)`)."
        )
        pushed = copy(self)
        pushed.config = replace(self.config, base_model_name_or_path=None, base_model_revision=None)
        return pushed


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """A module as it is used after training, inside the block: without dropout."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def read_values(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    What a head says of states, `(..., hidden_size)` to `(..., num_objectives)`, where the states are; in the reward's
    own units, if it is a [`ValueHead`].
    """
    parameter = next(head.parameters(), states)
    with in_eval(head):
        values = head(states.to(parameter.device, parameter.dtype))
    return (head.rewards(values) if isinstance(head, ValueHead) else values).to(states.device)


def _seen_prompts(name_or_path: str | os.PathLike, digest: str, options: dict) -> SeenPrompts:
    if Path(name_or_path, options["subfolder"], NEXT_PROMPTS_NAME).is_file():
        # Left by a save that was stopped, before or after it wrote the configuration.
        with suppress(ValueError):
            return SeenPrompts.load(find_file(name_or_path, NEXT_PROMPTS_NAME, **options), digest)
    return SeenPrompts.load(find_file(name_or_path, PROMPTS_NAME, **options), digest)


def _check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_slice(name)
                found[name] = tuple(tensor.get_shape())
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{path}: `{name}` has dtype {tensor.get_dtype()}, expected a float.")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): it may be cut off, or a pickle under this name."
        ) from error
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not hold the head that {CONFIG_NAME} describes: missing tensors {missing}, extra tensors "
            f"{extra}."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{path}: `{name}` has shape {found[name]}, {CONFIG_NAME} asks for {shape}.")
