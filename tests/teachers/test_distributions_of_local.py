"""What a local teacher says beyond log-probs: likeliest ids, draws, states; of any architecture."""

import json

import numpy as np
import pytest
import torch

from tests.teachers.test_local import build
from tests.teachers.tiny import SUBSET, random_sequences, tiny_model, write_teacher
from vpmoe.errors import TeacherError
from vpmoe.teachers.base import HiddenTeacher, SampledTeacher, TopTeacher
from vpmoe.vocabulary import RETURN, START, VOCAB_SIZE, VocabSubset


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return build(teacher_folder)


@pytest.fixture(scope="module")
def tables():
    """Sequences and the float64 log-probs of all known ids at every place."""
    sequences = random_sequences([5, 33, 1, 17])
    model, subset = tiny_model(len(SUBSET)).double(), VocabSubset(SUBSET)
    model.set_experts_implementation("eager")  # the other one knows no float64
    found = []
    with torch.no_grad():
        for sequence in sequences:
            rows = torch.from_numpy(subset.row_of[sequence])[None]
            found.append(model(rows).logits[0, :-1].log_softmax(-1).numpy())
    return sequences, found


def test_it_speaks_all_protocols(teacher):
    assert isinstance(teacher, TopTeacher)
    assert isinstance(teacher, SampledTeacher)
    assert isinstance(teacher, HiddenTeacher)


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_the_likeliest_ids_are_o200k_ids_with_unnormalized_logprobs(
    teacher_folder, tables, batch_tokens
):
    teacher = build(teacher_folder, batch_tokens=batch_tokens)
    sequences, dense = tables
    alone = teacher.score(sequences)
    for scores, table, logprobs in zip(teacher.score_top(sequences, 6), dense, alone, strict=True):
        expected = -np.sort(-table, axis=1)[:, :6]
        np.testing.assert_allclose(scores.top_logprobs, expected, atol=2e-5)
        rows = VocabSubset(SUBSET).row_of[scores.top_ids]  # two may be equal but for rounding
        named = np.take_along_axis(table, rows, axis=1)
        np.testing.assert_allclose(named, expected, atol=2e-5)
        np.testing.assert_allclose(scores.logprobs, logprobs, atol=2e-5)
        assert scores.top_ids.dtype == np.int32
        assert scores.top_logprobs.dtype == scores.logprobs.dtype == np.float32
        assert (np.exp(scores.top_logprobs).sum(axis=1) < 1).all()


def test_the_whole_vocabulary_adds_up_to_one(teacher):
    (scores,) = teacher.score_top(random_sequences([9]), len(SUBSET))
    np.testing.assert_allclose(np.exp(scores.top_logprobs).sum(axis=1), 1, atol=1e-5)
    with pytest.raises(TeacherError, match=f"{len(SUBSET) + 1} likeliest of {len(SUBSET)}"):
        teacher.score_top(random_sequences([9]), len(SUBSET) + 1)


def test_draws_do_not_depend_on_the_batch_and_average_to_the_distribution(teacher, tables):
    sequences, dense = tables
    together = teacher.score_sampled(sequences, 16, 3)
    for index, (sequence, scores) in enumerate(zip(sequences, together, strict=True)):
        (alone,) = teacher.score_sampled([sequence], 16, 3)
        np.testing.assert_array_equal(scores.ids, alone.ids)
        np.testing.assert_allclose(scores.log_weights, alone.log_weights, atol=1e-5)
        np.testing.assert_allclose(scores.logprobs, alone.logprobs, atol=2e-5)
        assert scores.ids.shape == (len(sequence) - 1, 16), index
    mean, seeds = np.zeros_like(dense[0]), 150
    subset = VocabSubset(SUBSET)
    for seed in range(seeds):
        (scores,) = teacher.score_sampled(sequences[:1], 16, seed)
        place, entry = np.nonzero(np.isfinite(scores.log_weights))
        rows = subset.row_of[scores.ids[place, entry]]
        np.add.at(mean, (place, rows), np.exp(scores.log_weights[place, entry]) / seeds)
    p = np.exp(dense[0])
    assert (np.abs(mean - p) < 5 * np.sqrt(p * (1 - p) / seeds / 16) + 1e-6).all()


def test_another_power_still_weighs_by_the_distribution(teacher, tables):
    sequences, dense = tables
    (scores,) = teacher.score_sampled(sequences[1:2], 4_096, 0, power=0.5)
    (plain,) = teacher.score_sampled(sequences[1:2], 4_096, 0)
    rows = VocabSubset(SUBSET).row_of
    mean = np.zeros_like(dense[1])
    place, entry = np.nonzero(np.isfinite(scores.log_weights))
    mean[place, rows[scores.ids[place, entry]]] = np.exp(scores.log_weights[place, entry])
    np.testing.assert_allclose(mean, np.exp(dense[1]), atol=0.01)
    assert np.isfinite(scores.log_weights).sum() > np.isfinite(plain.log_weights).sum()
    with pytest.raises(TeacherError, match="0 draws"):
        teacher.score_sampled(sequences, 0, 0)


def test_states_and_head_give_the_whole_distribution(teacher, tables):
    sequences, dense = tables
    for states, table in zip(teacher.hidden(sequences), dense, strict=True):
        logits = states.double() @ teacher.head_weight.double().T
        np.testing.assert_allclose(logits.log_softmax(-1).numpy(), table, atol=2e-5)
        assert not states.requires_grad
        weight = torch.ones(states.shape[1], requires_grad=True)
        (states * weight).square().sum().backward()  # as a loss would: kept for the backward


OTHERS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def other_model(name, vocab_size, **changes):
    import transformers

    config_class, model_class, defaults = OTHERS[name]
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, config_class)(**(settings | defaults | changes))
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("ids", [SUBSET, None], ids=["subset", "whole"])
def test_other_architectures_with_the_vocabulary(tmp_path, name, attention, ids):
    model = other_model(name, VOCAB_SIZE if ids is None else len(ids))
    model.save_pretrained(tmp_path)
    if ids is not None:
        (tmp_path / "vocab_ids.json").write_text(json.dumps(ids))
    sequence = np.array([START, 1428, 200_008, 1_007, 1_100, RETURN])
    known = np.arange(VOCAB_SIZE) if ids is None else np.array(ids)
    rows = torch.from_numpy(np.searchsorted(known, sequence))[None]
    with torch.no_grad():
        table = model(rows).logits[0, :-1].double().log_softmax(-1)
    teacher = build(tmp_path, attention=attention)
    (scores,) = teacher.score_top([sequence], 3)
    expected = table.gather(1, rows[0, 1:, None])[:, 0]
    np.testing.assert_allclose(scores.logprobs, expected.numpy(), atol=2e-5)
    np.testing.assert_array_equal(scores.top_ids, known[table.topk(3).indices.numpy()])


@pytest.mark.gpu
def test_a_gpu_names_the_same_ids(teacher_folder, teacher, tables):
    sequences = [sequence for sequence in tables[0] if len(sequence) > 1]
    on_gpu = build(teacher_folder, device="cuda")
    for ours, expected in zip(
        on_gpu.score_top(sequences, 6), teacher.score_top(sequences, 6), strict=True
    ):
        np.testing.assert_allclose(ours.top_logprobs, expected.top_logprobs, atol=1e-3)
        assert (ours.top_ids == expected.top_ids).mean() > 0.98
    for ours, expected in zip(
        on_gpu.score_sampled(sequences, 16, 3), teacher.score_sampled(sequences, 16, 3), strict=True
    ):
        assert (ours.ids == expected.ids).mean() > 0.95


def test_full_vocabulary_of_gpt_oss(tmp_path):
    teacher = build(write_teacher(tmp_path / "full", None, hidden_size=16, num_hidden_layers=1))
    sequence = np.array([START, 1428, 200_008, 4827, RETURN])
    model = tiny_model(VOCAB_SIZE, hidden_size=16, num_hidden_layers=1)
    with torch.no_grad():
        table = model(torch.from_numpy(sequence)[None]).logits[0, :-1].double().log_softmax(-1)
    (scores,) = teacher.score_top([sequence], 64)
    np.testing.assert_array_equal(scores.top_ids, table.topk(64).indices.numpy())
