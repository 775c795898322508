"""A store as a teacher: it speaks of its dataset and of nothing else."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from vpmoe.errors import DataError
from vpmoe.teachers import RecordedTeacherConfig, TeacherConfig
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TEACHER_LOGPROBS
from vpmoe.teachers.shards import SampleTargets
from vpmoe.teachers.store import TargetWriter


def test_it_gives_back_what_was_written_and_cannot_score_new_text(tmp_path):
    with TargetWriter(tmp_path, {"split": "train"}) as writer:
        spans = np.array([0, 1, 2, 0], dtype=np.uint8)
        writer.write(0, [SampleTargets("a", spans, np.array([-1.5, -0.5]))])
        writer.finish(1)
    config = TypeAdapter(TeacherConfig).validate_python({"kind": "recorded", "path": tmp_path})
    assert isinstance(config, RecordedTeacherConfig)
    assert TEACHER_LOGPROBS in config.provides and ROLLOUT_LOGPROBS not in config.provides
    assert config.build()["a"].tolist() == [0, -1.5, -0.5, 0]


def test_an_unfinished_store_is_refused_when_it_is_opened(tmp_path):
    TargetWriter(tmp_path, {"split": "train"}).close()
    with pytest.raises(DataError, match="has no manifest"):
        RecordedTeacherConfig(path=tmp_path).build()
