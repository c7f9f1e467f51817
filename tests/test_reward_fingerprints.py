"""What tells a reward from another of the same name: what it does and holds, equal in every process."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_recontrol import Rollout, load_rollouts, save_rollouts, vader
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.scoring.rewards import load_reward, note_calls, reward_fingerprint
from hf_recontrol.data.fingerprints import file_checksum
from hf_recontrol.utils.code_fingerprints import UnknownStateError, code_fingerprint

from .fresh import run_fresh

RATES = {"good": 1.0}


def base(completions, k=1, **columns):
    return [float(k) for _ in completions]


def weighted(factor):
    def reward(completions):
        return [factor * RATES["good"] for _ in completions]

    return reward


class Judge:
    """Called like a function."""

    def __init__(self, threshold, words=()):
        self.threshold, self.words = threshold, set(words)

    def __call__(self, completions):
        return [self._score(text) for text in completions]

    def _score(self, text):
        return self.threshold + len(self.words.intersection(text.split()))

    def method(self, completions):
        return self(completions)


@dataclasses.dataclass
class Settings:
    rate: float
    table: np.ndarray = None

    def __call__(self, completions):
        return [self.rate for _ in completions]


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda v: partial(base, k=v), (1, 5)),
        (lambda v: partial(base, k=v), (1, True)),
        (lambda v: partial(partial(base, k=2), extra=v), (1, 2)),
        (weighted, (1.0, 2.0)),
        (Judge, (1, 2)),
        (lambda v: Judge(1, v).method, (["a", "b"], ["a", "c"])),
        (lambda v: Settings(1.0, v), (np.zeros(3), np.ones(3))),
        (lambda v: Settings(1.0, v), (torch.zeros(2), torch.zeros(2, dtype=torch.int32))),
        (lambda v: lambda completions, k=v: [k], (1, 2)),
        (lambda v: lambda completions, *, k=v: [k], ({"a": 1}, {"a": 2})),
        (lambda v: eval(f"lambda completions: [{v} for _ in completions]"), (1, 2)),
        (lambda v: eval(f"lambda completions: sum(x in {v} for x in completions)"), ({"a", "b"}, {"a", "c"})),
        (lambda v: eval(f"lambda {v}: [1.0 for _ in completions]"), ("completions, topic", "completions, subject")),
        (lambda v: lru_cache(weighted(v)), (1, 2)),
        (lambda v: weighted(v), (str.lower, str.upper)),
    ],
)
def test_rewards_that_do_or_hold_something_else_differ_and_equal_ones_do_not(make, values):
    first, second = values
    assert reward_fingerprint(make(first)) == reward_fingerprint(make(first))
    assert reward_fingerprint(make(first)) != reward_fingerprint(make(second))


def test_data_and_helpers_of_the_same_module_count(monkeypatch):
    before = reward_fingerprint(weighted(1.0)), reward_fingerprint(Judge(1))
    monkeypatch.setitem(RATES, "good", 2.0)
    assert reward_fingerprint(weighted(1.0)) != before[0]
    monkeypatch.setattr(Judge, "_score", lambda self, text: 0.0)
    assert reward_fingerprint(Judge(1)) != before[1]


def test_what_cannot_be_compared_is_named_but_not_where_it_is_only_a_global_of_the_module():
    judge = Judge(1)
    judge.lock = threading.Lock()
    with pytest.raises(UnknownStateError, match=r"an object of _thread\.lock"):
        code_fingerprint(judge)
    space = {"__name__": "somebodys", "LOCK": threading.Lock()}
    exec("def reward(completions):\n    with LOCK:\n        return [1.0 for _ in completions]", space)
    assert code_fingerprint(space["reward"]) == code_fingerprint(space["reward"])


def test_what_holds_itself_has_a_fingerprint():
    def loop(completions, depth=0):
        return loop(completions, depth + 1)

    judge = Judge(1)
    judge.me = [judge]
    assert len({reward_fingerprint(loop), reward_fingerprint(judge), reward_fingerprint(Judge(1))}) == 3


def test_a_text_of_the_author_s_own_stands_for_it():
    judge = Judge(1)
    judge.lock, judge.fingerprint = threading.Lock(), "version 1"
    assert reward_fingerprint(judge) == "version 1"


MODULE = """
import dataclasses, enum, logging, pathlib, re, threading
from functools import lru_cache, partial, wraps

WORDS = {"alpha", "beta", "gamma", "delta"}
PATTERN = re.compile("a+")
LOCK = threading.Lock()
log = logging.getLogger("x")

class Level(enum.Enum):
    LOW = 1
    HIGH = 2

@dataclasses.dataclass(frozen=True)
class Config:
    level: Level = Level.LOW
    words: frozenset = frozenset(WORDS)
    path: pathlib.Path = pathlib.Path("a")

class Judge:
    shared = Config()
    def __init__(self, k): self.k, self.seen, self.raw = k, set(WORDS), object()
    def __call__(self, completions): return [self.k for _ in completions if PATTERN.search("a")]

def twice(function):
    @wraps(function)
    def wrapper(*args, **kwargs): return [2 * x for x in function(*args, **kwargs)]
    return wrapper

@lru_cache
def helper(text):
    return sum(word in {"x", "y", "zz"} for word in text.split())

def plain(completions, config=Config()):
    with LOCK:
        log.info("called")
        return [float(helper(text)) for text in completions]

comprehended = lambda completions: [sum(w in WORDS for w in text.split()) for text in completions]
nested = lambda completions: (lambda f: [f(x) for x in completions])(lambda x: {w: 1 for w in x} and 1.0)
decorated = twice(plain)
bound = Judge(3)
part = partial(plain, config=Config(Level.HIGH))
"""
NAMES = ("plain", "comprehended", "nested", "decorated", "bound", "part")


def test_fingerprints_are_equal_in_every_process(tmp_path):
    (tmp_path / "some_rewards.py").write_text(MODULE)
    program = (
        "import json, some_rewards\n"
        "from hf_recontrol.utils.code_fingerprints import code_fingerprint\n"
        f"print(json.dumps([code_fingerprint(getattr(some_rewards, name)) for name in {NAMES}]))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
        )
        for seed in ("1", "2")
    ]
    first, second = (json.loads(process.communicate()[0].splitlines()[-1]) for process in started)
    assert first == second and len(set(first)) == len(NAMES)


@pytest.fixture
def folder(tmp_path):
    """A finished folder of rollouts, written by hand."""
    path = tmp_path / "r" / "part-00000.parquet"
    save_rollouts([Rollout("w5", f"w{i}", [5], [6], False) for i in range(4)], path)
    manifest = {
        "format_version": 1,
        "kind": "rollouts",
        "settings": {},
        "num_parts": 1,
        "complete": True,
        "parts": {path.name: file_checksum(path)},
        "rewards": None,
        "counts": {},
    }
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return path.parent


def test_scores_of_another_partial_are_not_kept(folder):
    label_rollouts(folder, [partial(base, k=1)])
    with pytest.raises(ValueError, match=r"scored with \['base'\], but its code .* what it holds.*--again"):
        label_rollouts(folder, [partial(base, k=5)])
    label_rollouts(folder, [partial(base, k=5)], again=True)
    assert all(r.reward == [5.0] for r in load_rollouts(folder))


def test_a_reward_that_counts_its_calls_is_still_the_same(folder):
    class Counting(Judge):
        def __call__(self, completions):
            self.threshold += 1
            return [1.0 + i for i in range(len(completions))]

    judge = Counting(0)
    counts = label_rollouts(folder, [judge])
    assert judge.threshold == 1 and label_rollouts(folder, [judge]) == counts and judge.threshold == 1
    judge.threshold = 7
    with pytest.raises(ValueError, match="what it holds"):
        label_rollouts(folder, [judge])


def test_scores_of_a_reward_that_cannot_be_known_are_kept_with_a_warning(folder, recontrol_warnings):
    judge = Judge(1)
    judge.lock = threading.Lock()
    counts = label_rollouts(folder, [judge])
    assert len(recontrol_warnings) == 1 and "Judge.fingerprint = 'version 1'" in recontrol_warnings[0]
    scored = load_rollouts(folder)
    judge.threshold = 5
    assert label_rollouts(folder, [judge]) == counts and load_rollouts(folder) == scored
    assert len(recontrol_warnings) == 2 and "are kept" in recontrol_warnings[1]
    judge.fingerprint = "version 1"
    with pytest.raises(ValueError, match="--again"):
        label_rollouts(folder, [judge])
    label_rollouts(folder, [judge], again=True)
    label_rollouts(folder, [judge])
    assert len(recontrol_warnings) == 2


def test_what_cannot_be_known_to_be_the_same_reward_does_not_go_on_with_a_scoring(folder, recontrol_warnings):
    """Half of the scores of one reward and half of another are no reward at all."""
    judge = Judge(1)
    judge.lock = threading.Lock()
    label_rollouts(folder, [judge])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ValueError, match=r"cannot be known later: it holds an object of _thread\.lock.*--again"):
        label_rollouts(folder, [judge])
    label_rollouts(folder, [judge], again=True)
    label_rollouts(folder, [judge])


def test_a_column_and_our_own_rewards_have_one():
    assert reward_fingerprint(load_reward("column:a")) != reward_fingerprint(load_reward("column:b"))
    assert reward_fingerprint(vader) == reward_fingerprint(vader)


@pytest.mark.parametrize(
    "made",
    [
        "SimpleNamespace(k={})",
        "Namespace(k={})",
        "range({})",
        "MappingProxyType({{1: {}}})",
        "Random({})",
        "itemgetter({})",
        "{{1: {}}}.get",
        "Template('{}')",
    ],
)
def test_objects_of_the_module_count_with_what_they_hold(made):
    def of(number):
        space = {"__name__": "somebodys"}
        exec(
            "from argparse import Namespace\nfrom operator import itemgetter\nfrom random import Random\n"
            "from string import Template\nfrom types import MappingProxyType, SimpleNamespace\n"
            f"THING = {made.format(number)}\ndef reward(completions):\n    return [THING for _ in completions]",
            space,
        )
        return code_fingerprint(space["reward"])

    assert of(1) == of(1) != of(5)


def test_what_cannot_be_compared_in_a_global_is_named():
    space = {"__name__": "somebodys", "HELD": {"lock": threading.Lock()}}
    exec("def reward(completions):\n    return [HELD for _ in completions]", space)
    with pytest.raises(UnknownStateError, match="the global 'HELD'"):
        code_fingerprint(space["reward"])


@pytest.mark.parametrize("imported", ["import own_helper\n", "", "from own_helper import k\n"])
def test_modules_of_the_users_own_count_with_their_files(imported, tmp_path, monkeypatch):
    call = "own_helper.k(c)" if imported == "import own_helper\n" else "k(c)"
    inside = "" if imported else "    from own_helper import k\n"
    (tmp_path / "my_reward.py").write_text(
        f"{imported}def reward(completions):\n{inside}    return [{call} for c in completions]\n"
    )
    found = []
    for body in ("return 1.0", "return 1.0", "return 2.0"):
        (tmp_path / "own_helper.py").write_text(f"def k(text):\n    {body}\n")
        found.append(fingerprint_in_a_process(tmp_path))
    assert found[0] == found[1] != found[2]


def test_what_one_reward_has_become_is_not_another():
    one = Judge(1)
    before = reward_fingerprint(one)
    one.limit = 2
    note_calls(one, before)
    assert reward_fingerprint(one) == before
    other = Judge(1)
    other.limit = 2
    assert reward_fingerprint(other) != before


@pytest.mark.parametrize(
    ("imported", "call", "changed"),
    [
        ("import own_helper", "own_helper.k(c)", "own_second.py"),
        ("import own_package.sub", "own_package.sub.k(c)", "own_package/sub.py"),
        ("from own_package import sub", "sub.k(c)", "own_package/second.py"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_the_users_own_modules_import_counts(imported, call, changed, inside, tmp_path):
    texts = {
        "own_helper.py": "from own_second import k\n",
        "own_second.py": "def k(text):\n    return 1.0\n",
        "own_package/__init__.py": "",
        "own_package/sub.py": "from .second import k\n",
        "own_package/second.py": "def k(text):\n    return 1.0\n",
        "my_reward.py": f"{'' if inside else imported}\ndef reward(completions):\n    {imported if inside else ''}\n"
        f"    return [{call} for c in completions]\n",
    }
    (tmp_path / "own_package").mkdir()
    found = []
    for more in ("", "", "# other\n"):
        for name, text in texts.items():
            (tmp_path / name).write_text(text + (more if name == changed else ""))
        found.append(fingerprint_in_a_process(tmp_path))
    assert found[0] == found[1] != found[2]


def fingerprint_in_a_process(folder):
    program = (
        "import sys\nfrom hf_recontrol.utils.code_fingerprints import code_fingerprint\n"
        "sys.dont_write_bytecode = True\nsys.path.insert(0, sys.argv[1])\n"
        "import my_reward\nprint(code_fingerprint(my_reward.reward))"
    )
    code, out, err = run_fresh(program, [folder], os.environ, timeout=120)
    assert code == 0, err
    return out.splitlines()[-1]


def test_a_logger_of_the_module_does_not_make_its_comments_count(tmp_path):
    text = (
        "import logging\nlog = logging.getLogger(__name__)\n"
        "def reward(completions):\n    log.info('x')\n    return [1.0]\n"
    )
    found = []
    for more in ("", "# other\n"):
        (tmp_path / "my_reward.py").write_text(text + more)
        found.append(fingerprint_in_a_process(tmp_path))
    assert found[0] == found[1]


def test_a_descriptor_of_the_user_s_own_counts_with_what_it_holds():
    class Weight:
        def __init__(self, value):
            self.value = value

        def __get__(self, owner, cls=None):
            return self.value

        def __set__(self, owner, value):
            raise AttributeError

    def of(value):
        class Scorer:
            weight = Weight(value)

            def __call__(self, completions):
                return [self.weight for _ in completions]

        return code_fingerprint(Scorer())

    assert of(1) == of(1) != of(5)
