"""A tiny student with a vocabulary subset, shared by the tests of exports."""

import pytest

from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.moe import MoeConfig
from vpmoe.models.router import DeepseekV3Config
from vpmoe.models.student import Student, StudentConfig, build_student
from vpmoe.vocabulary import END_OF_TEXT, SPECIAL_TOKENS

HEADER_WORDS = (1_428, 17_196, 35_644, 173_781)
SUBSET = tuple(sorted({*range(50, 400), *HEADER_WORDS, *SPECIAL_TOKENS.values(), END_OF_TEXT}))


@pytest.fixture(scope="session")
def tiny_student() -> Student:
    config = StudentConfig(
        name="tiny",
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_subset=SUBSET,
        global_every=3,
        local_attention=TpaConfig(window_size=8),
        dense_hidden=32,
        moe=MoeConfig(
            num_experts=8,
            num_experts_per_token=2,
            expert_hidden=16,
            shared_expert_hidden=16,
            router=DeepseekV3Config(num_groups=4, num_groups_kept=2),
        ),
        init_std=0.3,
    )
    return build_student(config, seed=0)
