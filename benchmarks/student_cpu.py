"""Throughput of the demo student on this CPU: training passes and sampling.

python benchmarks/student_cpu.py [--threads 2] [--out benchmarks/results/student_cpu.json]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vpmoe import __version__
from vpmoe.config import load
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.rollouts.sampler import Sampler

PRESET = Path(__file__).resolve().parents[1] / "configs" / "models" / "demo.toml"
SUBSET = [*range(1_500), *range(199_998, 200_020)]  # as many ids as the demo's problems need
ROWS, SEQ_LEN, DOCUMENTS = 16, 256, 4
PROMPTS, NEW_TOKENS = 200, 100


def training_pass(student, batch):
    tokens, positions, documents = batch
    output = student(tokens, positions=positions, document_ids=documents)
    rows = student.rows_of(tokens).flatten()
    loss = F.cross_entropy(student.logits(output.hidden).flatten(0, 1), rows)
    (loss + 1e-4 * output.load_balance_sum).backward()


def timed(work, *, repeats):
    """Median and spread of wall and processor seconds."""
    wall, processor = [], []
    for _ in range(repeats):
        begin = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    return {
        "wall_s": statistics.median(wall),
        "wall_s_spread": max(wall) - min(wall),
        "processor_s": statistics.median(processor),
    }


def measure(*, repeats):
    overrides = [f"vocab_subset={SUBSET}"]
    student = build_student(load(PRESET, StudentConfig, overrides), seed=0)
    rng = np.random.default_rng(0)
    length = SEQ_LEN // DOCUMENTS
    batch = (
        torch.from_numpy(rng.integers(0, 1_500, size=(ROWS, SEQ_LEN))),
        torch.arange(length).repeat(DOCUMENTS).expand(ROWS, -1),
        torch.arange(DOCUMENTS).repeat_interleave(length).expand(ROWS, -1),
    )
    training_pass(student, batch)
    training = timed(lambda: training_pass(student, batch), repeats=repeats)
    training["tokens_per_s"] = ROWS * SEQ_LEN / training["wall_s"]
    prompts = [rng.integers(0, 1_500, size=n) for n in rng.integers(20, 60, size=PROMPTS)]
    sampler = Sampler(student, max_batch=PROMPTS)
    sampling = timed(
        lambda: sampler.generate(prompts, max_new_tokens=NEW_TOKENS, stop_tokens=()),
        repeats=max(1, repeats // 2),
    )
    sampling["tokens_per_s"] = PROMPTS * NEW_TOKENS / sampling["wall_s"]
    return {"training": training, "sampling": sampling}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        "what": "demo student, float32, packed rows forward and backward; sampling with a cache",
        "shapes": {
            "rows": ROWS,
            "seq_len": SEQ_LEN,
            "documents_per_row": DOCUMENTS,
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "vocabulary": len(SUBSET),
        },
        "device": platform.processor() or platform.machine(),
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "vpmoe": __version__},
        **measure(repeats=options.repeats),
    }
    text = json.dumps(report, indent=2)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
