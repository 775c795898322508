"""Counts against the architecture's published budget and the public teachers' sizes."""

from dataclasses import replace
from pathlib import Path

import pytest

from vpmoe.config import load
from vpmoe.models.count import count, visible_pairs
from vpmoe.models.student import StudentConfig

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "models"


def preset(name: str, *overrides: str) -> StudentConfig:
    return load(PRESETS / f"{name}.toml", StudentConfig, overrides)


def test_vpmoe_6b_equals_the_published_budget_plus_its_additions():
    report = count(preset("vpmoe-6b"))
    extra = sum(report.additions.values())
    assert report.additions == {"tpa mixture biases": 2_400}
    assert report.total - extra == 6_022_571_535
    assert report.active - extra == 780_874_767
    assert report.active_without_embeddings - extra == 369_046_543


def test_vpmoe_6b_items():
    items = {item.name: item for item in count(preset("vpmoe-6b")).items}
    assert items["routed experts"].total == 79 * 67_403_776
    assert items["routed experts"].active == 79 * 67_403_776 * 4 // 256
    assert items["shared experts"].total == 79 * 1_050_112
    assert items["attention output"].total == 80 * 1_049_600
    assert items["global attention (gqa)"].total == 20 * 1_574_400
    assert items["local attention (tpa)"].total == 60 * (1_089_536 + 1_536)
    assert items["routers"].total == 79 * 262_144
    assert items["router biases"].total == 79 * 256
    assert items["value residual"].total == 79
    assert items["position frequencies"].total == 64
    assert items["sinks"].total == 80 * 8


def test_items_add_up():
    for path in sorted(PRESETS.glob("*.toml")):
        report = count(load(path, StudentConfig))
        assert sum(item.total for item in report.items) == report.total, path.stem
        assert sum(item.active for item in report.items) == report.active, path.stem


@pytest.mark.parametrize(
    ("name", "total", "active", "without_input"),
    [
        ("gpt-oss-20b", 20_914_757_184, 4_187_440_704, 3_608_307_264),
        ("gpt-oss-120b", 116_829_156_672, 5_711_982_912, 5_132_849_472),
    ],
)
def test_teachers_have_their_public_sizes(name, total, active, without_input):
    report = count(preset(name))
    assert (report.total, report.active) == (total, active)
    embedding = next(item for item in report.items if item.name == "embedding")
    assert report.active - embedding.active == without_input


def test_router_bias_is_one_key():
    report = count(preset("vpmoe-6b", "moe.router.bias=false"))
    assert report.total == 6_022_571_535 + 2_400 - 79 * 256


def test_visible_pairs():
    assert visible_pairs(2_048, 128) == 254_016
    assert visible_pairs(2_048, None) == 2_048 * 2_049 // 2
    assert visible_pairs(5, 128) == 15


def test_flops_of_the_flagship():
    # 6 operations per active weight that is multiplied, plus attention: about 3.8 GFLOP at 2,048.
    report = count(preset("vpmoe-6b"), seq_len=2_048)
    assert report.training_flops_per_token == pytest.approx(3.79e9, rel=0.01)
    longer = count(preset("vpmoe-6b"), seq_len=4_096)
    more = longer.forward_flops_per_token - report.forward_flops_per_token
    local = 60 * (visible_pairs(4_096, 128) / 4_096 - visible_pairs(2_048, 128) / 2_048)
    assert more == pytest.approx(4 * 1_024 * (20 * 1_024 + local))


def test_reach_of_distance_penalties_is_reported():
    assert count(preset("tiny")).penalty_reach_tokens == (40, 160, 640, 2_560)
    flagship = count(preset("vpmoe-6b")).penalty_reach_tokens
    assert flagship == (20, 40, 80, 160, 320, 640, 1_280, 2_560)
    assert count(preset("gpt-oss-20b")).penalty_reach_tokens == ()


def test_tying_drops_one_table_and_no_flops():
    untied, tied = count(preset("tiny")), count(preset("tiny", "tie_embeddings=true"))
    assert untied.total - tied.total == 201_088 * 32
    assert untied.forward_flops_per_token == tied.forward_flops_per_token


def test_report_is_json_ready():
    report = count(preset("tiny"))
    tree = report.as_dict()
    assert tree["total"] == report.total
    assert tree["items"][0] == {"name": "embedding", "total": 6_434_816, "active": 6_434_816}
    assert replace(report, seq_len=1).seq_len == 1
