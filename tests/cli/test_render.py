import json

import pytest

from vpmoe.cli.render import flat, gib, print_facts, print_json, print_table, progress, short


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1_000, "1 k"),
        (131_072, "131 k"),
        (999_999, "1 M"),
        (6_022_571_535, "6.02 B"),
        (1.5e12, "1.5 T"),
        (0.25, "0.25"),
        (-2_500_000, "-2.5 M"),
    ],
)
def test_counts_are_short_and_say_their_power(number, said):
    assert short(number) == said


def test_bytes_are_gib_or_mib():
    assert gib(2**30) == "1.0 GiB"
    assert gib(2**30 - 2**20) == "1023.0 MiB"
    assert gib(11.2 * 2**30) == "11.2 GiB"


def test_facts_are_aligned_and_never_wrapped(capsys):
    print_facts([("stage", "x" * 300), ("fingerprint", "abc [bold]not markup[/bold]")])
    assert capsys.readouterr().out == (
        f"stage        {'x' * 300}\nfingerprint  abc [bold]not markup[/bold]\n"
    )


def test_a_table_keeps_words_left_and_numbers_right(capsys):
    print_table(["run", "exact match"], [["teacher", "0.98"], ["a", "1"]])
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0].split() == ["run", "exact", "match"]
    assert rows[-2].endswith("0.98")
    assert rows[-1].endswith("   1")
    assert rows[-1].lstrip().startswith("a ")


def test_a_table_in_a_pipe_is_not_cut_at_80_columns(capsys):
    print_table(["label", "choices"], [["<|start|>", "x" * 120]])
    assert f"<|start|>   {'x' * 120}" in capsys.readouterr().out


def test_json_keeps_its_values(capsys):
    value = {"a": [1, 2.5, None], "words": "ReLU²"}
    print_json(value)
    assert json.loads(capsys.readouterr().out) == value


def test_nested_tables_become_dotted_lines():
    assert list(flat({"a": {"b": 12345, "c": True}, "d": [1]})) == [
        ("a.b", "12,345"),
        ("a.c", "True"),
        ("d", "[1]"),
    ]


def test_progress_is_silent_off_a_terminal(capsys):
    with progress("rows") as tick:
        tick(1, 10)
        tick(10, 10)
    assert capsys.readouterr() == ("", "")
