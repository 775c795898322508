import pytest
import torch

from vpmoe.config import validate
from vpmoe.errors import ConfigError
from vpmoe.losses import ConfidenceWeightedConfig, LossInputs
from vpmoe.losses.chunked import chunked_loss_reference
from vpmoe.losses.confidence_weighted import confidence_weights

TEACHER = torch.tensor([-0.1, -2.0, -5.0])


def inputs_of(student_logprobs, teacher_logprobs, span_ids):
    """Rows over two tokens, the label being token 0 with the wanted log-probability."""
    logits = -((-student_logprobs.double()).expm1()).log()
    hidden = torch.stack([logits, torch.zeros_like(logits)], dim=1)
    return LossInputs(
        hidden=hidden.requires_grad_(),
        head_weight=torch.eye(2, dtype=torch.float64),
        labels=torch.zeros(len(logits), dtype=torch.long),
        span_ids=torch.tensor(span_ids, dtype=torch.uint8),
        content_mask=torch.ones(len(logits), dtype=torch.bool),
        teacher_logprobs=teacher_logprobs,
    )


def test_worked_example():
    """m = -1, log q [-.1, -2, -5], log p [-.5, -1.5, -3]: mean .843874."""
    weights = confidence_weights(TEACHER.double(), torch.full((3,), -1.0).double())
    assert weights.tolist() == pytest.approx([2.459603, 0.367879, 0.25], abs=5e-7)
    loss = ConfidenceWeightedConfig().build()
    loss.load_state_dict({"centers": torch.tensor([torch.nan, -1.0, torch.nan])})
    inputs = inputs_of(torch.tensor([-0.5, -1.5, -3.0]), TEACHER, [1, 1, 1])
    output = loss(inputs, torch.tensor([0, 1 / 3, 0]))
    assert output.total.item() == pytest.approx(0.843874, abs=5e-7)
    assert output.metrics["weight"][1].item() == pytest.approx(3.077482, abs=1e-6)


def test_weights_are_constants_to_the_gradient():
    inputs = inputs_of(torch.tensor([-0.5, -1.5, -3.0]), TEACHER, [1, 2, 1])
    loss = ConfidenceWeightedConfig().build()
    loss.load_state_dict({"centers": torch.tensor([torch.nan, -1.0, -3.0])})
    scales = torch.tensor([0, 0.5, 2.0], dtype=torch.float64)
    total = loss(inputs, scales).total
    weights = confidence_weights(TEACHER.double(), torch.tensor([-1.0, -3.0, -1.0]).double())
    expected = chunked_loss_reference(
        inputs.hidden,
        inputs.head_weight,
        inputs.labels,
        scales[inputs.span_ids.long()] * weights,
        lambda logprobs: -logprobs,
    )
    (found,) = torch.autograd.grad(total, inputs.hidden)
    (wanted,) = torch.autograd.grad(expected, inputs.hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_weight_grows_with_confidence_between_its_clips():
    logprobs = torch.linspace(-9, 0, 50)
    weights = confidence_weights(logprobs, torch.full((50,), -2.0), min_weight=0.5, max_weight=3.0)
    assert (weights.diff() >= 0).all()
    assert weights.min().item() == pytest.approx(0.5)
    assert weights.max().item() == pytest.approx(3.0)
    assert confidence_weights(torch.tensor([-2.0]), torch.tensor([-2.0])).item() == 1.0


def test_the_first_batch_sets_the_center_and_weighs_one():
    loss = ConfidenceWeightedConfig(center_decay=0.9).build()
    inputs = inputs_of(torch.tensor([-0.5, -1.5, -3.0]), TEACHER, [1, 1, 1])
    output = loss(inputs, torch.ones(3))
    assert output.metrics["weight"].tolist() == [0, 3, 0]
    loss.after_step(output.sums)
    centers = loss.state_dict()["centers"]
    assert centers.dtype == torch.float32
    assert centers[1].item() == pytest.approx(-7.1 / 3)
    assert centers[[0, 2]].isnan().all()  # spans never seen
    loss.after_step(
        {"tokens": torch.tensor([0, 4, 2]), "teacher_logprob": torch.tensor([0.0, -4.0, -6.0])}
    )
    centers = loss.state_dict()["centers"]
    assert centers[1].item() == pytest.approx(0.9 * -7.1 / 3 - 0.1)
    assert centers[2].item() == -3.0


def test_state_survives_a_checkpoint():
    loss = ConfidenceWeightedConfig().build()
    loss.after_step(
        {"tokens": torch.tensor([0, 4, 2]), "teacher_logprob": torch.tensor([0.0, -4.0, -6.0])}
    )
    again = ConfidenceWeightedConfig().build()
    again.load_state_dict(loss.state_dict())
    inputs = inputs_of(torch.tensor([-0.5, -1.5, -3.0]), TEACHER, [1, 2, 1])
    assert torch.equal(loss(inputs, torch.ones(3)).total, again(inputs, torch.ones(3)).total)


def test_crossed_clips_are_refused():
    with pytest.raises(ConfigError, match=r"min_weight 5\.0 is above max_weight 4\.0"):
        validate(ConfidenceWeightedConfig, {"min_weight": 5.0}, source="run.toml")
