"""Each tracker reads the same lines that metrics.jsonl holds, and nothing is sent anywhere."""

import importlib.util
import sqlite3

import pytest

from tests.train.toy import run, train_config
from vpmoe.errors import RunError
from vpmoe.storage.runs import read_metrics
from vpmoe.train.trackers import TensorBoardConfig, WandbConfig

NAME = "train/loss/final"


def installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def written(run_dir) -> list[float]:
    return [row[NAME] for row in read_metrics(run_dir)]


def test_tensorboard_holds_the_stream_once_even_after_a_resumption(tmp_path):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = train_config(
        tmp_path / "run",
        trackers=[{"kind": "tensorboard"}],
        checkpoint={"every_steps": 2, "keep": 0},
    )
    run(config)
    (tmp_path / "run" / "step-000004").rename(tmp_path / "gone")
    run(config, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars(NAME)
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert [event.value for event in found] == pytest.approx(written(tmp_path / "run"))


def test_trackio_holds_the_stream_in_a_local_database(tmp_path, monkeypatch):
    installed("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    run(train_config(tmp_path / "run", trackers=[{"kind": "trackio", "project": "test"}]))
    databases = list((tmp_path / "trackio").glob("*.db"))
    assert len(databases) == 1
    with sqlite3.connect(databases[0]) as database:
        steps = database.execute("SELECT step FROM metrics ORDER BY step").fetchall()
    assert [step for (step,) in steps] == [1, 2, 3, 4]


def test_wandb_writes_offline_files(tmp_path, monkeypatch):
    installed("wandb")
    monkeypatch.chdir(tmp_path)
    run(train_config(tmp_path / "run", trackers=[{"kind": "wandb"}]))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("config", [TensorBoardConfig(), WandbConfig()])
def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch, config):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = type(config).module
    with pytest.raises(RunError, match=f"{name} is not installed"):
        run(train_config(tmp_path / "run", trackers=[{"kind": config.kind}]))
