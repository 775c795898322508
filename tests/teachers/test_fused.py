"""Packed rows: the layout by hand, the network against sequences alone, the kernels on a GPU."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.kernels.common import needs_gpu
from tests.teachers.test_distribution import by_sorting
from tests.teachers.test_distributions_of_local import OTHERS, other_model
from tests.teachers.tiny import SUBSET, random_sequences, tiny_model
from vpmoe.errors import TeacherError
from vpmoe.teachers import fused
from vpmoe.teachers.base import TeacherIdentity
from vpmoe.teachers.fused import MIN_ROW, PackedNetwork, fill_rows, lay_out, row_length
from vpmoe.teachers.local import LocalTeacher, LocalTeacherConfig
from vpmoe.vocabulary import VocabSubset

IDENTITY = TeacherIdentity("t", "", "0", "float32", "none", "0")


def test_a_row_by_hand():
    row = lay_out([np.array([7, 8, 9]), np.array([4]), np.array([5, 6])], 8)
    assert row.tokens.tolist() == [7, 8, 9, 4, 5, 6, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert row.documents.tolist() == [0, 0, 0, 1, 2, 2, -1, -1]
    assert row.places.tolist() == [0, 1, 4]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
def test_every_sequence_has_a_place_and_no_two_rows_would_fit_in_one(lengths, batch_tokens):
    rows = fill_rows(lengths, batch_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(
        size <= batch_tokens or len(row) == 1
        for row in rows
        for size in [sum(lengths[i] for i in row)]
    )
    assert len(sizes) < 2 or sizes[0] + sizes[1] > batch_tokens


def test_rows_have_few_lengths():
    lengths = {row_length(n, 5_000) for n in range(1, 20_000)}
    assert lengths == {1_024, 2_048, 4_096, 5_120, 8_192, 16_384, 32_768}
    for tokens in (1, 1_024, 1_025, 5_000, 5_120, 5_121, 9_000):
        assert row_length(tokens, 5_000) >= tokens
    assert MIN_ROW % 128 == 0  # a block of the attention's mask


def packed_in_eager(model, sequences):
    """The packed network as PyTorch runs it uncompiled: the arithmetic without the kernels."""
    network = PackedNetwork(model, batch_tokens=1_024)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return network._run(lay_out(sequences, 256))


def alone(model, sequences):
    with torch.no_grad():
        return [
            model.base_model(input_ids=torch.from_numpy(s)[None]).last_hidden_state[0, :-1]
            for s in sequences
        ]


@pytest.mark.parametrize("name", ["gpt_oss", *OTHERS])
def test_packed_rows_equal_sequences_alone(name):
    if name == "gpt_oss":
        model = tiny_model(len(SUBSET), head_dim=16)
    else:
        model = other_model(name, len(SUBSET), head_dim=16)
    random = np.random.default_rng(0)
    sequences = [random.integers(0, len(SUBSET), n) for n in (40, 7, 30, 1, 3, 50)]
    expected = torch.cat(alone(model, sequences))
    hidden, labels = packed_in_eager(model, sequences)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=3e-5)
    assert torch.equal(labels, torch.from_numpy(np.concatenate([s[1:] for s in sequences])))


def test_attention_across_sequences_is_noticed(monkeypatch):
    from vpmoe.kernels import packed

    honest = packed.block_scope

    def leaky(documents, *, window_size):
        return honest(torch.zeros_like(documents), window_size=window_size)

    monkeypatch.setattr(packed, "block_scope", leaky)
    with pytest.raises(TeacherError, match="answers otherwise in a packed row"):
        PackedNetwork(tiny_model(len(SUBSET), head_dim=16), batch_tokens=1_024)


def test_generation_runs_as_transformers_does(monkeypatch):
    model = tiny_model(len(SUBSET), head_dim=16)
    prompts = random_sequences([6, 9])
    expected = LocalTeacher(model, identity=IDENTITY, subset=VocabSubset(SUBSET)).complete(
        prompts, max_new_tokens=5
    )
    teacher = LocalTeacher(model, identity=IDENTITY, subset=VocabSubset(SUBSET), fused=True)
    found = teacher.complete(prompts, max_new_tokens=5)
    assert [list(c) for c in found] == [list(c) for c in expected]
    assert model.config._attn_implementation == fused.ATTENTION


def test_what_the_kernels_do_not_know_is_refused():
    with pytest.raises(TeacherError, match="kernels 'fused' for heads of 8"):
        PackedNetwork(tiny_model(len(SUBSET)), batch_tokens=1_024)
    model = tiny_model(len(SUBSET), head_dim=16)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(TeacherError, match="layers of kind full_attention, linear_attention"):
        PackedNetwork(model, batch_tokens=1_024)


def test_the_config_asks_for_a_gpu_and_no_other_attention():
    with pytest.raises(ValidationError, match="needs device = 'cuda'"):
        LocalTeacherConfig(path="t", kernels="fused")
    with pytest.raises(ValidationError, match="brings its own attention"):
        LocalTeacherConfig(path="t", kernels="fused", device="cuda", attention="sdpa")
    config = LocalTeacherConfig(path="t", kernels="fused", device="cuda")
    assert json.loads(config.model_dump_json())["kernels"] == "fused"


GPU_IDS = sorted({*SUBSET, *range(5_000, 6_300)})
GPU_SHAPE = {
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": 16,
}


def on_both(dtype):
    """A tiny GPT-OSS: the float32 reference on the CPU, and a fused copy on the GPU."""
    settings = {"identity": IDENTITY, "subset": VocabSubset(GPU_IDS), "batch_tokens": 1_024}
    reference = LocalTeacher(tiny_model(len(GPU_IDS), **GPU_SHAPE), **settings)
    copy = tiny_model(len(GPU_IDS), **GPU_SHAPE).to("cuda", dtype)
    return reference, LocalTeacher(copy, fused=True, **settings)


def flat(scores, name):
    return np.concatenate([getattr(s, name).reshape(-1) for s in scores])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [(torch.float32, 2e-4, 2e-5), (torch.bfloat16, 5.0, 0.15)]
)
def test_packed_and_compiled_equals_the_reference(dtype, most, mean):
    reference, packed = on_both(dtype)
    sequences = random_sequences([3, 200, 57, 1, 128, 129, 300, 777, 2, 1_500])
    expected, found = reference.score_top(sequences, 10), packed.score_top(sequences, 10)
    for name in ("logprobs", "top_logprobs"):
        gap = np.abs(flat(found, name) - flat(expected, name))
        assert gap.max() < most and gap.mean() < mean, (name, gap.max(), gap.mean())
    one_by_one = [packed.score_top([s], 10)[0] for s in sequences]
    together = flat(found, "logprobs")
    gap = np.abs(together - flat(one_by_one, "logprobs"))
    assert gap.mean() < mean / 2
    np.testing.assert_allclose(np.concatenate(packed.score(sequences)), together, atol=mean)
    states = packed.hidden(sequences)
    for ours, theirs in zip(states, reference.hidden(sequences), strict=True):
        assert ours.shape == theirs.shape
    if dtype == torch.float32:
        same = flat(found, "top_ids") == flat(expected, "top_ids")
        assert same.mean() > 0.99
        draws = [t.score_sampled(sequences, 16, 1) for t in (packed, reference)]
        assert (flat(draws[0], "ids") == flat(draws[1], "ids")).mean() > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_packed_and_compiled(name):
    subset = VocabSubset(SUBSET)
    models = [other_model(name, len(SUBSET), head_dim=16, num_hidden_layers=2) for _ in range(2)]
    reference = LocalTeacher(models[0], identity=IDENTITY, subset=subset)
    packed = LocalTeacher(models[1].to("cuda"), identity=IDENTITY, subset=subset, fused=True)
    sequences = random_sequences([3, 200, 57, 1, 128, 777])
    expected, found = reference.score_top(sequences, 10), packed.score_top(sequences, 10)
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(flat(found, name), flat(expected, name), atol=2e-4)


@needs_gpu[0]
@needs_gpu[1]
@pytest.mark.parametrize("vocab", [1, 63, 65, 1_000, 8_193, 201_088])
@pytest.mark.parametrize("kind", ["distinct", "few values", "all equal", "minus zero"])
def test_the_kernel_names_the_likeliest_in_exact_order(vocab, kind):
    from vpmoe.kernels.likeliest import read_likeliest, read_logits

    torch.manual_seed(vocab)
    logits = torch.randn(33, vocab, device="cuda") * 3
    if kind == "few values":
        logits = logits.round()
    elif kind == "all equal":
        logits.fill_(-2.5)
    elif kind == "minus zero":
        logits = torch.where(logits > 0, 0.0, -0.0)
    tokens = torch.randint(vocab, (33,), device="cuda")
    norm = logits.double().logsumexp(1)
    chosen = logits.double().gather(1, tokens[:, None])[:, 0] - norm
    for k in sorted({1, min(7, vocab), min(64, vocab), min(130, vocab)}):
        logprobs, ids, top = read_likeliest(logits, tokens, k)
        np.testing.assert_array_equal(ids.cpu().numpy(), by_sorting(logits.cpu().numpy(), k))
        torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=2e-5)
        expected = logits.double().gather(1, ids) - norm[:, None]
        torch.testing.assert_close(top.double(), expected, rtol=0, atol=2e-5)
    plain, lse = read_logits(logits, tokens)
    assert torch.equal(plain, logprobs)
    torch.testing.assert_close(lse.double(), norm, rtol=0, atol=2e-5)
