import random
import re
from itertools import islice

import pyarrow.parquet as pq
import pytest

from vpmoe.data.problem_families import FAMILIES, FULL, SMALL, WORDS, every_text, family_of
from vpmoe.data.problems import (
    generate,
    is_correct,
    solve,
    split_of,
    write_problems,
)
from vpmoe.errors import DataError


def truth(query):
    """The right answer, computed in another way than the families do."""
    numbers = [int(n) for n in re.findall(r"-?\d+", query.replace("+", ""))]
    words = [w for w in re.findall(r"[a-z]+", query) if w in WORDS]
    if query.startswith("Dial"):
        return str(sum(numbers) % 10)
    if query.startswith("Add"):
        a, b = (int("".join(map(str, half))) for half in (numbers[:4], numbers[4:]))
        return ",".join(str(a + b).zfill(4))
    if query.startswith("Sort"):
        return ",".join(map(str, sorted(numbers)))
    if query.startswith("Count"):
        return str(words[1:].count(words[0]))
    if query.startswith("Doors"):
        pairs = re.findall(r"(\w+) to (\w+)", query)
        room = words[-1]
        for _ in range(4):
            room = next(b for a, b in pairs if a == room)
        return f"At {room}"
    cards = words
    for move in query.split(": ")[1].rstrip(".").split(", "):
        a, b, c, d = cards
        cards = {
            "reverse": [d, c, b, a],
            "rotate": [b, c, d, a],
            "swap": [b, a, c, d],
            "trade": [d, b, c, a],
        }[move]
    return "Cards " + " ".join(cards)


def test_solutions_equal_an_independent_solver():
    for problem in generate(1_200, seed=3):
        assert problem.solution == truth(problem.query), problem.query
        assert problem.answer == problem.solution and not problem.flawed
        assert solve(problem.query) == problem


def test_worked_examples():
    dial = solve("Dial at 4: +7, -3, +8, +5, -2.")
    assert dial.reasoning == "4+7=1\n1-3=8\n8+8=6\n6+5=1\n1-2=9" and dial.answer == "9"
    addition = solve("Add 4,7,2,8 and 3,9,1,5.")
    assert addition.reasoning == "8+5+0=13\n2+1+1=4\n7+9+0=16\n4+3+1=8"
    assert addition.answer == "8,6,4,3"
    assert solve("Add 9,0,0,0 and 1,0,0,0.").answer == "1,0,0,0,0"
    assert solve("Sort 17,4,22,9,30.").reasoning.split("\n")[3] == "4,9,17,22"
    cards = solve("Cards red blue green gold: swap, rotate, reverse, trade.")
    assert cards.reasoning.split("\n")[1] == "rotate red green gold blue"
    tally = solve("Count red in blue red gold red.")
    assert tally.reasoning == "See blue=0 red=1 gold=1 red=2" and tally.answer == "2"
    assert solve("What is love?") is None


def test_is_correct_is_exact_but_for_outer_white_space():
    problem = solve("Cards red blue green gold: swap, swap, swap, swap.")
    assert is_correct(problem, "Cards red blue green gold\n")
    for wrong in ("cards red blue green gold", "Cards red blue gold green", "", "Cards red"):
        assert not is_correct(problem, wrong)


def test_splits_never_overlap_and_follow_the_query_alone():
    train = [p.query for p in generate(3_000, seed=0)]
    held_out = [p.query for p in generate(600, seed=0, split="held-out")]
    other_seed = [p.query for p in generate(600, seed=99, split="held-out")]
    assert len(set(train)) == 3_000 and len(set(held_out)) == 600
    assert not set(train) & (set(held_out) | set(other_seed))
    assert {split_of(q) for q in train} == {"train"}
    assert {split_of(q) for q in held_out + other_seed} == {"held-out"}
    rng = random.Random(0)
    shares = [split_of(FAMILIES["doors"].draw(rng, FULL)) == "held-out" for _ in range(5_000)]
    assert 0.08 < sum(shares) / 5_000 < 0.12


def test_streams_are_deterministic_and_longer_ones_extend_shorter_ones():
    long = list(generate(300, seed=5, flawed_share=0.3))
    assert list(generate(120, seed=5, flawed_share=0.3)) == long[:120]
    assert list(islice(generate(10**9, seed=5, flawed_share=0.3), 300)) == long
    assert [p.query for p in generate(300, seed=5)] == [p.query for p in long]
    assert [p.query for p in generate(300, seed=6)] != [p.query for p in long]


@pytest.mark.parametrize("flaws", ["blind-spot", "scattered"])
def test_flawed_share_holds_in_every_family(flaws):
    problems = list(generate(9_000, seed=1, flawed_share=0.3, flaws=flaws))
    for name in FAMILIES:
        mine = [p for p in problems if p.family == name]
        assert len(mine) == 1_500
        assert abs(sum(p.flawed for p in mine) / 1_500 - 0.3) < 0.05, name


@pytest.mark.parametrize("flaws", ["blind-spot", "scattered"])
def test_a_flaw_is_one_wrong_step_carried_to_a_wrong_answer(flaws):
    flawed = [p for p in generate(6_000, seed=2, flawed_share=0.5, flaws=flaws) if p.flawed]
    assert len(flawed) > 2_500
    for problem in flawed:
        right = solve(problem.query)
        assert problem.answer != problem.solution == right.answer
        assert problem.reasoning != right.reasoning or problem.family == "addition"
        assert len(problem.reasoning.split("\n")) == len(right.reasoning.split("\n"))
        assert not is_correct(problem, problem.answer)


def test_every_step_of_every_family_can_be_wrong():
    rng = random.Random(4)
    for family in FAMILIES.values():
        for step in range(family.num_steps):
            for _ in range(50):
                query = family.draw(rng, FULL)
                assert family.work(query, step)[1] != family.work(query, None)[1], (query, step)


def test_blind_spots_are_a_function_of_the_query():
    problems = list(generate(6_000, seed=8, flawed_share=0.3))
    dial = [p for p in problems if p.family == "dial"]
    assert all(p.flawed == (p.query[8] in "012") for p in dial)
    addition = [p for p in problems if p.family == "addition"]
    assert all(p.flawed == (p.query[10] in "012") for p in addition)


def test_bad_requests_are_refused():
    with pytest.raises(DataError, match="unknown problem families"):
        list(generate(1, seed=0, families=["riddles"]))
    with pytest.raises(DataError, match=r"flawed_share is 1\.5"):
        list(generate(1, seed=0, flawed_share=1.5))
    with pytest.raises(DataError, match="cannot be flawed"):
        list(generate(1, seed=0, split="held-out", flawed_share=0.1))


def test_parquet_has_synths_columns(tmp_path):
    path = tmp_path / "deep" / "problems.parquet"
    problems = list(generate(60, seed=0, flawed_share=0.5))
    assert write_problems(path, problems) == 60
    assert [p.name for p in path.parent.iterdir()] == ["problems.parquet"]
    rows = pq.read_table(path).to_pylist()
    assert [r["synth_id"] for r in rows] == [p.sample_id for p in problems]
    assert [r["synthetic_answer"] for r in rows] == [p.answer for p in problems]
    assert [r["flawed"] for r in rows] == [p.flawed for p in problems]
    assert {r["exercise"] for r in rows} == set(FAMILIES)
    assert all(r["constraints"] is None and r["language"] == "en" for r in rows)


def test_every_text_covers_the_vocabulary_of_all_problems():
    from openai_harmony import load_harmony_encoding

    encoding = load_harmony_encoding("HarmonyGptOss")
    known = {token for text in every_text() for token in encoding.encode(text)}
    assert len(known) < 100
    for problem in generate(600, seed=12, flawed_share=0.5, flaws="scattered"):
        for text in (problem.query, problem.reasoning, problem.answer):
            assert set(encoding.encode(text)) <= known, text


def test_families_recognise_their_queries():
    rng = random.Random(1)
    for family in FAMILIES.values():
        assert family_of(family.draw(rng, FULL)) is family


def test_the_small_alphabet_asks_the_same_questions_of_fewer_facts():
    problems = list(generate(1_200, seed=3, alphabet="small", flawed_share=0.4))
    for problem in problems:
        assert truth(problem.query) == problem.solution
        words = {w for w in re.findall(r"[a-z]+", problem.query) if w in WORDS}
        assert words <= set(WORDS[: SMALL.words])
    turns = {t for p in problems for t in re.findall(r"[+-]\d", p.query)}
    assert turns == {"+1", "+2", "+3", "-1", "-2", "-3"}
    flawed = sum(p.flawed for p in problems) / len(problems)
    assert 0.35 < flawed < 0.45
    assert all((p.answer != p.solution) <= p.flawed for p in problems)
