"""The part of docs/targets.md on errors and bytes, and what its other parts read results by."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from performance import table

from vpmoe.vocabulary import VOCAB_SIZE

DEMO = "demo teacher"
RECOMMENDED, NORMALIZED, BUDGET = "DistillKit", "DistillKit, normalized", "DistillKit budget"
DEFAULT = "adaptive 0.005"  # AdaptiveConfig's own `worth_nats`
BAR, SET_BAR = 60, 182  # bytes: `adaptive` at the error of RECOMMENDED; set-coded 64
TAILS = {"even": "adaptive", "prior": "adaptive_prior"}  # -> how its keys begin in the file
TEACHERS = {
    "four synthetic shapes": "shapes of any ids",
    "the same, ids as frequent as labels": "shapes of frequent ids",
    "n-gram model, text it has counted": "n-gram counted text",
    "n-gram model, held-out text": "n-gram held-out text",
}
CODECS = {
    "top-64": "plain top-64",
    "set-64": "set-coded 64",
    "set-128": "set-coded 128",
    RECOMMENDED: "DistillKit recommended",
    NORMALIZED: "the same, `normalize_t`",
    BUDGET: "DistillKit budget",
}
ADAPTIVE = {
    "adaptive 0.01": "adaptive, `worth_nats` 0.01",
    DEFAULT: "adaptive, 0.005",
    "prior 0.03": "the same, `tail` prior, 0.03",
    "prior 0.01": "the same, `tail` prior, 0.01",
}
Found = dict[str, Any]


def point(frontier: Found, name: str) -> Found:
    """One codec of a teacher's frontier; empty where it was not measured."""
    return next((row for row in frontier["codecs"] if row["name"] == name), {})


def matched(frontier: Found, tail: str, name: str = RECOMMENDED) -> Found:
    """`adaptive` at the error of another codec; empty where it was not tried."""
    return frontier.get(f"{TAILS[tail]}_at_the_error_of", {}).get(name) or {}


def reranked(frontier: Found, tail: str, how: str) -> Found:
    """The same at the error of the recommended setting, with ids in another order."""
    return frontier.get(f"{TAILS[tail]}_of_another_ranking", {}).get(how) or {}


def reached(row: Found) -> bool:
    """Whether the error is the other's: the search ends at 256 ids."""
    return bool(row) and row["kl_nats"] <= row["its_kl_nats"]


def holds(row: Found) -> bool:
    """Whether the bar is met."""
    return reached(row) and row["bytes_per_token"] <= BAR


def compared(found: Found) -> Found:
    """The teachers that know ids enough for DistillKit's recommended setting."""
    return {name: f for name, f in found["frontiers"].items() if point(f, RECOMMENDED)}


def on_text(found: Found) -> Found:
    """Of these, those that read conversations."""
    return {n: f for n, f in compared(found).items() if n.startswith(("n-gram", "network"))}


def has_prior(found: Found) -> bool:
    """Whether a tail by its prior was measured."""
    return any(matched(frontier, "prior") for frontier in compared(found).values())


def said(items: Iterable[str]) -> str:
    """Words as a list in prose."""
    *first, last = list(items) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def short(name: str) -> str:
    """A teacher's name in a table."""
    return TEACHERS.get(name, name.replace(",", ""))


def span(values: Sequence[float], form: str = ".0f") -> str:
    """From the least to the most."""
    low, high = (format(end(values), form) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def prose(*parts: str) -> str:
    """Paragraphs and list items, wrapped as those written by hand."""
    lines = []
    for part in parts:
        indent = "  " if part.startswith("- ") else ""
        lines.append(
            textwrap.fill(
                part, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        )
    return ("\n" if parts[0].startswith("- ") else "\n\n").join(lines)


def errors(found: Found) -> str:
    """KL of some settings on every teacher."""
    many = compared(found)
    rows = [["entropy of the teacher", "", *(f"{f['entropy_nats']:.3f}" for f in many.values())]]
    for name, label in {**CODECS, **ADAPTIVE}.items():
        points = [point(frontier, name) for frontier in many.values()]
        if not any(points):
            continue
        sizes = {row["bytes_per_token"] for row in points if row}
        own = name in ADAPTIVE
        cells = [
            f"{row['kl_nats']:.4f}" + f" ({row['bytes_per_token']:.0f})" * own if row else "-"
            for row in points
        ]
        rows.append([label, "in brackets" if own else f"{max(sizes):g}", *cells])
    pairs = [(point(f, "set-64"), point(f, "top-64")) for f in many.values()]
    above = max(ours["kl_nats"] - plain["kl_nats"] for ours, plain in pairs)
    size = max(ours["bytes_per_token"] for ours, _ in pairs)
    text = (
        f"Set-coded 64 takes {size} bytes ({_bar(size <= SET_BAR)} of {SET_BAR}), and its KL is "
        f"at most {above:.6f} nats above plain top-64's."
    )
    head = ["KL in nats", "B/token", *(short(name) for name in many)]
    return f"{table(head, rows)}\n\n{prose(text)}"


def _bar(met: bool) -> str:
    return "within the bar" if met else "above the bar"


def at_equal_error(found: Found) -> str:
    """Bytes of `adaptive` where its KL is that of a setting of DistillKit."""
    many = compared(found)
    rows = []

    def line(label: str, tail: str, cells: list[Found], *, barred: bool = False) -> None:
        if any(cells):
            marked = [_bytes(cell, bold=barred and holds(cell)) for cell in cells]
            rows.append([label, tail, *marked])

    for name in (RECOMMENDED, NORMALIZED, BUDGET):
        label = {NORMALIZED: "DistillKit recommended with `normalize_t`"}.get(name, CODECS[name])
        for tail in TAILS:
            cells = [matched(frontier, tail, name) for frontier in many.values()]
            size = next((cell["its_bytes_per_token"] for cell in cells if cell), 0)
            line(f"{label}, {size:.0f} bytes", tail, cells, barred=name == RECOMMENDED)
        for how, text in (
            ("a tenth of the labels", "the same, a tenth of the labels counted"),
            ("numbers of o200k", "the same, nothing counted: ids by their number"),
        ):
            for tail in TAILS if name == RECOMMENDED else ():
                line(text, tail, [reranked(f, tail, how) for f in many.values()])
    return table(["bytes of `adaptive` at the error of", "`tail`", *map(short, many)], rows)


def _bytes(row: Found, *, bold: bool = False) -> str:
    if not row:
        return "-"
    if not reached(row):
        return "not reached"
    return f"**{row['bytes_per_token']:.1f}**" if bold else f"{row['bytes_per_token']:.1f}"


def findings(found: Found) -> list[str]:
    """Where the bar holds, and where not."""
    many, first = compared(found), next(iter(compared(found).values()))
    size, named = (point(first, RECOMMENDED)[key] for key in ("bytes_per_token", "entries"))
    lines = [
        f"- **The bar for `adaptive` is {BAR} bytes per token at the KL of DistillKit's "
        f"recommended setting**, which takes {size - 2:.0f}, {size:.0f} with the log-prob. "
        f"With an even tail it {_where(many, 'even')}."
    ]
    if has_prior(found):
        lines.append(f'- With `tail = "prior"` it {_where(many, "prior")}.')
    else:
        lines.append('- `tail = "prior"` is not in the file of results: not measured.')
    plain, normal = zip(*found["distillkit_by_instructions"].values(), strict=True)
    lines.append(
        "- DistillKit's setting fits a curve over ranks up to 112 in float32, which is "
        f"ill-conditioned: on the synthetic shapes its KL is {span(plain, '.3f')} by the "
        "instructions that the processor solves it with, and the error that `adaptive` has to "
        f"equal moves with it. With `normalize_t` it is {span(normal, '.3f')} with all of them."
    )
    demo = found["frontiers"][DEMO]
    ours, budget = point(demo, DEFAULT), point(demo, BUDGET)
    lines += [
        f"- The demo teacher knows fewer ids than the {named:.0f} that DistillKit recommends, so "
        f"that there is no error to equal. Mostly sure, it takes {ours['bytes_per_token']:.1f} "
        f"bytes for a KL of {ours['kl_nats']:.6f}, far inside the bar; DistillKit's budget setting "
        f"takes {budget['bytes_per_token']:.0f} for {budget['kl_nats']:.6f}.",
    ]
    if shapes := many.get("four synthetic shapes"):
        ids = round(matched(shapes, "even")["entries"])
        lines.append(
            "- Ids in no order at all are what no ranking and no prior can help with: to say which "
            f"{ids} of {VOCAB_SIZE:,} ids they are takes "
            f"{math.comb(VOCAB_SIZE, ids).bit_length() / 8:.0f} bytes."
        )
    return lines


def _where(many: Found, tail: str) -> str:
    """On which teachers the bar holds and is missed, with the bytes."""
    rows = {short(n): row for n, row in ((n, matched(f, tail)) for n, f in many.items()) if row}
    met, missed = (
        [f"{n} ({_bytes(row)})" for n, row in rows.items() if holds(row) == wanted]
        for wanted in (True, False)
    )
    if not missed:
        return f"holds on all of them: {said(met)}"
    return f"holds on {said(met)}; **it is missed** on {said(missed)}"


def gradients(found: Found) -> str:
    """What is wrong with a gradient where the KL is equal."""
    many = compared(found)
    rows = [
        ["DistillKit recommended", *_each(many, RECOMMENDED, "gradient_error", ".4f")],
        ["ids named", *_each(many, RECOMMENDED, "entries", ".0f")],
    ]
    for tail in TAILS:
        cells = [matched(frontier, tail) for frontier in many.values()]
        if any(cells):
            for key, form, label in (
                ("gradient_error", ".4f", f"adaptive, `tail` {tail}"),
                ("entries", ".0f", "ids named"),
            ):
                rows.append([label, *(format(row[key], form) if row else "-" for row in cells)])
    head = ["gradient's error at that KL, root mean square", *map(short, many)]
    return table(head, rows)


def _each(many: Found, name: str, key: str, form: str) -> list[str]:
    return [format(point(frontier, name)[key], form) for frontier in many.values()]


def gradient_text(found: Found) -> list[str]:
    """Who is further from a gradient, the KL being equal."""
    lines = []
    for tail in TAILS:
        rows = {short(n): matched(f, tail) for n, f in compared(found).items() if matched(f, tail)}
        if not rows:
            continue
        larger = {n: r for n, r in rows.items() if r["gradient_error"] > r["its_gradient_error"]}
        pairs = [
            f"{n} ({r['gradient_error']:.4f} against {r['its_gradient_error']:.4f})"
            for n, r in larger.items()
        ]
        text = (
            f'- `tail = "{tail}"`: the error of a cross-entropy\'s gradient at the logits is '
            f"larger than DistillKit's on {len(larger)} of {len(rows)} teachers"
        )
        text += f": {said(pairs)}." if pairs else "."
        if tail == "prior":
            ids = span([row["entries"] for row in rows.values()])
            text += (
                f" Fewer ids are named, {ids} where DistillKit names "
                f"{point(next(iter(compared(found).values())), RECOMMENDED)['entries']:.0f}, and "
                "one without a name is only as right as its frequency."
            )
        lines.append(text)
    return lines


def beside_a_prior(found: Found) -> list[str]:
    """What the others would be if their readers, too, shared the tail by the prior."""
    many = {n: f for n, f in compared(found).items() if f.get("others_beside_a_prior")}
    if not many:
        return []
    names = [(name, "kl_nats", label) for name, label in CODECS.items()]
    names.append((RECOMMENDED, "gradient_error", f"{CODECS[RECOMMENDED]}, gradient's error"))
    rows = []
    for name, key, label in names:
        pairs = [_both_tails(frontier, name, key) for frontier in many.values()]
        if any(pairs):
            size = max(point(f, name).get("bytes_per_token", 0) for f in many.values())
            rows.append([label, f"{size:g}", *(", ".join(pair) or "-" for pair in pairs)])
    cheapest = [_as_good(frontier) for frontier in many.values()]
    rows.append(["adaptive, `tail` prior, as low a KL", "in brackets", *cheapest])
    moved = [
        f"{even} to {prior} on {short(n)}"
        for n, f in many.items()
        if (pair := _both_tails(f, RECOMMENDED, "kl_nats")) and n.startswith("network")
        for even, prior in [pair]
    ]
    text = (
        "The idea is not bound to `adaptive`: whoever reads plain, set-coded or DistillKit's own "
        "entries could share their tail by the prior, too. No loss here does, their stores hold no "
        f"prior. The KL of DistillKit's recommended setting would go from {said(moved)}. In the "
        "table, KL in nats with an even tail, then by the prior; the last line is the cheapest "
        "of the measured settings of `adaptive` whose KL is no higher than that of DistillKit's "
        "recommended one read like this, with its bytes."
    )
    head = ["tail even, by the prior", "B/token", *map(short, many)]
    return ["### If others shared the tail by the prior", prose(text), table(head, rows)]


def _both_tails(frontier: Found, name: str, key: str) -> tuple[str, ...]:
    """A codec's error as it is, and by the prior."""
    other = frontier["others_beside_a_prior"].get(name)
    return (f"{point(frontier, name)[key]:.4f}", f"{other[key]:.4f}") if other else ()


def _as_good(frontier: Found) -> str:
    """The cheapest `adaptive` beside a prior that is as good as DistillKit beside a prior."""
    wanted = frontier["others_beside_a_prior"].get(RECOMMENDED)
    ours = [row for row in frontier["codecs"] if row["name"].startswith("prior ")]
    good = [row for row in ours if wanted and row["kl_nats"] <= wanted["kl_nats"]]
    best = min(good, key=lambda row: row["bytes_per_token"], default=None)
    return f"{best['kl_nats']:.4f} ({best['bytes_per_token']:.0f})" if best else "none"
