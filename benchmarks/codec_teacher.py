"""A GPT-OSS-architecture model with the whole vocabulary, trained for minutes on the SYNTH sample.

    python -m benchmarks.codec_teacher OUT --save FOLDER --seconds 220 --every 150
    python -m benchmarks.target_codecs --captured OUT/*.npz --data ... --demo-data ...

No weights of a large teacher are at hand where the codecs are measured. This one reads the sample's
train split over and over. Where it does best on held-out text it is saved: the teacher of
benchmarks/distillation.py. At the end it is as sure of most of what it has read as a good teacher
is of new text. Distributions are recorded at both moments, on text that it has read and on text
that it has not. Weights are running means over steps, which stand in for a learning rate that ends.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import recorded
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

from vpmoe.batch import Batch
from vpmoe.config import load
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.spans import Span
from vpmoe.vocabulary import VOCAB_SIZE

WINDOW = 128
DROPOUT = 0.1  # of embeddings and of final states, while training
PEAK_LR = 1e-3
MEAN_STEPS = 50  # steps that the running mean of the weights looks back on
PER_DOCUMENT = 16  # places of one conversation: those of one are alike
LABELS_AT_ONCE = 1_024


def config(hidden: int, layers: int) -> GptOssConfig:
    """A small model of the architecture; plain implementations, which train anywhere."""
    found = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        sliding_window=WINDOW,
        max_position_embeddings=4_096,
        pad_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    found._attn_implementation = "eager"
    found._experts_implementation = "eager"
    return found


def masks(document_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What each kind of layer may not see: later tokens, other documents, beyond the window."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device)
    back = place[:, None] - place
    seen = (document_ids[:, :, None] == document_ids[:, None, :]) & (back >= 0)
    lowest = torch.finfo(dtype).min
    return {
        name: torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, lowest)[:, None]
        for name, allowed in (
            ("full_attention", seen),
            ("sliding_attention", seen & (back < WINDOW)),
        )
    }


def states(model: Any, batch: Batch) -> torch.Tensor:
    """Final normed states of packed rows, documents apart, in bfloat16 on a GPU."""
    on_gpu = batch.tokens.is_cuda
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=on_gpu):
        embedded = F.dropout(model.model.embed_tokens(batch.tokens), DROPOUT, model.training)
        hidden = model.model(
            inputs_embeds=embedded,
            attention_mask=masks(batch.document_ids, torch.bfloat16 if on_gpu else torch.float32),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        return F.dropout(hidden, DROPOUT, model.training)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of all labels of documents, prompts included."""
    wanted = batch.document_ids >= 0
    hidden = states(model, batch)[wanted]
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
        logits = hidden @ model.lm_head.weight.T
    return F.cross_entropy(logits.float(), batch.labels[wanted])


@torch.no_grad()
def held_out(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Mean loss and entropy at the trained labels, nats."""
    loss, entropy, count = 0.0, 0.0, 0
    for batch in batches:
        wanted = batch.span_ids != Span.IGNORE
        labels = batch.labels[wanted]
        pairs = zip(
            states(model, batch)[wanted].split(LABELS_AT_ONCE),
            labels.split(LABELS_AT_ONCE),
            strict=True,
        )
        for hidden, label in pairs:
            logprobs = (hidden.float() @ model.lm_head.weight.float().T).log_softmax(1)
            loss += float(F.nll_loss(logprobs, label, reduction="sum"))
            entropy -= float((logprobs.exp() * logprobs).sum())
        count += len(labels)
    return {"loss": round(loss / count, 4), "entropy": round(entropy / count, 4)}


@torch.no_grad()
def positions(model: Any, dataset: Dataset, count: int) -> Any:
    """Whole distributions at `count` trained labels of random documents."""
    rng, found, have = np.random.default_rng(1), [], 0
    for index in rng.permutation(len(dataset)):
        document = dataset.conversation(int(index))
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        place = rng.choice(trained, min(PER_DOCUMENT, len(trained), count - have), replace=False)
        tokens = torch.from_numpy(document.tokens.astype(np.int64))[None].to(model.device)
        here = torch.arange(tokens.shape[1], device=model.device)[None]
        zeros = torch.zeros_like(tokens)
        batch = Batch(tokens, tokens, zeros.to(torch.uint8), zeros, here)
        found.append(states(model, batch)[0, torch.from_numpy(place).to(model.device)])
        have += len(place)
        if have >= count:
            break
    return recorded.recorded(torch.cat(found), model.lm_head.weight)


class Training:
    """The model, the running mean of its weights, and the best of these so far.

    Args:
        args: Of the command line.
        train: Rows to learn from.
        valid: Batches that say when the mean is at its best.
    """

    def __init__(self, args: argparse.Namespace, train: PackedLoader, valid: list[Batch]) -> None:
        torch.manual_seed(0)
        self.args, self.train, self.valid = args, train, valid
        self.model: Any = GptOssForCausalLM(config(args.hidden, args.layers)).to(args.device)
        self.mean: Any = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=PEAK_LR,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=args.device == "cuda",
        )
        self.steps, self.tokens, self.log = 0, 0, []
        self.best: dict[str, Any] = {"loss": math.inf}
        self.best_weights: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Train until the time is over; the running mean is judged now and then."""
        started = time.perf_counter()
        self.model.train()
        while (used := (time.perf_counter() - started) / self.args.seconds) < 1:
            loss = self.step(used)
            if self.steps % self.args.every == 0:
                self.judge(loss.item(), time.perf_counter() - started)
        self.judge(None, time.perf_counter() - started)

    def step(self, used: float) -> torch.Tensor:
        """One update; the learning rate falls with the share of the time that is used."""
        scale = min(1.0, (self.steps + 1) / 50) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * used))
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_LR * scale
        rows = self.args.rows
        batch = self.train.batch(self.steps * rows, rows)
        self.tokens += batch.num_tokens
        loss = loss_of(self.model, batch.to(self.args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        share = max(1 / MEAN_STEPS, 1 / self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), share)
        return loss

    def judge(self, loss: float | None, seconds: float) -> None:
        """Measure the running mean on held-out text, and keep it if it is the best so far."""
        found = held_out(self.mean, self.valid)
        row = {"step": self.steps, "tokens": self.tokens, "seconds": round(seconds, 1)}
        self.log.append(row | {"train_loss": loss and round(loss, 3), **found})
        print(json.dumps(self.log[-1]), flush=True)
        if found["loss"] < self.best["loss"]:
            self.best = row | found
            self.best_weights = {k: v.clone() for k, v in self.mean.state_dict().items()}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--save", type=Path, help="folder for the best checkpoint")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--every", type=int, default=60, help="steps between held-out losses")
    parser.add_argument("--valid-rows", type=int, default=0, help="held-out rows; 0: all")
    parser.add_argument("--places", type=int, default=512)
    parser.add_argument("--data", type=Path, default=Path("data/tiny-real"))
    parser.add_argument("--input", default="", help="the SYNTH sample, if the config's is not it")
    return parser.parse_args()


def dataset(folder: Path, sample: str) -> None:
    """Build the rows unless they are there."""
    if not (folder / "manifest.json").exists():
        words = [f"output={folder}", *([f"input={sample}"] if sample else [])]
        build_dataset(load(Path("configs/data/tiny-real.toml"), DataConfig, words))


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    dataset(args.data, args.input)
    train, valid = Dataset(args.data, "train"), Dataset(args.data, "valid")
    loader = PackedLoader(valid, seq_len=1_024, seed=0)
    count = args.valid_rows or loader.rows_in_epoch(0)
    rows = loader.batch(0, count).to(args.device)
    batches = [rows.rows(i, min(i + args.rows, count)) for i in range(0, count, args.rows)]
    training = Training(args, PackedLoader(train, seq_len=1_024, seed=0), batches)
    training.run()
    model, panels = training.mean, {}
    panels["read_many_times"] = positions(model, train, args.places)
    model.load_state_dict(training.best_weights)
    panels["read"] = positions(model, train, args.places)
    panels["held_out"] = positions(model, valid, args.places)
    for name, reference in panels.items():
        recorded.save(args.out / f"{name}.npz", reference)
    about = {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hidden": args.hidden,
        "layers": args.layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "documents": len(train),
        "best": training.best,
        "entropy_nats": {name: float(found.entropy.mean()) for name, found in panels.items()},
        "log": training.log,
    }
    (args.out / "codec-teacher.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about["best"] | about["entropy_nats"]), flush=True)
    if args.save:
        model.to(torch.bfloat16).save_pretrained(args.save)


if __name__ == "__main__":
    main()
