"""How fast codecs pack and unpack on a device, and whether its bytes are a CPU's.

    python -m benchmarks.codec_rates --device cuda --out benchmarks/results/target-codecs.json

Power laws over all 201,088 ids whose ranks are drawn with Zipf's frequencies, 2,000 different ones,
each many times. The best of five calls on tensors on the device, host time around a
synchronisation. With --out the numbers replace `gpu_adaptive` there.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vpmoe.teachers.codecs import Codec, CodecConfig, Entries
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import entries_of_top
from vpmoe.teachers.codecs.ranking import MOST, Ranking
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.vocabulary import VOCAB_SIZE

DIFFERENT, ASKED, SAMPLES = 2_000, 256, 100
CONFIGS = (
    ("set_coded, k 64", SetCodedConfig()),
    ("adaptive, worth_nats 0.013", AdaptiveConfig(worth_nats=1.3e-2)),
    ("adaptive, worth_nats 0.0075", AdaptiveConfig(worth_nats=7.5e-3)),
    ("adaptive, worth_nats 0.005", AdaptiveConfig()),
    ("adaptive, worth_nats 0.001", AdaptiveConfig(worth_nats=1e-3)),
    ("adaptive, worth_nats 0.01, prior", AdaptiveConfig(worth_nats=1e-2, tail="prior")),
)


def teacher(device: str) -> tuple[Entries, Ranking]:
    """The likeliest ids of power laws, frequent ids oftener among them, and the ids' ranking."""
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(VOCAB_SIZE, generator=rng)
    rank = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    frequency = (-rank.log()).float().to(device)
    rows = []
    noise = torch.Generator(device).manual_seed(0)
    for exponents in torch.linspace(1.1, 3.0, DIFFERENT).split(100):
        draws = torch.rand(len(exponents), VOCAB_SIZE, generator=noise, device=device)
        ranks = (frequency - (-draws.clamp_min(1e-30).log()).log()).topk(ASKED, dim=1).indices
        shapes = (-exponents[:, None].double() * rank.log()).log_softmax(1)[:, :ASKED]
        rows.append(entries_of_top(order[ranks.cpu()], shapes.float()))
    ids = torch.cat([row.ids for row in rows])
    logprobs = torch.cat([row.logprobs for row in rows])
    tails = torch.cat([row.tail for row in rows])
    return Entries(ids, logprobs, tails), Ranking(order[:MOST])


def best(function: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of five calls."""
    seconds = []
    for _ in range(6):
        _wait(device)
        begin = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def different_bytes(codec: Codec, entries: Entries, device: str) -> tuple[int, float]:
    """Bytes that differ between the device and the CPU, and by how much what they say differs."""
    places = torch.tensor([len(entries) // 2, len(entries) - len(entries) // 2])
    here = codec.encode(entries, places)
    there = codec.encode(entries.to(device), places.to(device))
    columns = {name: column.data for name, column in here.items()}
    apart = 0
    for name, data in columns.items():
        other = there[name].data.cpu()
        apart += int((data != other).sum()) if len(data) == len(other) else len(data)
    ours = codec.decode(columns, places)
    theirs = codec.decode({n: d.to(device) for n, d in columns.items()}, places.to(device)).to(
        "cpu"
    )
    assert torch.equal(ours.ids, theirs.ids), "the same bytes name other ids there"
    used = ours.logprobs > -torch.inf
    return apart, float((ours.logprobs - theirs.logprobs)[used].abs().max())


def measured(
    config: CodecConfig, entries: Entries, ranking: Ranking, *, device: str, places: int
) -> dict:
    """Rates on the device, and what there differs from a CPU."""
    codec = config.build().ranked_by(ranking)
    few = Entries(entries.ids[:, : codec.asked], entries.logprobs[:, : codec.asked], entries.tail)
    many = few.select(torch.arange(places) % len(few)).to(device)
    samples = torch.full((SAMPLES,), places // SAMPLES, device=device)
    columns = {name: column.data for name, column in codec.encode(many, samples).items()}
    counts = codec.decode(columns, samples).counts.float().mean()
    encode_s = best(lambda: codec.encode(many, samples), device)
    decode_s = best(lambda: codec.decode(columns, samples), device)
    apart, nats = different_bytes(codec, few, device)
    return {
        "entries": round(float(counts), 1),
        "encoded_per_s": int(places / encode_s),
        "decoded_per_s": int(places / decode_s),
        "bytes_unlike_a_cpu": apart,
        "log_probs_unlike_a_cpu": nats,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--places", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    entries, ranking = teacher(args.device)
    rows = []
    for name, config in CONFIGS:
        found = measured(config, entries, ranking, device=args.device, places=args.places)
        rows.append({"codec": name, **found})
        print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    result = {
        "command": f"python -m benchmarks.codec_rates --device {args.device}",
        "device": device, "places": args.places, "samples": SAMPLES, "compared": DIFFERENT,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))
    if args.out:
        held = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**held, "gpu_adaptive": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
