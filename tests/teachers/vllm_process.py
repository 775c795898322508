"""A real vLLM server, in a process group of its own that ends with the test."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-teacher" / "bin" / "python"
START_S = 400
# What the docs tell users to set; small blocks of memory, because two may run at once here.
FLAGS = (
    *("--served-model-name", "teacher", "--max-model-len", "2048", "--enforce-eager"),
    *("--dtype", "bfloat16", "--max-logprobs", "64", "--max-num-seqs", "8"),
    *("--no-enable-prefix-caching", "--num-gpu-blocks-override", "64"),
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass
class Vllm:
    """A running server: where it is, and the id of its process and group."""

    url: str
    pid: int
    log: Path

    def kill(self) -> None:
        """As if the machine had lost it: no goodbye to anyone."""
        _signal(self.pid, signal.SIGKILL)

    def num_answered(self) -> int:
        """Completions that its log says it gave."""
        return self.log.read_text().count('"POST /v1/completions HTTP/1.1" 200')


@contextlib.contextmanager
def vllm(model: Path, log: Path, *flags: str) -> Iterator[Vllm]:
    """A server of `model` on a free loopback port, healthy; it is stopped by its id at the end."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    address = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS")}
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(PYTHON), *module, *address, *FLAGS, *flags],
            env=environment | ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Vllm(f"http://127.0.0.1:{port}", process.pid, log)
    finally:
        _stop(process)


def _end_with_parent() -> None:
    """Have the kernel end the server if the tests are killed before they can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3_000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM was not up after {START_S} s:\n{log.read_text()[-3_000:]}")


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _stop(process: subprocess.Popen) -> None:
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    _signal(process.pid, signal.SIGKILL)
    process.wait()
