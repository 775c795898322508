"""`vpmoe chat`: talk to what was made."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vpmoe.cli.complaints import complain
from vpmoe.cli.render import console
from vpmoe.errors import DataError

if TYPE_CHECKING:
    from vpmoe.rollouts.chat import ChatSession

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint, a run or an export.")]
Effort = Annotated[
    Literal["low", "medium", "high"] | None,
    typer.Option("--effort", help="How hard to think; the training data's by default."),
]
PROMPT = "you> "


def chat(
    model: Model,
    effort: Effort = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 1024,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same answers.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device")] = "cpu",
) -> None:
    """Talk to a student; reasoning is dim, answers are plain.

    Questions are read line by line, from the keyboard or from a pipe; an empty line or the end of
    input ends the conversation, /new starts another.
    """
    from vpmoe.data.harmony import Renderer
    from vpmoe.export.load import open_model
    from vpmoe.rollouts.chat import ChatSession

    opened = open_model(model, device=device)
    session = ChatSession(
        opened.student,
        Renderer(opened.render),
        effort=effort,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    while question := _read():
        if question == "/new":
            session.reset()
        else:
            try:
                _answer(session, question)
            except DataError as error:
                if not sys.stdin.isatty():
                    raise
                complain(error)  # whoever types may ask again


def _read() -> str:
    if sys.stdin.isatty():
        console().print(PROMPT, end="", style="bold cyan")
    return sys.stdin.readline().strip()


def _answer(session: "ChatSession", question: str) -> None:
    out = console()
    channel = ""
    for piece in session.ask(question):
        if channel and piece.channel != channel:
            out.print()
        channel = piece.channel
        style = None if channel == "final" else "dim"
        out.print(piece.text, end="", style=style, markup=False)
    out.print()
    if session.answer and session.answer.failure:
        out.print(f"(malformed answer: {session.answer.failure})", style="yellow")
