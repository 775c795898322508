"""What each codec keeps for how many bytes, and how fast it packs and unpacks on one CPU core.

    python -m benchmarks.target_codecs --data data/tiny-real --demo-data runs/demo/data

Distributions: the demo teacher's; four synthetic shapes; an interpolated n-gram model of the SYNTH
sample over all 201,088 ids, on text that it has counted and on text that it has not; with
--captured, what benchmarks.codec_teacher wrote of a network. Ids are ranked by the labels of the
train split. For each teacher `adaptive` is also set so that its error is DistillKit's. The GPU's
rates were measured apart (benchmarks.codec_rates) and are carried over from the file that is
replaced.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from benchmarks.common import REPOSITORY, RESULTS

from vpmoe.config import load
from vpmoe.data.dataset import Dataset
from vpmoe.evals.report.charts_targets import draw_frontiers
from vpmoe.spans import Span
from vpmoe.stages.label_ranking import label_counts, label_ranking
from vpmoe.stages.plan_targets import plan_targets
from vpmoe.stages.score import ScoreConfig
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import Tail
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig
from vpmoe.teachers.frontier import (
    GRID,
    KEPT,
    RECOMMENDED,
    Point,
    Reference,
    joined,
    kl,
    measure,
    reference_of,
    squared_error,
)
from vpmoe.vocabulary import VOCAB_SIZE

ALL_IDS = torch.arange(VOCAB_SIZE)
ORDER = 4
TAILS: tuple[tuple[Tail, str], ...] = (("even", "adaptive"), ("prior", "adaptive_prior"))


def synthetic(counts: torch.Tensor | None = None) -> Reference:
    """Power laws 1.3 and 2, a confident shape, and a choice between two.

    Args:
        counts: Of the labels: the ids of each place are drawn by them, the likeliest first; if
            absent, every order of the ids is as good as another.
    """
    rank = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    tail = rank**-1.5
    shapes = [rank**-1.3, rank**-2.0]
    for head in (torch.tensor([0.97]), torch.tensor([0.49, 0.49])):
        rest = tail[len(head) :] / tail[len(head) :].sum() * (1 - float(head.sum()))
        shapes.append(torch.cat([head.double(), rest]))
    rng = torch.Generator().manual_seed(0)
    rows = []
    for shape in shapes:
        for _ in range(8):
            logprobs = (shape / shape.sum()).log()
            if counts is None:
                rows.append(logprobs[torch.randperm(VOCAB_SIZE, generator=rng)])
                continue
            chances = torch.rand(VOCAB_SIZE, generator=rng, dtype=torch.float64)
            keys = (counts + 0.1).log() - (-chances.log()).log()  # Gumbel: drawn one by one
            order = keys.argsort(descending=True)
            rows.append(torch.empty_like(logprobs).scatter_(0, order, logprobs))
    return reference_of(torch.stack(rows), ALL_IDS)


class NGrams:
    """Witten-Bell interpolation of orders 1 to 4 over a uniform distribution."""

    def __init__(self, dataset: Dataset) -> None:
        self.counts: list[dict] = [defaultdict(Counter) for _ in range(ORDER)]
        for index in range(len(dataset)):
            tokens = dataset.tokens(index).tolist()
            for n in range(ORDER):
                table = self.counts[n]
                for place in range(n, len(tokens)):
                    table[tuple(tokens[place - n : place])][tokens[place]] += 1

    def logprobs(self, before: list[int]) -> torch.Tensor:
        p = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
        for n in range(ORDER):
            found = self.counts[n].get(tuple(before[len(before) - n :]))
            if found:
                ids, times = np.array(list(found)), np.array(list(found.values()), dtype=float)
                p *= len(ids) / (times.sum() + len(ids))
                p[ids] += times / (times.sum() + len(ids))
        return torch.from_numpy(np.log(p / p.sum()))


def n_gram(model: NGrams, dataset: Dataset, places: int) -> Reference:
    rng, parts, rows = np.random.default_rng(0), [], []
    torch.manual_seed(0)
    for index in rng.permutation(len(dataset))[: places // 8]:
        document = dataset.conversation(int(index))
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        for place in rng.choice(trained, min(8, len(trained)), replace=False):
            rows.append(model.logprobs(document.tokens[: place + 1].tolist()))
        if len(rows) >= 32:
            parts.append(reference_of(torch.stack(rows), ALL_IDS))
            rows = []
    return joined(parts)


def captured(path: Path) -> Reference:
    """What benchmarks.codec_teacher kept of a network, in float64 but for the values themselves."""
    held = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    return Reference(
        entropy=held["entropy"].double(),
        squares=held["squares"].double(),
        ids=held["top_ids"].long(),
        logprobs=held["top_logprobs"].double(),
        drawn_ids=held["drawn_ids"].long()[:, :50],
        drawn_logprobs=held["drawn_logprobs"].double()[:, :50],
        vocab=VOCAB_SIZE,
        rest_ids=held["rest_ids"].long(),
    )


def at_the_error_of(
    points: list[Point],
    name: str,
    reference: Reference,
    ranking: Ranking,
    tail: Tail,
) -> dict | None:
    """`adaptive` with the `worth_nats` whose error is that of another codec, by bisection."""
    other = next((point for point in points if point.name == name), None)
    if other is None or other.kl_nats is None:
        return None

    def tried(worth: float) -> tuple[Point, float]:
        config = AdaptiveConfig(worth_nats=worth, tail=tail)
        (found,) = measure(reference, [("adaptive", "", config)], ranking=ranking)
        assert found.kl_nats is not None
        return found, found.kl_nats

    low, high = 1e-4, 1.0
    for _ in range(14):
        worth = (low * high) ** 0.5
        low, high = (worth, high) if tried(worth)[1] <= other.kl_nats else (low, worth)
    found, error = tried(low)
    return {
        "worth_nats": round(low, 6), "kl_nats": round(error, 6),
        "bytes_per_token": round(found.bytes_per_token, 2), "entries": round(found.entries, 2),
        "gradient_error": round(found.gradient_error, 6), "its_kl_nats": round(other.kl_nats, 6),
        "its_bytes_per_token": round(other.bytes_per_token, 2),
        "its_gradient_error": round(other.gradient_error, 6),
    }  # fmt: skip


def beside_a_prior(reference: Reference, ranking: Ranking) -> dict:
    """What other codecs' errors would be if they, too, shared the tail by how often ids are labels.

    Their files do not say so; whoever reads them could.
    """
    found, prior = {}, ranking.prior(reference.vocab, torch.device("cpu"))
    for _, name, config in GRID:
        codec = config.build()
        if codec.needs != "top" or config.kind == "adaptive" or codec.asked > KEPT:
            continue
        entries, places = reference.top(codec.asked), torch.tensor([len(reference)])
        columns = {n: c.data for n, c in codec.encode(entries, places).items()}
        rebuilt = codec.decode(columns, places)
        found[name] = {
            "kl_nats": round(float(kl(reference, rebuilt, prior).mean()), 6),
            "gradient_error": round(
                float(squared_error(reference, rebuilt, prior).mean().sqrt()), 6
            ),
        }
    return found


def rates(reference: Reference, ranking: Ranking) -> list[dict]:
    """Places a second of CPU time, one thread."""
    out = []
    for config in (
        TopKConfig(),
        SetCodedConfig(),
        AdaptiveConfig(worth_nats=1.3e-2),
        AdaptiveConfig(worth_nats=7.5e-3),
        AdaptiveConfig(),
        AdaptiveConfig(worth_nats=1e-3),
        AdaptiveConfig(worth_nats=3e-2, tail="prior"),
        AdaptiveConfig(worth_nats=1e-2, tail="prior"),
    ):
        codec = config.build().ranked_by(ranking)
        rows = torch.arange(800) % len(reference)
        entries = reference.top(codec.asked).select(rows)
        places = torch.tensor([800])
        best = {"encode": 1e9, "decode": 1e9}
        counts = torch.zeros(0)
        for _ in range(12):
            begin = time.thread_time()
            columns = codec.encode(entries, places)
            middle = time.thread_time()
            found = codec.decode({name: column.data for name, column in columns.items()}, places)
            best["decode"] = min(best["decode"], time.thread_time() - middle)
            best["encode"] = min(best["encode"], middle - begin)
            counts = found.counts.float()
        out.append(
            {
                "codec": config.model_dump(mode="json"),
                "entries": round(float(counts.mean()), 1),
                "encoded_per_s": int(800 / best["encode"]),
                "decoded_per_s": int(800 / best["decode"]),
            }
        )
    return out


def summary(points: list[Point], reference_or_entropy: float, places: int) -> dict:
    rows = [
        {
            "name": p.name, "bytes_per_token": round(p.bytes_per_token, 2),
            "kl_nats": p.kl_nats if p.kl_nats is None else round(p.kl_nats, 6),
            "gradient_error": round(p.gradient_error, 6), "entries": round(p.entries, 2),
        }
        for p in points
    ]  # fmt: skip
    return {"places": places, "entropy_nats": round(reference_or_entropy, 4), "codecs": rows}


def compared(
    points: list[Point], reference: Reference, ranking: Ranking, others: dict[str, Ranking]
) -> dict:
    """`adaptive` at the errors of DistillKit's settings, with either tail and other rankings."""
    settings = (RECOMMENDED, f"{RECOMMENDED}, normalized", "DistillKit budget")
    found: dict = {}
    for tail, key in TAILS:
        found[f"{key}_of_another_ranking"] = {
            how: at_the_error_of(points, RECOMMENDED, reference, other, tail)
            for how, other in others.items()
        }
        found[f"{key}_at_the_error_of"] = {
            name: at_the_error_of(points, name, reference, ranking, tail) for name in settings
        }
    return found | {"others_beside_a_prior": beside_a_prior(reference, ranking)}


def by_instructions() -> dict[str, list[float]]:
    """KL of DistillKit's recommended setting on synthetic shapes, by what its fit is solved with.

    With ranks as they are, and with `normalize_t`.

    MKL picks the instructions that the processor has, unless it is told which: what an
    ill-conditioned fit in float32 gives depends on them.
    """
    found = {}
    for name in ("AUTO", "AVX2", "COMPATIBLE"):
        command = [sys.executable, "-c", "from benchmarks.target_codecs import fits; print(fits())"]
        told = os.environ | {"MKL_CBWR": name}
        shown = subprocess.run(command, env=told, cwd=REPOSITORY, check=True, capture_output=True)
        found[name] = json.loads(shown.stdout)
    return found


def fits() -> list[float]:
    """KL of DistillKit's recommended setting on synthetic shapes, and with `normalize_t`."""
    torch.set_num_threads(1)
    names = (RECOMMENDED, f"{RECOMMENDED}, normalized")
    points = measure(synthetic(), grid=[one for one in GRID if one[1] in names])
    return [round(point.kl_nats or 0.0, 4) for point in points]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--demo-data", type=Path, required=True)
    parser.add_argument("--places", type=int, default=512)
    parser.add_argument("--captured", type=Path, nargs="*", default=[], metavar="NPZ")
    args = parser.parse_args()
    torch.set_num_threads(1)
    demo = plan_targets(
        load(Path("configs/demo/score.toml"), ScoreConfig, [f"data={args.demo_data}"]),
        places=args.places,
    )
    panels = {"demo teacher": demo.points}
    found = {"demo teacher": summary(demo.points, demo.entropy_nats, demo.places)}
    train = Dataset(args.data, "train")
    model, ranking = NGrams(train), label_ranking(train)
    others = {
        "a tenth of the labels": Ranking.of_counts(label_counts(train, step=10)),
        "numbers of o200k": Ranking.by_number(),
    }
    counts = label_counts(train)
    references = {
        "four synthetic shapes": synthetic(),
        "the same, ids as frequent as labels": synthetic(counts),
        "n-gram model, text it has counted": n_gram(model, train, args.places),
        "n-gram model, held-out text": n_gram(model, Dataset(args.data, "valid"), args.places),
        **{f"network, {path.stem.replace('_', ' ')}": captured(path) for path in args.captured},
    }
    for name, reference in references.items():
        panels[name] = measure(reference, ranking=ranking)
        found[name] = summary(panels[name], float(reference.entropy.mean()), len(reference))
        found[name] |= compared(panels[name], reference, ranking, others)
    path = RESULTS / "target-codecs.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    result = {
        "command": "python -m benchmarks.target_codecs",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "frontiers": found,
        "ranking": {
            "ids": len(ranking), "bytes_a_file": len(ranking.to_bytes()),
            "counted_labels": int(counts.sum()), "bytes_per_token": round(
                len(ranking.to_bytes()) / (2**20 * int(counts.sum()) / int(train.lengths.sum())), 3
            ),
        },
        "cpu_core": {
            name: rates(references[name], ranking)
            for name in ("n-gram model, text it has counted", "n-gram model, held-out text")
        },
        "distillkit_by_instructions": by_instructions(),
        "gpu": before.get("gpu", {}),
        "gpu_adaptive": before.get("gpu_adaptive", {}),
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw_frontiers(panels, REPOSITORY / "docs" / "target-codecs.png")


if __name__ == "__main__":
    main()
