"""`vpmoe count`: parameters, FLOPs and bytes of a student, without allocating it."""

from typing import Annotated

import typer

from vpmoe.cli.grammar import ConfigFile, Json, Overrides
from vpmoe.cli.render import print_facts, print_json, print_table
from vpmoe.errors import ConfigError

SeqLen = Annotated[
    int, typer.Option("--seq-len", min=1, help="Document length that attention is costed at.")
]


def count(
    config: ConfigFile, overrides: Overrides = None, seq_len: SeqLen = 2048, as_json: Json = False
) -> None:
    """Count parameters, FLOPs and bytes of a student.

    CONFIG is a model file, or a stage file whose student is counted. Nothing is allocated.
    """
    from vpmoe.cli.kinds import load_any
    from vpmoe.cli.sizing import size_facts, student_of
    from vpmoe.models.count import count as count_student

    student = student_of(load_any(config, overrides or []))
    if student is None:
        raise ConfigError([(f"{config} holds no student", "give a file of configs/models")])
    size = count_student(student, seq_len=seq_len)
    if as_json:
        print_json(size.as_dict())
        return
    rows = [[item.name, f"{item.total:,}", f"{item.active:,}"] for item in size.items]
    rows.append(["all", f"{size.total:,}", f"{size.active:,}"])
    print_table([size.name, "parameters", "active"], rows)
    print_facts(size_facts(size))
