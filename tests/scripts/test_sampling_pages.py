"""Sampling's benchmark keeps what it does not measure again; its page holds the bar to routing."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from benchmarks import common, sampling

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import performance_sampling

RUN = "2026-01-02T03:04:05Z"
ABOUT = {"device": "a GPU", "torch": "2", "triton": "3", "date": "2026-01-02"}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the benchmark with what it measures replaced; the rows of its file."""
    monkeypatch.setattr(common, "describe_device", lambda: dict(ABOUT))
    monkeypatch.setattr(sampling, "describe_device", lambda: dict(ABOUT))
    monkeypatch.setattr(sampling, "free", lambda: None)
    monkeypatch.setattr(sampling, "student_of", lambda layers: None)
    monkeypatch.setattr(sampling, "even_routing", lambda student, batch: nullcontext())
    monkeypatch.setattr(sampling, "memory_after", lambda student: {"what": "memory"})
    monkeypatch.setattr(sampling, "speed", lambda student, batch: {"what": "student", "is": batch})
    out = tmp_path / "sampling.json"

    def run(*words: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["sampling", "--out", str(out), *words])
        sampling.main()
        rows = json.loads(out.read_text())["rows"]
        assert all(row.pop("run") for row in rows)
        return rows

    return run


def test_parts_that_are_not_asked_for_keep_their_rows(measure):
    memory = {"part": "memory", "what": "memory"}
    assert measure("--parts", "memory") == [memory]
    speed = [
        {"part": "speed", "what": "student", "is": 8, "routing": routing}
        for routing in ("random", "even")
    ]
    assert measure("--parts", "speed", "--batches", "8") == [memory, *speed]
    assert measure("--parts", "speed", "--batches", "8") == [memory, *speed]
    assert measure("--parts", "memory") == [*speed, memory]
    with pytest.raises(SystemExit, match="has rows of layers 80, not 8: move it away, or give"):
        measure("--parts", "memory", "--layers", "8")


def row(routing: str, tokens_per_s: int | None, alone: int) -> dict:
    return {
        "part": "speed", "what": "student", "routing": routing, "batch": 64, "step_ms": 4.0,
        "tokens_per_s": tokens_per_s, "steps_alone_tokens_per_s": alone, "experts_in_use": 161.8,
        "run": RUN,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("even", "words"),
    [
        ([], "held against that. **Not run.**"),
        ([row("even", 20_000, 15_000)], "in use in a layer: met, 10.0 times the peer."),
        ([row("even", 13_000, 15_000)], "a layer: met (stretch missed), 6.5 times the peer."),
        ([row("even", 12_999, 15_000)], "in use in a layer: **missed**, 6.5 times the peer."),
        ([row("even", None, 13_001)], "write 13,001 tokens per second: **open**."),
        ([row("even", None, 12_999)], "12,999 tokens per second: **missed even without prompts**."),
    ],
)
def test_the_bar_is_held_against_evenly_used_experts(even, words):
    peer = {"part": "peer", "what": "a peer", "batch": 64, "tokens_per_s": 2_000, "run": RUN}
    found = {**ABOUT, "layers": 80, "prompt": 128, "new": 128}
    rows = [row("random", 16_000, 17_000), *even, peer]
    text = performance_sampling.sampling({**found, "rows": rows}, [], lambda head, rows: str(rows))
    assert words in text
    assert (
        "student writes 8.0 times the peer's tokens, 162 of 256 experts in use in a layer" in text
    )
    assert "captured before. All on 2026-01-02." in text
    assert "(another run)" not in text
    peer["run"] = "2026-01-03T03:05:00Z"
    text = performance_sampling.sampling({**found, "rows": rows}, [], lambda head, rows: str(rows))
    assert "a peer (another run)" in text and "On 2026-01-03: peer." in text


def test_short_kernels_are_shown_as_one_and_the_page_says_what_binds():
    kernels = [
        {"what": "kernel", "batch": 64, "routing": "even", "kernel": name, "calls": n, "us": us}
        for name, n, us in (
            ("_experts_kernel", 80, 2080.0), ("_linear_kernel", 239, 900.0), ("head", 1, 114.0),
            ("small", 2, 3.0), ("all others", 14, 17.0),
        )
    ]  # fmt: skip
    step = {"what": "step without head and draw", "batch": 64, "routing": "even", "step_ms": 3.777}
    named = {"kernel": kernels, step["what"]: [{**step, "experts_in_use": 162.5}]}
    text = "\n".join(performance_sampling._steps(named, lambda head, rows: str(rows)))
    assert "[['`experts`', 80, 2080.0], ['`linear`', 239, 900.0], ['`head`', 1, 114.0]," in text
    assert "['all others', 16, 20.0]]" in text
    assert "experts take 26 us, where reading 162 of them and the shared one takes 20;" in text
    assert "the 3 kernels around them take 11 us, some 3.8 each" in text
    assert "the step takes 3.78 ms" in text
