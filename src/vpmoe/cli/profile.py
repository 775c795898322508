"""`vpmoe profile`: where a training step's time and memory go."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vpmoe.cli.grammar import ConfigFile, Json, Overrides, Overwrite
from vpmoe.cli.render import print_facts, print_json, print_table, progress
from vpmoe.errors import ConfigError, RunError

Steps = Annotated[int, typer.Option("--steps", min=1, help="Measured steps.")]
Warmup = Annotated[int, typer.Option("--warmup", min=1, help="Steps before them.")]


def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results.")] = None,
    steps: Steps = 5,
    warmup: Warmup = 5,
    trace: Annotated[bool, typer.Option("--trace", help="Keep the profiler's trace.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure some steps of a stage: time by region, kernels, memory, predictions beside them.

    Writes summary.json and profile.png under reports/perf/, in a folder named for the config. The
    student is trained for these few steps and thrown away.
    """
    from vpmoe.cli.kinds import load_any
    from vpmoe.stages.base import StageConfig

    settings = load_any(config, list(overrides or []))
    if not isinstance(settings, StageConfig):
        raise ConfigError([(f"{config} is no stage of training", "give a config of a stage")])
    name = f"{config.resolve().parent.name}-{config.stem}"
    folder = out or Path("reports") / "perf" / name
    if (folder / "summary.json").exists() and not overwrite:
        raise RunError(f"{folder} holds a profile", hint="add --overwrite, or choose another --out")

    from vpmoe.stages.profile import ProfileSettings, run

    with progress("steps") as told:
        summary = run(
            settings,
            ProfileSettings(folder, warmup=warmup, steps=steps, with_trace=trace),
            progress=told,
        )
    if as_json:
        print_json(summary)
        return
    _print(summary, folder)


def _print(summary: dict[str, Any], folder: Path) -> None:
    expected, peak = summary["predicted"], summary["memory"]["peak_gib"]
    # A process on a CPU holds much more than its tensors.
    guessed_gib = None if summary["device"] == "CPU" else expected["total_gib"]
    speed, guess = summary["tokens_per_s"], expected["tokens_per_s"]
    facts = [
        ("device", f"{summary['device']}, kernels {summary['kernels_key']}"),
        (
            "step",
            f"{summary['step_ms']:,.1f} ms of {summary['tokens_per_step']:,.0f} tokens, spread "
            f"{summary['spread_ms']:,.1f} ms over {summary['steps']} steps",
        ),
        ("speed", f"{speed:,.0f} tokens/s{_against(speed, guess)}"),
        (
            "memory",
            f"{peak:.2f} GiB{_against(peak, guessed_gib)}",
        ),
        ("first step", f"{summary['first_step_s']:.1f} s"),
    ]
    if summary["mfu_pct"] is not None:
        facts.insert(3, ("utilization", f"{summary['mfu_pct']:.1f} % of the dense peak"))
    print_facts(facts)
    total = sum(summary["regions_ms"].values())
    print_table(
        ["region", "ms", "% of these"],
        [[n, f"{ms:,.2f}", f"{100 * ms / total:.1f}"] for n, ms in summary["regions_ms"].items()],
    )
    print_table(
        ["kernel", "region", "calls", "ms"],
        [
            [row["kernel"][:70], row["region"], str(row["calls"]), f"{row['ms']:.2f}"]
            for row in summary["kernels"][:12]
        ],
    )
    print_facts([("written", str(folder))])


def _against(measured: float, predicted: float | None) -> str:
    if not predicted:
        return ""
    return f"; predicted {predicted:,.3g}, {100 * (measured / predicted - 1):+.0f} %"
