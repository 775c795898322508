"""What surrounds the demo's stages: its folder, its fairness, its verdict."""

from pathlib import Path

import pytest

from vpmoe.config import load
from vpmoe.errors import RunError
from vpmoe.stages.base import SUMMARY_FILE
from vpmoe.stages.demo import (
    CONFIG_FILE,
    DemoConfig,
    _finish_baseline,
    _open_folder,
    _result,
    placed,
)
from vpmoe.storage.manifest import write_manifest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch) -> DemoConfig:
    monkeypatch.chdir(REPOSITORY)
    loaded = load(REPOSITORY / "configs/demo/demo.toml", DemoConfig, [f"run={tmp_path / 'demo'}"])
    return placed(loaded)


def test_the_baseline_is_the_first_stage_for_longer(config):
    """Same student, data, rows, rates and seed: more tokens and a full decay are all it gets."""
    ours, plain = config.warm_start, config.baseline
    own = {"run", "budget", "schedule"}
    assert plain.model_dump(exclude=own) == ours.model_dump(exclude=own)
    stages = (config.warm_start, config.offline, config.on_policy)
    assert plain.budget.tokens >= sum(stage.budget.tokens for stage in stages)
    assert plain.schedule.kind == config.offline.schedule.kind


def test_a_folder_is_gone_on_with_under_the_same_settings_only(config):
    folder = Path(config.run)
    _open_folder(folder, config, overwrite=False)
    (folder / "work").touch()
    _open_folder(folder, config, overwrite=False)
    assert (folder / "work").exists()
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(RunError, match="with other settings\\n  seed: 0 → 1"):
        _open_folder(folder, other, overwrite=False)
    _open_folder(folder, other, overwrite=True)
    assert [path.name for path in folder.iterdir()] == [CONFIG_FILE]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(config, overwrite):
    folder = Path(config.run)
    (folder / "1-warm-start").mkdir(parents=True)
    with pytest.raises(RunError, match="holds something else than a demo"):
        _open_folder(folder, config, overwrite=overwrite)
    assert (folder / "1-warm-start").exists()


def test_a_kill_while_an_old_demo_is_removed_leaves_nothing_to_go_on_with(config, monkeypatch):
    folder = Path(config.run)
    _open_folder(folder, config, overwrite=False)
    (folder / "1-warm-start").mkdir()

    def killed(path, **_):
        if Path(path).exists():
            (Path(path) / CONFIG_FILE).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("vpmoe.stages.demo.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        _open_folder(folder, config, overwrite=True)
    monkeypatch.undo()
    other = config.model_copy(update={"seed": 1})
    _open_folder(folder, other, overwrite=False)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == [CONFIG_FILE]


def test_a_kill_before_the_settings_were_written_is_gone_on_from(config):
    folder = Path(config.run)
    folder.mkdir()
    (folder / f"{CONFIG_FILE}.tmp").touch()
    _open_folder(folder, config, overwrite=False)
    assert (folder / CONFIG_FILE).exists()


class Ended:
    exitcode = 0

    def join(self) -> None:
        """It has ended."""


def test_a_baseline_with_fewer_tokens_is_no_comparison(config):
    for part in (config.warm_start, config.offline, config.on_policy, config.baseline):
        part.run_dir.mkdir(parents=True)
        write_manifest(part.run_dir / SUMMARY_FILE, {"tokens_seen": 100})
    with pytest.raises(RunError, match="the baseline saw 100 tokens, the three stages 300"):
        _finish_baseline(Ended(), config)  # pyright: ignore[reportArgumentType]
    write_manifest(config.baseline.run_dir / SUMMARY_FILE, {"tokens_seen": 300})
    _finish_baseline(Ended(), config)  # pyright: ignore[reportArgumentType]


def report(low: float, share: float, high: float, tokens: int | None = None) -> dict:
    match = {"total": {"share": share, "low": low, "high": high}}
    model = {} if tokens is None else {"tokens_seen": tokens}
    return {"model": model, "exact_match": match, "format": {"valid": {"share": 1.0}}}


@pytest.mark.parametrize(
    ("ours", "ahead", "apart"),
    [
        ((0.3, 0.4, 0.5), False, False),
        ((0.5, 0.6, 0.7), True, False),
        ((0.7, 0.8, 0.9), True, True),
    ],
)
def test_the_verdict_is_what_the_intervals_say(config, ours, ahead, apart):
    reports = {"teacher": report(0.9, 1.0, 1.0), "baseline": report(0.4, 0.5, 0.6, 90)}
    reports |= {
        "1-a": report(0, 0.1, 1, 10),
        "2-b": report(0, 0.2, 1, 20),
        "3-c": report(*ours, 30),
    }
    result = _result(config, reports)
    assert (result["beats_baseline"], result["intervals_apart"]) == (ahead, apart)
    assert ("beat the baseline at no more tokens" in result["verdict"]) == apart
    assert ("did not beat" in result["verdict"]) == (not ahead)
    assert [row["tokens"] for row in result["rows"]] == [None, 90, 10, 30, 60]
