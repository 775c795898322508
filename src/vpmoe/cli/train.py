"""`vpmoe train`: run one stage."""

import importlib
import os
from typing import Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, DryRun, Json, Overrides
from vpmoe.cli.render import print_facts, print_json
from vpmoe.errors import ConfigError

RunName = Annotated[
    str, typer.Option("--run", metavar="NAME", help="Folder under runs/, or a path with a slash.")
]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: RunName = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on at the last checkpoint.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a student by one stage: warm_start, offline or on_policy.

    The run's folder is what --run says, else the config's `run`, else runs/ and the config's
    name. --resume refuses a config that has changed, and shows the difference. Several GPUs:
    torchrun --nproc-per-node 8 -m vpmoe train CONFIG
    """
    from vpmoe.cli.kinds import load_any
    from vpmoe.cli.sizing import facts
    from vpmoe.config import fingerprint, resolved
    from vpmoe.stages.base import StageConfig

    words = list(overrides or [])
    if run:
        words.append(f"run={run if '/' in run else f'runs/{run}'}")
    settings = load_any(config, words)
    if not isinstance(settings, StageConfig):
        kind = resolved(settings)["kind"]
        raise ConfigError([(f"{config} is of kind {kind}, which is not trained", _verb_for(kind))])
    if not settings.run:
        settings = settings.model_copy(update={"run": f"runs/{config.stem}"})
    if dry_run:
        screen = [("run", str(settings.run_dir)), *facts(settings)]
        print_facts([*screen, ("fingerprint", fingerprint(resolved(settings)))])
        return
    _start(settings, resume=resume, as_json=as_json)


def _start(settings: object, *, resume: bool, as_json: bool) -> None:
    from vpmoe.train.hooks import ProgressBar

    stage = importlib.import_module(type(settings).__module__)
    summary = stage.run(settings, resume=resume, observers=[ProgressBar()])
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes: the first one speaks
    if as_json:
        print_json(summary)
        return
    facts = [("run", f"{summary['run']}, {summary['step']:,} steps")]
    facts.append(("tokens", f"{summary['tokens_seen']:,} trained on"))
    for name, found in summary.get("stop", {}).items():
        said = {True: "reached", False: "not reached", None: "not measured"}[found["holds"]]
        why = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if type(v) is float)
        facts.append((name, f"{said}: {found.get('why') or why}"))
    print_facts(facts)


def _verb_for(kind: str) -> str:
    verbs = {"data": "vpmoe data build", "score": "vpmoe score", "student": "vpmoe count"}
    return f"use: {verbs.get(kind, 'vpmoe check')} CONFIG"
