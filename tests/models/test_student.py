"""The whole student: packing, leaks, first weights, subsets, schedules, checkpointing."""

import pytest
import torch

from vpmoe.config import apply_overrides, validate
from vpmoe.errors import ConfigError, DataError
from vpmoe.models.moe import Moe
from vpmoe.models.student import Student, StudentConfig, build_student
from vpmoe.vocabulary import END_OF_TEXT

TREE = {
    "num_layers": 5,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "dense_hidden": 24,
    "init_std": 0.2,
    "local_attention": {"kind": "tpa", "window_size": 4},
    "global_attention": {"kind": "gqa"},
    "moe": {
        "num_experts": 8,
        "num_experts_per_token": 2,
        "expert_hidden": 12,
        "shared_expert_hidden": 16,
        "router": {"kind": "deepseek_v3", "num_groups": 4, "num_groups_kept": 2},
    },
}
ABLATIONS = [
    "sinks=false",
    "global_every=1",
    "global_every=0",
    "tie_embeddings=true",
    "activation='swiglu'",
    "activation='clamped_swiglu'",
    "value_residual=false",
    "qk_norm=false",
    "attention_bias=false",
    "mlp_bias=false",
    "dense_layers=0",
    "local_attention.rank=3",
    "local_attention.window_size=64",
    "local_attention={kind='gqa', window_size=3, position={kind='none'}}",
    "local_attention.position={kind='rope', base=500.0}",
    "global_attention.position={kind='grape_m'}",
    "global_attention={kind='tpa', window_size=7}",
    "moe.router={kind='softmax_topk'}",
    "moe.router.group_score_topk=1",
    "moe.shared_expert_hidden=0",
    "moe.shared_expert_weight={kind='warmup', tokens=10}",
]


def config_of(*overrides: str) -> StudentConfig:
    return validate(StudentConfig, apply_overrides(TREE, overrides), source="test")


def student_of(*overrides: str, dtype: torch.dtype = torch.float64) -> Student:
    return build_student(config_of(*overrides), seed=0, dtype=dtype)


def shaken(student: Student) -> Student:
    """The student with nothing where it starts: no lambda at 1, no sink, bias or choice at 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        moved = [*student.parameters(), *(router.expert_bias for router in student.routers())]
        for tensor in moved:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return student


def packed_batch(seed: int = 0):
    """Two rows of documents of 9, 3, 11 tokens and of 2, 18, with padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.tensor([[0] * 9 + [1] * 3 + [2] * 11, [0] * 2 + [1] * 18 + [-1] * 3])
    lengths = [(0, 0, 9), (0, 9, 12), (0, 12, 23), (1, 0, 2), (1, 2, 20)]
    positions = torch.zeros_like(documents)
    for row, begin, end in lengths:
        positions[row, begin:end] = torch.arange(end - begin)
    tokens = torch.randint(0, 97, documents.shape, generator=generator)
    return tokens, positions, documents, lengths


@pytest.mark.parametrize("override", ["name='all'", *ABLATIONS])
def test_packed_rows_equal_documents_alone(override):
    student = shaken(student_of(override))
    tokens, positions, documents, lengths = packed_batch()
    packed = student(tokens, positions=positions, document_ids=documents)
    balance = 0.0
    for row, begin, end in lengths:
        here = tokens[row : row + 1, begin:end]
        zeros = torch.zeros_like(here)
        alone = student(here, positions=torch.arange(end - begin)[None], document_ids=zeros)
        torch.testing.assert_close(
            packed.hidden[row, begin:end], alone.hidden[0], atol=1e-10, rtol=1e-10
        )
        balance += alone.load_balance_sum
    torch.testing.assert_close(packed.load_balance_sum, balance)
    assert packed.num_documents == 5


@pytest.mark.parametrize("override", ["dense_layers=5", "name='experts'"])
def test_documents_do_not_leak_by_one_bit(override):
    overrides = [override] if "name" in override else [override, "moe.num_experts=8"]
    tree = apply_overrides(TREE, overrides)
    if "dense" in override:
        del tree["moe"]
    student = build_student(validate(StudentConfig, tree, source="t"), seed=0)
    tokens, positions, documents, _ = packed_batch()
    other = tokens.clone()
    other[0, :9] = (tokens[0, :9] + 1 + torch.arange(9)) % 97  # document A, all of it
    upstream = torch.randn(14, 32, generator=torch.Generator().manual_seed(1))
    seen = []
    for given in (tokens, other):
        student.zero_grad()
        hidden = student(given, positions=positions, document_ids=documents).hidden
        hidden[0, 9:].backward(upstream)
        seen.append((hidden[0, 9:].detach(), student.embedding.weight.grad.clone()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_gradients_reach_every_parameter():
    student = shaken(student_of())
    tokens, positions, documents, _ = packed_batch()
    output = student(tokens, positions=positions, document_ids=documents)
    (student.logits(output.hidden).square().sum() + output.load_balance_sum).backward()
    missing = [n for n, p in student.named_parameters() if p.grad is None]
    assert missing == []
    still = [n for n, p in student.named_parameters() if not p.grad.count_nonzero()]
    assert still == []


def test_first_weights_depend_on_seed_and_name_alone():
    plain, ablated = student_of(), student_of("sinks=false", "moe.num_experts=16")
    weights = dict(plain.named_parameters())
    for name, parameter in ablated.named_parameters():
        if ".experts." not in name and ".router." not in name:
            assert torch.equal(parameter, weights[name]), name
    other = build_student(config_of(), seed=1, dtype=torch.float64)
    assert not torch.equal(other.head_weight, plain.head_weight)


def test_first_weights_have_their_sizes():
    student = build_student(config_of("hidden_size=256", "init_std=0.02"), seed=0)
    named = dict(student.named_parameters())
    for name, parameter in named.items():
        assert torch.isfinite(parameter).all(), name
    layer = "layers.2."
    assert named[layer + "attention.q_b.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    small = 0.02 / 10**0.5
    for name in ("attention.o_proj.weight", "mlp.experts.down_weight", "mlp.shared.down.weight"):
        assert named[layer + name].std().item() == pytest.approx(small, rel=0.05), name
    for name in ("attention.sinks", "attention.q_bias", "mlp.router.bias", "mlp.experts.up_bias"):
        assert not named[layer + name].count_nonzero(), name
    assert named[layer + "attention.value_lambda"].item() == 1
    assert named["final_norm.gamma"].eq(1).all()


def test_embeddings_may_begin_larger_and_nothing_else_changes():
    plain = dict(student_of().named_parameters())
    for name, parameter in student_of("embedding_std=1.0").named_parameters():
        grown = 5 * plain[name] if name == "embedding.weight" else plain[name]  # from init_std 0.2
        torch.testing.assert_close(parameter, grown)


def test_a_large_embedding_is_no_head():
    with pytest.raises(ConfigError, match="embedding_std with tie_embeddings"):
        config_of("embedding_std=1.0", "tie_embeddings=true")


def test_bfloat16_keeps_what_must_stay_float32():
    student = student_of(dtype=torch.bfloat16)
    wide = {n.split(".", 2)[-1] for n, p in student.named_parameters() if p.dtype == torch.float32}
    kept = {"attention.sinks", "attention.value_lambda", "mlp.router.weight", "mlp.router.bias"}
    assert wide == kept | {"log_freq"}
    assert student.routers()[0].expert_bias.dtype == torch.float32
    tokens, positions, documents, _ = packed_batch()
    output = student(tokens, positions=positions, document_ids=documents)
    assert output.hidden.dtype == torch.bfloat16
    assert output.load_balance_sum.dtype == torch.float32


@pytest.mark.parametrize("override", ABLATIONS)
def test_without_gradients_the_mode_changes_nothing(override):
    """So sampling and held-out losses need no evaluation mode; a dropout would."""
    student = student_of(override)
    tokens, positions, documents, _ = packed_batch()
    with torch.no_grad():
        states = [
            student.train(mode)(tokens, positions=positions, document_ids=documents).hidden
            for mode in (True, False)
        ]
    assert torch.equal(*states)


def test_training_passes_count_tokens_and_others_do_not():
    student = student_of()
    tokens, positions, documents, _ = packed_batch()
    router = student.routers()[0]
    student.eval()(tokens, positions=positions, document_ids=documents)
    with torch.no_grad():
        student.train()(tokens, positions=positions, document_ids=documents)
    assert router.local_tokens_per_expert.sum() == 0
    student(tokens, positions=positions, document_ids=documents)
    student(tokens, positions=positions, document_ids=documents)
    assert router.local_tokens_per_expert.sum() == 2 * 2 * 43  # passes, experts each, real tokens


def test_activation_checkpointing_changes_nothing():
    tokens, positions, documents, _ = packed_batch()
    grads, counts = [], []
    for checkpointing in (False, True):
        student = student_of()
        student.activation_checkpointing = checkpointing
        output = student(tokens, positions=positions, document_ids=documents)
        (output.hidden.sum() + output.load_balance_sum).backward()
        grads.append([p.grad for p in student.parameters()])
        counts.append([r.local_tokens_per_expert for r in student.routers()])
    for one, other in zip(grads[0] + counts[0], grads[1] + counts[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_vocabulary_subset_maps_both_ends():
    ids = (3, 7, 50, 4_096, END_OF_TEXT, 200_002)
    tree = {**TREE, "vocab_subset": ids}
    del tree["vocab_size"]
    student = build_student(validate(StudentConfig, tree, source="t"), seed=0)
    assert student.head_weight.shape == (6, 32)
    labels = torch.tensor([[200_002, 3], [END_OF_TEXT, 50]])
    assert student.rows_of(labels).tolist() == [[5, 0], [4, 2]]
    assert torch.equal(student.ids_of(student.rows_of(labels)), labels)
    with pytest.raises(DataError, match=r"1 token ids are not .* first 51"):
        student.rows_of(torch.tensor([3, 51]))


def test_shared_expert_follows_the_tokens_seen():
    student = student_of("moe.shared_expert_weight={kind='warmup', tokens=10}")
    tokens, positions, documents, _ = packed_batch()

    def hidden(tokens_seen):
        student.set_progress(tokens_seen)
        return student(tokens, positions=positions, document_ids=documents).hidden

    without = [hidden(0), hidden(5), hidden(10), hidden(99)]
    assert not torch.equal(without[0], without[1])
    assert torch.equal(without[2], without[3])
    for layer in student.layers:
        if isinstance(layer.mlp, Moe):
            layer.mlp.shared = None
    assert torch.equal(hidden(5), without[0])  # weight 0 is no shared expert
    assert student.state_dict()["shared_weight"].item() == 0.5  # saved with the model


def test_value_residual_reads_the_first_layer():
    student = student_of()
    tokens, positions, documents, _ = packed_batch()
    before = student(tokens, positions=positions, document_ids=documents).hidden
    plain = student_of("value_residual=false")
    plain.load_state_dict(
        {n: t for n, t in student.state_dict().items() if "value_lambda" not in n}
    )
    same = plain(tokens, positions=positions, document_ids=documents).hidden
    torch.testing.assert_close(before, same)  # lambda starts at 1
    with torch.no_grad():
        student.layers[2].attention.value_lambda.fill_(0.5)
    after = student(tokens, positions=positions, document_ids=documents).hidden
    assert not torch.allclose(before, after)


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="'turbo' are not available"):
        build_student(config_of(), seed=0, kernels="turbo")
