"""Record what a real vLLM server answers, for the tests that run without one.

    scripts/teacher_server.sh  # or any server of the tiny checkpoint
    .venv/bin/python scripts/record_teacher_server.py http://127.0.0.1:8123 teacher

Writes tests/teachers/golden/vllm-<version>.json: prompts with their answers, and refusals.
"""

import json
import sys
from pathlib import Path

import httpx
import numpy as np

from vpmoe.teachers.answers import request_body

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "teachers" / "golden"
LENGTHS, WIDTHS = (2, 3, 9, 14), (0, 3)


def main(url: str, model: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        version = client.get("/version").json()["version"]
        rng = np.random.default_rng(20)
        prompts = [rng.integers(0, 201_088, size=n) for n in LENGTHS]
        recorded = []
        for prompt in prompts:
            for k in WIDTHS:
                body = request_body(model, prompt, k)
                answer = client.post("/v1/completions", json=body).raise_for_status().json()
                recorded.append({"body": body, "answer": answer})
        short = request_body(model, prompts[0], 0)
        wrong = {
            "too many logprobs": {**short, "prompt_logprobs": 65},
            "unknown model": {**short, "model": "nobody"},
            "outside the vocabulary": {**short, "prompt": [5, 201_088]},
            "too long": {**short, "prompt": [5] * 2_049},
            "no room for a token": {**short, "prompt": [5] * 2_048},
        }
        refusals = {}
        for name, body in wrong.items():
            response = client.post("/v1/completions", json=body)
            refusals[name] = {"status": response.status_code, "answer": response.json()}
        models = client.get("/v1/models").json()
        for entry in models["data"]:
            entry["root"] = "tiny-teacher"  # a path of the machine that recorded
    found = {"version": version, "models": models, "answers": recorded, "refusals": refusals}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"vllm-{version}.json"
    file.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
