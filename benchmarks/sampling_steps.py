"""One step of sampling: with evenly used experts, kernel by kernel, and under other settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from benchmarks.common import graph_times, kernel_times

PROMPT = 128
NEW = 128
ROUNDS = 192  # steps in which biases are moved
AGAIN = 64  # of them until new conversations begin
SHOWN = 12  # kernels

# Of half a network, in smaller tiles, so that more programs fit on a multiprocessor.
SMALL = {"MAX_PIECE": 64, "WARPS": 4}
SHORT = {"DEPTH": 64, "STAGES": 5}

# What is said of a variant -> the constants that it changes, by module of `vpmoe.kernels`.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "kernels one after another, without early launches": {"overlap": {"ENABLED": False}},
    **{f"experts: {n} columns guessed": {"decode_experts": {"GUESSED": n}} for n in (0, 512)},
    "experts: 2 teams": {"decode_experts": {"TEAMS": 2}},
    "experts: 4 tiles under way": {"decode_experts": {"STAGES": 4}},
    "experts: 4 warps": {"decode_experts": {"WARPS": 4}},
    "experts: 64 units a program, 4 warps": {"decode_experts": SMALL},
    "experts: the same, tiles 64 deep, 5 under way": {"decode_experts": {**SMALL, **SHORT}},
    **{f"linear: {n} columns a program": {"decode": {"COLUMNS": n}} for n in (8, 32)},
    "linear: 32 rows a program": {"decode": {"TALL": 32}},
    "linear: 4 tiles under way": {"decode": {"STAGES": 4}},
    "attention: nothing of the ring early": {"decode_attention": {"EARLY": 0}},
    "attention: 64 keys at a time": {"decode_attention": {"BLOCK": 64}},
    "as it is, once more": {},
}


def random_prompts(count: int, length: int, *, seed: int = 0) -> list[np.ndarray]:
    """Prompts of one length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 199_000, length) for _ in range(count)]


def conversations(student: Any, batch: int) -> Any:
    """Slots in the middle of completions."""
    from vpmoe.rollouts.draw import Draw
    from vpmoe.rollouts.slots import Slots

    slots = Slots(student, Draw(1.0, 1.0, 1), (), slots=batch, capacity=PROMPT + NEW)
    begin(slots, batch)
    slots.advance(NEW // 2)
    return slots


def begin(slots: Any, batch: int, *, seed: int = 0) -> None:
    """New conversations in all slots."""
    every = range(batch)
    slots.admit(every, random_prompts(batch, PROMPT, seed=seed), every, [NEW] * batch)


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Count the experts that eager steps use, layer by layer; move selection biases meanwhile.

    Yields:
        `in_use`, a count for each layer that was run, and `move`, by how much the bias of an expert
        with too few tokens rises.
    """
    from vpmoe.kernels import decode_experts
    from vpmoe.models.router import shifted_expert_bias

    choose = decode_experts.choose_experts
    state: dict[str, Any] = {"move": 0.0, "in_use": []}

    def watching(*arguments: Any) -> None:
        choose(*arguments)
        bias, ids = arguments[2], arguments[5]
        loads = ids.flatten().long().bincount(minlength=len(bias)).float()
        if state["move"]:
            bias.copy_(shifted_expert_bias(bias, loads, rate=state["move"]))
        state["in_use"].append(int((loads > 0).sum()))

    decode_experts.choose_experts = watching
    try:
        yield state
    finally:
        decode_experts.choose_experts = choose


@contextmanager
@torch.no_grad()
def even_routing(student: Any, batch: int) -> Iterator[None]:
    """Selection biases that spread a batch's tokens over the experts, as training moves them.

    A student whose routers send all tokens to the same few experts makes sampling look cheap: it is
    the weights in use that are read.
    """
    slots = conversations(student, batch)
    try:
        with watched() as state:
            for number in range(ROUNDS):
                if number % AGAIN == 0:
                    begin(slots, batch, seed=1 + number)
                state["move"] = 0.02 * (1 - number / ROUNDS) ** 2
                slots._step()
        del slots
        yield
    finally:
        for router in student.routers():
            router.expert_bias.zero_()


@torch.no_grad()
def experts_in_use(step: Callable[[], Any]) -> float | None:
    """Experts that a step reads, the mean of the layers with experts; None without such layers."""
    with watched() as state:
        step()
    found = state["in_use"]
    return round(sum(found) / len(found), 1) if found else None


@torch.no_grad()
def kernels(student: Any, batch: int) -> list[dict[str, Any]]:
    """GPU time of a step by kernel, the longest first and one after another; short ones as one.

    A kernel that waits for another would count that time as its own.
    """
    with changed({"overlap": {"ENABLED": False}}):
        found = kernel_times(conversations(student, batch)._step)
    rest = {name: sum(row[name] for row in found[SHOWN:]) for name in ("calls", "us")}
    rows = [*found[:SHOWN], {"kernel": "all others", **rest}]
    return [{"what": "kernel", "batch": batch, **row} for row in rows]


@torch.no_grad()
def bare(student: Any, batch: int) -> dict[str, Any]:
    """The step without head and draw."""
    step = reading(conversations(student, batch), batch)
    times = graph_times(step).summary()
    return {
        "what": "step without head and draw",
        "batch": batch,
        "step_ms": times["ms"],
        "step_spread_ms": times["spread_ms"],
        "experts_in_use": experts_in_use(step),
    }


def reading(slots: Any, batch: int) -> Callable[[], Any]:
    """A step without head and draw."""
    rows = torch.arange(batch, device="cuda")
    return lambda: slots.decoder.read(rows, slots._places)


@torch.no_grad()
def variants(student: Any, batch: int) -> Iterator[dict[str, Any]]:
    """The step without head and draw under other settings, as it is first and last."""
    for name, changes in VARIANTS.items():
        with changed(changes):
            found = timed(student, batch)
        yield {"what": "variant of the step", "batch": batch, "variant": name, **found}


def timed(student: Any, batch: int) -> dict[str, Any]:
    """Times of the step, or why there are none."""
    from triton import CompilationError, OutOfResources

    try:
        times = graph_times(reading(conversations(student, batch), batch)).summary()
    except (OutOfResources, CompilationError) as error:  # before anything is captured
        return {"step_ms": None, "why": str(error)[:80]}
    return {"step_ms": times["ms"], "step_spread_ms": times["spread_ms"]}


@contextmanager
def changed(changes: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Constants of kernels, for a while."""
    from importlib import import_module

    before: list[tuple[Any, str, Any]] = []
    try:
        for module, values in changes.items():
            found = import_module(f"vpmoe.kernels.{module}")
            for name, value in values.items():
                before.append((found, name, getattr(found, name)))
                setattr(found, name, value)
        yield
    finally:
        for found, name, value in before:
            setattr(found, name, value)
