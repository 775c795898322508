"""The student's config: presets, per-layer kinds, refusals with their words."""

from pathlib import Path

import pytest

from tests.models.test_student import TREE
from vpmoe.config import apply_overrides, load, validate
from vpmoe.errors import ConfigError
from vpmoe.models.attention.gqa import GqaConfig
from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.student import StudentConfig

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "models"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(StudentConfig, apply_overrides(TREE, overrides), source="t")
    return str(caught.value)


def test_vpmoe_6b_is_as_locked():
    config = load(PRESETS / "vpmoe-6b.toml", StudentConfig)
    layers = range(1, 81)
    assert [n for n in layers if config.is_global(n)] == list(range(4, 81, 4))
    assert [n for n in layers if not config.is_moe(n)] == [1]
    assert config.attention_of(1) == TpaConfig(rank=2, q_rank=4, window_size=128)
    assert config.attention_of(80) == GqaConfig()
    assert config.local_attention.position.kind == "grape_m"
    assert config.local_attention.position.log_freq_scale == 16
    assert config.load_balance == 1e-4
    assert (config.norm_eps, config.tie_embeddings, config.vocab_size) == (1e-6, False, 201_088)


def test_gpt_oss_alternates_from_a_sliding_layer():
    config = load(PRESETS / "gpt-oss-20b.toml", StudentConfig)
    windows = [config.attention_of(n).window_size for n in range(1, 25)]
    assert windows == [128, None] * 12
    assert config.load_balance == 0


def test_full_attention_everywhere_is_one_key():
    config = load(PRESETS / "vpmoe-4.5b-gqa.toml", StudentConfig)
    assert {config.attention_of(n).kind for n in range(1, 81)} == {"gqa"}
    assert list(config.attention_kinds) == ["global"]
    assert list(load(PRESETS / "vpmoe-6b.toml", StudentConfig).attention_kinds) == [
        "local",
        "global",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("num_kv_heads=3", "num_heads 4 does not divide by num_kv_heads 3"),
        ("head_dim=7", "head_dim 7 is odd"),
        ("local_attention.window_size=0", "window_size"),
        ("moe.num_experts_per_token=9", "9 experts per token of only 8"),
        ("moe.router.num_groups=3", "8 experts do not split into 3 groups"),
        ("moe.router.num_groups_kept=5", "keeps 5 of 4 groups"),
        ("moe.num_experts_per_token=5", "5 experts per token, but kept groups hold only 4"),
        ("moe.router.group_score_topk=3", "group_score_topk 3 of groups of 2"),
        ("dense_layers=6", "dense_layers 6 is more than num_layers 5"),
        ("dense_layers=5", "the [moe] table would never be used"),
        ("vocab_subset=[1, 199999]", "vocab_size is set too"),
    ],
)
def test_what_does_not_fit_is_refused(override, said):
    assert said in refusal(override)


def test_experts_are_needed_where_layers_are_not_dense():
    tree = {key: value for key, value in TREE.items() if key != "moe"}
    with pytest.raises(ConfigError, match=r"need a \[moe\] table"):
        validate(StudentConfig, tree, source="t")


def test_vocab_subset_must_hold_the_padding_id_in_order():
    tree = {key: value for key, value in TREE.items() if key != "vocab_size"}
    with pytest.raises(ConfigError, match="lacks 199999, the id that pads"):
        validate(StudentConfig, {**tree, "vocab_subset": [1, 2]}, source="t")
    with pytest.raises(ConfigError, match="not strictly increasing"):
        validate(StudentConfig, {**tree, "vocab_subset": [199_999, 2]}, source="t")


def test_vocab_subset_from_a_file(tmp_path):
    tree = {key: value for key, value in TREE.items() if key != "vocab_size"}
    as_json, as_text = tmp_path / "ids.json", tmp_path / "ids.txt"
    as_json.write_text("[5, 8, 199999]")
    as_text.write_text("5\n8\n199999\n")
    for path in (as_json, as_text):
        config = validate(StudentConfig, {**tree, "vocab_subset": str(path)}, source="t")
        assert config.vocab_subset == (5, 8, 199_999)
        assert config.num_rows == 3
    as_text.write_text("5 eight")
    with pytest.raises(ConfigError, match=r"ids\.txt is not a list of token ids"):
        validate(StudentConfig, {**tree, "vocab_subset": str(as_text)}, source="t")
    with pytest.raises(ConfigError, match="cannot read"):
        validate(StudentConfig, {**tree, "vocab_subset": str(tmp_path / "no")}, source="t")
