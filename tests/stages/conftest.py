"""A tiny dataset of verifiable problems, and the words a student needs for it."""

import numpy as np
import pytest

from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig
from vpmoe.data.problems import generate, write_problems
from vpmoe.vocabulary import STOP_TOKENS


@pytest.fixture(scope="session")
def problems_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    write_problems(folder / "rows.parquet", generate(150, seed=1))
    build_dataset(
        DataConfig(
            input=str(folder / "rows.parquet"),
            output=str(folder / "data"),
            seq_len=256,
            valid_fraction=0.2,
            render=RenderConfig(system=False),
        )
    )
    return folder / "data"


@pytest.fixture(scope="session")
def problem_vocab(problems_dir):
    splits = [Dataset(problems_dir, "train"), Dataset(problems_dir, "valid")]
    used = [np.unique(d.tokens(i)) for d in splits for i in range(len(d))]
    return tuple(np.unique(np.concatenate([*used, STOP_TOKENS])).tolist())
