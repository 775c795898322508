"""Step 1 of the demo's teacher: clean problems as a table of tokens.

    python scripts/make_teacher_table.py --out .demo/teacher-table.npz

Step 2, scripts/train_demo_teacher.py, then needs neither a tokenizer nor this package.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from openai_harmony import (
    Conversation,
    Message,
    RenderConversationConfig,
    Role,
    load_harmony_encoding,
)

from vpmoe import vocabulary as ids
from vpmoe.data.problem_families import FAMILIES, every_text
from vpmoe.data.problems import generate

TEACHER_SEED = 7_000_001  # of its problems: unlike any seed that demos use
HELD_OUT_SEED = 7_000_002
HEADER_WORDS = (ids.SYSTEM, ids.DEVELOPER, ids.USER, ids.ASSISTANT, ids.ANALYSIS, ids.FINAL)


class Pieces:
    """Closed-vocabulary tokenization: every piece of text is looked up in o200k once."""

    pattern = re.compile(r" ?[A-Za-z]+|\d{1,3}| ?[^\sA-Za-z0-9]+|\s")

    def __init__(self) -> None:
        self.encoding = load_harmony_encoding("HarmonyGptOss")
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in self.pattern.findall(text):
            if piece not in self.known:
                self.known[piece] = self.encoding.encode(piece)
            tokens += self.known[piece]
        return tokens

    def conversation(self, problem) -> tuple[list[int], int]:
        """Harmony tokens of a problem without a system message, and the prompt's length."""
        prompt = [
            ids.START,
            ids.USER,
            ids.MESSAGE,
            *self.encode(problem.query),
            ids.END,
            ids.START,
            ids.ASSISTANT,
        ]
        reasoning = [
            ids.CHANNEL,
            ids.ANALYSIS,
            ids.MESSAGE,
            *self.encode(problem.reasoning),
            ids.END,
        ]
        final = [
            ids.START,
            ids.ASSISTANT,
            ids.CHANNEL,
            ids.FINAL,
            ids.MESSAGE,
            *self.encode(problem.answer),
            ids.RETURN,
        ]
        return prompt + reasoning + final, len(prompt)


def check_against_harmony(pieces: Pieces, problems) -> None:
    """Stop unless openai-harmony renders the same tokens."""
    config = RenderConversationConfig(auto_drop_analysis=False)
    for problem in problems:
        conversation = Conversation.from_messages(
            [
                Message.from_role_and_content(Role.USER, problem.query),
                Message.from_role_and_content(Role.ASSISTANT, problem.reasoning).with_channel(
                    "analysis"
                ),
                Message.from_role_and_content(Role.ASSISTANT, problem.answer).with_channel("final"),
            ]
        )
        render = pieces.encoding.render_conversation_for_training
        if render(conversation, config=config) != pieces.conversation(problem)[0]:
            raise SystemExit(f"tokens differ from openai-harmony's for {problem.query!r}")


def write_table(out: Path, *, count: int, held_out: int) -> None:
    pieces = Pieces()
    check_against_harmony(pieces, generate(120, seed=1))
    used = {token for text in every_text() for token in pieces.encoding.encode(text)}
    used |= {*ids.SPECIAL_TOKENS.values(), *HEADER_WORDS}
    vocab_ids = np.array(sorted(used), dtype=np.int64)
    row_of = {int(token): row for row, token in enumerate(vocab_ids)}
    names = list(FAMILIES)
    arrays: dict[str, np.ndarray] = {"vocab_ids": vocab_ids, "families": np.array(names)}
    arrays["pad_row"] = np.array(row_of[ids.END_OF_TEXT])
    arrays["stop_row"] = np.array(row_of[ids.RETURN])
    arrays["message_row"] = np.array(row_of[ids.MESSAGE])
    parts = {
        "train": generate(count, seed=TEACHER_SEED),
        "held_out": generate(held_out * len(names), seed=HELD_OUT_SEED, split="held-out"),
    }
    for part, problems in parts.items():
        rows, prompts, families = [], [], []
        for problem in problems:
            tokens, prompt = pieces.conversation(problem)
            rows.append(bytes(row_of[token] for token in tokens))
            prompts.append(prompt)
            families.append(names.index(problem.family))
        width = max(map(len, rows))
        padding = bytes([row_of[ids.END_OF_TEXT]])
        flat = b"".join(row.ljust(width, padding) for row in rows)
        arrays[f"{part}_tokens"] = np.frombuffer(flat, dtype=np.uint8).reshape(-1, width)
        arrays[f"{part}_prompts"] = np.array(prompts, dtype=np.uint8)
        arrays[f"{part}_lengths"] = np.array([len(row) for row in rows], dtype=np.uint8)
        arrays[f"{part}_families"] = np.array(families, dtype=np.uint8)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    lengths = arrays["train_lengths"]
    print(
        f"{out}: {count:,} problems, {int(lengths.sum()):,} tokens, lengths "
        f"{lengths.min()}..{lengths.max()}, {len(vocab_ids)} ids, "
        f"{out.stat().st_size / 2**20:.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".demo/teacher-table.npz"))
    parser.add_argument("--count", type=int, default=600_000)
    parser.add_argument("--held-out", type=int, default=500, help="per family")
    args = parser.parse_args()
    write_table(args.out, count=args.count, held_out=args.held_out)


if __name__ == "__main__":
    main()
