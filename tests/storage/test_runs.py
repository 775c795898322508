import json
import resource
import subprocess
import sys

import pytest

from vpmoe.errors import DataError, RunError
from vpmoe.storage.runs import RunDir, read_config, read_metrics

HOLD = """
import sys, time
from vpmoe.storage.runs import RunDir
with RunDir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lines_come_back_in_order_and_nan_is_null(tmp_path):
    with RunDir(tmp_path / "run") as run:
        run.log(1, {"train/loss/final": 2.5, "note": "a"})
        run.log(2, {"train/loss/final": float("nan")})
    rows = list(read_metrics(tmp_path / "run"))
    assert rows == [
        {"step": 1, "train/loss/final": 2.5, "note": "a"},
        {"step": 2, "train/loss/final": None},
    ]


def test_truncation_drops_later_lines_and_a_torn_one_and_goes_on(tmp_path):
    with RunDir(tmp_path) as run:
        for step in range(1, 6):
            run.log(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    with RunDir(tmp_path) as run:
        run.truncate_metrics(3)
        run.log(4, {"x": 40})
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_config_is_written_whole(tmp_path):
    assert read_config(tmp_path) is None
    with RunDir(tmp_path) as run:
        run.write_config({"a": {"b": 1}})
    assert read_config(tmp_path) == {"a": {"b": 1}}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": {"b": 1}}


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
            RunDir(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    with RunDir(tmp_path) as run:
        run.log(1, {})


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="cannot use run folder"):
        RunDir(tmp_path / "run")


def test_a_full_disk_is_one_clear_line_and_the_rest_stays_readable(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunDir(tmp_path) as run:
        run.log(1, {"x": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
        try:
            with pytest.raises(DataError, match=r"metrics\.jsonl"):
                for step in range(2, 9):
                    run.log(step, {"x": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
