"""`vpmoe count`: parameters, FLOPs and bytes of a student, without allocating it."""

from vpmoe.cli.grammar import ConfigFile, Json, Overrides
from vpmoe.cli.render import print_json
from vpmoe.errors import ConfigError


def count(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Count parameters, active parameters, FLOPs per token and memory of a student.

    CONFIG is a model file, or a stage file whose student is counted. Nothing is allocated.
    """
    from vpmoe.cli.kinds import load_any, student_of
    from vpmoe.models.count import count as count_student

    loaded = load_any(config, overrides or [])
    student = student_of(loaded)
    if student is None:
        raise ConfigError([(f"{config} holds no student", "give a file of configs/models")])
    report = count_student(student)
    if as_json:
        print_json(report.as_dict())
        return
