import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.errors import CheckFailedError, DataError
from vpmoe.export.hf import export_student
from vpmoe.export.parity import check_parity, probe_tokens
from vpmoe.storage.manifest import file_sha256
from vpmoe.vocabulary import CALL, END_OF_TEXT, RETURN

RENDER = RenderConfig(system=False)
MANIFEST = {
    "step": 7,
    "tokens_seen": 12_345,
    "fingerprint": "abcdef012345",
    "inputs": {"data": {"fingerprint": "0123"}},
    "parent": "step-000003",
    "vpmoe_version": "0.0.9",
    "git_sha": "c" * 40,
}
EVALS = {
    "exact_match": {"total": {"share": 0.5, "count": 10, "low": 0.25, "high": 0.75}},
    "heldout": {"loss": {"reasoning": 1.25, "final": None}},
}


@pytest.fixture(scope="module")
def folder(tiny_student, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export_student(tiny_student, out, manifest=MANIFEST, render=RENDER, evals=EVALS)
    return out


def test_exported_model_has_the_students_logits(tiny_student, folder):
    parity = check_parity(tiny_student, folder)
    assert parity.is_exact and parity.max_difference == 0.0
    assert parity.num_logits == 2 * 64 * len(tiny_student.config.vocab_subset)


def test_damaged_weights_are_noticed(tiny_student, folder, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 0x40
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckFailedError, match="logits differ"):
        check_parity(tiny_student, copy)


def test_a_failed_comparison_leaves_nothing_behind(tiny_student, tmp_path, monkeypatch):
    def refuse(student, path):
        raise CheckFailedError("no")

    monkeypatch.setattr("vpmoe.export.hf.check_parity", refuse)
    with pytest.raises(CheckFailedError):
        export_student(tiny_student, tmp_path / "out", manifest=MANIFEST, render=RENDER)
    assert list(tmp_path.iterdir()) == []


def test_chat_from_question_to_text(tiny_student, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert prompt["input_ids"][0].tolist() == Renderer(RENDER).prompt("a").tolist()
    made = model.generate(**prompt, max_new_tokens=6)
    assert set(made[0].tolist()) <= set(tiny_student.config.vocab_subset)
    assert model.generation_config.eos_token_id == [RETURN, CALL]
    assert model.generation_config.pad_token_id == END_OF_TEXT


def test_manifest_knows_every_file_and_the_origin(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == file_sha256(folder / name)
    assert manifest["checkpoint_code"] == {"vpmoe_version": "0.0.9", "git_sha": "c" * 40}
    assert (manifest["step"], manifest["tokens_seen"]) == (7, 12_345)
    assert manifest["render"]["system"] is False


def test_card_tells_sizes_and_results(tiny_student, folder):
    card = (folder / "README.md").read_text()
    total = sum(parameter.numel() for parameter in tiny_student.parameters())
    assert f"| parameters | {total:,} |" in card
    assert "50.0 % of 10 problems (95 %: 25.0 % to 75.0 %)" in card
    assert "| held-out loss, nats per token | reasoning 1.250 |" in card
    assert "equal bit for bit" in card
    assert "reasoning_effort" not in card  # rendered without a system message


def test_exports_are_not_replaced_by_accident(tiny_student, folder, tmp_path):
    with pytest.raises(DataError, match="already there"):
        export_student(tiny_student, folder, manifest=MANIFEST, render=RENDER)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not an export"):
        export_student(tiny_student, precious, manifest=MANIFEST, render=RENDER, overwrite=True)


def test_overwriting_replaces_the_whole_folder(tiny_student, tmp_path, folder):
    out = tmp_path / "again"
    shutil.copytree(folder, out)
    (out / "leftover.txt").write_text("old")
    export_student(tiny_student, out, manifest=MANIFEST, render=RENDER, overwrite=True)
    assert not (out / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert file_sha256(out / "model.safetensors") == file_sha256(folder / "model.safetensors")


def test_probe_uses_only_ordinary_tokens_of_the_subset(tiny_student):
    tokens = set(probe_tokens(tiny_student).flatten().tolist())
    assert tokens <= set(tiny_student.config.vocab_subset)
    assert max(tokens) < END_OF_TEXT


@pytest.mark.slow
def test_loads_with_remote_code_in_a_fresh_process(folder, tmp_path):
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(float(model(torch.tensor([[60, 61, 62]])).logits[0, -1, 60]))\n"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = float(model(torch.tensor([[60, 61, 62]])).logits[0, -1, 60])
    assert float(done.stdout) == expected
