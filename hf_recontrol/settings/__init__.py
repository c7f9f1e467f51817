"""
Settings of a run, one class for each stage or command: one name, one default and one text for Python, the command
and YAML. Each class is read on its own, and those of several stages are made of them.
"""

from .comparison import (
    COMPARE_INPUTS,
    HELD_OUT_PROMPTS,
    TUNE_INPUTS,
    AnswerSettings,
    CompareSettings,
    TraceSettings,
    TuneSettings,
)
from .engine import OWN_ENGINE, EngineSettings
from .stages import (
    BadRowSettings,
    DemoSettings,
    ForwardSettings,
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
    StopSettings,
    TemplateSettings,
)
from .training import (
    INDIFFERENT,
    AdvantageSettings,
    FitSettings,
    HeadSettings,
    TrainingSettings,
    TrainSettings,
    ValueSettings,
)
