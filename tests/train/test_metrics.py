import pytest
import torch

from vpmoe.models.router import router_health
from vpmoe.train.metrics import Stopwatch, loss_metrics, router_metrics


def test_losses_are_means_per_span_and_empty_spans_are_left_out():
    sums = {
        "loss": torch.tensor([0.0, 12.0, 0.0]),
        "tokens": torch.tensor([0.0, 4.0, 0.0]),
        "nll": torch.tensor([0.0, 12.0, 0.0]),
        "content_nll": torch.tensor([0.0, 6.0, 0.0]),
        "content_tokens": torch.tensor([0.0, 3.0, 0.0]),
    }
    assert loss_metrics(sums, torch.tensor([0.0, 0.25, 0.0])) == {
        "train/tokens/reasoning": 4,
        "train/scale/reasoning": 0.25,
        "train/loss/reasoning": 3.0,
        "train/nll/reasoning": 3.0,
        "train/content_loss/reasoning": 2.0,
        "train/tokens/final": 0,
    }


def test_router_numbers_are_logged_per_layer_and_over_layers():
    even, uneven = torch.ones(8), torch.tensor([1.0, 1, 2, 2, 0, 1, 1, 0])
    health = {
        "layers.1.mlp.router": router_health(even, torch.zeros(8)),
        "layers.2.mlp.router": router_health(uneven, torch.arange(8) * 0.1),
    }
    rows = router_metrics(health)
    assert rows["router/cv_pct/layer_02"] == 0
    assert rows["router/cv_pct/layer_03"] == pytest.approx(70.710678)
    assert rows["router/entropy/layer_03"] == pytest.approx(1.732868, abs=1e-6)
    assert rows["router/dead_experts"] == 2
    assert rows["router/max_load_pct"] == 25
    assert rows["router/bias_range"] == pytest.approx(0.7)
    assert router_metrics({}) == {}


def test_parts_of_a_step_add_up():
    watch = Stopwatch(torch.device("cpu"))
    with watch("step"):
        for _ in range(2):
            with watch("data"):
                sum(range(1000))
    assert watch.seconds["step"] >= watch.seconds["data"] > 0
    assert set(watch.metrics()) == {"time/step_s", "time/data_s"}
