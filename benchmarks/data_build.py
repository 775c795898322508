"""Tokens per second of the whole dataset builder, beside openai-harmony in the same run.

    python benchmarks/data_build.py SAMPLE.parquet [--rows 60000] [--out data_build.json]

The sample is repeated with distinct ids. Each measurement runs in a process of its own and counts
that process's CPU seconds, start-up included, because one core is what the bar is about and other
programs may use the machine; wall seconds stand beside them. "builder" reads parquet, renders,
checks, splits, writes, hashes and writes the manifest. "tiktoken" only encodes the same text, the
floor under any builder; "harmony" only renders with the reference library, from ready strings.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.o200k import o200k
from vpmoe.storage.manifest import provenance

ROUNDS = 3
PEER_ROWS = 2_000


def repeat_sample(sample: Path, num_rows: int, path: Path) -> None:
    """Write `num_rows` rows of the sample, over and over, each with an id of its own."""
    table = pq.read_table(sample)
    place = table.schema.get_field_index("synth_id")
    with pq.ParquetWriter(path, table.schema) as writer:
        written = 0
        while written < num_rows:
            ids = [f"{name}-{written}" for name in table.column("synth_id").to_pylist()]
            part = table.set_column(place, "synth_id", [pa.array(ids)])
            writer.write_table(part.slice(0, num_rows - written))
            written += table.num_rows


def build(path: Path) -> int:
    """Tokens of a dataset built from `path`."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_dataset(DataConfig(input=str(path), output=Path(folder) / "data"))
    return sum(manifest["tokens"].values())


def conversations(path: Path) -> list[Conversation]:
    """The first rows of `path`, ready to render."""
    rows = pq.read_table(path).slice(0, PEER_ROWS).to_pylist()
    channels = (("user", None, "query"), ("assistant", "analysis", "synthetic_reasoning"))
    fields = (*channels, ("assistant", "final", "synthetic_answer"))
    return [
        Conversation(r["synth_id"], tuple(Message(role, ch, r[key]) for role, ch, key in fields))
        for r in rows
    ]


def harmony(rows: list[Conversation]) -> int:
    """Tokens rendered by the reference library."""
    renderer = Renderer(RenderConfig())
    return sum(renderer.oracle_tokens(c).size for c in rows)


def tiktoken(rows: list[Conversation]) -> int:
    """Tokens of the bare tokenizer."""
    texts = [m.content for c in rows for m in c.messages]
    return sum(o200k().encode_to_numpy(text, disallowed_special=()).size for text in texts)


def measure(job: str, path: Path) -> dict[str, float]:
    """Tokens, CPU and wall seconds and peak memory of one job in a fresh process."""
    command = [sys.executable, __file__, str(path), "--job", job]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def run_job(job: str, path: Path) -> None:
    """Do one job and say what it took, as JSON."""
    if job == "builder":  # charged for its start-up too
        work, given, cpu = build, path, 0.0
    else:
        work, given = {"harmony": harmony, "tiktoken": tiktoken}[job], conversations(path)
        work(given[:1])
        cpu = time.process_time()
    wall = time.perf_counter()
    tokens = work(given)
    result = {
        "tokens": tokens,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(result))


def peak_mib() -> float:
    """Most memory that this process ever held; ru_maxrss would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure in turns, so that what else the machine does falls on all alike."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample", type=Path)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", choices=("builder", "harmony", "tiktoken"))
    options = parser.parse_args()
    if options.job:
        run_job(options.job, options.sample)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "rows.parquet"
        repeat_sample(options.sample, options.rows, path)
        jobs = ("builder", "harmony", "tiktoken")
        runs = {job: [] for job in jobs}
        for _ in range(ROUNDS):
            for job in jobs:
                runs[job].append(measure(job, path))
    finally:
        shutil.rmtree(folder)
    result = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {
            p: metadata.version(p) for p in ("tiktoken", "oss-harmony", "pyarrow", "numpy")
        },
        **provenance(),
        "rows": options.rows,
        "peer_rows": PEER_ROWS,
        "million_tokens_per_cpu_s": {
            job: round(statistics.median(r["tokens"] / r["cpu_s"] for r in runs[job]) / 1e6, 3)
            for job in jobs
        },
        "builder_peak_mib": round(max(r["peak_mib"] for r in runs["builder"])),
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
