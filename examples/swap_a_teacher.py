"""Another teacher: token pairs, counted. Not a good one, but a teacher all the same.

A teacher is one file: who it is, what it provides, and `score`. In the package it would lie in
`src/vpmoe/teachers/` with a config whose `build` makes it; the one line to add is that config in
the union of `teachers/__init__.py`.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from vpmoe.data.build import DataConfig, RenderConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.problems import generate, write_problems
from vpmoe.stages.score import ScoreConfig, score_dataset
from vpmoe.teachers import LocalTeacherConfig
from vpmoe.teachers.base import TEACHER_LOGPROBS, Teacher, TeacherIdentity
from vpmoe.vocabulary import O200K_SHA256, VOCAB_SIZE


class PairTeacher:
    """log p(next | token), from add-one counts over a dataset."""

    identity = TeacherIdentity("pairs", "", "none", "float64", "none", O200K_SHA256)
    provides = frozenset({TEACHER_LOGPROBS})

    def __init__(self, dataset: Dataset) -> None:
        self.pairs, self.firsts = Counter(), Counter()
        for index in range(len(dataset)):
            tokens = dataset.conversation(index).tokens.tolist()
            self.firsts.update(tokens[:-1])
            self.pairs.update(pairwise(tokens))

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of every token after the first."""
        return [
            np.array([self._score(*pair) for pair in pairwise(s.tolist())], np.float32)
            for s in sequences
        ]

    def _score(self, first: int, second: int) -> float:
        return float(np.log((self.pairs[first, second] + 1) / (self.firsts[first] + VOCAB_SIZE)))


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    write_problems(folder / "rows.parquet", generate(100, seed=0))
    rows, out = str(folder / "rows.parquet"), folder / "dataset"
    build_dataset(DataConfig(input=rows, output=out, render=RenderConfig(system=False)))
    dataset = Dataset(out, "train")
    teacher: Teacher = PairTeacher(dataset)
    unused = LocalTeacherConfig(path="none")  # the stage is given the teacher itself
    config = ScoreConfig(data=out, output=folder / "targets", teacher=unused)
    manifest = score_dataset(dataset, teacher, config)
    for span in ("reasoning", "final"):
        print(f"{span}: {manifest['teacher_logprobs'][span]['mean']:.3f} nats per token")
