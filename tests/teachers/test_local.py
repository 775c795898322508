"""The teacher in this process: right numbers, whatever the batch; and every refusal."""

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from tests.teachers.tiny import SUBSET, random_sequences, tiny_config, tiny_model, write_teacher
from vpmoe.errors import DataError, TeacherError
from vpmoe.teachers import TeacherConfig
from vpmoe.teachers.base import Teacher, TeacherIdentity
from vpmoe.teachers.local import LocalTeacher, LocalTeacherConfig
from vpmoe.vocabulary import O200K_SHA256, RETURN, START, VOCAB_SIZE, VocabSubset

IDENTITY = TeacherIdentity("t", "", "0", "float32", "none", "0")


def build(path, **settings):
    return LocalTeacherConfig(path=str(path), **{"dtype": "float32", **settings}).build()


def whole_logprobs(model, rows):
    """Reference: the model's own logits of one sequence, all of them at once."""
    with torch.no_grad():
        logits = model(torch.as_tensor(rows)[None].long()).logits[0].double()
    table = logits.log_softmax(-1)
    return table[:-1].gather(1, torch.as_tensor(rows)[1:, None].long())[:, 0].numpy()


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return build(teacher_folder)


def test_scores_equal_the_models_own_log_softmax(teacher):
    sequences = random_sequences([5, 40, 17])
    model, subset = tiny_model(len(SUBSET)), VocabSubset(SUBSET)
    for sequence, scores in zip(sequences, teacher.score(sequences), strict=True):
        expected = whole_logprobs(model, subset.row_of[sequence])
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert expected.std() > 0.5  # the numbers differ enough for the comparison to mean something


def test_full_vocabulary_without_a_subset(tmp_path):
    teacher = build(write_teacher(tmp_path / "full", None, hidden_size=16, num_hidden_layers=1))
    sequence = np.array([START, 1428, 200_008, 4827, 150_000, RETURN])
    model = tiny_model(VOCAB_SIZE, hidden_size=16, num_hidden_layers=1)
    expected = whole_logprobs(model, sequence)
    np.testing.assert_allclose(teacher.score([sequence])[0], expected, atol=2e-5)
    assert teacher.identity.vocab_sha256 == O200K_SHA256


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_scores_do_not_depend_on_the_batch(teacher_folder, experts):
    sequences = random_sequences([3, 60, 2, 31, 60, 9, 33])
    alone = [build(teacher_folder, experts=experts).score([s])[0] for s in sequences]
    for batch_tokens in (1, 64, 100_000):
        for order in (range(7), [4, 2, 6, 0, 1, 5, 3]):
            teacher = build(teacher_folder, experts=experts, batch_tokens=batch_tokens)
            together = teacher.score([sequences[i] for i in order])
            for place, index in enumerate(order):
                np.testing.assert_allclose(together[place], alone[index], atol=2e-5)


def test_a_token_is_scored_by_what_stands_before_it_only(teacher):
    sequence = random_sequences([30])[0]
    changed = sequence.copy()
    changed[20:] = SUBSET[3]
    before, after = teacher.score([sequence, changed])
    np.testing.assert_allclose(before[:19], after[:19], atol=2e-5)
    assert not np.allclose(before[19], after[19])


def test_the_head_never_sees_a_whole_sequence(teacher, monkeypatch):
    def refuse(*_):
        raise AssertionError("logits of a sequence were made")

    monkeypatch.setattr(teacher._model.get_output_embeddings(), "forward", refuse)
    assert len(teacher.score(random_sequences([12]))[0]) == 11


def test_edges_of_length(teacher):
    sequences = random_sequences([1, 2])
    assert [len(s) for s in teacher.score(sequences)] == [0, 1]
    assert teacher.score([]) == []
    with pytest.raises(DataError, match="shape"):
        teacher.score([np.array([], dtype=np.int64)])
    with pytest.raises(TeacherError, match="5000 tokens is longer than the teacher's 4096"):
        teacher.score(random_sequences([5_000]))


def test_an_unknown_token_is_refused_by_its_id(teacher):
    with pytest.raises(DataError, match=r"1 token ids .* first 7"):
        teacher.score([np.array([START, 7])])


def test_it_is_a_teacher_and_its_config_is_in_the_union(teacher_folder, teacher):
    assert isinstance(teacher, Teacher)
    config = TypeAdapter(TeacherConfig).validate_python({"kind": "local", "path": teacher_folder})
    assert isinstance(config, LocalTeacherConfig)
    words = {"teacher_logprobs", "rollout_logprobs", "target_ids", "teacher_hidden"}
    assert config.provides == teacher.provides == words


def test_identity_follows_weights_and_not_the_place(teacher_folder, tmp_path):
    first = build(teacher_folder).identity
    moved = tmp_path / "elsewhere" / "tiny-teacher"
    shutil.copytree(teacher_folder, moved)
    assert build(moved).identity == first
    assert first.name == "tiny-teacher"
    assert first.vocab_sha256 == VocabSubset(SUBSET).sha256
    other = build(write_teacher(tmp_path / "tiny-teacher", seed=1)).identity
    assert other.weights_sha256 != first.weights_sha256
    assert build(teacher_folder, dtype="bfloat16").identity != first


def test_bfloat16_stays_near_float32(teacher_folder, teacher):
    sequences = random_sequences([50] * 4)
    exact = np.concatenate(teacher.score(sequences))
    rounded = np.concatenate(build(teacher_folder, dtype="bfloat16").score(sequences))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_gpu_gives_the_same_scores(teacher_folder, teacher, experts):
    sequences = random_sequences([3, 200, 57])
    on_gpu = build(teacher_folder, device="cuda", experts=experts).score(sequences)
    for scores, expected in zip(on_gpu, teacher.score(sequences), strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-3)
    half = build(teacher_folder, device="cuda", experts=experts, dtype="bfloat16").score(sequences)
    gap = np.concatenate(half) - np.concatenate(teacher.score(sequences))
    assert np.abs(gap).mean() < 0.1


def test_a_config_alone_gives_random_weights_by_seed(tmp_path):
    tiny_config(len(SUBSET)).save_pretrained(tmp_path)
    (tmp_path / "vocab_ids.json").write_text(json.dumps(SUBSET))
    path, sequence = tmp_path / "config.json", random_sequences([10])
    first, again, other = (build(path, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.score(sequence)[0], again.score(sequence)[0])
    assert first.identity == again.identity != other.identity
    assert not np.allclose(first.score(sequence)[0], other.score(sequence)[0])


def test_greedy_completions_match_step_by_step_argmax(teacher):
    prompts = random_sequences([6, 9, 6])
    subset = VocabSubset(SUBSET)
    for prompt, completion in zip(
        prompts, teacher.complete(prompts, max_new_tokens=7), strict=True
    ):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(7):
                rows = torch.from_numpy(subset.row_of[np.array(text)])[None]
                text.append(int(subset.ids[teacher._model(rows).logits[0, -1].argmax()]))
                if text[-1] in (RETURN, 200_012):
                    break
        assert completion.tolist() == text[len(prompt) :]


def pack_mxfp4(weights: torch.Tensor, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """New random weights of that shape on the MXFP4 grid, and their packed form.

    OCP MX: 32 values along the input share a power of two; two 4-bit codes to a byte, low first.
    """
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    experts, inputs, outputs = weights.shape
    random = torch.Generator().manual_seed(seed)
    shape = (experts, outputs, inputs // 32)
    codes = torch.randint(0, 16, (*shape, 32), generator=random, dtype=torch.uint8)
    scales = torch.randint(122, 126, shape, generator=random, dtype=torch.uint8)
    values = grid[codes.long()] * 2.0 ** (scales[..., None].float() - 127)
    wide = values.reshape(experts, outputs, inputs).transpose(1, 2).contiguous()
    return wide, {"blocks": codes[..., 0::2] | (codes[..., 1::2] << 4), "scales": scales}


def test_mxfp4_checkpoints_are_widened_exactly(tmp_path, teacher_folder):
    from safetensors.torch import load_file, save_file

    wide, packed = tmp_path / "wide", tmp_path / "packed"
    for folder in (wide, packed):
        shutil.copytree(teacher_folder, folder)
    weights = load_file(wide / "model.safetensors")
    small = dict(weights)
    for seed, name in enumerate(n for n in weights if n.endswith(("_up_proj", "down_proj"))):
        weights[name], parts = pack_mxfp4(weights[name], seed)
        del small[name]
        small |= {f"{name}_{part}": value for part, value in parts.items()}
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    save_file(small, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (packed / "config.json").write_text(json.dumps(config))
    sequences = random_sequences([20, 33])
    teacher, expected = build(packed), build(wide)
    assert (teacher.identity.quantization, expected.identity.quantization) == ("mxfp4", "none")
    for scores, reference in zip(teacher.score(sequences), expected.score(sequences), strict=True):
        np.testing.assert_array_equal(scores, reference)
    assert len(small) > len(weights)


# Refusals: each is one sentence with the value seen.


def test_vocabularies_that_differ_are_named_with_both_sizes(tmp_path, teacher_folder):
    folder = tmp_path / "no-ids"
    shutil.copytree(teacher_folder, folder)
    (folder / "vocab_ids.json").unlink()
    with pytest.raises(TeacherError, match=rf"differ: {len(SUBSET)} and 201,088 \(o200k Harmony\)"):
        build(folder)
    (folder / "vocab_ids.json").write_text(json.dumps(SUBSET[:-1]))
    with pytest.raises(TeacherError, match=rf"differ: {len(SUBSET)} and {len(SUBSET) - 1} \(vocab"):
        build(folder)
    (folder / "vocab_ids.json").write_text('{"a": 1}')
    with pytest.raises(TeacherError, match="not a list of token ids"):
        build(folder)


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path):
    folder = tmp_path / "full"
    write_teacher(folder, None, hidden_size=16, num_hidden_layers=1)
    tokens = [{"content": "<|start|>", "id": 3}, {"content": "<|startoftext|>", "id": 199_998}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(TeacherError, match=r"has id None for <\|endoftext\|>"):
        build(folder)


def test_a_checkpoint_with_a_missing_weight_is_refused(tmp_path, teacher_folder):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(teacher_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.sinks"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 missing keys, first model\.layers\.1.*sinks"):
        build(folder)


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(TeacherError, match="no teacher at /nowhere/at/all"):
        build("/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeacherError, match="cannot load the teacher from"):
        build(tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="neither a local folder nor reachable"):
        build("nobody/nothing-there")


def test_a_folder_with_code_of_its_own_is_refused_without_asking(tmp_path, monkeypatch):
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(own), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asked"))
    with pytest.raises(TeacherError, match="cannot load the teacher from"):
        build(tmp_path)


def test_a_revision_makes_no_sense_for_a_folder(teacher_folder):
    with pytest.raises(TeacherError, match="cannot have revision 'v2'"):
        build(teacher_folder, revision="v2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(teacher_folder):
    with pytest.raises(TeacherError, match=r"'cuda:1'.*sees 0 GPUs"):
        build(teacher_folder, device="cuda:1")


def test_memory_that_runs_out_names_the_setting(teacher_folder, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    teacher = build(teacher_folder, batch_tokens=128)
    monkeypatch.setattr(teacher._model.base_model, "forward", exhausted)
    with pytest.raises(TeacherError, match="2 sequences of up to 50 tokens") as caught:
        teacher.score(random_sequences([50, 49]))
    assert "batch_tokens (now 128)" in caught.value.hint


def test_gpt_oss_has_no_sdpa_and_says_so(teacher_folder):
    with pytest.raises(TeacherError, match="does not support"):
        build(teacher_folder, attention="sdpa")


class Capped(nn.Module):
    """Logits squeezed into (-cap, cap), as some models do after the head."""

    def __init__(self, model, cap):
        super().__init__()
        self.inner, self.cap = model, cap
        self.config, self.base_model, self.device = model.config, model.base_model, model.device
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = self.cap * torch.tanh(output.logits / self.cap)
        return output


def test_a_head_with_a_soft_cap_or_a_scale_is_refused():
    model, subset = tiny_model(len(SUBSET)), VocabSubset(SUBSET)
    LocalTeacher(model, identity=IDENTITY, subset=subset)
    with pytest.raises(TeacherError, match="around the head"):
        LocalTeacher(Capped(model, 30.0), identity=IDENTITY, subset=subset)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))
    with pytest.raises(TeacherError, match="around the head"):
        LocalTeacher(model, identity=IDENTITY, subset=subset)
