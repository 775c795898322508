"""An HTTP server that answers as vLLM was recorded to, and fails where a test tells it to."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from vpmoe.data.o200k import decode, encode
from vpmoe.vocabulary import VOCAB_SIZE

GOLDEN = Path(__file__).parent / "golden" / "vllm-0.32.0.json"


def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def recorded(body: dict) -> dict:
    """The real server's answer to this very request."""
    for entry in golden()["answers"]:
        if entry["body"] == body:
            return entry["answer"]
    raise KeyError(f"nothing recorded for {body}")


def logprobs_of(tokens, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs at every place but the first, decided by the tokens before it."""
    running = np.cumsum(np.asarray(tokens, dtype=np.int64) * 31 + 7)[:-1]
    ids = (running[:, None] % 50_000) + 3 * np.arange(width)
    logprobs = -1.0 - (running[:, None] % 13) / 16 - 0.25 * np.arange(width)
    return ids, logprobs - np.log(8)


def invented(body: dict) -> dict:
    """An answer of the recorded form, with numbers that follow from the prompt alone."""
    tokens, k = body["prompt"], body.get("prompt_logprobs", 0)
    ids, logprobs = logprobs_of(tokens)
    places: list[dict | None] = [None]
    for place in range(1, len(tokens)):
        row = {
            str(int(i)): {"logprob": float(v), "rank": r + 1, "decoded_token": "x"}
            for r, (i, v) in enumerate(
                zip(ids[place - 1, :k], logprobs[place - 1, :k], strict=True)
            )
        }
        own = str(tokens[place])
        if own not in row:
            low = float(logprobs[place - 1, -1]) - 1 - (int(own) % 97) / 10
            row = {own: {"logprob": low, "rank": 1_000, "decoded_token": "x"}, **row}
        places.append(row)
    choice = {"index": 0, "text": "", "prompt_logprobs": places, "prompt_token_ids": tokens}
    return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def spelled(path: str, body: dict) -> dict:
    """Answers of the tokenizer's two addresses."""
    if path == "/tokenize":
        return {"tokens": encode(body["prompt"]).tolist()}
    return {"prompt": decode(body["tokens"])}


def own_logprobs(tokens) -> np.ndarray:
    """What `invented` says about a prompt's own tokens when none is among the likeliest."""
    _, logprobs = logprobs_of(tokens)
    return (logprobs[:, -1] - 1 - (np.asarray(tokens[1:]) % 97) / 10).astype(np.float32)


class StandIn:
    """The state of one stand-in server; `url` is its address.

    `faults` are taken one for each request, before it is answered: "reset" closes the connection,
    "cut" closes it in the middle of the answer, a number is a status, a function changes the
    answer. None is no fault.
    """

    def __init__(self, answer: Callable[[dict], dict] = recorded):
        self.answer, self.faults = answer, []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.pause = 0.0
        self.num_ids = VOCAB_SIZE
        self.busy = self.most_busy = 0
        self.models = golden()["models"]
        self.lock = threading.Lock()
        self.url = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "GET":
            self._send(handler, 200, self.models)
            return
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path != "/v1/completions":
            self._send(handler, 200, spelled(handler.path, body))
            return
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.pause)
            if fault == "reset":
                _hang_up(handler)
            elif isinstance(fault, int):
                self._send(handler, fault, {"error": {"message": "as told", "code": fault}})
            elif isinstance(fault, dict):
                self._send(handler, fault["status"], fault["answer"])
            elif max(body["prompt"]) >= self.num_ids:
                self._send(handler, 400, golden()["refusals"]["outside the vocabulary"]["answer"])
            else:
                answer = self.answer(body)
                answer = fault(answer) if callable(fault) else answer
                self._send(handler, 200, answer, cut=fault == "cut")
        finally:
            with self.lock:
                self.busy -= 1

    def _send(self, handler, status: int, answer: dict, cut: bool = False) -> None:
        content = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            _hang_up(handler)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve(answer: Callable[[dict], dict] = recorded):
    """A running stand-in, on a free loopback port."""
    state = StandIn(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            state.respond(self)

        def do_POST(self) -> None:
            state.respond(self)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address) -> None:
            pass  # broken pipes are what these tests are about

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
