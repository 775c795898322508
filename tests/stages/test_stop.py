import pytest

from vpmoe.stages.stop import StopConfig, stop_report


def row(tokens, loss=None, **values):
    held_out = {} if loss is None else {"valid/loss/reasoning": loss, "valid/loss/final": loss}
    return {"tokens_seen": tokens, **held_out, **values}


def test_nothing_measured_is_said_not_guessed():
    report = stop_report([row(10)], StopConfig())
    assert [report[name]["holds"] for name in ("format", "stable", "plateau")] == [None] * 3
    assert "valid.every_steps" in report["plateau"]["why"]


@pytest.mark.parametrize(("last", "holds"), [(0.995, True), (0.98, False)])
def test_plateau_is_the_fall_over_the_last_tenth(last, holds):
    rows = [row(500, 2.0), row(900, 1.0), row(950, 0.999), row(1000, last)]
    found = stop_report(rows, StopConfig())["plateau"]
    assert found["improvement_pct"] == pytest.approx(100 * (1 - last))
    assert found["holds"] is holds


def test_divergence_and_dead_experts_are_not_stable():
    health = {"router/active_experts_mean": 15.0, "router/dead_experts": 2.0}
    layers = {"router/active_experts/layer_02": 15.0, "router/active_experts/layer_03": 15.0}
    rows = [row(1, 1.0), row(2, 1.04, **health, **layers)]
    found = stop_report(rows, StopConfig())["stable"]
    assert found["dead_experts_pct"] == pytest.approx(100 * 2 / 32)
    assert found["above_best_pct"] == pytest.approx(4.0)
    assert found["holds"] is False
    assert stop_report(rows, StopConfig(dead_experts_pct=10))["stable"]["holds"] is True
    assert stop_report([*rows, row(3, 1.06)], StopConfig())["stable"]["holds"] is False


def test_format_is_the_last_share():
    rows = [row(1, **{"valid/format_valid_pct": 99.0}), row(2, **{"valid/format_valid_pct": 90.0})]
    assert stop_report(rows, StopConfig())["format"] == {"holds": False, "format_valid_pct": 90.0}
