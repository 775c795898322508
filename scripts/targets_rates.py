"""The part of docs/targets.md on how fast codecs pack and unpack."""

from typing import Any

from performance import table

GPU_BAR, CORE_BAR = 1_000_000, 100_000  # places a second: both ways; decoded
PACKING_BAR = 5  # percent of a teacher's speed

Found = dict[str, Any]


def rates(found: Found) -> str:
    """Places a second on a GPU and on one core."""
    rows = [
        [f"`{row['codec']}`, one {of['device']}", row.get("entries"), *_both(row)]
        for of in (found["gpu"], found["gpu_adaptive"])
        for row in of["rows"]
        if of is found["gpu_adaptive"] or row["codec"] not in _newer(found)
    ]
    for teacher, measured in found["cpu_core"].items():
        for row in measured:
            rows.append(
                [f"`{_name(row['codec'])}`, {teacher}, one core", row["entries"], *_both(row)]
            )
    return table(["places per second", "ids", "pack", "unpack"], rows)


def _both(row: Found) -> list[str]:
    return [_rate(row["encoded_per_s"]), _rate(row["decoded_per_s"])]


def _rate(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def _newer(found: Found) -> set[str]:
    """Codecs whose older rates were measured again."""
    return {row["codec"] for row in found["gpu_adaptive"]["rows"]}


def _name(codec: Found) -> str:
    if codec["kind"] != "adaptive":
        return f"{codec['kind']}, k {codec['k']}"
    tail = ", prior" if codec.get("tail") == "prior" else ""
    return f"adaptive, worth_nats {codec['worth_nats']:g}{tail}"


def rate_text(found: Found) -> str:
    """Bars of speed, and what was not timed."""
    gpu, older = found["gpu_adaptive"], found["gpu"]
    ours = [row for row in gpu["rows"] if row["codec"].startswith("adaptive")]
    packed, unpacked = ([row[f"{way}_per_s"] for row in ours] for way in ("encoded", "decoded"))
    apart = sum(row["bytes_unlike_a_cpu"] for row in gpu["rows"])
    core = [
        (row["decoded_per_s"], f"`{_name(row['codec'])}` ({row['entries']:.0f} ids, {teacher}: "
         f"{_rate(row['decoded_per_s'])})")
        for teacher, rows in found["cpu_core"].items()
        for row in rows
    ]  # fmt: skip
    others = " and ".join(
        f"`{c}`" for row in older["rows"] if (c := row["codec"]) not in _newer(found)
    )
    slow = [text for rate, text in core if rate < CORE_BAR]
    return (
        f"`{gpu['command']}`, power laws, {gpu['date']}; {others} {older['date']}. On the GPU "
        f"`adaptive` packs {_rate(min(packed))} to {_rate(max(packed))} places a second and "
        f"unpacks {_rate(min(unpacked))} to {_rate(max(unpacked))} (bar {_rate(GPU_BAR)}, "
        f"{'met' if min(packed + unpacked) >= GPU_BAR else 'missed'}); {apart or 'none'} of its "
        f"bytes and set-coded's differ from a CPU's on {gpu['compared']:,} distributions. One core "
        f"is to unpack {_rate(CORE_BAR)}: "
        + (f"missed by {'; '.join(slow)}; met by all others. " if slow else "met by all. ")
        + "`distillkit` was not timed on a GPU, `sampled` only as below."
    )


def packing_text(packing: Found) -> str:
    """What packing costs a teacher."""
    rows = packing["rows"]
    costs = [row["slower_packed_pct"] for row in rows]
    stored = [row["slower_stored_pct"] for row in rows]
    each = ", ".join(f"{row['slower_packed_pct']:.1f} % for {row['codec']}" for row in rows)
    times, pieces = rows[0]["repetitions"], rows[0]["pieces"]
    return (
        "A local teacher's answers are checked and packed on its own device, 8,192 labels at a "
        "time, by a thread beside the teacher, those of a server by a thread of the CPU, while the "
        f"next piece is read. Beside a teacher of GPT-OSS-20B's shape on one {packing['device']} "
        f"that costs {min(costs):.1f} to {max(costs):.1f} % of its speed (bar {PACKING_BAR} %, "
        f"{'met' if max(costs) <= PACKING_BAR else 'missed'}): {each}. Measured "
        f"{'once' if times == 1 else f'{times} times'} each way over {pieces} pieces"
        f"{', so without a spread' if times == 1 else ''}; the last piece is packed with no "
        "teacher beside it. The whole stage, which also selects, ranks and writes, takes "
        f"{min(stored):.1f} to {max(stored):.1f} % longer ([performance.md](performance.md))."
    )
