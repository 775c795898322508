"""Side by side with DistillKit's own codec and losses, as published, on the same inputs.

python -m benchmarks.distillkit CHECKOUT      a checkout of github.com/arcee-ai/DistillKit

Its code is imported from there and none of it is kept here. Teacher distributions have the whole
vocabulary; everything is compared with the dense float64 result, which is cheap for a few hundred
positions.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import RESULTS
from torch import Tensor

VOCAB = 201_088
POSITIONS = 64
SEED = 0
CODES = {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
BUDGET = {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}


def teachers() -> dict[str, Tensor]:
    """Log-probs [positions, V], float64, of four shapes: two power laws, sure, and two-way."""
    generator = torch.Generator().manual_seed(SEED)
    rank = torch.arange(1, VOCAB + 1, dtype=torch.float64)
    found = {}
    for name, slope in (("power law 1.3", 1.3), ("power law 2", 2.0)):
        found[name] = (-slope * rank.log()).expand(POSITIONS, -1)
    sure = -1.1 * rank.log()
    sure = torch.where(rank == 1, sure + 9.0, sure)
    found["sure"] = sure.expand(POSITIONS, -1)
    found["two-way"] = torch.where(rank <= 2, -0.1 * rank, -7.0 - 1.2 * rank.log()).expand(
        POSITIONS, -1
    )
    out = {}
    for name, logits in found.items():
        noise = torch.randn(POSITIONS, VOCAB, generator=generator, dtype=torch.float64)
        order = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(POSITIONS)])
        noisy = (logits + 0.3 * noise).gather(1, order)
        out[name] = noisy.log_softmax(1)
    return out


def rebuilt_kl(teacher: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor | None) -> float:
    """Mean KL(teacher || entries and an even rest), nats; mass beyond one is scaled away."""
    logprobs = logprobs.double()
    mass = logprobs.exp().sum(1)
    if tail is None:
        logprobs = logprobs - (mass.clamp_min(1 - 1e-6) / (1 - 1e-6)).log()[:, None]
        rest = (1 - logprobs.exp().sum(1)).clamp_min(1e-12)
    else:
        rest = tail.double().exp()
        logprobs = logprobs - (mass + rest).log()[:, None]
        rest = rest / (mass + rest)
    used = (logprobs > -torch.inf).sum(1)
    dense = (rest / (VOCAB - used)).log()[:, None].expand_as(teacher).clone()
    for row in range(len(teacher)):
        n = int(used[row])
        keep = logprobs[row] > -torch.inf
        dense[row, ids[row][keep][:n]] = logprobs[row][keep]
    return float((teacher.exp() * (teacher - dense)).sum(1).mean())


def codec_rows(kit: Any, given: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Bytes and error of their codec and of ours."""
    rows = []
    for shape, teacher in given.items():
        for name, settings, more in (
            ("DistillKit recommended", CODES, {}),
            ("DistillKit recommended, normalised t", CODES, {"normalize_t": True}),
            ("DistillKit budget", BUDGET, {}),
        ):
            config = kit.Config(
                d=VOCAB, exact_dtype="bfloat16", term_dtype="float32", residual_bins=[],
                delta_encoding=False, **settings, **more,
            )  # fmt: skip
            codec = kit.Compressor(config=config)
            ids, logprobs = codec.decompress_to_sparse(codec.compress(teacher.float()))
            rows.append(
                {
                    "teacher": shape,
                    "codec": name,
                    "bytes": config.total_bits() / 8,
                    "kl_nats": rebuilt_kl(teacher, ids, logprobs, None),
                    "mass_above_one_pct": float(
                        100 * (logprobs.double().exp().sum(1) > 1 + 1e-6).double().mean()
                    ),
                }
            )
        rows += own_codecs(shape, teacher)
    return rows


def own_codecs(shape: str, teacher: Tensor) -> list[dict[str, Any]]:
    """The same of this package's codecs."""
    from pydantic import TypeAdapter

    from vpmoe.teachers.codecs import CodecConfig
    from vpmoe.teachers.codecs.base import entries_of_top
    from vpmoe.teachers.codecs.ranking import Ranking

    rows = []
    places = torch.tensor([POSITIONS])
    for name, tree in (
        ("plain top-64", {"kind": "top_k", "k": 64}),
        ("set-coded top-64", {"kind": "set_coded", "k": 64}),
        ("set-coded top-128", {"kind": "set_coded", "k": 128}),
        ("adaptive", {"kind": "adaptive"}),
    ):
        codec = TypeAdapter(CodecConfig).validate_python(tree).build()
        codec = codec.ranked_by(Ranking.by_number())  # these teachers' ids are in no order
        top = teacher.float().topk(codec.asked, dim=1)
        columns = codec.encode(entries_of_top(top.indices, top.values), places)
        found = codec.decode({n: c.data for n, c in columns.items()}, places)
        rows.append(
            {
                "teacher": shape,
                "codec": name,
                "bytes": sum(c.data.numel() for c in columns.values()) / POSITIONS,
                "kl_nats": rebuilt_kl(teacher, found.ids, found.logprobs, found.tail),
                "mass_above_one_pct": float(
                    100 * (found.logprobs.double().exp().sum(1) > 1 + 1e-6).double().mean()
                ),
            }
        )
    return rows


def loss_rows(kit: Any, given: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Value and gradient of each loss beside the exact KL's, at temperatures 1 and 2.

    The student is the teacher with noise of one nat and a tail that is twice as heavy.
    """
    rows = []
    generator = torch.Generator().manual_seed(SEED + 1)
    for shape, teacher in given.items():
        noise = torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
        student = 0.8 * teacher + noise
        top = teacher.topk(128, dim=1)
        for temperature in (1.0, 2.0):
            exact = _of(lambda z, t=teacher, tau=temperature: _dense(z, t, tau), student)
            for name, function in losses(kit, top.indices, top.values, temperature).items():
                value, gradient = _of(function, student)
                rows.append(
                    {
                        "teacher": shape,
                        "loss": name,
                        "temperature": temperature,
                        "value": value,
                        "exact_value": exact[0],
                        "gradient_error": float((gradient - exact[1]).norm() / exact[1].norm()),
                    }
                )
    return rows


def losses(
    kit: Any, ids: Tensor, logprobs: Tensor, temperature: float
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Their two ways with what is missing, and ours with the stored tail."""

    def theirs(missing: str) -> Callable[[Tensor], Tensor]:
        def run(z: Tensor) -> Tensor:
            total = kit.sparse_kl_div(
                z[None], ids[None], logprobs[None], missing=kit.Missing(missing),
                temperature=temperature,
            )  # fmt: skip
            return temperature**2 * total / len(z)

        return run

    return {
        "DistillKit, zero": theirs("zero"),
        "DistillKit, symmetric_uniform": theirs("symmetric_uniform"),
        "forward KL, bucket": lambda z: _own(z, ids, logprobs, temperature),
    }


def _own(z: Tensor, ids: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """Our loss through its public door: a head of one row per logit turns states into them."""
    from vpmoe.losses import ForwardKLConfig
    from vpmoe.losses.base import LossInputs
    from vpmoe.spans import NUM_SPANS, Span

    rows = len(z)
    tail = torch.log1p(-logprobs.exp().sum(1))
    basis, weight = torch.eye(rows, dtype=z.dtype), z.T  # states @ weight^T are the logits
    inputs = LossInputs(
        hidden=basis,
        head_weight=weight,
        labels=ids[:, 0].clone(),
        span_ids=torch.full((rows,), int(Span.FINAL), dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool),
        target_ids=ids,
        target_logprobs=logprobs.to(z.dtype),
        target_tail=tail.to(z.dtype),
    )
    scales = torch.zeros(NUM_SPANS, dtype=torch.float64)
    scales[Span.FINAL] = 1 / rows
    return ForwardKLConfig(temperature=temperature).build()(inputs, scales).total


def _dense(z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    t = (teacher / temperature).log_softmax(1)
    p = (z / temperature).log_softmax(1)
    return temperature**2 * (t.exp() * (t - p)).sum() / len(z)


def _of(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "distillkit.json")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))
    kit = argparse.Namespace(
        Compressor=importlib.import_module("distillkit.compression.compressor").LogprobCompressor,
        Config=importlib.import_module(
            "distillkit.compression.config"
        ).DistributionQuantizationConfig,
        sparse_kl_div=importlib.import_module("distillkit.lossfuncs.kl").sparse_kl_div,
        Missing=importlib.import_module(
            "distillkit.missing_probability"
        ).MissingProbabilityHandling,
    )
    commit = subprocess.run(
        ["git", "-C", str(args.checkout), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    given = teachers()
    found = {
        "what": "DistillKit as published beside this package, same inputs, float64 truth",
        "distillkit_commit": commit,
        "vocab": VOCAB,
        "positions": POSITIONS,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "codecs": codec_rows(kit, given),
        "losses": loss_rows(kit, given),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in (*found["codecs"], *found["losses"]):
        print(row)


if __name__ == "__main__":
    main()
