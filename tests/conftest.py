"""Shared by all tests: no network, no noise that nobody asked for, and a tiny Llama."""

import gc
import logging
import os
import random
import subprocess

# Before huggingface_hub is imported, which reads it once. Tests with a server of their own run a fresh process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For every process that a test starts, too: beside other tests, threads that wait for one another take twice the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig

from .fresh import run_fresh
from .hub_server import TOKEN, Hub

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "hf_recontrol",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("hf_recontrol")

HIDDEN, LAYERS, VOCAB = 16, 3, 32


class _ErrorOnDeprecation(logging.Handler):
    """Transformers logs most of its deprecations; a log message of that kind is a failure, as a warning is."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(sign in message.lower() for sign in ("deprecated", "will be removed")):
            raise AssertionError(f"transformers deprecates something that was used: {message}")


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True, scope="session")
def _no_deprecated_use_of_transformers():
    handler = _ErrorOnDeprecation()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture
def recontrol_warnings() -> list[str]:
    """What hf_recontrol warned of so far. A test that asks for it says what it expects; any other must be quiet."""
    return _collector.messages


_collector = _Collector()
logging.getLogger("hf_recontrol").addHandler(_collector)


@pytest.fixture(autouse=True)
def _no_unexpected_warnings(request):
    _collector.messages.clear()
    yield
    expected = {"recontrol_warnings", "caplog"} & set(request.fixturenames)
    if _collector.messages and not expected:
        pytest.fail(f"hf_recontrol warned, and the test did not ask for it: {_collector.messages}")


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs) -> LlamaForCausalLM:
    """A random Llama so small that one token takes about a millisecond, with an end token that is never drawn."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        # Larger than the default, so that a tiny model has opinions for control to change.
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | kwargs))).to(dtype).eval()


def make_head(seed: int = 1, dtype: torch.dtype = torch.float32, **kwargs) -> ValueHead:
    """A random head, for the tiny Llama unless `hidden_size` says otherwise; its g and its b are not zero."""
    torch.manual_seed(seed)
    head = ValueHead(ValueHeadConfig(**({"hidden_size": HIDDEN, "head_sizes": [12]} | kwargs)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5)
        if head.config.static_vector:
            # Not of the numbers that other tensors are drawn from.
            head.static_vector.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return head.to(dtype)


def at(config: ValueHeadConfig) -> dict:
    """Settings that read the states which a head of this configuration reads, with directions if it has a g."""
    return {
        "hook_point": config.hook_point,
        "layer": config.layer,
        "directions": config.advantage_sizes is not None,
    }


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def head() -> ValueHead:
    return make_head()


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 13], [1, 7, 3, 2]])


# Strong enough to change what the tiny Llama says.
STRONG = ControlConfig(step_size=1.0, num_steps=10)


@pytest.fixture
def hub():
    with Hub().running() as hub:
        yield hub


@pytest.fixture
def run(tmp_path):
    """
    Runs Python in a fresh process, of the interpreter `python` if it is named, with an empty cache unless `home` names
    one; gives what it printed. The token is never in what it prints or logs.
    """

    def run(script, *args, endpoint, token=TOKEN, home="home", python=None, **environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        if token:
            variables["HF_TOKEN"] = token
        variables |= environment
        if python is None:
            code, out, err = run_fresh(script, args, variables, timeout=120)
        else:
            done = subprocess.run(
                [python, "-c", script, *args],
                env=variables,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        assert code == 0, err
        assert TOKEN not in out + err
        return out

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws does not depend on the tests before it, which differ from one machine to the next."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish():
    """What all the imports made is garbage to nobody: looking through it takes a quarter of a second each time."""
    gc.collect()
    gc.freeze()
