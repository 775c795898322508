"""A GPT-OSS-architecture model with the whole vocabulary, trained for minutes on the SYNTH sample.

No weights of a large teacher are at hand where the codecs are measured. A small model that has
read a part of the sample many times is as sure of most tokens of it as a good teacher is of new
text, and unsure of the others: the shape that decides how many bytes a distribution needs. It is
measured at several moments of its training, on what it has read and on what it has not.

    python -m benchmarks.codec_teacher OUT --seconds 120

Not run to its end on a GPU yet.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from vpmoe.config import load
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.spans import Span
from vpmoe.teachers.distribution import likeliest
from vpmoe.vocabulary import VOCAB_SIZE

KEPT = 512  # likeliest ids kept of each position
DRAWS = 64


def config(hidden: int, layers: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        sliding_window=128,
        max_position_embeddings=4_096,
        pad_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


@torch.no_grad()
def positions(
    model, dataset: Dataset, count: int, *, seed: int, limit: int | None = None
) -> dict[str, np.ndarray]:
    """Distributions at `count` trained labels: entropies, likeliest ids, draws, all in float64."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[torch.Tensor]] = {}
    have = 0
    for index in rng.permutation(limit or len(dataset)):
        document = dataset.conversation(int(index))
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        place = torch.from_numpy(rng.choice(trained, min(16, len(trained)), replace=False))
        tokens = torch.from_numpy(document.tokens[:-1].astype(np.int64))[None].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        logits = hidden[place.to(model.device)].float() @ model.lm_head.weight.float().T
        logprobs = logits.double().log_softmax(1)
        ids = likeliest(logits, KEPT)
        labels = torch.from_numpy(document.tokens.astype(np.int64))[place + 1].to(model.device)
        drawn = torch.multinomial(logprobs.exp(), DRAWS, replacement=True)
        here = {
            "entropy": -(logprobs.exp() * logprobs).sum(1),
            "squares": logprobs.exp().square().sum(1),
            "label_logprob": logprobs.gather(1, labels[:, None])[:, 0],
            "top_ids": ids.int(),
            "top_logprobs": logprobs.gather(1, ids).float(),
            "tail": torch.log1p(-logprobs.gather(1, ids).exp().sum(1)),
            "drawn_ids": drawn.int(),
            "drawn_logprobs": logprobs.gather(1, drawn).float(),
        }
        for name, value in here.items():
            found.setdefault(name, []).append(value.cpu())
        have += len(place)
        if have >= count:
            break
    return {name: torch.cat(parts)[:count].numpy() for name, parts in found.items()}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=1_000)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--data", type=Path, default=Path("data/tiny-real"))
    parser.add_argument("--save", type=Path, help="folder for the trained checkpoint")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    settings = load(Path("configs/data/tiny-real.toml"), DataConfig, [f"output={args.data}"])
    if not (args.data / "manifest.json").exists():
        build_dataset(settings)
    train, valid = Dataset(args.data, "train"), Dataset(args.data, "valid")
    torch.manual_seed(0)
    model = GptOssForCausalLM(config(args.hidden, args.layers)).to(args.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=args.device == "cuda"
    )
    known = frozenset(train.sample_ids[: args.documents])
    loader = PackedLoader(train, seq_len=1_024, seed=0, only=known)
    args.out.mkdir(parents=True, exist_ok=True)
    started, step, log, marks = time.perf_counter(), 0, [], [0.4, 0.6, 0.8, 1.0]
    while marks:
        used = (time.perf_counter() - started) / args.seconds
        scale = min(1.0, (step + 1) / 50) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * min(used, 1)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        batch = loader.batch(step * args.rows, args.rows).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            hidden = model.model(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
            ).last_hidden_state
            wanted = batch.document_ids >= 0
            logits = hidden[wanted] @ model.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            log.append((step, round(time.perf_counter() - started, 1), round(loss.item(), 3)))
            print(*log[-1], flush=True)
        if used >= marks[0]:
            name = f"after_{round(marks.pop(0) * 100)}"
            model.eval()
            for split, dataset, limit in (("train", train, args.documents), ("valid", valid, None)):
                made = positions(model, dataset, args.positions, seed=1, limit=limit)
                np.savez_compressed(args.out / f"{name}_{split}.npz", **made)
                print(name, split, {k: float(made[k].mean()) for k in ("entropy", "label_logprob")})
            model.train()
    if args.save:
        model.to(torch.bfloat16).save_pretrained(args.save)
    about = {
        "step": step, "seconds": args.seconds, "hidden": args.hidden, "layers": args.layers,
        "parameters": sum(p.numel() for p in model.parameters()), "loss": log,
    }  # fmt: skip
    (args.out / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
