"""A LoRA adapter of the base, trained by DPO on pairs of its own scored responses."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...data.fingerprints import file_checksum, model_settings, prompt_hash
from ...data.processes import Processes
from ...data.prompts import Prompts
from ...data.rollouts import Rollout
from ...utils.checks import check_int, check_no_secret, check_number
from ...utils.extras import needs_extra
from ...utils.files import make_folder, write_json
from ..likelihoods import base_only
from .rival import Answer, Bench, Rival, rollouts_for, scored_by_prompt

_ADAPTER = "compared"


class DpoLora(Rival):
    """
    A LoRA adapter, trained by TRL's `DPOTrainer` before the comparison on the same scored rollouts as the head.

    A pair is the response of the highest and that of the lowest reward to one prompt; prompts whose responses all have
    one reward make none. Responses to different prompts are never paired: DPO compares answers to one question. The
    trainer gets the token ids that the base saw and drew, no texts.

    The adapter is kept in `bench.folder`, in a folder named by all that it depends on, and is not trained again.
    `training.json` beside its weights holds the number of pairs and steps, the seconds of training, and the peak of
    the memory in bytes: on a GPU what PyTorch allocated while training, else all of the process's since its start.
    A training that was stopped resumes from the last of its checkpoints, one every two minutes, to the same adapter.
    They stand beside the adapter's folder in a hidden one of the same name, until the adapter is written.

    The strength multiplies the adapter's contribution to the weights: 1 is as trained.

    Args:
        rollouts (`str`, *optional*):
            A folder of scored rollouts with two responses or more to a prompt; by default the comparison's
            (`rollouts`). Several rewards count by their sum in standard deviations.
        adapter (`str`, *optional*):
            A folder with a LoRA adapter of this base in peft's format: then nothing is trained.
        merge (`bool`, *optional*, defaults to `True`):
            Whether the adapter is added to the weights while it answers. Otherwise it is computed beside them at each
            token, which is slower: what is timed is what is asked for.
        beta (`float`, *optional*, defaults to 0.1):
            Of DPO: how strongly the policy is kept near the base.
        r (`int`, *optional*, defaults to 8), lora_alpha (`float`, *optional*, defaults to 16):
            Rank of the adapter, and its scale times the rank.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            The layers that are adapted, as in peft's `LoraConfig`.
        learning_rate (`float`, *optional*, defaults to 1e-4), num_epochs (`float`, *optional*, defaults to 1):
            Of the training.
        batch_size (`int`, *optional*, defaults to 4):
            Pairs in each step.
        max_pairs (`int`, *optional*):
            Pairs at most, chosen at random. By default all.
        training_arguments (`dict`, *optional*):
            Further arguments of TRL's `DPOConfig`.

    Raises:
        `ValueError`, `OSError`, `ImportError`: before any training, if there are no pairs or no adapter, peft or TRL
        is missing, or an argument cannot work.
    """

    start = 1.0
    strength = 1.0

    def __init__(
        self,
        bench: Bench,
        rollouts: str | None = None,
        adapter: str | None = None,
        merge: bool = True,
        beta: float = 0.1,
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: str | Sequence[str] = "all-linear",
        learning_rate: float = 1e-4,
        num_epochs: float = 1,
        batch_size: int = 4,
        max_pairs: int | None = None,
        training_arguments: dict[str, Any] | None = None,
    ):
        super().__init__(bench)
        check_int("r", r, low=1)
        check_int("batch_size", batch_size, low=1)
        if max_pairs is not None:
            check_int("max_pairs", max_pairs, low=1)
        numbers = {"beta": beta, "lora_alpha": lora_alpha, "learning_rate": learning_rate, "num_epochs": num_epochs}
        for name, value in numbers.items():
            check_number(name, value, above=0)
        with needs_extra("lora", "A LoRA adapter"):
            import peft
        self.merge = merge
        self._layers: dict[str, nn.Module] | None = None
        self._unfinished: Path | None = None
        if adapter is not None:
            self._path = Path(adapter)
            if not (self._path / "adapter_config.json").is_file():
                raise OSError(f"{self._path} holds no adapter of peft (`adapter_config.json`).")
            parts = sorted(each for each in self._path.glob("adapter_*") if each.is_file())
            self._known = {each.name: file_checksum(each) for each in parts}
            return
        self.pairs = self._pairs(bench.rollouts if rollouts is None else rollouts, max_pairs)
        modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        self._lora = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, target_modules=modules)
        self._arguments = {
            "beta": beta,
            "learning_rate": learning_rate,
            "num_train_epochs": num_epochs,
            "per_device_train_batch_size": batch_size,
            "seed": bench.sampling.seed,
            # The base's own precision, and whole responses.
            "bf16": False,
            "max_length": None,
            "gradient_checkpointing": False,
            "logging_steps": 10,
            **(training_arguments or {}),
        }
        check_no_secret("training_arguments", training_arguments or {}, "a token of the Hub belongs into HF_TOKEN.")
        from .lora_training import dpo_config

        dpo_config(self._arguments, bench.folder, bench.model.device)
        ids = [[each.prompt_ids, each.completion_ids] for pair in self.pairs for each in pair]
        self._known = {
            **model_settings(bench.model),
            "pairs": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            "lora": [r, lora_alpha, modules],
            "arguments": self._arguments,
        }
        text = json.dumps(self._known, sort_keys=True, default=str)
        self._path = bench.folder / f"lora-dpo-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._unfinished = bench.folder / f".{self._path.name}"
        if Processes().count > 1 and not self._path.is_dir():
            raise ValueError(
                "A LoRA adapter is trained by one process: run the comparison once without `accelerate launch` until "
                "it is trained, or name one that is (`adapter`)."
            )

    def _pairs(self, folder: str | Path | None, max_pairs: int | None) -> list[tuple[Rollout, Rollout]]:
        """(the best, the worst response) to each prompt."""
        if folder is None:
            raise ValueError(
                "A LoRA adapter is trained on scored rollouts: name their folder (`rollouts`), as `recontrol rollout` "
                "and `recontrol label` make it, for the comparison or for this control, or an `adapter`."
            )
        manifest = rollouts_for(self.bench, folder, "LoRA adapter")
        of_prompt = scored_by_prompt(self.bench, folder, manifest["rewards"])
        if not of_prompt:
            raise ValueError(f"No response in {folder} has a reward: nothing can be learnt from these.")
        if all(len(scored) == 1 for scored in of_prompt.values()):
            raise ValueError(
                f"The rollouts in {folder} have one scored response to each prompt, and DPO needs two to compare: "
                "sample them with `num_samples` of at least 2."
            )
        ends = [(min(s, key=lambda x: x[0]), max(s, key=lambda x: x[0])) for s in of_prompt.values()]
        pairs = [(best, worst) for (low, worst), (high, best) in ends if high > low]
        if not pairs:
            raise ValueError(
                f"The rollouts in {folder} hold no two responses to one prompt of different reward: sample more "
                "responses to each prompt (`num_samples`)."
            )
        if max_pairs is not None and len(pairs) > max_pairs:
            pairs = random.Random(self.bench.sampling.seed).sample(pairs, max_pairs)
        self.learnt = frozenset(prompt_hash(best.prompt) for best, _ in pairs)
        return pairs

    def depends_on(self) -> dict[str, Any]:
        return {"adapter": json.loads(json.dumps(self._known, default=str))}

    def prepare(self) -> None:
        from ...training.trainer import own_randomness

        # peft draws an adapter's weights: before the trainer sets its seed, and where others are then read.
        with own_randomness(self.bench.sampling.seed):
            if not (self._path / "adapter_config.json").is_file():
                self._train()
            self._layers = _adapter_layers(self.bench.model, self._path, self.merge)
        if self._unfinished is not None:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def trainer(self, folder: Path):
        """The [`AdapterTrainer`], whose checkpoints are in a folder."""
        from .lora_training import AdapterTrainer

        return AdapterTrainer(self.bench, self.pairs, self._lora, self._arguments, folder)

    def _train(self) -> None:
        adapter = make_folder(self._unfinished) / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        trainer = self.trainer(self._unfinished / "checkpoints")
        spent = trainer.fit()
        trainer.save_adapter(adapter)
        about = {"pairs": len(self.pairs), **spent, "device": self.bench.model.device.type}
        write_json(adapter / "training.json", about)
        adapter.rename(self._path)

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        with self.policy(strength):
            return [Answer(rollout) for rollout in self.bench.draw(prompts)]

    @contextmanager
    def policy(self, strength: float | None) -> Iterator[AbstractContextManager | None]:
        if self._layers is None:
            raise RuntimeError("`prepare` must be called before a LoRA adapter is used.")
        strength = self.strength if strength is None else strength
        layers = self._layers
        trained = {name: layer.scaling[_ADAPTER] for name, layer in layers.items()}
        weights = {name: layer.get_base_layer().weight.data for name, layer in layers.items()} if self.merge else {}
        model = self.bench.model
        try:
            for name, layer in layers.items():
                layer.scaling[_ADAPTER] = strength * trained[name]
                if self.merge:
                    summed = weights[name] + layer.get_delta_weight(_ADAPTER)
                    layer.get_base_layer().weight.data = summed.to(weights[name].dtype)
                else:
                    model.set_submodule(name, layer)
            with base_only(model):
                yield
        finally:
            for name, layer in layers.items():
                layer.scaling[_ADAPTER] = trained[name]
                if self.merge:
                    layer.get_base_layer().weight.data = weights[name]
                else:
                    model.set_submodule(name, layer.get_base_layer())


def _adapter_layers(model: PreTrainedModel, path: Path, merge: bool) -> dict[str, nn.Module]:
    """An adapter's layers around those of a model, by name; the model itself stays as it is."""
    import peft
    from peft.tuners.lora import Linear, LoraLayer

    config = peft.PeftConfig.from_pretrained(path)
    if config.peft_type != peft.PeftType.LORA or config.modules_to_save or config.bias != "none":
        raise ValueError(f"{path} must hold a LoRA adapter that replaces no module and no bias.")
    config.inference_mode = True
    state = {
        key.removeprefix("base_model.model."): value for key, value in peft.load_peft_weights(path, "cpu").items()
    }
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers: dict[str, nn.Module] = {}
    try:
        peft.inject_adapter_in_model(config, model, _ADAPTER)
        outcome = peft.set_peft_model_state_dict(model, state, _ADAPTER)
        layers = {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    finally:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
            model.set_submodule(name, layer.eval().get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)
    if outcome.unexpected_keys:
        raise ValueError(f"The adapter in {path} is of another model: here is no {outcome.unexpected_keys[0]}.")
    if merge and not all(type(layer) is Linear for layer in layers.values()):
        raise ValueError(f"The adapter in {path} cannot be merged into these weights: set `merge: false`.")
    if merge and (config.use_dora or config.lora_bias):
        raise ValueError(f"The adapter in {path} is more than a sum of weights (DoRA, a bias): set `merge: false`.")
    if merge and (tied := _tied(model, layers)):
        raise ValueError(
            f"The adapter in {path} changes {tied[0]}, whose weight is also that of {tied[1]}: merged it would change "
            "both. Set `merge: false`."
        )
    return layers


def _tied(model: PreTrainedModel, layers: dict[str, nn.Module]) -> tuple[str, str] | None:
    """A layer and another module with the same weight, by their names, if there are such."""
    own = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name != (layer := own.get(id(weight), name)):
            return layer, name
    return None
