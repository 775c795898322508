"""The part of docs/performance.md that speaks of sampling."""

from collections.abc import Callable
from typing import Any

AGREEMENT = "sampler against trainer"
AGREEMENT_BAR = 0.02  # nats
BAR, STRETCH = 13_000, 20_000  # tokens per second at a batch of 64
ROOFLINE_MS = {1: 0.30, 8: 0.57, 64: 2.02, 256: 3.42}  # weights once, keys and values, 4.26 TB/s
BYTES_PER_US = 4.26e6
UNIT_BYTES = 2 * 2 * 1024  # of an expert's unit, bf16
UNITS, SHARED_UNITS = 128, 512
SHORT_US = 10.0  # kernels that take less in a step are shown as one

SLOTS = 64
COLUMNS = {
    "batch": "batch",
    "tokens_per_s": "tokens/s",
    "step_ms": "step ms",
    "steps_alone_tokens_per_s": "steps alone, tokens/s",
    "prompts_ms": "prompts ms",
    "experts_in_use": "experts in use",
}

Table = Callable[..., str]


def sampling(found: dict[str, Any], trained: list[dict[str, Any]], table: Table) -> str:
    """Speed, agreement and memory of the sampler; `trained` holds rows of the whole-model run."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in [*found["rows"], *(row for row in trained if row["what"] == AGREEMENT)]:
        named.setdefault("peer" if row.get("part") == "peer" else row["what"], []).append(row)
    parts = [
        f"## Sampling: {found['layers']} layers, prompts of {found['prompt']}, "
        f"{found['new']} new tokens",
        f"{found['device']}, torch {found['torch']}, Triton {found['triton']}. Random weights and "
        "tokens, temperature 1. Tokens per second count whole calls, prompts included, graphs "
        f"captured before.{_dates(found)}",
        *_speed(named, table),
        *_steps(named, table),
        *_continuous(named, table),
        *_agreement(named, table),
    ]
    for held in named.get("memory", []):
        parts.append(
            f"GiB reserved before a round of {SLOTS}, at its peak and after it: "
            f"{held['before_gib']}, {held['during_gib']}, {held['after_gib']}."
        )
    return "\n\n".join(parts)


def _dates(found: dict[str, Any]) -> str:
    """Which parts are of which day, and what was otherwise than today."""
    days: dict[str, set[str]] = {}
    for row in found["rows"]:
        name = f"{row['part']}, {row['routing']} routing" if "routing" in row else row["part"]
        days.setdefault(row["run"][:10] if "run" in row else row["date"], set()).add(name)
    if len(days) == 1:
        said = [f"all on {next(iter(days))}"]
    else:
        said = [f"on {day}: {'; '.join(sorted(parts))}" for day, parts in sorted(days.items())]
    return "".join(f" {line[0].upper()}{line[1:]}." for line in said) + _said(found["rows"])


def _speed(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    peer = named["peer"][0]
    rows = []
    for row in named["student"]:
        is_judged = row["batch"] == SLOTS and row["routing"] == "even"
        what = f"student, {row['routing']} routing"
        rows.append([what, *(_cell(row, name) for name in COLUMNS), *_bars(is_judged)])
    judged = [row for row in named["student"] if row["batch"] == SLOTS]
    is_beside = "run" in peer and any(row.get("run") == peer["run"] for row in judged)
    when = "" if is_beside else " (another run)"
    cells = (_cell(peer, name) if name in peer else None for name in COLUMNS)
    rows.append([f"{peer['what']}{when}", *cells, *_bars(False)])
    shown = table(["what", *COLUMNS.values(), "bar", "stretch"], rows)
    return [shown, *_judged(judged, peer)]


def _cell(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    return "not run" if name == "tokens_per_s" and value is None else value


def _bars(is_judged: bool) -> tuple[int | None, int | None]:
    return (BAR, STRETCH) if is_judged else (None, None)


def _judged(rows: list[dict[str, Any]], peer: dict[str, Any]) -> list[str]:
    """What the bar says of the batch that it is set for."""
    by = {row["routing"]: row for row in rows}
    drawn, even = by.get("random"), by.get("even")
    if drawn is None:
        return [f"**Not run at a batch of {SLOTS}**, for which the bar is."]
    said = (
        f"At a batch of {SLOTS}, with routers as they are drawn, the student writes "
        f"{drawn['tokens_per_s'] / peer['tokens_per_s']:.1f} times the peer's tokens{_used(drawn)}."
        " With `even` routing, selection biases spread the tokens, as training does: the bar is "
        "held against that"
    )
    if even is None:
        return [f"{said}. **Not run.**"]
    if even["tokens_per_s"] is None:
        alone = even["steps_alone_tokens_per_s"]
        verdict = "missed even without prompts" if alone < BAR else "open"
        return [
            f"{said}{_used(even)}; steps alone write {alone:,} tokens per second: **{verdict}**."
        ]
    verdict = "met" if even["tokens_per_s"] >= BAR else "**missed**"
    if BAR <= even["tokens_per_s"] < STRETCH:
        verdict += " (stretch missed)"
    ratio = even["tokens_per_s"] / peer["tokens_per_s"]
    return [f"{said}{_used(even)}: {verdict}, {ratio:.1f} times the peer."]


def _used(row: dict[str, Any]) -> str:
    used = row.get("experts_in_use")
    return "" if used is None else f", {used:.0f} of 256 experts in use in a layer"


def _steps(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    """Where a step goes, and what other settings change."""
    parts = []
    if bare := named.get("step without head and draw", []):
        parts += [
            f"The step without head and draw, {bare[0]['routing']} routing, beside the time that "
            "reading every weight in use and the cache once would take with evenly used experts:",
            table(["batch", "ms", "experts in use", "roofline ms"], [_bare(row) for row in bare]),
        ]
    if kernels := named.get("kernel", []):
        parts += [
            f"Where a step of {kernels[0]['batch']} goes, {kernels[0]['routing']} routing, kernels "
            "one after another:",
            table(["kernel", "calls", "us"], _long(kernels)),
            *_binds(kernels, bare),
        ]
    if variants := named.get("variant of the step", []):
        parts += [
            f"What was tried, the step of {variants[0]['batch']} without head and draw, "
            f"{variants[0]['routing']} routing, single runs{_drift(variants)}:",
            table(["variant", "ms"], [[row["variant"], row["step_ms"]] for row in variants]),
        ]
    return parts


def _drift(variants: list[dict[str, Any]]) -> str:
    """How far the step as it is comes from itself."""
    own = [row["step_ms"] for row in variants if row["variant"].startswith("as it is")]
    if len(own) < 2:
        return ""
    return f" (as it is, first and last, differ by {100 * (max(own) / min(own) - 1):.1f} %)"


def _long(kernels: list[dict[str, Any]]) -> list[list[Any]]:
    """A row for each kernel that takes its time, one for all others."""
    is_short = [row["us"] < SHORT_US or row["kernel"] == "all others" for row in kernels]
    short = [row for row, yes in zip(kernels, is_short, strict=True) if yes]
    rows = [
        [f"`{row['kernel'].strip('_').removesuffix('_kernel')}`", row["calls"], row["us"]]
        for row, yes in zip(kernels, is_short, strict=True)
        if not yes
    ]
    sums = [round(sum(row[name] for row in short), 1) for name in ("calls", "us")]
    return [*rows, ["all others", *sums]]


def _binds(kernels: list[dict[str, Any]], bare: list[dict[str, Any]]) -> list[str]:
    """What the experts' kernel and those around it take of a layer."""
    step = next((row for row in bare if row["batch"] == kernels[0]["batch"]), None)
    experts = next((row for row in kernels if "experts" in row["kernel"]), None)
    if step is None or experts is None:
        return []
    layers, used = experts["calls"], step["experts_in_use"]
    others = [row for row in kernels if row is not experts and row["kernel"] != "all others"]
    around = [row for row in others if row["calls"] >= layers - 1]
    count, took = (sum(row[name] for row in around) / layers for name in ("calls", "us"))
    ideal = (used * UNITS + SHARED_UNITS) * UNIT_BYTES / BYTES_PER_US
    return [
        f"What binds: in a layer the experts take {experts['us'] / layers:.0f} us, where reading "
        f"{used:.0f} of them and the shared one takes {ideal:.0f}; the {count:.0f} kernels around "
        f"them take {took:.0f} us, some {took / count:.1f} each, which is latency. Early launches "
        f"hide a part of that: the step takes {step['step_ms']:.2f} ms."
    ]


def _bare(row: dict[str, Any]) -> list[Any]:
    batch = row["batch"]
    return [batch, row["step_ms"], row.get("experts_in_use"), ROOFLINE_MS.get(batch)]


def _continuous(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    flows = [*named.get("continuous", []), *named.get("batch after batch", [])]
    if not flows:
        return []
    one = flows[0]
    return [
        f"{one['prompts']} prompts, {one['tokens']:,} tokens in completions of geometric lengths "
        f"up to {one['longest']}, {one['slots']} slots; batches capture a new graph where they "
        "need a larger cache:",
        table(
            ["slots", "routing", "seconds", "tokens/s"],
            [[row["what"], row["routing"], row["seconds"], row["tokens_per_s"]] for row in flows],
        ),
    ]


def _agreement(named: dict[str, list[dict[str, Any]]], table: Table) -> list[str]:
    rows = named.get(AGREEMENT, [])
    if not rows:
        return []
    above = [
        f"{row['weights']}, {row['routing']} routing"
        for row in rows
        if row["drawn_mean_abs_nats"] > AGREEMENT_BAR
    ]
    fixed = (
        " With `fixed` routing a large selection bias names the same experts for all tokens."
        if any(row["routing"] == "fixed" for row in rows)
        else ""
    )
    return [
        "Log-probs of the sampler beside those of the trainer's forward pass over the same "
        f"tokens, mean absolute difference in nats (bar {AGREEMENT_BAR}), and how often a greedy "
        "token is the trainer's likeliest. Random routers choose between near ties, so that "
        "rounding alone changes experts, layer after layer: the trainer's own distance from the "
        f"reference kernels says how much of that there is.{fixed} In `replayed` rows the trainer "
        "takes the experts that the sampler used, as stage 3 does; the completions are those of "
        f"the row before. Above the bar: {'; '.join(above) or 'none'}.{_said(rows)}",
        table(
            [
                "weights",
                "layers",
                "routing",
                "drawn",
                "greedy",
                "trainer - reference",
                "same greedy token, %",
            ],
            [
                [
                    row["weights"],
                    row["layers"],
                    row["routing"],
                    row["drawn_mean_abs_nats"],
                    row["greedy_mean_abs_nats"],
                    row.get("drawn_trainer_against_reference"),
                    row["greedy_same_pct"],
                ]
                for row in rows
            ],
        ),
    ]


def _said(rows: list[dict[str, Any]]) -> str:
    notes = sorted({row["note"] for row in rows if "note" in row})
    return "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
