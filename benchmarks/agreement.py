"""Log-probs of the sampler beside those of the trainer's forward pass; a part of `sampling`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 8
NEW = 128
WIDTH = 512  # of the trainer's rows


@torch.no_grad()
def agreement(student: Any) -> list[dict[str, Any]]:
    """A student with random weights, whose routers choose between near ties in every layer.

    Rounding alone changes experts then: the trainer's own distance from the reference kernels says
    how much. `replayed` gives the trainer the experts that the sampler used; with `fixed` routing
    a large selection bias names the same experts for all tokens.
    """
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 199_000, int(n)) for n in rng.integers(4, 300, BATCH)]
    rows = _measured(student, prompts, weights="random", routings=("random", "replayed"))
    device = student.head_weight.device
    for router in student.routers():
        generator = torch.Generator(device).manual_seed(0)
        shape = router.expert_bias.shape
        router.expert_bias.copy_(torch.randn(shape, generator=generator, device=device))
    rows += _measured(student, prompts, weights="random", routings=("fixed",))
    for router in student.routers():
        router.expert_bias.zero_()
    return rows


@torch.no_grad()
def agreement_of_run(
    run: Path, *, device: str = "cuda", kernels: str = "fused"
) -> list[dict[str, Any]]:
    """A trained student on questions rendered as in its training."""
    from vpmoe.data.harmony import RenderConfig, Renderer
    from vpmoe.data.problems import generate
    from vpmoe.train.state import load_student
    from vpmoe.vocabulary import STOP_TOKENS

    student, manifest = load_student(run, device=device, dtype=torch.bfloat16, kernels=kernels)
    data = (manifest["inputs"] or {}).get("data") or {}
    renderer = Renderer(RenderConfig(**data.get("render", {})))
    asked = [renderer.prompt(p.query, None) for p in generate(40 * BATCH, seed=2)]
    if student.row_of is not None:
        known = set(student.id_of.tolist())
        asked = [prompt for prompt in asked if known.issuperset(prompt.tolist())]
    if len(asked) < BATCH:
        raise SystemExit(f"{run} knows the words of {len(asked)} questions, {BATCH} are needed")
    prompts = asked[:BATCH]
    return _measured(
        student.eval(),
        prompts,
        weights="trained",
        routings=("own", "replayed"),
        stops=STOP_TOKENS,
    )


@torch.no_grad()
def agreement_on_data(student: Any, dataset: Any) -> list[dict[str, Any]]:
    """A student in training, on the prompts of conversations that it was not trained on."""
    from vpmoe.spans import Span

    prompts = []
    for index in range(len(dataset)):
        document = dataset.conversation(index)
        begin = int(np.flatnonzero(document.span_ids != Span.IGNORE)[0]) + 1
        if begin + NEW <= WIDTH:
            prompts.append(document.tokens[:begin].astype(np.int64))
    student.eval()
    return _measured(student, prompts[:BATCH], weights="in training", routings=("own", "replayed"))


def _measured(
    student: Any,
    prompts: list[np.ndarray],
    *,
    weights: str,
    routings: tuple[str, ...],
    stops: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A row per routing over the same completions; any but "replayed" is the trainer's own."""
    from vpmoe.rollouts.sampler import Sampler

    reference = student_like(student)
    rows: dict[str, dict[str, Any]] = {
        routing: {
            "what": "sampler against trainer",
            "weights": weights,
            "routing": routing,
            "layers": student.config.num_layers,
            "sequences": len(prompts),
        }
        for routing in routings
    }
    for name, temperature in (("drawn", 1.0), ("greedy", 0.0)):
        sampler = Sampler(student, max_batch=len(prompts), keeps_experts=True)
        done = sampler.generate(
            prompts, max_new_tokens=NEW, seed=3, temperature=temperature, stop_tokens=stops
        )
        sampler.release()
        own = torch.from_numpy(np.concatenate([completion.logprobs for completion in done]))
        for routing, row in rows.items():
            is_replayed = routing == "replayed"
            logits, chosen = recomputed(student, prompts, done, is_replayed=is_replayed)
            table = logits.float().log_softmax(dim=-1)
            found = table.gather(1, chosen[:, None])[:, 0]
            gap = (found - own.to(found)).abs()
            again, _ = recomputed(reference, prompts, done, is_replayed=is_replayed)
            noise = again.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0] - found
            row[f"{name}_tokens"] = len(chosen)
            row[f"{name}_mean_abs_nats"] = round(float(gap.mean()), 4)
            row[f"{name}_max_abs_nats"] = round(float(gap.max()), 4)
            row[f"{name}_trainer_against_reference"] = round(float(noise.abs().mean()), 4)
            if temperature == 0:
                same = logits.argmax(dim=-1) == chosen
                row["greedy_same_pct"] = round(100 * float(same.float().mean()), 2)
                behind = table.max(dim=-1).values - found
                row["greedy_worst_behind_nats"] = round(float(behind.max()), 4)
    return list(rows.values())


def student_like(student: Any) -> Any:
    """The same weights behind the reference kernels."""
    from vpmoe.models.student import build_student

    made = build_student(student.config, seed=0, device="meta", dtype=torch.bfloat16)
    made = made.to_empty(device=student.head_weight.device)
    values = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, parameter in made.named_parameters():
        parameter.data = values[name].data
    for name, buffer in made.named_buffers():
        buffer.data = values[name].data.clone()
    return made.eval()


def recomputed(student: Any, prompts: list[Any], done: list[Any], *, is_replayed: bool) -> Any:
    """Logits of the trainer's forward pass where completions were written, and their rows."""
    whole = [np.concatenate([p, c.tokens]) for p, c in zip(prompts, done, strict=True)]
    device = student.head_weight.device
    tokens = torch.full((len(whole), WIDTH), int(prompts[0][0]))
    documents = torch.full_like(tokens, -1)
    expert_ids = None
    if is_replayed and done[0].expert_ids is not None:
        kept = torch.from_numpy(done[0].expert_ids)
        shape = (len(whole), WIDTH, *kept.shape[1:])
        expert_ids = torch.zeros(shape, dtype=kept.dtype).bitwise_not_()
    for row, (sequence, completion) in enumerate(zip(whole, done, strict=True)):
        tokens[row, : len(sequence)] = torch.from_numpy(sequence)
        documents[row, : len(sequence)] = 0
        if expert_ids is not None:
            expert_ids[row, : len(sequence) - 1] = torch.from_numpy(completion.expert_ids)
    place = torch.arange(WIDTH, device=device).expand_as(tokens).contiguous()
    hidden = student(
        tokens.to(device),
        positions=place,
        document_ids=documents.to(device),
        expert_ids=None if expert_ids is None else expert_ids.to(device),
    ).hidden
    states = [
        hidden[row, len(p) - 1 : len(p) + len(c.tokens) - 1]
        for row, (p, c) in enumerate(zip(prompts, done, strict=True))
    ]
    written = np.concatenate([completion.tokens for completion in done])
    return student.logits(torch.cat(states)), student.rows_of(torch.from_numpy(written).to(device))
