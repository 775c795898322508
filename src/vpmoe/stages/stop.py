"""Whether a warm start has done its work: read off the metrics stream, never guessed."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from vpmoe.config import Config

_LOSSES = ("valid/loss/reasoning", "valid/loss/final")


class StopConfig(Config):
    """When a warm start may end."""

    format_valid_pct: float = Field(default=95.0, ge=0, le=100)
    """Share of well-formed held-out completions to reach."""
    dead_experts_pct: float = Field(default=5.0, ge=0, le=100)
    """Share of experts without a token that still counts as healthy routing."""
    divergence_pct: float = Field(default=5.0, ge=0)
    """How far above its best the held-out loss may end."""
    window: float = Field(default=0.1, gt=0, le=1)
    """Share of the tokens so far over which improvement is judged."""
    improvement_pct: float = Field(default=1.0, ge=0)
    """Fall of the held-out loss within the window, below which it no longer improves quickly."""


def stop_report(rows: Sequence[dict[str, Any]], config: StopConfig) -> dict[str, dict[str, Any]]:
    """Each condition with whether it holds (None: not measured) and the value it was judged by.

    Conditions: "format" (completions are valid Harmony), "stable" (experts in use, held-out loss
    near its best), "plateau" (held-out loss improves slowly).
    """
    measured = [row for row in rows if all(row.get(name) is not None for name in _LOSSES)]
    curve = [(row["tokens_seen"], sum(row[name] for name in _LOSSES)) for row in measured]
    return {
        "format": _format(rows, config),
        "stable": _stable(rows, curve, config),
        "plateau": _plateau(curve, config),
    }


def _format(rows: Sequence[dict[str, Any]], config: StopConfig) -> dict[str, Any]:
    shares = [r["valid/format_valid_pct"] for r in rows if "valid/format_valid_pct" in r]
    if not shares:
        return {"holds": None, "why": "no completions were sampled: set valid.prompts"}
    return {"holds": shares[-1] >= config.format_valid_pct, "format_valid_pct": shares[-1]}


def _stable(
    rows: Sequence[dict[str, Any]], curve: Sequence[tuple[float, float]], config: StopConfig
) -> dict[str, Any]:
    if not rows or not curve:
        return {"holds": None, "why": "the held-out loss was not measured: set valid.documents"}
    last = rows[-1]
    dead = last.get("router/dead_experts", 0.0)
    layers = sum(name.startswith("router/active_experts/") for name in last)
    experts = dead + layers * last.get("router/active_experts_mean", 0.0)
    dead_pct = 100 * dead / experts if experts else 0.0
    above_pct = 100 * (curve[-1][1] / min(loss for _, loss in curve) - 1)
    holds = dead_pct <= config.dead_experts_pct and above_pct <= config.divergence_pct
    return {"holds": holds, "dead_experts_pct": dead_pct, "above_best_pct": above_pct}


def _plateau(curve: Sequence[tuple[float, float]], config: StopConfig) -> dict[str, Any]:
    if len(curve) < 2:
        return {"holds": None, "why": "the held-out loss was measured once: set valid.every_steps"}
    tokens, loss = curve[-1]
    earlier = [past for seen, past in curve if seen <= (1 - config.window) * tokens]
    if not earlier:
        return {"holds": None, "why": "the measurements do not reach back over the window"}
    fall_pct = 100 * (1 - loss / earlier[-1])
    return {"holds": fall_pct < config.improvement_pct, "improvement_pct": fall_pct}
