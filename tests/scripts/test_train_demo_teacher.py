import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

from vpmoe.data.problems import solve
from vpmoe.vocabulary import END_OF_TEXT, SPECIAL_TOKENS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import make_teacher_table as step1
import train_demo_teacher as step2

CPU = torch.device("cpu")
LITTLE = step2.Variant(hidden=16, layers=2, intermediate=16, head_dim=8, heads=2, batch=8)


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "table.npz"
    step1.write_table(path, count=240, held_out=3)
    return path


@pytest.fixture(scope="module")
def table(table_path):
    return step2.Table(table_path, CPU)


def test_table_rows_are_harmony_conversations(table):
    ids = table.vocab_ids
    assert set(SPECIAL_TOKENS.values()) <= set(ids.tolist()) and len(ids) <= 256
    assert np.all(np.diff(ids) > 0)
    pieces = step1.Pieces()
    for row, length, prompt in zip(
        table.held_out, table.held_out_lengths, table.held_out_prompts, strict=True
    ):
        tokens = ids[row.numpy()]
        assert set(tokens[int(length) :]) <= {END_OF_TEXT}
        text = pieces.encoding.decode(tokens[: int(length)].tolist())
        query = text.removeprefix("<|start|>user<|message|>").split("<|end|>")[0]
        problem = solve(query)
        assert pieces.conversation(problem) == (tokens[: int(length)].tolist(), int(prompt))
        assert text.endswith(f"<|channel|>final<|message|>{problem.solution}<|return|>")


def test_all_experts_at_once_equal_transformers_own(table, tmp_path):
    trainer = step2.Trainer(LITTLE, table, CPU, graph=False)
    for _ in range(3):
        trainer.step(1e-2)
    step2.save(trainer, tmp_path)
    stock = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = table.train[:6].long()
    with torch.no_grad():
        mine = step2.logits_of(trainer.model, tokens, trainer.masks)
        assert torch.allclose(mine, stock(tokens).logits, atol=2e-5)
    assert json.loads((tmp_path / "vocab_ids.json").read_text()) == table.vocab_ids.tolist()


def test_trained_labels_are_the_completions(table):
    trainer = step2.Trainer(LITTLE, table, CPU, graph=False)
    trainer._fill()
    ids = table.vocab_ids
    for tokens, trained in zip(trainer.tokens, trainer.trained, strict=True):
        kept = ids[tokens[trained.bool()].numpy()]
        text = step1.Pieces().encoding.decode(kept.tolist()) if tokens is trainer.tokens[0] else ""
        assert kept[0] == SPECIAL_TOKENS["<|start|>"] and kept[-1] == SPECIAL_TOKENS["<|return|>"]
        assert text == "" or text.startswith("<|start|>assistant<|channel|>analysis<|message|>")
        assert list(kept).count(SPECIAL_TOKENS["<|message|>"]) == 2


def test_exact_match_judges_the_final_message_alone(table):
    right = table.held_out[0].tolist()
    prompt, length = int(table.held_out_prompts[0]), int(table.held_out_lengths[0])
    answer = step2.answer_of(right, table)
    assert answer == right[length - 1 - len(answer) : length - 1]
    other_trace = list(right)
    other_trace[prompt + 3] = right[prompt + 4]
    assert step2.answer_of(other_trace, table) == answer
    endless = [token for token in right if token != table.stop_row]
    assert step2.answer_of(endless, table) is None
    assert step2.answer_of(right[:prompt], table) is None


def test_training_lowers_the_loss_and_leaves_a_record(table_path, tmp_path, monkeypatch):
    variant = step2.replace(LITTLE, steps=30, lr=1e-2)
    monkeypatch.setitem(step2.VARIANTS, "little", variant)
    args = argparse.Namespace(
        table=table_path, out=tmp_path, device="cpu", graph=False, batch=0, steps=99, seconds=60.0
    )
    args.look, args.final_look = 1, 2
    step2.train_one("little", args)
    record = json.loads((tmp_path / "little" / "training.json").read_text())
    losses = [point["loss"] for point in record["curve"]]
    assert record["steps"] == 30 and losses[-1] < losses[0] - 0.5
    assert record["bytes"] == (tmp_path / "little" / "model.safetensors").stat().st_size
    assert set(record["held_out_exact_match"]) == {"total", *table_families(table_path)}


def table_families(path):
    with np.load(path) as arrays:
        return arrays["families"].tolist()
