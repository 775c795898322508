"""A tiny problem dataset and a tiny student over its vocabulary."""

import numpy as np
import pytest

from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.problems import generate, write_problems
from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.moe import MoeConfig
from vpmoe.models.router import DeepseekV3Config
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.vocabulary import STOP_TOKENS

RENDER = RenderConfig(system=False)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    write_problems(folder / "rows.parquet", generate(120, seed=1))
    config = DataConfig(
        input=str(folder / "rows.parquet"),
        output=str(folder / "data"),
        seq_len=256,
        valid_fraction=0.2,
        render=RENDER,
    )
    build_dataset(config)
    return folder / "data"


@pytest.fixture(scope="session")
def vocab(data_dir):
    used = [
        np.unique(d.tokens(i))
        for d in (Dataset(data_dir, "train"), Dataset(data_dir, "valid"))
        for i in range(len(d))
    ]
    asked = [Renderer(RENDER).prompt(p.query) for p in generate(8, seed=4, split="held-out")]
    return tuple(np.unique(np.concatenate([*used, *asked, STOP_TOKENS])).tolist())


@pytest.fixture
def student(vocab):
    config = StudentConfig(
        name="tiny",
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_subset=vocab,
        global_every=3,
        local_attention=TpaConfig(window_size=16),
        dense_hidden=32,
        moe=MoeConfig(
            num_experts=8,
            num_experts_per_token=2,
            expert_hidden=16,
            shared_expert_hidden=16,
            router=DeepseekV3Config(num_groups=4, num_groups_kept=2),
        ),
        init_std=0.2,
    )
    return build_student(config, seed=0)
