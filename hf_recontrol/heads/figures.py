"""What the figures of a head and of a control are called, wherever they are shown: card, report, tables."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """How a figure is shown."""

    label: str
    meaning: str
    # The type of metric on the Hub, for figures that go into a card's metadata.
    metric: str | None = None


# In the order in which tables show them.
FIGURES = {
    "held_out_episodes": Figure("Held-out responses", "what the figures below are of: a handful means little"),
    "held_out_prompts": Figure("Held-out prompts", "whose responses were not trained on"),
    "value_error": Figure(
        "V's error along the response", "0 is perfect, 1 is the error of always guessing the mean reward", "mse"
    ),
    "value_error_last": Figure("V's error at the last token", "the same, where V has read the whole response", "mse"),
    "constant": Figure("Error of the training mean reward", "what a head that learned nothing reaches"),
    "prompt_mean": Figure("Error of the prompt's mean reward", "the mean reward of the prompt's other responses"),
    "correlation_first": Figure(
        "V's correlation with the reward, first token", "known from the prompt alone", "pearsonr"
    ),
    "correlation_last": Figure("V's correlation with the reward, last token", "1 is perfect", "pearsonr"),
    "critic_value_error": Figure(
        "the critic's error along the response", "of what sees more than V; g and the static vector learned from it"
    ),
    "critic_value_error_last": Figure("the critic's error at the last token", "to be held against V's"),
    "critic_correlation_last": Figure("the critic's correlation with the reward, last token", "1 is perfect"),
    "advantage_correlation": Figure(
        "g's correlation with its targets", "how much each token changes the critic's value (or V)", "pearsonr"
    ),
    "constant_correlation": Figure("the same, of the static vector", "what does not depend on the state", "pearsonr"),
    "reward": Figure("reward", "mean over the responses"),
    "diversity": Figure("diversity", "product of the shares of distinct 2-, 3- and 4-grams of words"),
    "kl": Figure("KL (nats/token)", "of the controlled policy to the base"),
}
