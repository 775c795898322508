"""The facts that `vpmoe check` shows: all of them derived, none typed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpmoe.cli.render import short
from vpmoe.config import Config

Facts = list[tuple[str, str]]


def dataset_facts(manifest: Mapping[str, Any]) -> Facts:
    """What a dataset holds, and what was turned away."""
    facts = []
    for split, rows in manifest["rows"].items():
        spans = manifest["span_labels"][split]
        trained = spans["reasoning"] + spans["final"]
        text = f"{rows:,} conversations, {short(manifest['tokens'][split])} tokens"
        if trained:
            text += f", {short(trained)} trained ({_spans(spans)})"
        facts.append((split, text))
    for name in ("rejects", "cuts"):
        counts = ", ".join(f"{what} {count:,}" for what, count in manifest[name].items())
        facts.append((name, counts or "none"))
    return facts


def _spans(labels: Mapping[str, int]) -> str:
    reasoning, final = labels["reasoning"], labels["final"]
    share = 100 * reasoning / (reasoning + final)
    return f"{share:.0f} % reasoning, {100 - share:.0f} % final"
