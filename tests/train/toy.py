"""A tiny student and a plan of random packed sequences, for tests of the loop."""

import multiprocessing
import os
import socket
from pathlib import Path

import torch

from vpmoe.batch import PADDING_DOCUMENT, Batch
from vpmoe.losses.cross_entropy import CrossEntropyConfig
from vpmoe.models.config import StudentConfig
from vpmoe.models.student import build_student
from vpmoe.train.config import TrainConfig, rows_of_rank
from vpmoe.train.device import world
from vpmoe.train.loop import train
from vpmoe.train.plan import Plan
from vpmoe.vocabulary import CHANNEL, END, END_OF_TEXT, MESSAGE, RETURN, START

WORDS = 40
SUBSET = (*range(WORDS), END_OF_TEXT, RETURN, CHANNEL, START, END, MESSAGE)

STUDENT = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "vocab_subset": SUBSET,
    "global_every": 3,
    "local_attention": {"kind": "tpa", "window_size": 8},
    "dense_layers": 1,
    "dense_hidden": 24,
    "moe": {
        "num_experts": 8,
        "num_experts_per_token": 2,
        "expert_hidden": 8,
        "shared_expert_hidden": 12,
        "router": {"kind": "deepseek_v3", "num_groups": 4, "num_groups_kept": 2},
    },
}


def student_config(**changes) -> StudentConfig:
    return StudentConfig.model_validate({**STUDENT, **changes})


def train_config(run: Path | str, **changes) -> TrainConfig:
    tree = {
        "run": str(run),
        "threads": 1,
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 24},
        "budget": {"steps": 4},
        "checkpoint": {"every_steps": 2, "keep": 2},
        **changes,
    }
    return TrainConfig.model_validate(tree)


def random_batch(step: int, rows: range, *, seq_len: int) -> Batch:
    """Rows of one global batch; row r of step s is the same however the batch is cut."""
    parts = [_random_row(step * 1000 + row, seq_len) for row in rows]
    return Batch(**{name: torch.stack([p[name] for p in parts]) for name in parts[0]})


def _random_row(seed: int, seq_len: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (seq_len,), generator=draw)
    length = seq_len - int(torch.randint(0, seq_len // 2, (), generator=draw))
    cut = int(torch.randint(1, length, (), generator=draw))
    document_ids = torch.where(torch.arange(seq_len) < cut, 0, 1)
    positions = torch.where(document_ids == 0, torch.arange(seq_len), torch.arange(seq_len) - cut)
    # Two words in three follow the word before them, so that there is something to learn.
    labels = (tokens * 7 + 3) % WORDS
    noise = torch.randint(0, WORDS, (seq_len,), generator=draw)
    labels = torch.where(torch.rand(seq_len, generator=draw) < 0.67, labels, noise)
    span_ids = torch.randint(0, 3, (seq_len,), generator=draw).to(torch.uint8)
    padding = torch.arange(seq_len) >= length
    document_ids[padding] = PADDING_DOCUMENT
    tokens[padding] = END_OF_TEXT
    labels[padding] = END_OF_TEXT
    span_ids[padding] = 0
    return {
        "tokens": tokens,
        "labels": labels,
        "span_ids": span_ids,
        "document_ids": document_ids,
        "positions": positions.masked_fill(padding, 0),
    }


class ToyPlan(Plan):
    """Random sequences, cross-entropy, and a counter that has to survive."""

    def __init__(self, config: TrainConfig, *, rank: int = 0, num_ranks: int = 1) -> None:
        self.config = config
        self.num_steps = config.budget.num_steps(1.0)
        self.inputs = {"dataset": "toy"}
        self.calls = 0
        self._rows = rows_of_rank(config.batch, rank=rank, num_ranks=num_ranks)
        self._loss = CrossEntropyConfig().build()

    def micro_batches(self, step):
        assert self.calls == step, "the plan's state was not restored"
        self.calls += 1
        whole = random_batch(step, self._rows, seq_len=self.config.batch.seq_len)
        size = self.config.batch.micro_batch_size
        count = len(self._rows)
        return [whole.rows(i, min(i + size, count)) for i in range(0, count, size)], self._loss

    def state(self):
        return {"calls": self.calls}

    def load_state(self, state):
        self.calls = state["calls"]


def run(config: TrainConfig, *, resume: bool = False, dtype=torch.float32, **options):
    """Train the tiny student through the real loop; returns it."""
    with world(config.device, threads=config.threads) as ranks:
        # Drawn on the CPU, so that weights are the same wherever they are trained.
        student = build_student(student_config(), seed=config.seed, dtype=dtype).to(ranks.device)
        plan = options.pop("plan", None)
        plan = plan or ToyPlan(config, rank=ranks.rank, num_ranks=ranks.size)
        train(student, plan, config, world=ranks, resume=resume, **options)
    return student


def start(config: TrainConfig, *, rank: int = 0, num_ranks: int = 1, port: int = 0, **options):
    """`run` in a process of its own, forked from a server that has done the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    env = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    process = context.Process(target=_work, args=(config, env if num_ranks > 1 else {}, options))
    process.start()
    return process


def _work(config: TrainConfig, env: dict, options: dict) -> None:
    os.environ.update({name: str(value) for name, value in env.items()})
    run(config, **options)


def run_on_ranks(config: TrainConfig, *, num_ranks: int, **options) -> None:
    """`run` on some ranks of this machine; all have ended well when it returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        start(config, rank=rank, num_ranks=num_ranks, port=port, **options)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0] * num_ranks
