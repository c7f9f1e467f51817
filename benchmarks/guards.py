"""
What guards are worth: a head's recommended control at its own strength and at 20 times it, under each guard.

    python benchmarks/guards.py --rewards reward-model --output guards [--only vader] [--prompts 100]

Over the heads of examples/heads, on unseen prompts (`REWARDS/prompts-test.jsonl`, as `reward_model.py` leaves them),
with the other head's reward as the judge. What each comparison says goes to `benchmarks/results/guards-NAME.md`. It
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from example_heads import COMPARED, HEADS

from hf_recontrol import ValueHead, compare, embedded_model, load_prompts

KEPT = Path(__file__).with_name("results")
TIMES = 20
GUARDS = {
    "no guard": {},
    **{f"KL <= {limit:g}": {"max_kl": limit} for limit in (0.1, 0.2, 0.4)},
    **{f"plausibility {p:g}": {"plausibility": p} for p in (0.05, 0.2)},
    "KL <= 0.2, plausibility 0.05": {"max_kl": 0.2, "plausibility": 0.05},
}


def controls(head: Path) -> list[dict]:
    """The recommended control as it is, and many times as strong."""
    control = ValueHead.from_pretrained(head).config.control
    kind = "static_vector" if control.method == "static" else control.method
    found = [{"kind": "base"}, {"kind": kind, "name": "recommended", "strengths": control.step_size}]
    for name, guard in GUARDS.items():
        found.append({"kind": kind, "name": f"x{TIMES}, {name}", "strengths": TIMES * control.step_size, **guard})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=Path, required=True, help="folder of reward_model.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["vader", "preference"], nargs="*", default=["vader", "preference"])
    parser.add_argument("--prompts", type=int, default=100)
    arguments = parser.parse_args()
    functions = {"vader": "hf_recontrol:vader", "preference": str(arguments.rewards)}
    for name in arguments.only:
        head, output = HEADS / f"smollm2-{name}", arguments.output / name
        compare(
            embedded_model(),
            load_prompts(arguments.rewards / "prompts-test.jsonl", limit=arguments.prompts),
            functions[name],
            output,
            COMPARED,
            head=head,
            judge=next(function for other, function in functions.items() if other != name),
            controls=controls(head),
        )
        table = (output / "table.md").read_text(encoding="utf-8")
        (KEPT / f"guards-{name}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
