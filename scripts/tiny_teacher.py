"""Write a tiny random GPT-OSS checkpoint with the whole o200k vocabulary, as vLLM serves it.

.venv/bin/python scripts/tiny_teacher.py FOLDER [SEED]
"""

import sys
from pathlib import Path


def write(folder: Path, seed: int = 0) -> Path:
    """Two layers, four experts, 104 MB in bfloat16; the same bytes for the same seed."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from vpmoe.data.harmony import RenderConfig
    from vpmoe.export.tokenizer import build_tokenizer
    from vpmoe.vocabulary import END_OF_TEXT, RETURN, VOCAB_SIZE

    config = GptOssConfig(  # rope as in the original: vLLM knows no other for this model
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
        initializer_range=0.05,
        pad_token_id=END_OF_TEXT,
        eos_token_id=RETURN,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GptOssForCausalLM(config).to(torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight.mul_(3)  # surer than chance: the likeliest ids hold some mass
    model.save_pretrained(folder)
    build_tokenizer(RenderConfig()).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
