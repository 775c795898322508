"""A real vLLM server against the same model in this process. Run with `make test-teacher`."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.teachers.stand_in import golden
from tests.teachers.vllm_process import PYTHON, REPOSITORY, vllm
from tests.train.toy import STUDENT
from vpmoe.cli import main
from vpmoe.config import load, validate
from vpmoe.data.harmony import RenderConfig
from vpmoe.data.problems import generate, write_problems
from vpmoe.errors import TeacherError
from vpmoe.stages.examine_teacher import made_up
from vpmoe.stages.score import ScoreConfig, run
from vpmoe.storage.runs import read_metrics
from vpmoe.teachers import client
from vpmoe.teachers.answers import read_answer
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.server import ServerTeacherConfig
from vpmoe.teachers.store import TargetStore

pytestmark = [
    pytest.mark.teacher_server,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-teacher: run make test-teacher"),
]

# Means over places; a single one may be off by half a nat where a router chose otherwise.
MEAN_NATS, MOST_NATS = 0.02, 0.05


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("tiny", REPOSITORY / "scripts/tiny_teacher.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(tmp_path_factory.mktemp("tiny") / "tiny-teacher")


@pytest.fixture(scope="module")
def server(tiny):
    with vllm(tiny, tiny.parent / "one.log") as running:
        yield running


@pytest.fixture(scope="module")
def teacher(server):
    built = config(server.url).build()
    yield built
    built.close()


@pytest.fixture(scope="module")
def local(tiny):
    return {
        dtype: LocalTeacherConfig(path=str(tiny), dtype=dtype).build()
        for dtype in ("bfloat16", "float32")
    }


@pytest.fixture(scope="module")
def asked() -> list[np.ndarray]:
    return [document.tokens[:-1] for document in made_up(16, RenderConfig())]


def config(*urls: str, **changes) -> ServerTeacherConfig:
    tree = {"urls": list(urls), "model": "teacher", "recheck": 0.0}
    return validate(ServerTeacherConfig, tree | changes, source="test")


def gaps(first, second) -> np.ndarray:
    return np.concatenate([np.abs(a - b) for a, b in zip(first, second, strict=True)])


def test_it_still_answers_as_it_was_recorded(server):
    """Should this fail with another version: record anew, and see what changed."""
    for entry in golden()["answers"]:
        url = f"{server.url}/v1/completions"
        answer = httpx.post(url, json=entry["body"], timeout=120, trust_env=False).json()
        prompt, k = np.array(entry["body"]["prompt"]), entry["body"]["prompt_logprobs"]
        now, then = read_answer(answer, prompt, k), read_answer(entry["answer"], prompt, k)
        assert answer["choices"][0].keys() == entry["answer"]["choices"][0].keys()
        np.testing.assert_allclose(now.logprobs, then.logprobs, atol=0.05)
        np.testing.assert_allclose(now.top_logprobs, then.top_logprobs, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_log_probs_are_those_of_the_model_in_this_process(teacher, local, asked, dtype):
    gap = gaps(teacher.score(asked), local[dtype].score(asked))
    print(
        f"{dtype}: mean {gap.mean():.4f}, 95 % {np.quantile(gap, 0.95):.4f}, most {gap.max():.4f}"
    )
    assert gap.mean() < MEAN_NATS and np.quantile(gap, 0.95) < MOST_NATS


def test_the_likeliest_ids_are_the_same_up_to_near_ties(teacher, local, asked):
    mine, theirs = teacher.score_top(asked, 16), local["float32"].score_top(asked, 16)
    shared = [
        len(np.intersect1d(a, b)) / 16
        for x, y in zip(mine, theirs, strict=True)
        for a, b in zip(x.top_ids, y.top_ids, strict=True)
    ]
    print(f"top-16 sets share {100 * np.mean(shared):.1f} % on average")
    assert np.mean(shared) > 0.95
    assert gaps(teacher.score(asked), [x.logprobs for x in mine]).max() < MOST_NATS
    values = gaps([x.top_logprobs[:, :8] for x in mine], [y.top_logprobs[:, :8] for y in theirs])
    assert values.mean() < MEAN_NATS


def test_order_and_company_do_not_matter(teacher, asked):
    together = teacher.score(asked)
    backwards = teacher.score(asked[::-1])[::-1]
    alone = [teacher.score([sequence])[0] for sequence in asked]
    found = gaps(together, backwards), gaps(together, alone)
    print(f"order {found[0].mean():.5f}, company {found[1].mean():.5f} nats per token")
    assert max(gap.mean() for gap in found) < MEAN_NATS / 2


def test_refusals_have_hints(teacher, asked):
    with pytest.raises(TeacherError, match="greater than max allowed: 64") as caught:
        teacher.score_top(asked[:1], 65)
    assert "--max-logprobs" in caught.value.hint
    with pytest.raises(TeacherError, match="longer than the 2047"):
        teacher.score([np.zeros(2_048, dtype=np.int64)])


def write_toml(path: Path, **tree) -> Path:
    """Nested tables in TOML, for verbs that read files; JSON's scalars and lists are TOML's."""

    def lines(table, prefix=""):
        for key, value in table.items():
            if not isinstance(value, dict):
                yield f"{key} = {json.dumps(value)}"
        for key, value in table.items():
            if isinstance(value, dict):
                yield f"[{prefix}{key}]"
                yield from lines(value, f"{prefix}{key}.")

    path.write_text("\n".join(lines(tree)) + "\n", encoding="utf-8")
    return path


def score_table(folder: Path, output: str, urls: list[str], tiny: Path, **changes) -> Path:
    teacher = {"kind": "server", "urls": urls, "model": "teacher", "recheck": 0.0, **changes}
    teacher["reference"] = {"path": str(tiny), "dtype": "bfloat16"}
    return write_toml(
        folder / f"{output}.toml",
        kind="score",
        data=str(folder / "data"),
        output=str(folder / output),
        shard_tokens=400,
        selection={"fraction": 1.0},
        codec={"kind": "set_coded", "k": 16},
        teacher=teacher,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of problems, built by the verb."""
    folder = tmp_path_factory.mktemp("end-to-end")
    write_problems(folder / "rows.parquet", generate(40, seed=1))
    table = write_toml(
        folder / "data.toml",
        kind="data",
        input=str(folder / "rows.parquet"),
        output=str(folder / "data"),
        seq_len=256,
        valid_fraction=0.1,
    )
    assert main.run(["data", "build", str(table)]) == 0
    return folder


def shard_bytes(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.glob("*.arrow")}


def wait_for_shards(store: Path, count: int, limit_s: float = 240) -> None:
    begin = time.monotonic()
    while len(list(store.glob("*.arrow"))) < count:
        assert time.monotonic() - begin < limit_s, "no shard was written"
        time.sleep(0.02)


def vpmoe(*words: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "vpmoe", *words], env=environment, start_new_session=True
    )


def test_end_to_end_with_a_kill_in_the_middle(folder, server, tiny, capsys):
    """build -> doctor -> score, killed and resumed -> verify -> stage 2 -> eval."""
    table = score_table(folder, "targets", [server.url], tiny)
    code = main.run(["teacher", "doctor", str(table), "--sequences", "8", "--json"])
    found = {f["check"]: f["state"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert code == 0 and set(found.values()) == {"ok"}, found

    store, before = folder / "targets", server.num_answered()
    child = vpmoe("score", str(table))
    wait_for_shards(store, 3)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = shard_bytes(store)
    assert not (store / "manifest.json").exists() and len(kept) >= 3
    assert vpmoe("score", str(table)).wait() == 0
    asked = server.num_answered() - before
    written = TargetStore(store)
    samples, shards = len(written), written.manifest["shards"]
    again = max(entry["samples"] for entry in shards)
    print(
        f"{samples} samples, {len(shards)} shards, {len(kept)} of them before the kill, {asked} "
        f"requests, at most {again} samples in a shard"
    )
    assert samples <= asked <= samples + again
    assert kept.items() <= shard_bytes(store).items()

    whole = load(table, ScoreConfig, [f"output={folder / 'whole'}"])
    run(whole)
    assert set(TargetStore(whole.output)) == set(written)
    same = shard_bytes(whole.output) == shard_bytes(store)
    print("the same bytes as a run that was not killed" if same else "other bytes")
    for name in written:
        np.testing.assert_allclose(written[name], TargetStore(whole.output)[name], atol=0.1)
    before = server.num_answered()
    assert main.run(["score", str(table)]) == 0
    assert server.num_answered() == before  # nothing is left to ask

    assert main.run(["targets", "verify", str(store), "--data", str(folder / "data")]) == 0
    student = {k: v for k, v in STUDENT.items() if k != "vocab_subset"}
    stage_two = write_toml(
        folder / "2.toml",
        kind="offline",
        run=str(folder / "run"),
        data=str(folder / "data"),
        threads=1,
        student=student,
        loss={"kind": "forward_kl"},
        targets={"path": str(store), "share": 1.0},
        batch={"global_batch_size": 2, "micro_batch_size": 2, "seq_len": 256},
        budget={"steps": 6},
        optimizer={"kind": "adamw", "lr": 0.01},
        valid={"documents": 0},
    )
    assert main.run(["train", str(stage_two)]) == 0
    losses = [row["train/loss/final"] for row in read_metrics(folder / "run")]
    print("loss:", [round(loss, 3) for loss in losses])
    assert len(losses) == 6 and np.mean(losses[3:]) < np.mean(losses[:3])
    assert main.run(["eval", str(folder / "run"), "documents=4", "prompts=0", "--json"]) == 0


def test_two_copies_share_the_work_and_the_death_of_one_is_survived(
    folder, server, tiny, asked, monkeypatch
):
    monkeypatch.setattr(client, "_FIRST_REST_S", 0.05)
    with vllm(tiny, tiny.parent / "two.log", "--skip-tokenizer-init") as other:
        both = config(server.url, other.url, recheck=0.2, retries=3).build()
        alone = config(server.url).build().score(asked)
        shared = both.score(asked)
        assert gaps(alone, shared).mean() < MEAN_NATS / 2
        counts = [each["answered"] for each in both.traffic.values()]
        print(f"answers of the two: {counts}")
        assert min(counts) >= 3

        killer = threading.Timer(0.5, other.kill)
        killer.start()
        again = both.score(asked * 6)
        killer.join()
        assert gaps(alone * 6, again).mean() < MEAN_NATS / 2
        print(f"traffic with a death: {both.traffic}")
        assert sum(v for k, v in both.traffic[other.url].items() if k.startswith("conn")) > 0
        both.close()


def test_a_server_that_dies_is_named_and_another_goes_on(folder, server, tiny, capsys):
    with vllm(tiny, tiny.parent / "three.log", "--skip-tokenizer-init") as dying:
        table = score_table(folder, "orphan", [dying.url], tiny, retries=2)
        killer = threading.Thread(
            target=lambda: (wait_for_shards(folder / "orphan", 2), dying.kill())
        )
        killer.start()
        assert main.run(["score", str(table)]) == 1
        killer.join()
        said = capsys.readouterr().err
        assert f"no teacher server answers any more, 3 tries in a row each: {dying.url}" in said
        assert "what is stored is not asked again" in said
    kept = shard_bytes(folder / "orphan")
    before = server.num_answered()
    table = score_table(folder, "orphan", [server.url], tiny)
    assert main.run(["score", str(table)]) == 0
    store = TargetStore(folder / "orphan")
    old = sum(e["samples"] for e in store.manifest["shards"] if e["file"] in kept)
    assert old > 0
    assert server.num_answered() - before == len(store) - old
    assert kept.items() <= shard_bytes(folder / "orphan").items()
