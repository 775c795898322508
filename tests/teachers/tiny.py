"""Small random GPT-OSS checkpoints, written to disk as transformers does."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vpmoe.vocabulary import ANALYSIS, ASSISTANT, FINAL, SPECIAL_TOKENS, SYSTEM, USER, VOCAB_SIZE

WORDS = range(1_000, 1_180)
SUBSET = sorted({*SPECIAL_TOKENS.values(), *WORDS, ANALYSIS, ASSISTANT, FINAL, SYSTEM, USER})


def tiny_config(vocab_size: int, **changes):
    from transformers import GptOssConfig

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "max_position_embeddings": 4_096,
        "pad_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,  # wide, so that log-probs differ by nats
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    return GptOssConfig(**(settings | changes))


def tiny_model(vocab_size: int, *, seed: int = 0, **changes):
    from transformers import GptOssForCausalLM

    torch.manual_seed(seed)
    return GptOssForCausalLM(tiny_config(vocab_size, **changes)).eval()


def write_teacher(folder: Path, ids: list[int] | None = SUBSET, *, seed: int = 0, **changes) -> str:
    """A checkpoint folder; `ids` None keeps the whole vocabulary."""
    model = tiny_model(VOCAB_SIZE if ids is None else len(ids), seed=seed, **changes)
    model.save_pretrained(folder)
    if ids is not None:
        (folder / "vocab_ids.json").write_text(json.dumps(ids))
    return str(folder)


def random_sequences(lengths, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(SUBSET, size=n).astype(np.int32) for n in lengths]


def run_and_kill(work: Callable[[], object], log: Path, rng: random.Random) -> bool:
    """Run `work` in a process of its own and kill it a random while after its log has grown.

    Returns:
        Whether the process was still at work when SIGKILL came.
    """
    size = log.stat().st_size if log.exists() else 0
    lines = rng.randint(0, 3)
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    while lines and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if log.exists() and log.read_bytes()[size:].count(b"\n") >= lines:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
