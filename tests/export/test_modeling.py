import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import vpmoe.export
from vpmoe.export.modeling import VpmoeConfig, VpmoeForCausalLM
from vpmoe.models.attention.gqa import GqaConfig
from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.moe import AnnealWeight, MoeConfig
from vpmoe.models.positions import RopeConfig
from vpmoe.models.router import DeepseekV3Config
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.vocabulary import END_OF_TEXT, RETURN, START, VOCAB_SIZE

SUBSET = (
    *range(50, 90),
    1_428,
    4_827,
    35_644,
    173_781,
    END_OF_TEXT,
    RETURN,
    200_005,
    START,
    200_008,
)


def tiny(**changes) -> StudentConfig:
    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_subset": SUBSET,
        "global_every": 2,
        "local_attention": TpaConfig(window_size=5),
        "dense_hidden": 32,
        "moe": MoeConfig(
            num_experts=8,
            num_experts_per_token=2,
            expert_hidden=16,
            shared_expert_hidden=16,
            shared_expert_weight=AnnealWeight(tokens=100, final=0.25),
            router=DeepseekV3Config(num_groups=4, num_groups_kept=2),
        ),
        "init_std": 0.3,
    }
    return StudentConfig(**{**settings, **changes})


CONFIGS = {
    "subset": tiny(),
    "tied": tiny(tie_embeddings=True),
    "rope": tiny(local_attention=GqaConfig(position=RopeConfig(), window_size=4)),
}


def student_of(config: StudentConfig):
    student = build_student(config, seed=3).eval()
    student.set_progress(60)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in student.routers():
            router.expert_bias.copy_(
                0.1 * torch.randn(router.expert_bias.shape, generator=generator)
            )
    return student


def prompts(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    picked = torch.randint(0, 40, (rows, length), generator=generator)
    return torch.tensor(SUBSET)[picked]


def plain_logits(student, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        out = student(tokens, positions=positions, document_ids=torch.zeros_like(tokens))
        return student.logits(out.hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_students_bit_for_bit(name):
    student = student_of(CONFIGS[name])
    tokens = prompts(2, 12)
    with torch.no_grad():
        logits = VpmoeForCausalLM.from_student(student)(tokens).logits
    assert torch.equal(logits[..., list(SUBSET)], plain_logits(student, tokens))
    outside = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    outside[list(SUBSET)] = False
    assert (logits[..., outside] == -torch.inf).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_give_the_same_logits_bit_for_bit(name, tmp_path):
    student = student_of(CONFIGS[name])
    VpmoeForCausalLM.from_student(student).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = prompts(2, 12)
    assert torch.equal(plain_logits(loaded.student, tokens), plain_logits(student, tokens))
    assert loaded.config.student_config == student.config
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()


def test_every_parameter_and_buffer_survives(tmp_path):
    student = student_of(CONFIGS["rope"])
    VpmoeForCausalLM.from_student(student).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).student
    theirs = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


def test_half_precision_keeps_the_router_wide(tmp_path):
    student = build_student(tiny(), seed=3, dtype=torch.bfloat16)
    VpmoeForCausalLM.from_student(student).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).student
    for name, tensor in student.named_parameters():
        assert dict(loaded.named_parameters())[name].dtype == tensor.dtype, name
    assert loaded.routers()[0].expert_bias.dtype == torch.float32


def test_registered_with_transformers(tmp_path):
    config = VpmoeConfig.from_student(tiny())
    config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), vpmoe.export.VpmoeConfig)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, VpmoeForCausalLM)
    built = build_student(tiny(), seed=0)
    assert torch.equal(
        plain_logits(model.student, prompts(1, 9)), plain_logits(built, prompts(1, 9))
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_greedy_argmax(name, use_cache):
    student = student_of(CONFIGS[name])
    tokens = prompts(2, 9)
    expected = tokens
    for _ in range(12):
        logits = plain_logits(student, expected)[:, -1]
        chosen = torch.tensor(SUBSET)[logits.argmax(dim=-1)]
        expected = torch.cat([expected, chosen[:, None]], dim=1)
    model = VpmoeForCausalLM.from_student(student)
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
        use_cache=use_cache, pad_token_id=END_OF_TEXT, eos_token_id=None,
    )  # fmt: skip
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_changes_nothing(use_cache):
    model = VpmoeForCausalLM.from_student(student_of(CONFIGS["subset"]))
    long, short = prompts(1, 11), prompts(1, 4)
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "use_cache": use_cache,
        "pad_token_id": 0,
        "eos_token_id": RETURN,
    }
    alone = [
        model.generate(t, attention_mask=torch.ones_like(t), **options)[0, t.shape[1] :].tolist()
        for t in (long, short)
    ]
    pad = torch.zeros(1, 7, dtype=torch.int64)  # an id that the subset lacks, behind the mask
    batch = torch.cat([long, torch.cat([pad, short], dim=1)])
    mask = torch.cat(
        [torch.ones(1, 11), torch.cat([torch.zeros(1, 7), torch.ones(1, 4)], 1)]
    ).long()
    together = model.generate(batch, attention_mask=mask, **options)[:, 11:].tolist()
    for row, expected in zip(together, alone, strict=True):
        assert row[: len(expected)] == expected


def test_padded_logits_equal_unpadded_ones_on_either_side():
    model = VpmoeForCausalLM.from_student(student_of(CONFIGS["subset"]))
    tokens = prompts(1, 6)
    pad = torch.full((1, 3), END_OF_TEXT)
    ones, zeros = torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        bare = model(tokens).logits
        left = model(torch.cat([pad, tokens], 1), attention_mask=torch.cat([zeros, ones], 1)).logits
        right = model(
            torch.cat([tokens, pad], 1), attention_mask=torch.cat([ones, zeros], 1)
        ).logits
    kept = list(SUBSET)
    torch.testing.assert_close(left[:, 3:, kept], bare[..., kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right[:, :6, kept], bare[..., kept], rtol=1e-5, atol=1e-5)


def test_sampling_and_beams_stay_inside_the_subset():
    model = VpmoeForCausalLM.from_student(student_of(CONFIGS["subset"]))
    tokens = prompts(2, 5)
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 8,
        "pad_token_id": END_OF_TEXT,
    }
    torch.manual_seed(0)
    sampled = model.generate(tokens, do_sample=True, num_return_sequences=2, **options)
    beams = model.generate(tokens, do_sample=False, num_beams=3, eos_token_id=RETURN, **options)
    uncached = model.generate(
        tokens, do_sample=False, num_beams=3, eos_token_id=RETURN, use_cache=False, **options
    )
    assert set(sampled.flatten().tolist()) <= set(SUBSET)
    assert beams.tolist() == uncached.tolist()


def test_loss_is_the_mean_over_shifted_labels():
    student = student_of(CONFIGS["subset"])
    tokens = prompts(2, 7)
    labels = tokens.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        loss = VpmoeForCausalLM.from_student(student)(tokens, labels=labels).loss
    logprobs = plain_logits(student, tokens)[:, 2:-1].log_softmax(-1)
    chosen = logprobs.gather(2, student.rows_of(tokens[:, 3:])[..., None])
    torch.testing.assert_close(loss, -chosen.mean())
