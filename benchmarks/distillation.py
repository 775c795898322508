"""Stage 2 by every kind of target, on equal student tokens, judged by what it is for.

python -m benchmarks.distillation demo OUT                       problems, a teacher that knows them
python -m benchmarks.distillation synth OUT --teacher FOLDER     real rows, the whole vocabulary

Each method trains the same student from the same fresh weights in the same order of documents; only
the loss and what it reads of the teacher differ. Judged on held-out documents by the exact
KL(teacher || student) over the vocabulary, and on the demo's problems by exact match. Three seeds:
weights, order and, for the demo, the problems themselves.
"""

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, is_dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import REPOSITORY

CODECS: dict[str, dict[str, Any]] = {
    "logprob": {"kind": "logprob"},
    "top": {"kind": "set_coded"},
    "sampled": {"kind": "sampled"},
}
HIDDEN = "hidden"

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
        batch = {"global_batch_size": 16, "micro_batch_size": 16, "seq_len": 1024}
        optimizer = {"kind": "normuon", "embed_lr_mult": 5.0}
        device, dtype = args.device, "float32"
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
        tree["teacher"] = settings["teacher"]
    else:
        path = settings["data"].parent / f"targets-{source}"
        tree["targets"] = {"path": str(path), "share": 1.0}
    begin = time.perf_counter()
    summary = run(validate(OfflineConfig, tree, source=method))
    seconds = time.perf_counter() - begin
    found = judge(part, args, seed, run_dir)
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


def judge(part: str, args: argparse.Namespace, seed: int, run_dir: Path) -> dict[str, Any]:
    """Exact held-out KL to the teacher and loss; on the demo's problems exact match as well."""
    from vpmoe.config import validate
    from vpmoe.data.dataset import Dataset
    from vpmoe.evals.heldout import documents_of, heldout_loss
    from vpmoe.teachers import LocalTeacherConfig
    from vpmoe.train.state import load_student

    settings = settings_of(part, args, seed)
    device = torch.device(settings["device"])
    student, _ = load_student(run_dir, device=device)
    student.eval()
    documents = documents_of(Dataset(settings["data"], "valid"))
    teacher = validate(LocalTeacherConfig, settings["teacher"], source="teacher").build()
    found = held_out_kl(student, teacher, documents)
    loss = heldout_loss(student, documents)
    found["heldout_loss"] = as_plain(loss.loss)
    if part == "demo":
        found["exact_match"] = exact_match_of(student, seed)
    return found


def as_plain(value: Any) -> Any:
    """Plain values, ready for JSON."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@torch.no_grad()
def held_out_kl(student: Any, teacher: Any, documents: list[Any]) -> dict[str, Any]:
    """KL(teacher || student) over the whole vocabulary, nats, at every trained label, float64."""
    from vpmoe.spans import Span

    device = student.embedding.weight.device
    wide = torch.float64 if student.id_of is not None else torch.float32
    head, own = teacher.head_weight.to(device, wide), student.head_weight.to(wide)
    if student.id_of is not None and len(head) != len(own):
        head = head[student.id_of]
    total, entropy, count, mass = 0.0, 0.0, 0, 0.0
    for document in documents:
        tokens = torch.from_numpy(document.tokens[:-1].astype("int64")).to(device)
        trained = torch.from_numpy((document.span_ids != Span.IGNORE).copy()).to(device)
        trained = trained[: tokens.numel() - 1]
        states = teacher.hidden([document.tokens[:-1]])[0].to(device, wide)[trained]
        place = torch.arange(tokens.numel(), device=device)[None]
        output = student(tokens[None], positions=place, document_ids=torch.zeros_like(place))
        hidden = output.hidden[0, :-1][trained].to(wide)
        for begin in range(0, len(states), 256):
            t = (states[begin : begin + 256] @ head.T).log_softmax(1)
            p = (hidden[begin : begin + 256] @ own.T).log_softmax(1)
            total += float((t.exp() * (t - p)).sum())
            entropy -= float((t.exp() * t).sum())
            mass += float(t.exp().topk(min(64, t.shape[1]), dim=1).values.sum())
            count += len(t)
    return {
        "kl_nats": total / count,
        "teacher_entropy_nats": entropy / count,
        "teacher_top64_mass": mass / count,
        "labels": count,
    }


def exact_match_of(student: Any, seed: int) -> dict[str, Any]:
    """Share of 300 held-out problems answered right, greedily."""
    from vpmoe.config import read_tree, validate
    from vpmoe.evals.suite import EvalConfig, evaluate, open_inputs

    tree = dict(read_tree(REPOSITORY / "configs/demo/eval.toml"))
    tree.pop("teacher"), tree.pop("data"), tree.pop("documents")
    config = validate(EvalConfig, tree, source="eval")
    report = evaluate(student, config, open_inputs(config))
    return as_plain(report.exact_match)


def take_a_gpu(turn: Any, devices: list[str]) -> None:
    """Processes share the GPUs evenly: each sees one."""
    with turn.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[turn.value % len(devices)]
        turn.value += 1


def job(task: tuple[str, argparse.Namespace, int, str, str]) -> dict[str, Any]:
    """One piece of work in a process of its own."""
    kind, args, seed, name, part = task
    torch.set_num_threads(1)
    return (score if kind == "score" else train)(part, args, seed, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["demo", "synth"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, help="checkpoint of the real rows' teacher")
    parser.add_argument("--input", default="../shared/data/synth/synth_sample.parquet")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.k = args.k or (8 if args.part == "demo" else 64)
    begin = time.perf_counter()
    sources = sorted({METHODS[m][2] for m in args.methods} - {HIDDEN})
    seeds = args.seeds if args.part == "demo" else args.seeds[:1]
    for seed in seeds:
        make_data(args.part, args, seed)
    context = get_context("spawn")
    turn = context.Value("i", 0)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    with ProcessPoolExecutor(args.processes, context, take_a_gpu, (turn, devices)) as pool:
        scores = [("score", args, s, c, args.part) for s in seeds for c in sources]
        stores = list(pool.map(job, scores))
        tasks = [("train", args, s, m, args.part) for m in args.methods for s in args.seeds]
        rows = list(pool.map(job, tasks))
    write(args, stores, rows, time.perf_counter() - begin)


def write(
    args: argparse.Namespace,
    stores: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    seconds: float,
) -> None:
    """The results file: settings, stores, one row per method and seed."""
    import platform

    on_gpu = args.part == "synth" and args.device == "cuda"
    about = {
        "part": args.part,
        "device": torch.cuda.get_device_name(0) if on_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tokens": args.tokens,
        "k": args.k,
        "seconds": round(seconds, 1),
        "stores": stores,
        "rows": rows,
    }
    path = args.out / f"distillation-{args.part}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print("written", path)


if __name__ == "__main__":
    main()
