"""Settings of training: the head's shape, V, the advantage part; and of everything from prompts to a head."""

from __future__ import annotations

from typing import Literal

from ..utils.checks import check_no_secret
from ..utils.setting_fields import Settings, setting, settings_class
from .engine import OWN_ENGINE
from .stages import LabelSettings, LoadingSettings, PromptSettings, RolloutSettings, SeedSettings, StatesSettings


@settings_class("Head")
class HeadSettings(Settings):
    """The shape of a head."""

    head_sizes: tuple[int, ...] = setting(
        (1024,),
        "Widths of V's hidden layers. One has the fastest ascent; width and depth hardly change the error.",
        low=1,
    )
    activation: Literal["relu", "silu", "gelu", "tanh"] = setting("relu", "Of V and g. ReLU has the fastest ascent.")
    advantage_sizes: tuple[int, ...] | None = setting(
        (256,),
        "Widths of g's hidden layers (where there are directions); none: a static vector, but no g.",
        low=1,
    )
    token_bias: bool = setting(
        True,
        "Let the static vector and g go with one number for each token of the vocabulary (where there are "
        "directions), for what a token's row of the LM head does not say of it. It is left out where the error on "
        "held-out prompts is no smaller with it.",
    )


# Settings, and arguments of TrainingArguments, that change nothing of the result.
INDIFFERENT = (
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "output_dir",
    "project",
    "report_to",
    "run_name",
    "trackio_space_id",
)


@settings_class("Training of both parts")
class TrainingSettings(SeedSettings):
    """What the training of V and of the advantage part share."""

    validation_split: float = setting(
        0.1, "Share of the prompts that is held out: it chooses the epoch, and all figures are of it.", above=0, high=1
    )
    discount: float = setting(1.0, "γ: below 1 the reward counts less the further away it is.", low=0, high=1)
    open_truncated: bool = setting(
        False,
        "Leave responses that were cut at the token limit open (V of their last state stands for what would have "
        "come) instead of ending in their reward. For rewards that judge only finished answers.",
    )
    train_batch_size: int = setting(
        64, "Responses in a training batch, over all processes, which must share it evenly.", low=1
    )
    lr_scheduler_type: str = setting(
        "constant", "Schedule of the learning rate: constant, linear, cosine, ..., as in transformers."
    )
    bf16: bool = setting(False, "Train in mixed precision, on devices that are faster in bfloat16.")
    dataloader_num_workers: int = setting(
        0, "Processes that fetch states ahead, where the disk is slower than the training.", low=0
    )
    report_to: str = setting("none", "Where the training's log goes: tensorboard, wandb, trackio, ...")
    training_arguments: dict = setting(
        {}, "Further arguments of transformers' TrainingArguments, by name.", default_text="none"
    )

    def __post_init__(self):
        super().__post_init__()
        check_no_secret("training_arguments", self.training_arguments, "a token of the Hub belongs into HF_TOKEN.")


@settings_class("Training of V")
class ValueSettings(TrainingSettings):
    """How V is trained."""

    td_lambda: float = setting(
        0.95, "λ of the TD(λ) targets: 0 is the paper's Bellman target, 1 is Monte Carlo.", low=0, high=1
    )
    target_update: float | None = setting(
        None,
        "Take the targets from a copy of V (a target network) that moves this share of the way to V after each step. "
        "For small λ where V runs away.",
        above=0,
        high=1,
        default_text="the targets come from V itself, without gradient",
    )
    learning_rate: float = setting(3e-4, "AdamW's, for V.", above=0)
    num_epochs: int = setting(30, "Epochs at most, for V; the best one is kept.", low=1)
    weight_decay: float = setting(0.01, "AdamW's, for V.", low=0)
    patience: int | None = setting(
        5, "Stop the training of V after so many epochs that were no better; none: never stop early.", low=1
    )
    scaling: Literal["feature", "scalar", "none"] = setting(
        "feature",
        "How the state is scaled: `feature`: each feature is standardised; `scalar`: one scale for all; `none`: the "
        "paper.",
    )


@settings_class("Training of the advantage part")
class AdvantageSettings(TrainingSettings):
    """How the advantage part g is trained."""

    gae_lambda: float = setting(
        0.8, "λ of GAE, for the targets of the static vector and g: 0 is the next state's value alone.", low=0, high=1
    )
    critic: bool = setting(
        True,
        "Take the targets of the static vector and g from a critic: a linear value function that sees more than the "
        "head can (the tokens drawn so far; with `prefix_every` their rewards; with `critic_layer` another layer). "
        "Otherwise from V.",
    )
    advantage_learning_rate: float = setting(1e-4, "AdamW's, for g.", above=0)
    advantage_num_epochs: int = setting(
        6, "Epochs at most, for g; the best one is kept. 0: g is the static vector.", low=0
    )
    advantage_weight_decay: float = setting(0.0, "AdamW's, for g.", low=0)
    advantage_patience: int | None = setting(
        2, "Stop the training of g after so many epochs that were no better; none: never stop early.", low=1
    )


@settings_class("Training")
class TrainSettings(AdvantageSettings, ValueSettings, HeadSettings):
    """How a head, V and the advantage part, is trained from a folder of states."""


@settings_class("Recommended control, rounds")
class FitSettings(TrainSettings, StatesSettings, LabelSettings, RolloutSettings, PromptSettings, LoadingSettings):
    """Everything that [`fit`] does: all stages, from prompts to a head that recommends a control."""

    target_kl: float = setting(
        0.1,
        "The head recommends the step size at which control moves the policy by so many nats a token. Lower it for "
        "answers nearer to the base's.",
        above=0,
    )
    rounds: int = setting(
        1,
        "Rounds of all stages. Each but the first samples responses under the control that the head so far "
        "recommends, and trains a head anew on the responses of all rounds.",
        low=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rounds > 1 and self.engine != OWN_ENGINE:
            raise ValueError(
                "Further rounds (`rounds`) are sampled under heads that do not exist yet, so no other engine can be "
                f"started with them: take `engine={OWN_ENGINE!r}`, or make them with the stages one by one."
            )
        if self.prefix_every is not None and not (self.with_directions and self.critic):
            raise ValueError(
                "`prefix_every` is for the critic of the static vector and the advantage part: it needs `critic`, "
                "`hook_point='lm_head'` and `directions`."
            )
