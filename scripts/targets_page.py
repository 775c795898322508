"""Write the measured parts of docs/targets.md from benchmarks/results, or check them.

python scripts/targets_page.py            write what stands between the page's markers
python scripts/targets_page.py --check    exit 1 if it is stale
"""

import re
import sys
from collections import Counter

from performance import REPOSITORY, load, table
from targets_frontiers import (
    DEFAULT,
    DEMO,
    RECOMMENDED,
    Found,
    at_equal_error,
    beside_a_prior,
    compared,
    errors,
    findings,
    gradient_text,
    gradients,
    has_prior,
    matched,
    on_text,
    point,
    prose,
    said,
    short,
    span,
)
from targets_rates import packing_text, rate_text, rates

from vpmoe.vocabulary import VOCAB_SIZE

PAGE = REPOSITORY / "docs" / "targets.md"


def overview(found: Found) -> str:
    """What each codec keeps and takes."""
    text, many = list(on_text(found).values()), list(compared(found).values())

    def takes(name: str, of: list[Found] = many) -> str:
        return span([point(frontier, name)["bytes_per_token"] for frontier in of])

    n_grams, networks = ([f for n, f in on_text(found).items() if n.startswith(kind)]
                         for kind in ("n-gram", "network"))  # fmt: skip
    sure = point(found["frontiers"][DEMO], DEFAULT)["bytes_per_token"]
    even = f"{sure:.0f} where the teacher is sure, {takes(DEFAULT, n_grams)} for n-grams"
    if networks:
        even += f", {takes(DEFAULT, networks)} for an unsure network"
    near = [row["bytes_per_token"] for row in (matched(f, "prior") for f in text) if row]
    prior = f"{span(near)} at DistillKit's error" if near else "not measured"
    rows = [
        ["`logprob`", "nothing more", 2],
        ["`top_k`", "the K likeliest ids, float16 log-probs", f"{takes('top-64')} for K = 64"],
        [
            "`set_coded`",
            "the same ids as a set, a byte per log-prob, the mass of all others",
            f"{point(many[0], 'set-64')['bytes_per_token']} for K = 64",
        ],
        [
            "`adaptive`",
            "each id as long as naming it lowers the KL by `worth_nats`, or up to `top_p`",
            even,
        ],
        [
            '`adaptive`, `tail = "prior"`',
            "ids that are not as likely as they are frequent",
            prior,
        ],
        [
            "`sampled`",
            "ids drawn from the teacher, and how often; unbiased",
            f"{span([point(f, 'sampled, 50 draws')['bytes_per_token'] for f in many])} at 50 draws",
        ],
        [
            "`distillkit`",
            "DistillKit's own columns, to read its captures",
            f"{takes(RECOMMENDED)} as it recommends",
        ],
    ]
    head = ["`codec.kind`", "what is kept of each label", "bytes per token, log-prob included"]
    return table(head, rows)


def measured(found: Found, teacher: Found, packing: Found) -> str:
    """The section."""
    return "\n\n".join(
        [
            "## Measured",
            prose(how(found)),
            f"![Error against bytes for {len(found['frontiers'])} teachers](target-codecs.png)",
            prose(*teachers(found, teacher)),
            errors(found),
            "### At the error of DistillKit's recommended setting",
            at_equal_error(found),
            prose(*findings(found)),
            gradients(found),
            prose(*gradient_text(found)),
            *beside_a_prior(found),
            "### How fast",
            rates(found),
            prose(rate_text(found), packing_text(packing)),
        ]
    )


def how(found: Found) -> str:
    """What was run, and what is counted."""
    places = {name: frontier["places"] for name, frontier in found["frontiers"].items()}
    usual = Counter(places.values()).most_common(1)[0][0]
    fewer = [f"{count} of {short(name)}" for name, count in places.items() if count != usual]
    ranking = found["ranking"]
    text = (
        f"`{found['command']}`, {found['date']}; {usual} labels of each teacher"
        f"{f' ({said(fewer)})' if fewer else ''}. All numbers of this section "
        "come from `target-codecs.json`, `codec-teacher.json` and `teacher-packing.json` of "
        "`benchmarks/results`. KL is KL(teacher ‖ rebuilt), what is not named "
        'spread evenly over all other ids, or by the prior where it says `tail = "prior"`. '
        "DistillKit's settings are read as it reads them; the dashed line is its recommended one. "
        "Bytes have the log-prob and all that a label takes in them; the ranking's "
        f"{ranking['bytes_a_file']:,} bytes in each file are {ranking['bytes_per_token']:.2f} per "
        "token more when the file is full."
    )
    if has_prior(found):
        text += (
            " Beside a prior, what the teacher says of ids beyond those that are held is "
            "estimated: from 200 draws beyond its 512 likeliest, of the network beyond its 1,024."
        )
    return text


def teachers(found: Found, teacher: Found) -> list[str]:
    """Who was measured, and what each is worth as a witness."""
    nats, best, last = teacher["entropy_nats"], teacher["best"], teacher["log"][-1]
    counted = found["ranking"]["counted_labels"]
    return [
        "- The synthetic shapes are power laws without an end, a sure teacher and one that wavers "
        "between two ids; their ids are drawn from all alike, or as often as they are labels.",
        "- The n-gram model interpolates orders 1 to 4 of the SYNTH sample's train split over all "
        f"{VOCAB_SIZE:,} ids. What it does not know it leaves to the frequencies of single ids, "
        "which is the prior itself: **a prior is flattered by it**, and a ranking too.",
        "- The network is the fair one. It has GPT-OSS's architecture, "
        f"{teacher['parameters'] / 1e6:.0f} M parameters, and {last['seconds']:.0f} s of training "
        f"on one {teacher['device']}, {last['tokens'] / 1e6:.1f} M tokens of the same split "
        "(`benchmarks/codec_teacher.py`, read with `--captured`). `held out` and `read`: its "
        f"weights after {best['seconds']:.0f} s, the best on held-out text, on such text "
        f"({nats['held_out']:.1f} nats of entropy a label) and on text that it trained on "
        f"({nats['read']:.1f}). `read many times`: its last weights on text that it trained on "
        f"({nats['read_many_times']:.1f}), the nearest there is to a good teacher's sureness; "
        "GPT-OSS itself was not at hand.",
        f"- Ranking and prior were counted on the {counted:,} trained labels of the train split; "
        "held-out labels are those of other documents.",
    ]


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with new text between the markers of each block."""
    for name, text in blocks.items():
        between = re.compile(f"(<!-- {name}: [^>]* -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
        if len(between.findall(page)) != 1:
            sys.exit(f"docs/targets.md wants the markers of {name} once")
        page = between.sub(lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}", page)
    return page


def main(words: list[str]) -> int:
    """Write the page, or with --check compare it; the value is the exit code."""
    found, page = load("target-codecs"), PAGE.read_text(encoding="utf-8")
    section = measured(found, load("codec-teacher"), load("teacher-packing"))
    text = filled(page, {"overview": overview(found), "measured": section})
    if text == page:
        return 0
    if words == ["--check"]:
        print("docs/targets.md is stale: run python scripts/targets_page.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
