"""What the page of results.py says, but for the figures."""

from __future__ import annotations

TITLES = {
    "comparison": "unseen prompts of HH-RLHF",
    "rivals": "what else learns from the same responses, or asks about each token",
    "lora": "an adapter trained by DPO on the same responses",
    "against-static": "the head's methods against its static vector, at some 0.1 nats a token",
    "against-best": "the head's methods against the best of 16 answers",
    "plain": "the static vector of a plain V",
    "other-noise": "the same prompts with other noise",
    "harmfulqa": "HarmfulQA, out of distribution",
    "grid": "step size by steps",
}
# What `Study.addition` stands for.
ADDITIONS = {"more": "four responses to each of 1,913 prompts"}
# What a part's differences are to, where not to the base.
AGAINST = {"against-static": "static_vector", "against-best": "best_of_n"}
# What other scripts printed of a study's head, by their files among the figures: title, and what it is.
FURTHER = {
    "bounds-vader.md": (
        "smollm2, vader: what keeps a token's shift from gaining more",
        "What shifts of the drawn tokens gain at a small KL, on prompts that they were not learned on, in deviations "
        "of the reward for the root of a nat an answer (nothing is sampled for it). Beside those that are learned "
        "stand shifts that no head can know: a token's valence in VADER's own lexicon, and shifts times the slope of "
        "VADER's score at the response so far. "
        "`python benchmarks/bounds.py --fit results/smollm2-vader/fit --gae-lambda 0.5`.",
    ),
    "rounds-vader.md": (
        "smollm2, vader: a second round",
        "A head fitted anew to as many responses under the control that the first one recommends, to these alone, in "
        "place of it; and the mean of both heads' static vectors and token biases. "
        "`python benchmarks/rounds.py --fit results/smollm2-vader/fit --rewards results/reward-model --output rounds "
        "--rounds 2`.",
    ),
    "layers-vader.md": (
        "smollm2, vader: V at a middle layer, and many steps against one",
        "Each V was trained on the states of the same responses, at the layer that it reads and writes. `python "
        "benchmarks/layers.py --fit results/smollm2-vader/fit --rewards results/reward-model --output layers "
        "--layers 15`.",
    ),
    "guards-vader.md": (
        "smollm2, vader: 20 times the recommended strength, under guards",
        "The head of `examples/heads`. `python benchmarks/guards.py --rewards results/reward-model --output guards "
        "--only vader`.",
    ),
    "guards-preference.md": (
        "smollm2, preference: 20 times the recommended strength, under guards",
        "The head of `examples/heads`. `python benchmarks/guards.py --rewards results/reward-model --output guards "
        "--only preference`.",
    ),
    "beyond-words.md": (
        "smollm2: rewards that no bag of words predicts",
        "`order` is the share of words that begin with a later letter of the alphabet than the word before; `tone` is "
        "VADER's sentiment where the prompt asks for a cheerful answer, its opposite where it asks for a gloomy one. "
        "`python benchmarks/beyond_words.py --rewards results/reward-model --output beyond`.",
    ),
    "data-preference.md": (
        "smollm2, preference: how many responses, and how many to one prompt",
        "Gains on prompts that nothing was fitted to, in deviations of the reward for the root of a nat an answer "
        "(nothing is sampled for it). `python benchmarks/data.py --fit results/smollm2-preference-more/fit "
        "--gae-lambda 0.8 --output data`.",
    ),
}
# What a table's title leaves open.
NOTES = {
    "plain": "The static vector as the mean of V's own differences from token to token: without a critic, without "
    "rewards of the response so far, without a token bias (`--no-critic --gae-lambda 0 --no-token-bias`).",
    "rivals": "b, g and c learned from rewards of the response so far too; V, which `ascent` and `cd_prefix` follow, "
    "and the steering vector have one reward of each response. Rivals have their default settings: none was tuned.",
    "lora": "b, g and c learned from rewards of the response so far too; the adapter has the order of each prompt's "
    "two responses. It has the default settings of `lora_dpo`: none was tuned.",
    "other-noise": "Above, answers have the noise of seed 0, as the responses that the head was trained on: the n-th "
    "prompt's answer has that of the n-th training prompt's first response. Here it is that of seed 1.",
    "harmfulqa": "200 questions, spread evenly over the ten topics of the file. Strengths are those of the first "
    "table.",
}
REWARDS = {
    "vader": "Reward: VADER sentiment; judge: the preference reward model",
    "preference": "Reward: the preference reward model; judge: 1 less the probability of offensive language",
}
INTRODUCTION = """# Results

Made by `make results PAIRS=... HARMFULQA=...` (`benchmarks/results.py`): small models, short answers, small rewards,
one seed. Every table is the `table.md` of one comparison; [comparing.md](comparing.md) says what its columns mean, and
what KL is worth.
Strengths were found on 64 held-out prompts, never by the reward, and meet their KL there within 10 %: controls of one
KL may lie apart, so read the KL beside each reward. Differences are paired over prompts; their intervals are over
these prompts, not over trainings of the head. The same 200 prompts have measured every version of it. Times in these
tables are of a machine that did other work too.{times}

The models: smollm2 is SmolLM2-135M-Instruct as `make demo` makes it, from a file of 4-bit weights (Q4_1), in float32:
not the weights on the Hub, on which nothing here was measured{gemma}.
Heads are those of `recontrol fit` on first turns of HH-RLHF's harmlessness pairs, two responses of 48 tokens to each
unless a title says otherwise.
{scored}
The preference reward model is a MiniLM of 6 layers, trained on the same pairs by `benchmarks/reward_model.py`: it
ranks {accuracy:.0%} of {held_out_pairs} unseen pairs right, where "the shorter one is better" has
{accuracy_of_the_shorter:.0%}, and its reward correlates with an answer's length by {correlation_with_length:.2f}: it
is a learned reward that is no lexicon, not a measure of what people prefer. No judge here reads and understands: win
rates are by the judge that is named above each table, this reward model, or a classifier of offensive language (the
package `alt-profanity-check`).

What else learns from the same responses, and questions out of distribution, were measured on smollm2 alone, numbers of
steps and times on smollm2-vader alone.
"""

GEMMA = (
    "; gemma is Gemma-3-270M, a pretrained-only model, from 4-bit weights too (Q4_K_M), in float32, asked in "
    "HH-RLHF's form of a dialogue; its heads are of 512 prompts, those of smollm2 of 1,024"
)
