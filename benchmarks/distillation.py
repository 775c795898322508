"""Stage 2 by every kind of target, on equal student tokens, judged by what it is for.

python -m benchmarks.distillation demo OUT                       problems, a teacher that knows them
python -m benchmarks.distillation synth OUT --teacher FOLDER --input SAMPLE.parquet
                                                                 real rows, the whole vocabulary

Each method trains the same student from the same fresh weights in the same order of documents; only
the loss and what it reads of the teacher differ. Judged on held-out documents by the exact
KL(teacher || student) over the vocabulary, and on the demo's problems by exact match. Three seeds:
weights, order and, for the demo, the problems themselves. Many runs share a GPU. What fails is
tried once more with half as many beside it; results are written as they come.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import REPOSITORY
from benchmarks.distillation_judge import anchors, judge

CODECS: dict[str, dict[str, Any]] = {
    "logprob": {"kind": "logprob"},
    "top": {"kind": "set_coded"},
    "prior": {"kind": "adaptive", "tail": "prior"},
    "sampled": {"kind": "sampled"},
}
HIDDEN = "hidden"

Task = tuple[str, int, str]  # score, train or anchors; seed; codec or method

# name -> (what is said of it, loss, store or HIDDEN or none)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "cross_entropy": ("cross-entropy alone", {"kind": "cross_entropy"}, "logprob"),
    "confidence": ("confidence-weighted cross-entropy", {"kind": "confidence_weighted"}, "logprob"),
    "bucket": ("forward KL, top-K and a tail bucket", {"kind": "forward_kl"}, "top"),
    "renormalized": (
        "forward KL, top-K renormalised",
        {"kind": "forward_kl", "tail": "renormalized"},
        "top",
    ),
    "prior": (
        "forward KL, the tail by how often ids are labels",
        {"kind": "forward_kl", "tail": "prior"},
        "prior",
    ),
    "sampled": ("random-sampling targets", {"kind": "random_sampling"}, "sampled"),
    "exact": ("exact forward KL from states", {"kind": "forward_kl", "against": "hidden"}, HIDDEN),
}


def settings_of(part: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Everything that the methods of one seed share."""
    folder = args.out / f"seed-{seed}"
    if part == "demo":
        teacher = {"kind": "local", "path": "configs/demo/teacher", "dtype": "float32"}
        batch = {"global_batch_size": 7, "micro_batch_size": 7, "seq_len": 144}
        optimizer = {"kind": "normuon", "lr": 0.02, "adam_lr": 4e-3}
        device, dtype = "cpu", "float32"
    else:
        teacher = {
            "kind": "local",
            "path": str(args.teacher),
            "dtype": "bfloat16",
            "device": args.device,
        }
        batch = {"global_batch_size": args.rows, "micro_batch_size": args.rows, "seq_len": 1024}
        optimizer = {"kind": "normuon", "embed_lr_mult": 5.0}
        device, dtype = args.device, "bfloat16" if args.device == "cuda" else "float32"
    return {
        "folder": folder,
        "data": folder / "data" if part == "demo" else args.out / "data",
        "teacher": teacher,
        "batch": batch,
        "optimizer": optimizer,
        "device": device,
        "dtype": dtype,
        "tokens": args.tokens,
        "k": args.k,
    }


def student_of(part: str) -> dict[str, Any]:
    """The student's config; the demo's keeps what its teacher knows of the vocabulary."""
    from vpmoe.config import read_tree
    from vpmoe.teachers.checkpoint import read_vocab

    if part == "synth":
        return dict(read_tree(REPOSITORY / "configs" / "models" / "tiny-real.toml"))
    subset = read_vocab(Path("configs/demo/teacher"))
    assert subset is not None
    tree = dict(read_tree(REPOSITORY / "configs" / "models" / "demo.toml"))
    return tree | {"vocab_subset": tuple(subset.ids.tolist())}


def make_data(part: str, args: argparse.Namespace, seed: int) -> None:
    """The dataset of a seed; the real rows are the same for all."""
    from vpmoe.config import load, read_tree
    from vpmoe.data.build import DataConfig, build_dataset
    from vpmoe.data.problems import generate, write_problems

    settings = settings_of(part, args, seed)
    if (settings["data"] / "manifest.json").exists():
        return
    if part == "synth":
        words = [f"output={settings['data']}", f"input={args.input}"]
        build_dataset(load(REPOSITORY / "configs/data/tiny-real.toml", DataConfig, words))
        return
    corpus = read_tree(REPOSITORY / "configs/demo/demo.toml")["corpus"]
    rows = generate(
        corpus["traces"],
        seed=seed,
        families=tuple(corpus["families"]),
        alphabet=corpus["alphabet"],
        flawed_share=corpus["flawed_share"],
        flaws="blind-spot",
    )
    settings["folder"].mkdir(parents=True, exist_ok=True)
    write_problems(settings["folder"] / "traces.parquet", rows)
    words = [f"output={settings['data']}", f"input={settings['folder'] / 'traces.parquet'}"]
    build_dataset(load(REPOSITORY / "configs/demo/data.toml", DataConfig, words))


def score(part: str, args: argparse.Namespace, seed: int, codec: str) -> dict[str, Any]:
    """The teacher's opinion of a dataset in one codec: bytes per label and seconds."""
    from vpmoe.config import validate
    from vpmoe.stages.score import ScoreConfig, run

    settings = settings_of(part, args, seed)
    choice = dict(CODECS[codec])
    if codec == "top":
        choice["k"] = args.k
    output = settings["data"].parent / f"targets-{codec}"
    tree = {
        "kind": "score",
        "data": str(settings["data"]),
        "output": str(output),
        "teacher": settings["teacher"],
        "codec": choice,
        "selection": {"fraction": 1.0},
    }
    begin = time.perf_counter()
    manifest = run(validate(ScoreConfig, tree, source="score"), overwrite=True)
    size = sum(entry["bytes"] for entry in manifest["shards"])
    return {
        "codec": codec,
        "bytes_per_label": size / manifest["labels"],
        "seconds": time.perf_counter() - begin,
        "labels": manifest["labels"],
    }


def train(part: str, args: argparse.Namespace, seed: int, method: str) -> dict[str, Any]:
    """One student trained by one method, and what became of it."""
    from vpmoe.config import validate
    from vpmoe.stages.offline import OfflineConfig, run

    torch.set_num_threads(1)
    settings = settings_of(part, args, seed)
    _, loss, source = METHODS[method]
    run_dir = settings["folder"] / method
    shutil.rmtree(run_dir, ignore_errors=True)
    tree: dict[str, Any] = {
        "kind": "offline",
        "run": str(run_dir),
        "seed": seed,
        "data": str(settings["data"]),
        "student": student_of(part),
        "device": settings["device"],
        "dtype": settings["dtype"],
        "threads": 1,
        "loss": loss,
        "batch": settings["batch"],
        "budget": {"tokens": settings["tokens"]},
        "optimizer": settings["optimizer"],
        "schedule": {"kind": "cosine", "warmup": 0.03},
        "valid": {"documents": 0},
    }
    if source == HIDDEN:
        tree["teacher"], tree["targets"] = settings["teacher"], {"share": 1.0}
    else:
        path = settings["data"].parent / f"targets-{source}"
        tree["targets"] = {"path": str(path), "share": 1.0}
    begin = time.perf_counter()
    summary = run(validate(OfflineConfig, tree, source=method))
    seconds = time.perf_counter() - begin
    found = judge(settings, run_dir, problems=part == "demo")
    row = {
        "part": part,
        "method": method,
        "what": METHODS[method][0],
        "seed": seed,
        "student_tokens": summary["tokens_seen"],
        "steps": summary["step"],
        "train_s": round(seconds, 1),
        **found,
    }
    print(json.dumps(row), flush=True)
    return row


def take_a_gpu(turn: Any, devices: list[str]) -> None:
    """Processes share the GPUs evenly: each sees one."""
    with turn.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[turn.value % len(devices)]
        turn.value += 1


def job(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """One piece of work in a process of its own; what went wrong comes back in words."""
    kind, seed, name = task
    torch.set_num_threads(1)
    try:
        if kind == "anchors":
            return anchors(settings_of(args.part, args, seed), student_of(args.part))
        return (score if kind == "score" else train)(args.part, args, seed, name)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:400]}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def needs_store(task: Task) -> bool:
    """Whether the task has to wait until the teacher's opinion is written."""
    return task[0] == "train" and METHODS[task[2]][2] != HIDDEN


class Results:
    """What came out so far; the file is written anew whenever something is added."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.perf_counter()
        self.stores: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.anchors: dict[str, Any] = {}
        self.failed: list[dict[str, Any]] = []

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Keep what a task gave."""
        if task[0] == "anchors":
            self.anchors = found
        else:
            (self.stores if task[0] == "score" else self.rows).append(found)
        self.write()

    def write(self) -> None:
        """Settings, stores, anchors, one row per method and seed, and what failed."""
        args = self.args
        on_gpu = args.part == "synth" and args.device == "cuda"
        teacher = " --teacher FOLDER" if args.part == "synth" else ""
        about = {
            "command": f"python -m benchmarks.distillation {args.part} OUT{teacher} --tokens "
            f"{args.tokens} --processes {args.processes}",
            "part": args.part,
            "device": torch.cuda.get_device_name(0) if on_gpu else platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "tokens": args.tokens,
            "k": args.k,
            "seconds": round(time.perf_counter() - self.begin, 1),
            "anchors": self.anchors,
            "stores": self.stores,
            "rows": sorted(self.rows, key=lambda row: list(METHODS).index(row["method"])),
            "failed": self.failed,
        }
        path = args.out / f"distillation-{args.part}.json"
        path.write_text(json.dumps(about, indent=1) + "\n")


def perform(tasks: list[Task], results: Results, processes: int) -> list[Task]:
    """Do the tasks side by side; the value is those that failed."""
    args, context = results.args, get_context("spawn")
    turn = context.Value("i", 0)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    waiting = [task for task in tasks if needs_store(task)]
    failed: list[Task] = []
    with ProcessPoolExecutor(processes, context, take_a_gpu, (turn, devices)) as pool:
        futures = {pool.submit(job, t, args): t for t in tasks if not needs_store(t)}
        while futures or waiting:
            if waiting and not any(task[0] == "score" for task in futures.values()):
                try:
                    futures |= {pool.submit(job, task, args): task for task in waiting}
                except BrokenExecutor:  # a process died
                    failed += waiting
                waiting = []
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                task = futures.pop(future)
                found = outcome(future)
                if "failed" in found:
                    failed.append(task)
                    results.failed.append({"task": list(task), **found})
                    results.write()
                else:
                    results.add(task, found)
    return failed


def outcome(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """What a task gave, or how its process ended."""
    error = future.exception()
    return future.result() if error is None else {"failed": repr(error)[:400]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["demo", "synth"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, help="checkpoint of the real rows' teacher")
    parser.add_argument("--input", help="the SYNTH sample, for real rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="of 1,024 tokens in a step, real rows")
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    demo = args.part == "demo"
    if not demo and not (args.teacher and args.input):
        parser.error("synth needs --teacher FOLDER and --input SAMPLE.parquet")
    args.k = args.k or (8 if demo else 64)
    args.processes = args.processes or ((os.cpu_count() or 1) if demo else 9)
    results = Results(args)
    sources = sorted({METHODS[m][2] for m in args.methods} - {HIDDEN})
    seeds = args.seeds if demo else args.seeds[:1]  # the real rows are the same for all
    for seed in seeds:
        make_data(args.part, args, seed)
    tasks = [("score", seed, codec) for seed in seeds for codec in sources]
    # The slowest first, which read no store; then seed by seed.
    order = sorted(args.methods, key=lambda method: METHODS[method][2] != HIDDEN)
    tasks += [("train", seed, method) for seed in args.seeds for method in order]
    tasks += [] if demo else [("anchors", seeds[0], "")]
    failed = perform(tasks, results, args.processes)
    if failed:
        print("once more:", failed, flush=True)
        failed = perform(failed, results, max(1, args.processes // 2))
    results.write()
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
