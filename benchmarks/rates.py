"""First steps of the whole student at several learning rates, with small and with large embeddings.

python -m benchmarks.rates --data data/one-gpu      one GPU of 140 GB, three minutes

`--variants 4` runs one again and keeps the others' rows.

Each variant starts from the same seed, reads the same rows through the trainer's own path and
follows the same schedule; what differs is in `VARIANTS`.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, free, kept_rows, write_results
from benchmarks.whole_model import trainee

KEYS = ("embedding_std", "lr", "adam_lr", "embed_lr_mult", "router_lr_mult")
# embedding_std, and the optimizer's lr, adam_lr, embed_lr_mult, router_lr_mult
VARIANTS: tuple[tuple[float, ...], ...] = (
    (1.0, 0.002, 5e-4, 10, 0.2),
    (1.0, 0.005, 1e-3, 10, 0.1),
    (1.0, 0.01, 1e-3, 10, 0.1),
    (0.02, 0.005, 2e-3, 20, 0.1),
    (1.0, 0.02, 2e-3, 10, 0.05),
)
KEPT = {
    "reasoning": "train/loss/reasoning",
    "final": "train/loss/final",
    "grad_norm": "grad_norm/all",
    "dead_experts": "router/dead_experts",
    "max_load_pct": "router/max_load_pct",
    "cv_pct": "router/cv_pct_mean",
}


def train(args: argparse.Namespace, variant: tuple[float, ...]) -> dict[str, Any]:
    """Columns of numbers, one entry a step."""
    settings = dict(zip(KEYS, variant, strict=True))
    changes = {
        "student.embedding_std": settings["embedding_std"],
        "schedule.warmup": 0.1,
        "budget.steps": args.steps,
        **{f"optimizer.{key}": float(settings[key]) for key in KEYS[1:]},
    }
    columns: dict[str, list[float]] = {name: [] for name in KEPT}
    with trainee(args, **changes) as it:
        for _ in range(args.steps):
            it.step(args.tokens, args.tokens)
            for name, key in KEPT.items():
                columns[name].append(round(float(it.metrics[key]), 4))
    row = {**settings, "tokens_per_step": args.tokens, **columns}
    print({**settings, **{name: values[-1] for name, values in columns.items()}}, flush=True)
    return row


def main() -> None:
    """Run all variants; write what was seen after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a built dataset, rows of 2,048")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)))
    parser.add_argument("--out", type=Path, default=RESULTS / "rates.json")
    args = parser.parse_args()
    rows = kept_rows(args.out, layers=args.layers)
    for number in args.variants:
        rows = [row for row in rows if row["variant"] != number]
        rows.append({"variant": number, **train(args, VARIANTS[number])})
        rows.sort(key=lambda row: row["variant"])
        write_results(args.out, rows, command="python -m benchmarks.rates", layers=args.layers)
        free()


if __name__ == "__main__":
    main()
