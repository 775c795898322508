"""Recreates the demo's teacher: a small GPT-OSS model trained on clean problems only.

Step 1, where vpmoe is installed (half a minute on one core):

    python scripts/make_teacher_table.py --out .demo/teacher-table.npz

Step 2, on a CPU or one GPU (needs only torch, numpy, transformers and safetensors). Several
variants train side by side; each leaves a model folder and a JSON with its curve and accuracy:

    python scripts/train_demo_teacher.py --table .demo/teacher-table.npz \
        --out .demo/teachers --variants small,medium --seconds 300

The chosen folder is what ships. Its weights are float16, its embedding rows are the o200k ids
listed in `vocab_ids.json` beside them.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from demo_teacher_model import VARIANTS, Masks, Variant, build_model, logits_of
from safetensors.torch import save_file
from torch.nn import functional as F


class Table:
    """The arrays of step 1 on a device, padded to one width."""

    def __init__(self, path: Path, device) -> None:
        with np.load(path) as arrays:
            data = {name: arrays[name] for name in arrays.files}
        self.vocab_ids = data["vocab_ids"]
        self.families = [str(name) for name in data["families"]]
        self.pad_row = int(data["pad_row"])
        self.stop_row = int(data["stop_row"])
        self.message_row = int(data["message_row"])
        self.width = max(data["train_tokens"].shape[1], data["held_out_tokens"].shape[1])

        def padded(tokens):
            missing = self.width - tokens.shape[1]
            fill = self.pad_row
            return np.pad(tokens, ((0, 0), (0, missing)), constant_values=fill)

        for part in ("train", "held_out"):
            tokens = torch.from_numpy(padded(data[f"{part}_tokens"])).to(device)
            setattr(self, part, tokens)
            for name in ("prompts", "lengths", "families"):
                values = torch.from_numpy(data[f"{part}_{name}"].astype(np.int64)).to(device)
                setattr(self, f"{part}_{name}", values)


def loss_of(model, tokens, trained, masks: Masks, variant: Variant):
    """Cross-entropy over assistant labels plus a pull towards equal use of the experts."""
    logits = logits_of(model, tokens, masks)[:, :-1]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        tokens[:, 1:].reshape(-1),
        reduction="none",
        label_smoothing=variant.label_smoothing,
    )
    keep = trained[:, 1:].reshape(-1)
    loss = (losses * keep).sum() / keep.sum()
    shares = torch.stack([layer.mlp.experts.mean_shares for layer in model.model.layers])
    return loss + variant.balance * (variant.experts * shares.square().sum(dim=1) - 1).mean()


class Trainer:
    """Model, optimizer and one training step, which a CUDA graph replays where asked for."""

    def __init__(self, variant: Variant, table: Table, device, *, graph: bool) -> None:
        self.variant, self.table = variant, table
        self.model = build_model(variant, table, device)
        self.masks = Masks(table.width, variant.window, device)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": variant.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=torch.tensor(variant.lr, device=device),
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )
        self.tokens = torch.zeros((variant.batch, table.width), dtype=torch.int64, device=device)
        self.trained = torch.zeros((variant.batch, table.width), device=device)
        self.loss = torch.zeros((), device=device)
        self.places = torch.arange(table.width, device=device)[None]
        self.generator = torch.Generator(device=device).manual_seed(variant.seed)
        self.graph = self._captured() if graph else None

    def _update(self) -> None:
        loss = loss_of(self.model, self.tokens, self.trained, self.masks, self.variant)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)

    def _captured(self):
        self._fill()
        self._set_lr(0.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update()
        return graph

    def _fill(self) -> None:
        count = len(self.table.train)
        rows = torch.randint(
            count, (self.variant.batch,), generator=self.generator, device=self.tokens.device
        )
        self.tokens.copy_(self.table.train[rows])
        first = self.table.train_prompts[rows][:, None] - 2  # the header's own labels included
        last = self.table.train_lengths[rows][:, None]
        self.trained.copy_((self.places >= first) & (self.places < last))

    def step(self, lr: float) -> None:
        self._set_lr(lr)
        self._fill()
        if self.graph is None:
            self._update()
        else:
            self.graph.replay()


def rate(progress: float, variant: Variant) -> float:
    """Linear warm-up, then a cosine to zero."""
    if progress < variant.warmup:
        return variant.lr * (progress + 1e-3) / variant.warmup
    rest = (progress - variant.warmup) / (1 - variant.warmup)
    return variant.lr * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def complete(model, table: Table, masks: Masks, *, temperature: float, per_family: int):
    """Held-out completions, greedy at temperature 0: (tokens, chosen rows of the table)."""
    chosen = torch.cat(
        [
            (table.held_out_families == index).nonzero()[:per_family, 0]
            for index in range(len(table.families))
        ]
    )
    reference = table.held_out[chosen].long()
    prompts = table.held_out_prompts[chosen][:, None]
    places = torch.arange(table.width, device=reference.device)[None]
    tokens = torch.where(places < prompts, reference, table.pad_row)
    done = torch.zeros(len(chosen), dtype=torch.bool, device=tokens.device)
    generator = torch.Generator(device=tokens.device).manual_seed(0)
    for place in range(int(prompts.min()), table.width):
        logits = logits_of(model, tokens, masks)[:, place - 1]
        if temperature:
            odds = torch.softmax(logits / temperature, dim=-1)
            picked = torch.multinomial(odds, 1, generator=generator)[:, 0]
        else:
            picked = logits.argmax(dim=-1)
        writing = (place >= prompts[:, 0]) & ~done
        tokens[:, place] = torch.where(writing, picked, tokens[:, place])
        done |= writing & (picked == table.stop_row)
    return tokens, chosen


def answer_of(row: list[int], table: Table) -> list[int] | None:
    """The final message's rows, None where the completion has no such message."""
    message, stop = table.message_row, table.stop_row
    if row.count(message) < 3 or stop not in row:
        return None
    third = [place for place, token in enumerate(row) if token == message][2]
    return row[third + 1 : row.index(stop)]


def evaluate(trainer: Trainer, *, temperature: float = 0.0, per_family: int = 100) -> dict:
    """Exact match of the answers by family and in total."""
    table = trainer.table
    with torch.no_grad():
        tokens, chosen = complete(
            trainer.model, table, trainer.masks, temperature=temperature, per_family=per_family
        )
    hits: dict[str, list[bool]] = {name: [] for name in table.families}
    families = table.held_out_families[chosen].tolist()
    for family, row, right in zip(
        families, tokens.tolist(), table.held_out[chosen].tolist(), strict=True
    ):
        answer = answer_of(row, table)
        hits[table.families[family]].append(
            answer is not None and answer == answer_of(right, table)
        )
    report = {name: float(np.mean(found)) for name, found in hits.items()}
    return {"total": float(np.mean(list(report.values()))), **report}


def save(trainer: Trainer, folder: Path) -> None:
    """Write the float16 model folder, and give the trainer the rounded weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().half().cpu() for n, p in trainer.model.state_dict().items()}
    save_file(
        {n: p.contiguous() for n, p in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = trainer.model.config.to_diff_dict()
    config |= {"architectures": ["GptOssForCausalLM"], "dtype": "float16", "use_cache": True}
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = [int(token) for token in trainer.table.vocab_ids]
    (folder / "vocab_ids.json").write_text(json.dumps(ids) + "\n")
    trainer.model.load_state_dict({n: p.float() for n, p in state.items()})
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_one(name: str, args: argparse.Namespace) -> None:
    """Train one variant to the end of its steps or seconds, whichever comes first."""
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    variant = replace(VARIANTS[name], **({"batch": args.batch} if args.batch else {}))
    table = Table(args.table, device)
    trainer = Trainer(variant, table, device, graph=args.graph)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{name}: {count:,} parameters, width {table.width}", flush=True)
    began, step, curve, next_look = time.time(), 0, [], 0.02
    tokens_per_step = float(table.train_lengths.float().mean()) * variant.batch
    steps, progress = variant.steps or args.steps, 0.0
    while progress < 1.0:
        trainer.step(rate(progress, variant))
        step += 1
        if step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        progress = max(step / steps, (time.time() - began) / args.seconds)
        if progress >= next_look:
            next_look = 1.3 * progress if progress < 0.4 else progress + 0.15
            point = {"step": step, "tokens": int(step * tokens_per_step)}
            point |= {"loss": float(trainer.loss), **evaluate(trainer, per_family=args.look)}
            curve.append(point)
            shown = " ".join(f"{k}={v:.3f}" for k, v in point.items() if isinstance(v, float))
            print(f"{name}: step {step} {time.time() - began:.0f}s {shown}", flush=True)
    seconds = time.time() - began
    folder = args.out / name
    save(trainer, folder)
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    result = {
        "variant": name,
        "settings": asdict(variant),
        "parameters": count,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "steps": step,
        "tokens": int(step * tokens_per_step),
        "seconds": round(seconds, 1),
        "held_out_exact_match": evaluate(trainer, per_family=args.final_look),
        "held_out_exact_match_sampled": evaluate(
            trainer, temperature=1.0, per_family=args.final_look
        ),
        "problems_per_family": args.final_look,
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "graph": trainer.graph is not None,
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({k: v for k, v in result.items() if k not in ("curve", "settings")}), flush=True
    )


def train_all(args: argparse.Namespace) -> None:
    """One process per variant; a variant whose CUDA graph fails is started again without."""
    names = args.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"unknown variants {unknown}; known: {', '.join(VARIANTS)}")
    deadline = time.time() + args.seconds
    running = {name: _start(name, args, graph=args.graph) for name in names}
    while running:
        time.sleep(1)
        for name, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[name]
            left = deadline - time.time()
            if code and args.graph and left > 0.5 * args.seconds:
                print(f"{name}: failed with a CUDA graph ({code}), again without", flush=True)
                args.seconds = left
                running[name] = _start(name, args, graph=False)
            elif code:
                print(f"{name}: failed ({code})", flush=True)


def _start(name: str, args: argparse.Namespace, *, graph: bool) -> subprocess.Popen:
    command = [sys.executable, __file__, "--one", name, "--device", args.device]
    command += ["--table", str(args.table), "--out", str(args.out), "--steps", str(args.steps)]
    command += ["--seconds", str(args.seconds), "--look", str(args.look)]
    command += ["--final-look", str(args.final_look)]
    command += ["--batch", str(args.batch)] if args.batch else []
    return subprocess.Popen(command + (["--graph"] if graph else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=Path(".demo/teacher-table.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo/teachers"))
    parser.add_argument("--variants", default="small", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true", help="replay steps as a CUDA graph")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--batch", type=int, default=0, help="0: the variant's own")
    parser.add_argument("--look", type=int, default=50, help="problems per family on the way")
    parser.add_argument("--final-look", type=int, default=500)
    args = parser.parse_args()
    if args.one:
        train_one(args.one, args)
    else:
        train_all(args)


if __name__ == "__main__":
    main()
