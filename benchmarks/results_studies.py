"""The studies of results.py: which heads there are, and what each is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_recontrol import CompareSettings

# Nats a token. What follows the comparison is at the last.
KLS = (0.05, 0.1)
INSTRUCTION = CompareSettings().instruction


@dataclass(frozen=True)
class Study:
    """
    A head and what it is compared with.

    Args:
        base (`str`):
            `"smollm2"` or `"gemma"`.
        reward (`str`):
            `"vader"` or `"preference"`; the judge is the preference reward for the first, inoffensive language for
            the second.
        controls (`list[dict]`):
            What is compared on the unseen prompts.
        num_prompts (`int`):
            Prompts that the head is trained on.
        num_samples (`int`):
            Responses to each.
        kls (`tuple[float, ...]`):
            Nats a token that the head's methods are compared at.
        options (`dict`):
            Further settings of the sampling.
        addition (`str`):
            What tells its name from that of a study of the same base and reward.
    """

    base: str
    reward: str
    controls: list[dict[str, Any]]
    num_prompts: int = 1024
    num_samples: int = 2
    kls: tuple[float, ...] = KLS
    options: dict[str, Any] = field(default_factory=dict)
    addition: str = ""

    @property
    def name(self) -> str:
        return f"{self.base}-{self.reward}{self.addition}"

    @property
    def training(self) -> dict[str, int]:
        """How the responses are sampled that the head is trained on."""
        return {"num_prompts": self.num_prompts, "num_samples": self.num_samples}


HEADS_OWN: list[dict[str, Any]] = [{"kind": "static_vector"}, {"kind": "advantage"}, {"kind": "ascent"}]
FEW: list[dict[str, Any]] = [{"kind": "base"}, {"kind": "prompting"}, {"kind": "best_of_n", "n": 8}, *HEADS_OWN]
MORE_OF_N = [control | ({"n": 16} if control["kind"] == "best_of_n" else {}) for control in FEW]
# Under an instruction, what is trained on the same rollouts, and what asks the head or the reward about each token,
# beside the head's own methods. The rows of the paper's Table 1 are these and those above.
RIVALS: list[dict[str, Any]] = [
    {"kind": "base"},
    *HEADS_OWN,
    {"kind": "ascent", "name": "ascent + prompting", "instruction": INSTRUCTION},
    {"kind": "advantage", "name": "advantage + prompting", "instruction": INSTRUCTION},
    {"kind": "steering_vector", "kl": 0.1},
    {"kind": "cd_prefix", "kl": 0.1},
    {"kind": "cd", "kl": 0.1},
]
# HH-RLHF's own form of a dialogue, for a base model without a chat template.
DIALOGUE = {"stop_strings": ("\n\nHuman:",)}
STUDIES = [
    Study("smollm2", "vader", MORE_OF_N),
    Study("smollm2", "preference", MORE_OF_N),
    # All prompts that there are; at 0.075 an answer has some twice the KL of the best of 16.
    Study(
        "smollm2",
        "preference",
        [control for control in MORE_OF_N if control["kind"] != "prompting"],
        num_prompts=1913,
        num_samples=4,
        kls=(0.075, 0.1),
        addition="-more",
    ),
    Study("gemma", "vader", FEW, num_prompts=512, options=DIALOGUE),
    Study("gemma", "preference", FEW, num_prompts=512, options=DIALOGUE),
]
# Fig. 5 of the paper: step sizes by numbers of steps.
GRID = [
    {"kind": "base"},
    *(
        {"kind": "ascent", "name": f"ascent, {steps} steps", "num_steps": steps, "strengths": [0.1, 0.3, 1.0, 3.0]}
        for steps in (10, 30, 100, 200)
    ),
]
# Fig. 6 of the paper: time by batch size. As far in 200 steps as in 30: answers of one length.
TIMED = [
    {"kind": "base"},
    {"kind": "advantage", "strengths": 1.0},
    {"kind": "ascent", "strengths": 0.3},
    {"kind": "ascent", "name": "ascent, 200 steps", "num_steps": 200, "strengths": 0.045},
    {"kind": "cd_prefix", "strengths": 1.0},
]
