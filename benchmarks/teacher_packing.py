"""What packing costs a teacher: `vpmoe score` as it is, beside the same teacher that packs nothing.

Each codec is measured three ways on the same documents, in turns: the teacher alone, in the pieces
that `vpmoe score` gives it; its answers checked and packed on another thread while the next piece
is read, as the stage does; and the whole stage, which also selects, ranks ids, and writes the
store, once for all that it reads.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import REPOSITORY

from vpmoe.config import load, validate
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset, Document
from vpmoe.stages.label_ranking import label_ranking
from vpmoe.stages.score import ScoreConfig, ask_about, packed, pool_of, score_dataset
from vpmoe.teachers.ask import said_of
from vpmoe.teachers.codecs import Codec
from vpmoe.teachers.selection import select

CODECS: dict[str, dict[str, Any]] = {
    "logprob": {"kind": "logprob"},
    "set_coded 64": {"kind": "set_coded", "k": 64},
    "adaptive": {"kind": "adaptive"},
    "sampled 50": {"kind": "sampled", "draws": 50},
}
PIECE_TOKENS = 2**16  # of one call to the teacher, as the stage cuts them


def conversations(sample: Path, folder: Path) -> Dataset:
    """A SYNTH sample, rendered and cut as for training, in a new folder."""
    words = [f"input={sample}", f"output={folder}", "seq_len=2048"]
    build_dataset(load(REPOSITORY / "configs" / "data" / "tiny-real.toml", DataConfig, words))
    return Dataset(folder, "train")


def packing(
    teacher: Any, dataset: Dataset, *, fraction: float, repetitions: int, device: str
) -> list[dict[str, Any]]:
    """One row for each codec.

    Args:
        teacher: Who scores; the first call of each kind is not counted.
        dataset: What it reads.
        fraction: Share of its tokens.
        repetitions: Of each of the three ways.
        device: Where the teacher is, and answers are packed.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, choice in CODECS.items():
            tree = {
                "kind": "score",
                "data": str(dataset.path),
                "output": f"{folder}/store",
                "teacher": {"kind": "local", "path": "random", "device": device},
                "codec": choice,
                "selection": {"fraction": fraction},
            }
            config = validate(ScoreConfig, tree, source="packing")
            rows.append({"codec": name, **measured(teacher, dataset, config, repetitions)})
            print(rows[-1], flush=True)
    return rows


def measured(
    teacher: Any, dataset: Dataset, config: ScoreConfig, repetitions: int
) -> dict[str, Any]:
    """Tokens per second each way, and what the stage loses to packing and writing, percent."""
    codec, pieces = config.codec.build(), pieces_of(dataset, config)
    if codec.by_rank:
        codec = codec.ranked_by(label_ranking(dataset))
    ways: dict[str, Callable[[], Any]] = {
        "alone": lambda: [read(teacher, codec, piece) for piece in pieces],
        "packed": lambda: packed_beside(dataset, teacher, codec, config, pieces),
        "stored": lambda: score_dataset(dataset, teacher, config, overwrite=True),
    }
    manifest = anew(ways["stored"], config)[1]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, work in ways.items():
            times[name].append(anew(work, config)[0])
    tokens = sum(len(document.tokens) for piece in pieces for document in piece)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "tokens": tokens,
        "labels": manifest["labels"],
        "pieces": len(pieces),
        "repetitions": repetitions,
        **{f"{name}_tokens_per_s": round(tokens / middle[name]) for name in ways},
        "slower_packed_pct": round(100 * (middle["packed"] / middle["alone"] - 1), 2),
        "slower_stored_pct": round(100 * (middle["stored"] / middle["alone"] - 1), 2),
        "spread_s": {name: round((max(t) - min(t)) / 2, 4) for name, t in times.items()},
        "bytes_per_label": round(
            sum(entry["bytes"] for entry in manifest["shards"]) / manifest["labels"], 2
        ),
        **packed_alone(dataset, teacher, codec, config, pieces[0]),
    }


def anew(work: Callable[[], Any], config: ScoreConfig) -> tuple[float, Any]:
    """Seconds of the work and what it gives, with nothing of an earlier store left over."""
    shutil.rmtree(config.output, ignore_errors=True)
    begin = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def pieces_of(dataset: Dataset, config: ScoreConfig) -> list[list[Document]]:
    """The chosen documents as the stage gives them to the teacher: longest first, in pieces."""
    pieces: list[list[Document]] = [[]]
    lengths, held = dataset.lengths, 0
    for index in sorted(select(pool_of(dataset), config.selection), key=lambda i: (-lengths[i], i)):
        if held and held + lengths[index] > PIECE_TOKENS:
            pieces.append([])
            held = 0
        pieces[-1].append(dataset.conversation(int(index)))
        held += int(lengths[index])
    return pieces


def read(teacher: Any, codec: Codec, piece: list[Document]) -> Any:
    """The teacher's answer and nothing else."""
    return said_of(teacher, codec, [document.tokens[:-1] for document in piece])


def packed_beside(
    dataset: Dataset,
    teacher: Any,
    codec: Codec,
    config: ScoreConfig,
    pieces: list[list[Document]],
) -> None:
    """Every piece packed while the teacher reads the next one."""
    device = getattr(config.teacher, "device", "cpu")
    with ThreadPoolExecutor(1) as packer:
        waiting = None
        for piece in pieces:
            heard = ask_about(dataset, teacher, codec, piece)
            if waiting is not None:
                waiting.result()
            waiting = packer.submit(packed, heard, codec, device)
        if waiting is not None:
            waiting.result()


def packed_alone(
    dataset: Dataset, teacher: Any, codec: Codec, config: ScoreConfig, piece: list[Document]
) -> dict[str, Any]:
    """Labels checked and packed per second while nothing else runs, transfers included.

    Best of three; none where log-probs alone are kept.
    """
    if codec.needs == "logprobs":
        return {}
    heard, best = ask_about(dataset, teacher, codec, piece), 1e9
    device = getattr(config.teacher, "device", "cpu")
    for _ in range(3):
        begin = time.perf_counter()
        targets = packed(heard, codec, device)
        best = min(best, time.perf_counter() - begin)
    return {"labels_packed_per_s": round(sum(len(t.logprobs) for t in targets) / best)}
