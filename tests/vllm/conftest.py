"""A tiny Llama and its heads on the disk, under our wrapper and on vLLM. Without vLLM all of this is skipped."""

import os

# Read once, when vLLM is imported. One process: what is in it can be looked at.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead

from ..conftest import make_llama
from ..tiny_models import tiny_head
from ..tiny_tokenizer import tiny_tokenizer

collect_ignore_glob = []
try:
    import vllm
except ImportError:
    collect_ignore_glob = ["test_*.py"]

# Strong enough to change what the tiny Llama says.
ASCENT = ControlConfig(step_size=1.0, num_steps=10)
POLITE = ControlConfig(method="advantage", step_size=1.5)


class Served(NamedTuple):
    """Folders of a base and of its heads."""

    base: str
    heads: dict[str, str]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # What vLLM looks at of torch when it is imported.
            item.add_marker(pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning"))


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    """A tiny Llama with the heads `default` (an ascent) and `polite` (the advantage edit)."""
    folder: Path = tmp_path_factory.mktemp("served")
    model = make_llama(vocab_size=97, hidden_size=64, max_position_embeddings=256)
    model.save_pretrained(folder / "base")
    tiny_tokenizer(chat=True).save_pretrained(folder / "base")
    heads = {}
    for seed, (name, control) in enumerate({"default": ASCENT, "polite": POLITE}.items()):
        head = tiny_head(model, "lm_head", control=control, seed=seed)
        head.save_pretrained(folder / name)
        heads[name] = str(folder / name)
    return Served(str(folder / "base"), heads)


@pytest.fixture(scope="session")
def wrapped(served) -> ReControlForCausalLM:
    """The same under our wrapper: what vLLM must say, too."""
    model = ReControlForCausalLM.from_pretrained(served.base, value_head=served.heads["default"], dtype=torch.float32)
    model.add_value_head("polite", ValueHead.from_pretrained(served.heads["polite"]))
    return model


@pytest.fixture(scope="session")
def start(served):
    """Starts an engine of the tiny Llama, with changed arguments; one of each at a time."""
    from vllm import LLM

    from hf_recontrol.integrations.vllm.arguments import recontrol_engine_args

    engines = {}

    def start(heads=None, control=None, **changes) -> "vllm.LLM":
        key = repr((heads, control, sorted(changes.items())))
        if key not in engines:
            engines.clear()
            gc.collect()
            arguments = recontrol_engine_args(served.base, heads or served.heads, control, served_model_name="tiny")
            settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 32, "enforce_eager": True}
            engines[key] = LLM(**arguments, **(settings | changes))
        return engines[key]

    return start


@pytest.fixture
def engine(start) -> "vllm.LLM":
    """An engine of the tiny Llama with both heads."""
    return start()


@pytest.fixture
def says(wrapped):
    """What our wrapper says to a prompt of token ids, greedily."""

    def says(prompt, control=None, value_heads=None, tokens=8) -> list[int]:
        ids = torch.tensor([prompt])
        out = wrapped.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            control=control,
            value_heads=value_heads,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    return says
