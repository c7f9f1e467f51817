"""
Align a language model while it generates: value heads that steer the hidden states of any decoder-only model.

What stands in `__all__` is what this package offers; everything else is private and may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .collection.rollouts import generate_rollouts, write_rollouts
    from .collection.scoring.classifiers import ClassifierReward
    from .collection.scoring.labels import label_rollouts
    from .collection.scoring.responses import score_rollouts
    from .collection.scoring.rewards import RewardFunction, load_reward, text_reward
    from .collection.scoring.vader import vader
    from .collection.states import collect_states, write_states
    from .configuration import ControlConfig, TrainingRecord, ValueHeadConfig
    from .data.prompts import Prompts, load_prompts
    from .data.rollouts import Rollout, load_rollouts, save_rollouts
    from .data.states import States, StateStore
    from .data.templating import encode_prompt
    from .evaluation.comparison.figures import Figure
    from .evaluation.data_curve import DataCurve, data_curve
    from .evaluation.intervals import paired_interval
    from .evaluation.judges.judge import Judge, Question, Verdict
    from .evaluation.judges.page import write_judge_page
    from .evaluation.metrics import diversity, kl_divergence
    from .evaluation.pages.report import write_report
    from .evaluation.recommendation import Recommendation, Trial, recommend_control
    from .evaluation.rivals.rival import Answer, Bench, Rival
    from .evaluation.strength import KLMatch, match_kl
    from .evaluation.trace.drawing import trace
    from .evaluation.trace.page import write_trace
    from .evaluation.trace.record import TokenChance, Trace, TracedResponse, TracedToken
    from .heads.convert import convert_checkpoint
    from .heads.value_head import ValueHead
    from .integrations.vllm.arguments import recontrol_engine_args
    from .modeling.causal_lm import ReControlForCausalLM
    from .modeling.hook_points import HookPoint
    from .modeling.logits_processor import ReControlLogitsProcessor
    from .pipelines.compare import compare
    from .pipelines.demo import embedded_model
    from .pipelines.fit import fit
    from .pipelines.tune import tune
    from .settings import (
        AdvantageSettings,
        BadRowSettings,
        CompareSettings,
        FitSettings,
        ForwardSettings,
        HeadSettings,
        HookPointSettings,
        LabelSettings,
        LoadingSettings,
        PromptSettings,
        RolloutSettings,
        SamplingSettings,
        ScoringSettings,
        SeedSettings,
        SourceSettings,
        StatesSettings,
        TemplateSettings,
        TraceSettings,
        TrainingSettings,
        TrainSettings,
        TuneSettings,
        ValueSettings,
    )
    from .training.advantage import fit_advantage
    from .training.critic import train_critic
    from .training.held_out import split_by_prompt, value_figures
    from .training.stage import train_head
    from .training.targets import td_targets, value_differences
    from .training.value import ValueTrainer, measure_value_head, train_value_head

# Imported on first use, as transformers does, so that `import hf_recontrol` does not wait for torch.
_MODULES = {
    "collection.scoring.classifiers": ("ClassifierReward",),
    "collection.scoring.labels": ("label_rollouts",),
    "collection.scoring.responses": ("score_rollouts",),
    "collection.scoring.rewards": ("RewardFunction", "load_reward", "text_reward"),
    "collection.scoring.vader": ("vader",),
    "collection.rollouts": ("generate_rollouts", "write_rollouts"),
    "collection.states": ("collect_states", "write_states"),
    "configuration": ("ControlConfig", "TrainingRecord", "ValueHeadConfig"),
    "data.prompts": ("Prompts", "load_prompts"),
    "data.rollouts": ("Rollout", "load_rollouts", "save_rollouts"),
    "data.states": ("StateStore", "States"),
    "data.templating": ("encode_prompt",),
    "evaluation.data_curve": ("DataCurve", "data_curve"),
    "evaluation.intervals": ("paired_interval",),
    "evaluation.judges.judge": ("Judge", "Question", "Verdict"),
    "evaluation.judges.page": ("write_judge_page",),
    "evaluation.metrics": ("diversity", "kl_divergence"),
    "evaluation.recommendation": ("Recommendation", "Trial", "recommend_control"),
    "evaluation.pages.report": ("write_report",),
    "evaluation.comparison.figures": ("Figure",),
    "evaluation.rivals.rival": ("Answer", "Bench", "Rival"),
    "evaluation.strength": ("KLMatch", "match_kl"),
    "evaluation.trace.drawing": ("trace",),
    "evaluation.trace.page": ("write_trace",),
    "evaluation.trace.record": ("TokenChance", "Trace", "TracedResponse", "TracedToken"),
    "heads.convert": ("convert_checkpoint",),
    "heads.value_head": ("ValueHead",),
    "integrations.vllm.arguments": ("recontrol_engine_args",),
    "modeling.causal_lm": ("ReControlForCausalLM",),
    "modeling.hook_points": ("HookPoint",),
    "modeling.logits_processor": ("ReControlLogitsProcessor",),
    "pipelines.compare": ("compare",),
    "pipelines.demo": ("embedded_model",),
    "pipelines.fit": ("fit",),
    "pipelines.tune": ("tune",),
    "settings": (
        "AdvantageSettings",
        "BadRowSettings",
        "CompareSettings",
        "FitSettings",
        "ForwardSettings",
        "HeadSettings",
        "HookPointSettings",
        "LabelSettings",
        "LoadingSettings",
        "PromptSettings",
        "RolloutSettings",
        "SamplingSettings",
        "ScoringSettings",
        "SeedSettings",
        "SourceSettings",
        "StatesSettings",
        "TemplateSettings",
        "TraceSettings",
        "TrainSettings",
        "TrainingSettings",
        "TuneSettings",
        "ValueSettings",
    ),
    "training.advantage": ("fit_advantage",),
    "training.critic": ("train_critic",),
    "training.held_out": ("split_by_prompt", "value_figures"),
    "training.stage": ("train_head",),
    "training.targets": ("td_targets", "value_differences"),
    "training.value": ("ValueTrainer", "measure_value_head", "train_value_head"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
