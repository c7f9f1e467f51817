"""How reward functions are called: by keyword, as TRL calls them, whatever their signatures."""

import asyncio
import inspect
import threading
from functools import partial, wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recontrol import Rollout, fit, score_rollouts, text_reward, vader
from hf_recontrol.collection.scoring.rewards import by_name, call_reward, load_reward, reward_name

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

CHAT = [{"role": "user", "content": "w5"}]


def rows(*completions, prompt="w5", **columns) -> list[Rollout]:
    return [Rollout(prompt, text, [5], [6, 7], False, columns=dict(columns)) for text in completions]


def scores(reward, rollouts=None) -> list:
    return [r.reward[0] for r in score_rollouts(rollouts or rows("a", "bcd", topic="xy"), reward)]


def lengths(texts):
    return [float(len(text)) for text in texts]


def test_arguments_are_given_by_keyword_in_whatever_order_a_function_names_them():
    assert scores(lambda completions, prompts, **kwargs: lengths(completions)) == [1, 3]
    assert scores(lambda completions, ground_truth=None, **kwargs: lengths(completions)) == [1, 3]
    assert scores(lambda completions, **kwargs: lengths(completions)) == [1, 3]
    assert scores(lambda completions: lengths(completions)) == [1, 3]
    assert scores(lambda *, topic, completions: lengths(topic)) == [2, 2]
    assert scores(lambda completion_ids: lengths(completion_ids)) == [2, 2]
    assert scores(lambda topic, **kwargs: lengths(topic)) == [2, 2]
    assert scores(lambda **kwargs: lengths(kwargs["completions"])) == [1, 3]


def test_positional_only_arguments_are_found_by_their_names_too():
    def reward(completions, factor=3, prompts=None, /, **columns):
        assert prompts == ["w5", "w5"] and columns == {"topic": ["xy", "xy"], "completion_ids": [[6, 7], [6, 7]]}
        return [factor * value for value in lengths(completions)]

    assert scores(reward) == [3, 9]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda a, b: [0.0], r"needs a, b, which nothing provides"),
        (lambda prompt, completion, **kwargs: [0.0], r"needs prompt, completion, which nothing provides"),
        (lambda completions, trainer_state: [0.0], r"needs trainer_state"),
        (lambda a=1, b=2: [0.0], r"takes nothing of what there is"),
        (lambda *args: [0.0], r"takes nothing of what there is"),
        (len, r"needs obj"),
        (max, r"What the reward max takes cannot be found out"),
        (partial(lambda completions, topic, **columns: [0.0], topic="mine"), r"was given topic already"),
        (partial(lambda judge, completions, **columns: [0.0], "mine"), None),
        (partial(lambda topic, completions, **columns: [0.0], "mine"), r"was given topic already"),
        (int, r"int is a class: give an object of it"),
        (torch.nn.Linear(1, 1), r"is a model: give `ClassifierReward\(model, tokenizer\)`"),
        (load_reward("column:absent"), r"The data have no column 'absent', they have \['topic'\]"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_it_and_the_others_are(reward, message):
    calls = []
    first = text_reward(lambda completions, **columns: calls.append(1) or lengths(completions))
    if message is None:
        with pytest.raises(ValueError, match="returned 1 values for 2"):
            score_rollouts(rows("a", "b", topic="x"), reward)
        return
    with pytest.raises(ValueError, match=message) as raised:
        score_rollouts(rows("a", "b", topic="x"), first, reward)
    assert not calls
    if "is a" not in message and "no column" not in message:
        assert "def my_reward(completions, **columns)" in str(raised.value) and "['topic']" in str(raised.value)


def test_a_decorator_that_hands_on_everything_is_looked_through_and_another_is_not():
    def doubled(function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            return [2 * value for value in function(*args, **kwargs)]

        return wrapper

    def judged(function):
        @wraps(function)
        def wrapper(completions, **kwargs):
            return function(completions, judge=10)

        return wrapper

    assert scores(doubled(lambda completions: lengths(completions))) == [2, 6]
    assert scores(judged(lambda completions, judge: [judge * value for value in lengths(completions)])) == [10, 30]
    with pytest.raises(ValueError, match="needs other"):
        scores(doubled(lambda completions, other: lengths(completions)))


def test_objects_methods_and_partials_are_called_like_functions():
    class Judge:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, completions, topic, **kwargs):
            return [self.factor * value for value in lengths(completions)]

        def method(self, completions):
            return self(completions, None)

    assert scores(Judge(2)) == [2, 6] and scores(Judge(3).method) == [3, 9]
    assert scores(partial(lambda completions, k: [k * v for v in lengths(completions)], k=5)) == [5, 15]
    assert (reward_name(Judge(2)), reward_name(Judge(2).method), reward_name(partial(vader, k=1))) == (
        "Judge",
        "method",
        "vader",
    )


async def slow(completions, **columns):
    await asyncio.sleep(0)
    return lengths(completions)


def test_coroutines_are_awaited_also_where_a_loop_runs_already():
    class Judge:
        async def __call__(self, completions):
            return await slow(completions)

    async def notebook(reward):
        return scores(reward)

    for reward in (slow, partial(slow), Judge()):
        assert scores(reward) == [1, 3] and asyncio.run(notebook(reward)) == [1, 3]


@pytest.mark.parametrize("in_notebook", [False, True])
def test_what_coroutines_keep_between_calls_stays_theirs(in_notebook):
    # As a client, a semaphore belongs to the loop in which it was first waited for.
    one_at_a_time = asyncio.Semaphore(1)

    async def limited(completions):
        async def length(completion):
            async with one_at_a_time:
                await asyncio.sleep(0)
                return float(len(completion))

        return await asyncio.gather(*map(length, completions))

    async def notebook():
        return [scores(limited) for _ in range(3)]

    found = asyncio.run(notebook()) if in_notebook else [scores(limited) for _ in range(3)]
    assert found == [[1, 3]] * 3


def test_coroutines_may_wait_for_other_rewards_and_end_the_program():
    async def of_another(completions):
        return [value + 1 for value in scores(slow)]

    async def ends(completions):
        raise SystemExit("set a key")

    async def notebook(reward):
        return scores(reward)

    assert scores(of_another) == asyncio.run(notebook(of_another)) == [2, 4]
    for run in (scores, lambda reward: asyncio.run(notebook(reward))):
        with pytest.raises(SystemExit, match="set a key"):
            run(ends)
    assert scores(slow) == [1, 3]


def test_a_coroutine_is_run_by_the_thread_that_asks():
    thread = threading.get_ident()

    async def here(completions):
        return [float(threading.get_ident() == thread)] * len(completions)

    assert scores(here) == [1, 1]


def test_a_failing_coroutine_is_named():
    async def failing(completions):
        raise ZeroDivisionError("once")

    with pytest.raises(RuntimeError, match="failing failed: ZeroDivisionError: once"):
        scores(failing)


def test_responses_to_chats_are_messages_as_in_trl_unless_texts_are_asked_for():
    seen = {}

    def messages(prompts, completions):
        seen["messages"] = (prompts, completions)
        return [0.0] * len(prompts)

    @text_reward
    def texts(prompts, completions):
        seen["texts"] = (prompts, completions)
        return [0.0] * len(prompts)

    mixed = rows("a", prompt=CHAT) + rows("b")
    score_rollouts(mixed, messages, texts, partial(texts))
    assert seen["messages"] == ([CHAT, "w5"], [[{"role": "assistant", "content": "a"}], "b"])
    assert seen["texts"] == ([CHAT, "w5"], ["a", "b"])


def test_an_object_asks_for_texts_by_its_class():
    @text_reward
    class Judge:
        def __call__(self, completions):
            return lengths(completions)

    assert scores(Judge(), rows("a", "bcd", prompt=CHAT)) == [1, 3]


def test_our_own_vader_scores_chats():
    pytest.importorskip("vaderSentiment")
    good, bad = scores(vader, rows("What a lovely day!", "This is awful.", prompt=CHAT))
    assert bad < 0 < good


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ((0.5, 1), [0.5, 1.0]),
        (np.array([0.5, 1], dtype=np.float16), [0.5, 1.0]),
        (torch.tensor([[0.5], [1.0]], dtype=torch.bfloat16), [0.5, 1.0]),
        (torch.tensor([0.5, 1.0], requires_grad=True), [0.5, 1.0]),
        ([torch.tensor(0.5), np.float32(1)], [0.5, 1.0]),
        ([True, False], [1.0, 0.0]),
        (map(float, "12"), [1.0, 2.0]),
    ],
)
def test_rewards_may_come_as_any_list_of_numbers(returned, expected):
    assert scores(lambda completions: returned) == expected


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned nothing, expected a list with one number for each response"),
        (1.0, "returned a value of type float"),
        ("12", "returned a value of type str"),
        ({0: 0.5, 1: 0.5}, "returned a value of type dict"),
        ({0.5, 0.7}, "returned a value of type set"),
        (torch.tensor(1.0), "returned a value of type Tensor"),
        (np.ones((2, 2)), "returned a value of type ndarray"),
        ([1.0], "returned 1 values for 2 responses"),
        ([[1.0, 2.0], [1.0, 2.0]], r"row 0: the reward <lambda> returned \[1.0, 2.0\], expected a finite number"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        scores(lambda completions: returned)


def test_data_frames_columns_are_lists_too():
    pandas = pytest.importorskip("pandas")
    assert scores(lambda completions: pandas.Series([0.5, 1.0], index=["b", "a"])) == [0.5, 1.0]
    assert scores(lambda completions: pandas.DataFrame([[0.5], [1.0]])) == [0.5, 1.0]


# Those of `trl.rewards` that need no other package and no network, on what they were written for.
def test_functions_of_trl_run_as_they_are():
    trl = pytest.importorskip("trl.rewards")
    good = "<think>\nw5 w6\n</think>\nw7"
    chats = rows(good, "w5 w6", prompt=CHAT, topic="x")
    assert scores(trl.think_format_reward, chats) == [1.0, 0.0]
    repeated = [Rollout(CHAT, "a", [5], [1, 2, 3, 4], True), Rollout(CHAT, "b", [5], [5] * 5, True)]
    assert scores(trl.get_repetition_penalty_reward(ngram_size=2), repeated) == [0.0, -0.75]
    long = [Rollout(CHAT, "a", [5], [1] * 90, True), Rollout(CHAT, "b", [5], [1] * 10, True)]
    assert scores(trl.get_soft_overlong_punishment(100, 20), long) == [-0.5, 0.0]
    assert by_name([trl.think_format_reward, trl.get_soft_overlong_punishment(100, 20)]).keys() == {
        "think_format_reward",
        "soft_overlong_punishment_reward",
    }
    with pytest.raises(ValueError, match="accuracy_reward needs solution, which nothing provides"):
        scores(trl.accuracy_reward, chats)


def test_fit_refuses_a_reward_before_it_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_recontrol.collection.rollouts._sample", None)

    def run(reward, **changes):
        model = tiny_model("llama", dtype=torch.float32)
        data = [{"prompt": f"w{i}", "topic": i} for i in range(5, 45)]
        fit(model, data, reward, tmp_path / "run", tokenizer=tiny_tokenizer(), quiet=True, **changes)

    with pytest.raises(ValueError, match=r"needs subject, which nothing provides.*columns \['topic'\]"):
        run(lambda completions, subject: [0.0])
    with pytest.raises(RuntimeError, match=r"failed: KeyError: 'subject' \(Each reward is tried before sampling"):
        run(lambda completions, **columns: [0.0 for _ in columns["subject"]])
    with pytest.raises(ValueError, match=r"returned nan, expected a finite number.*tried before sampling"):
        run(lambda completions: [float("nan") for _ in completions])
    with pytest.raises(ValueError, match="no column 'absent'"):
        run("column:absent", on_bad_rows="skip")
    with pytest.raises(ValueError, match="Two rewards have the same name"):
        run(["topic", "column:topic"])
    assert not (tmp_path / "run").exists()


NAMES = ["prompts", "completions", "completion_ids", "topic", "answer", "absent", "a"]
MADE = ["function", "method", "object", "coroutine", "partial", "decorated"]
KINDS = [inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]


def handed_on(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@st.composite
def signatures(draw):
    """Random signatures, as the source of a function that notes what it gets."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5))
    kinds = sorted(draw(st.lists(st.sampled_from(KINDS), min_size=len(names), max_size=len(names))))
    with_default = [draw(st.booleans()) for _ in names]
    for i in range(1, len(names)):  # no parameter without a default may follow one that has one
        with_default[i] |= with_default[i - 1] and kinds[i] is not inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default="default" if has else inspect.Parameter.empty)
        for name, kind, has in zip(names, kinds, with_default, strict=True)
    ]
    if draw(st.booleans()):
        at = sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds)
        parameters.insert(at, inspect.Parameter("others", inspect.Parameter.VAR_POSITIONAL))
    if draw(st.booleans()):
        parameters.append(inspect.Parameter("rest", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


@settings(max_examples=300, deadline=None)
@given(
    signatures(), st.booleans(), st.sampled_from(["function", "method", "object", "coroutine", "partial", "decorated"])
)
def test_no_signature_gets_another_meaning_than_its_names_say(signature, chat, kind):
    noted = {}
    source = "async def reward" if kind == "coroutine" else "def reward"
    own = ["self"] if kind in ("method", "object") else []
    parameters = str(signature)[1:-1]
    if own and "/" not in parameters:
        parameters = ", ".join([*own, parameters] if parameters else own)
    elif own:
        parameters = f"self, {parameters}"
    space = {"noted": noted}
    exec(f"{source}({parameters}):\n    noted.update(locals())\n    return [1.0, 2.0]", space)
    reward = space["reward"]
    if kind == "method":
        reward = type("Judge", (), {"method": reward})().method
    elif kind == "object":
        reward = type("Judge", (), {"__call__": reward})()
    elif kind == "partial":
        reward = partial(reward)
    elif kind == "decorated":
        reward = handed_on(reward)
    rollouts = rows("a", "bcd", prompt=CHAT if chat else "w5", topic="x", answer=None)
    texts = [[{"role": "assistant", "content": text}] if chat else text for text in ("a", "bcd")]
    there = {
        "prompts": [CHAT, CHAT] if chat else ["w5", "w5"],
        "completions": texts,
        "completion_ids": [[6, 7], [6, 7]],
        "topic": ["x", "x"],
        "answer": [None, None],
    }
    named = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    missing = [n for n, p in named.items() if n not in there and p.default is p.empty]
    takes_all = "rest" in signature.parameters
    if missing or not (takes_all or set(named) & set(there)):
        with pytest.raises(ValueError, match=f"needs {', '.join(missing)}" if missing else "takes nothing"):
            score_rollouts(rollouts, reward)
        assert not noted
        return
    assert [r.reward for r in score_rollouts(rollouts, reward)] == [[1.0], [2.0]]
    assert {n: noted[n] for n in named} == {n: there.get(n, "default") for n in named}
    assert noted.get("others", ()) == ()
    if takes_all:
        assert noted["rest"] == {n: value for n, value in there.items() if n not in named}


def test_a_column_that_is_called_as_a_methods_own_argument_is_left_out():
    class Scorer:
        def __call__(self, completions, **columns):
            return [float("self" not in columns and "topic" in columns)] * len(completions)

        def score(this, completions, **columns):
            return [float("this" not in columns)] * len(completions)

    values = {"self": ["a"], "this": ["b"], "topic": ["c"]}
    for function in (Scorer(), Scorer().score, partial(Scorer()), partial(Scorer().score)):
        assert call_reward(function, ["p"], ["c"], [[1]], values) == [1.0]


def test_a_bound_method_is_marked_where_it_is_written():
    class Scorer:
        def score(self, completions):
            return [1.0] * len(completions)

    with pytest.raises(TypeError, match="`text_reward` cannot mark score"):
        text_reward(Scorer().score)
