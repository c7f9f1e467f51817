"""Rewards: what can score responses, what it is called, and how it is called."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import os
import threading
import types
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from ...data.processes import Processes
from ...data.prompts import Prompt
from ...utils.code_fingerprints import UnknownStateError, code_fingerprint
from ...utils.imports import named_module
from .classifiers import ClassifierReward

# f(prompts=, completions=, completion_ids=, **columns) -> list[float | None], as in TRL: one reward for each response,
# `None` where the function has none to give. A function gets what its signature names.
RewardFunction = Callable[..., Sequence[float | None]]

# What every reward function can have. Columns of these names are not handed over.
_GIVEN = ("prompts", "completions", "completion_ids")

# Of rewards (by id, and kept, so that no id is used twice) and their hashes after they were called: the hash before.
_before_calls: dict[tuple[int, str], tuple[RewardFunction, str]] = {}


class MissingColumnError(ValueError):
    """The data lack the column that a reward names."""


def text_reward(function: RewardFunction) -> RewardFunction:
    """
    Decorator: the reward function gets each completion as a text, for chats too. Without it a response to a chat comes
    as TRL gives it, as a list of messages: `[{"role": "assistant", "content": text}]`.

    Args:
        function (`Callable`):
            A reward function, or a class whose objects are called as one.

    Example:

    ```python
    @text_reward
    def brevity(completions, **columns):
        return [-float(len(text)) for text in completions]
    ```

    Raises:
        `TypeError`: if it cannot be marked, such as a bound method.
    """
    try:
        function.text_completions = True
    except AttributeError:
        raise TypeError(
            f"`text_reward` cannot mark {reward_name(function)}: put it above the function's `def`."
        ) from None
    return function


def load_reward(spec: str, columns: Collection[str] = ()) -> RewardFunction:
    """
    A reward function from its description.

    Args:
        spec (`str`):
            `"module:function"` (also a module in the current folder), `"column:NAME"` or just the name of one of
            `columns` for a column of the data, or the folder or Hub name of a sequence classifier, `"name"` or
            `"name#LABEL"` if it has several labels. A classifier computes where this process does (its accelerator).
        columns (collection of `str`, *optional*):
            The columns that the data have.

    Raises:
        `ValueError`, `OSError`: if there is no such thing, or it is a model but no whole classifier.
    """
    if spec in columns or spec.startswith("column:"):
        return ColumnReward(spec if spec in columns else spec.removeprefix("column:"))
    module_name, colon, function_name = spec.partition(":")
    if colon and all(part.isidentifier() for part in module_name.split(".")) and function_name.isidentifier():
        try:
            module = named_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name.split(".")[0] and error.name != module_name:
                raise
            raise ValueError(f"No module {module_name!r} for the reward {spec!r}: is it installed or here?") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"The module {module_name!r} has no function {function_name!r}.")
        return function
    name, _, label = (spec, "", "") if os.path.isdir(spec) else spec.partition("#")
    try:
        reward = ClassifierReward.from_pretrained(name, label=label or None)
    except OSError as error:
        raise OSError(
            f"The reward {spec!r} is no column of the data ({sorted(columns)}) and no `module:function`, and no "
            f"classifier of that name could be loaded: {error}"
        ) from error
    reward.model.to(Processes().device)
    return reward


class ColumnReward:
    """A column of the data as a reward function."""

    def __init__(self, column: str):
        self.column = self.__name__ = column
        self.fingerprint = f"column {column}"

    def __call__(self, **columns) -> list:
        return columns[self.column]


def reward_name(function: RewardFunction) -> str:
    """What a reward is called in messages, files and reports: by its function's own name, however it was given."""
    function = _with_attribute(function, "__name__")
    return getattr(function, "__name__", type(function).__name__)


def _with_attribute(function: RewardFunction, name: str) -> RewardFunction:
    """The function itself, or of partial ones what they are of, until it has an attribute."""
    while isinstance(function, partial) and not hasattr(function, name):
        function = function.func
    return function


def check_reward(function: RewardFunction, columns: Collection[str]) -> None:
    """
    Check that a reward function can be called with what there is.

    Args:
        function (`Callable`):
            The reward function.
        columns (collection of `str`):
            The columns that the data have beside the prompt.

    Raises:
        `ValueError`: if it needs an argument that nothing provides, or takes none of what there is; says which.
    """
    _wanted(function, {*_GIVEN, *columns})


def _wanted(function: RewardFunction, available: Collection[str]) -> tuple[list[inspect.Parameter], list[str]]:
    """(the parameters to give by position, the names to give by keyword) in a call of a reward function."""
    name = reward_name(function)
    if isinstance(function, ColumnReward) and function.column not in set(available) - set(_GIVEN):
        raise MissingColumnError(f"The data have no column {function.column!r}, they have {_others(available)}.")
    if isinstance(function, (type, torch.nn.Module)):
        remedy = "an object of it" if isinstance(function, type) else "`ClassifierReward(model, tokenizer)`"
        kind = "class" if isinstance(function, type) else "model"
        raise ValueError(f"The reward {name} is a {kind}: give {remedy}, or a function.")
    remedy = (
        f"Put it into a function of your own: `def my_reward(completions, **columns): return {name}(...)`. There are "
        f"{', '.join(_GIVEN)} and the columns {_others(available)}."
    )
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"What the reward {name} takes cannot be found out ({error}). {remedy}") from error
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [needed for needed in required if needed not in available]:
        raise ValueError(f"The reward {name} needs {', '.join(missing)}, which nothing provides. {remedy}")
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    by_keyword = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        by_keyword = sorted(set(available) - {p.name for p in by_position} - _hidden(function))
    else:
        by_keyword = [given for given in by_keyword if given in available]
        if not by_keyword and not any(p.name in available for p in by_position):
            raise ValueError(f"The reward {name} takes nothing of what there is. {remedy}")
    if twice := sorted(_bound(function).intersection(by_keyword)):
        raise ValueError(
            f"The reward {name} was given {', '.join(twice)} already (`functools.partial`), and the data have that "
            f"too: rename one of them. {remedy}"
        )
    return by_position, by_keyword


def _hidden(function: RewardFunction) -> set[str]:
    """The name of the argument that a method gets by itself: a column of that name cannot be given."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, types.FunctionType):
        return set()
    method = function if isinstance(function, types.MethodType) else type(function).__call__
    code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
    return set() if code is None else set(code.co_varnames[: code.co_argcount][:1])


def _others(available: Collection[str]) -> list[str]:
    return sorted(set(available) - set(_GIVEN))


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    """The parameters of a function; of what it wraps, if it hands on whatever it gets."""
    own = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    kinds = {p.kind for p in own}
    if inspect.Parameter.VAR_KEYWORD in kinds and kinds <= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }:
        own = list(inspect.signature(function).parameters.values())
    return own


def _bound(function: RewardFunction) -> set[str]:
    """The names of arguments that a partial function holds already."""
    bound = set()
    while isinstance(function, partial):
        all_names, left = (set(inspect.signature(f).parameters) for f in (function.func, function))
        bound |= {*function.keywords, *(all_names - left)}
        function = function.func
    return bound


def _takes_texts(function: RewardFunction) -> bool:
    return getattr(_with_attribute(function, "text_completions"), "text_completions", False)


def call_reward(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[list[int]],
    columns: dict[str, list],
) -> list:
    """
    What a reward function says of responses.

    Args:
        function (`Callable`):
            The reward function; if it is a coroutine function, what it returns is awaited.
        prompts, completions, completion_ids, columns:
            Lists of one length, from which it gets what its signature names.

    Returns:
        `list`, of that length: what it returned, unchecked.

    Raises:
        `ValueError`: as [`check_reward`]; if it returns no list of that length. `RuntimeError`: if it fails.
    """
    name = reward_name(function)
    if not _takes_texts(function):
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
    values = columns | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    by_position, by_keyword = _wanted(function, values)
    # Copies: a function may change what it is given, and the next one must not see that, nor the file.
    args = [copy.deepcopy(values[p.name]) if p.name in values else p.default for p in by_position]
    kwargs = copy.deepcopy({given: values[given] for given in by_keyword})
    try:
        returned = function(*args, **kwargs)
        if inspect.isawaitable(returned):
            returned = _awaited(returned)
        returned = _listed(returned)
    except ImportError:
        raise  # it says what to do
    except Exception as error:
        raise RuntimeError(f"The reward {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(returned, list):
        kind = "nothing" if returned is None else f"a value of type {type(returned).__name__}"
        raise ValueError(f"The reward {name} returned {kind}, expected a list with one number for each response.")
    if len(returned) != len(prompts):
        raise ValueError(f"The reward {name} returned {len(returned)} values for {len(prompts)} responses.")
    return returned


def _awaited(awaitable: Awaitable) -> Any:
    async def wait():
        return await awaitable

    here = os.getpid(), threading.get_ident()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _loop(*here).run_until_complete(wait())
    # A notebook's thread has a running loop, which cannot wait for another.
    return _worker(*here).submit(_awaited, wait()).result()


@cache
def _loop(process: int, thread: int) -> asyncio.AbstractEventLoop:
    """A thread's loop for all calls, since what a reward keeps between them, such as a client, belongs to one."""
    return asyncio.new_event_loop()


@cache
def _worker(process: int, thread: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def _listed(returned: Any) -> Any:
    """What a reward function returned as a list, or as it is where its items have no order or no end."""
    if hasattr(returned, "to_numpy"):
        returned = returned.to_numpy()
    if isinstance(returned, (torch.Tensor, np.ndarray)):
        # A column of one number each is a list of numbers.
        is_column = returned.ndim > 0 and math.prod(returned.shape[1:]) == 1
        return returned.reshape(-1).tolist() if is_column else returned
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
        return returned
    return list(returned)


def reward_fingerprint(function: RewardFunction) -> str:
    """
    What tells a reward from another of the same name: its `fingerprint`, if it has such a text, else a hash of what
    it does and holds, see [`code_fingerprint`].

    Raises:
        [`UnknownStateError`]: if that cannot be known.
    """
    given = getattr(function, "fingerprint", None)
    if isinstance(given, str) and given:
        return given
    found = code_fingerprint(function)
    return _before_calls.get((id(function), found), (function, found))[1]


def note_calls(function: RewardFunction, fingerprint: str | None) -> None:
    """Remember that a reward of this fingerprint is as it is now because we called it: it may count, or cache."""
    try:
        now = reward_fingerprint(function)
    except UnknownStateError:
        return
    if fingerprint is not None and now != fingerprint:
        _before_calls[id(function), now] = function, fingerprint


def by_name(rewards: Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    """
    Reward functions by their own names; those of one name from several modules also by their modules.

    Raises:
        `ValueError`: if a reward is given twice, or two cannot be told apart by their names.
    """
    names = [reward_name(function) for function in rewards]
    alike = {name for name in names if names.count(name) > 1}
    names = [
        f"{getattr(function, '__module__', '')}:{name}" if name in alike else name
        for name, function in zip(names, rewards, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two rewards have the same name: {names}. Give each reward once, and each function a name of its own "
            "(its `__name__`)."
        )
    return dict(zip(names, rewards, strict=True))


def objective_names(names: Sequence[str], combine_rewards: str) -> list[str]:
    """The names of what a response has a number of, by rewards of these names: one, if they are combined."""
    return [f"{combine_rewards} of {', '.join(names)}"] if combine_rewards != "none" and len(names) > 1 else [*names]


def named_rewards(
    rewards: str | RewardFunction | Sequence[str | RewardFunction], columns: Collection[str]
) -> dict[str, RewardFunction]:
    """
    Rewards as users give them, by name, see [`by_name`].

    Args:
        rewards (`str`, function, or sequence of these):
            As for [`load_reward`], or functions.
        columns (collection of `str`):
            What the rows hold beside prompt and completion.

    Raises:
        `ValueError`: if there is none, one is neither a function nor a name, or one cannot be called with these
            columns; names it.
    """
    specs = [rewards] if isinstance(rewards, str) or callable(rewards) else rewards
    if not isinstance(specs, Sequence) or not all(isinstance(spec, str) or callable(spec) for spec in specs):
        raise ValueError(f"Rewards must be functions or their names, got {rewards!r}.")
    if not specs:
        raise ValueError("No reward is given: name at least one.")
    functions = by_name([load_reward(spec, columns) if isinstance(spec, str) else spec for spec in specs])
    for function in functions.values():
        check_reward(function, columns)
    return functions
