"""Answers as a real vLLM server gave them, and every way in which they may be wrong."""

import copy

import numpy as np
import pytest

from tests.teachers.stand_in import golden
from vpmoe.errors import TeacherError
from vpmoe.teachers.answers import read_answer, request_body

ANSWERS = golden()["answers"]


def parts(entry):
    return entry["answer"], np.array(entry["body"]["prompt"]), entry["body"]["prompt_logprobs"]


def longest(k: int):
    return parts([e for e in ANSWERS if e["body"]["prompt_logprobs"] == k][-1])


@pytest.mark.parametrize("entry", ANSWERS)
def test_recorded_answers_are_read_place_by_place(entry):
    answer, prompt, k = parts(entry)
    scores = read_answer(answer, prompt, k)
    places = answer["choices"][0]["prompt_logprobs"]
    assert scores.logprobs.dtype == scores.top_logprobs.dtype == np.float32
    assert scores.top_ids.shape == scores.top_logprobs.shape == (len(prompt) - 1, k)
    for index, own in enumerate(scores.logprobs):
        said = places[index + 1]
        assert own == np.float32(said[str(prompt[index + 1])]["logprob"])
        ranked = sorted((v["rank"], int(i)) for i, v in said.items() if v["rank"] <= k)
        assert {i for _, i in ranked} == set(scores.top_ids[index].tolist())
        values = [np.float32(said[str(i)]["logprob"]) for i in scores.top_ids[index]]
        np.testing.assert_array_equal(scores.top_logprobs[index], values)
        assert (np.diff(scores.top_logprobs[index]) <= 0).all()


def test_the_recorded_request_is_the_one_that_is_sent():
    for entry in ANSWERS:
        prompt, k = entry["body"]["prompt"], entry["body"]["prompt_logprobs"]
        assert request_body("teacher", np.array(prompt), k) == entry["body"]


def test_of_equal_ids_the_lower_comes_first_and_the_prompts_own_token_is_among_them():
    """bfloat16 logits tie often; the order the server lists ties in may change with the batch."""
    entries = {
        "9": {"logprob": -2.0, "rank": 3},  # the prompt's own: tied, and counted after its equals
        "4": {"logprob": -2.0, "rank": 1},
        "7": {"logprob": -2.0, "rank": 2},
    }
    choice = {"prompt_token_ids": [1, 9], "prompt_logprobs": [None, entries]}
    scores = read_answer({"choices": [choice]}, np.array([1, 9]), 3)
    assert scores.top_ids.tolist() == [[4, 7, 9]]
    del entries["9"], entries["4"]
    entries |= {"9": {"logprob": -2.0, "rank": 3}, "2": {"logprob": -1.5, "rank": 1}}
    scores = read_answer({"choices": [choice]}, np.array([1, 9]), 2)
    assert scores.top_ids.tolist() == [[2, 7]]
    assert scores.logprobs.tolist() == [-2.0]


def shifted_by_one(choice, prompt):
    choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][:-1]]


def without_the_null(choice, prompt):
    choice["prompt_logprobs"] = [*choice["prompt_logprobs"][1:], None]


def cut_short(choice, prompt):
    del choice["prompt_logprobs"][-1]


def fewer_entries(choice, prompt):
    place = choice["prompt_logprobs"][5]
    del place[next(i for i in place if i != str(prompt[5]))]


def one_more_entry(choice, prompt):
    choice["prompt_logprobs"][5]["17"] = {"logprob": -20.0, "rank": 5}


def another_token(choice, prompt):
    place = choice["prompt_logprobs"][5]
    place["17"] = place.pop(str(prompt[5]))


def not_a_number(choice, prompt):
    choice["prompt_logprobs"][5][str(prompt[5])]["logprob"] = float("nan")


def no_number(choice, prompt):
    choice["prompt_logprobs"][5][str(prompt[5])]["logprob"] = None


def above_zero(choice, prompt):
    choice["prompt_logprobs"][5][str(prompt[5])]["logprob"] = 0.5


def too_much_mass(choice, prompt):
    for entry in choice["prompt_logprobs"][5].values():
        entry["logprob"] = -0.6


def wrong_rank(choice, prompt):
    choice["prompt_logprobs"][5][str(prompt[5])]["rank"] = 2


def rank_of_another(choice, prompt):
    entries = choice["prompt_logprobs"][5]
    other = next(i for i in entries if i != str(prompt[5]))
    entries[other]["logprob"] = entries[str(prompt[5])]["logprob"] - 1


def no_rank(choice, prompt):
    choice["prompt_logprobs"][5][str(prompt[5])]["rank"] = 0


def padding_row(choice, prompt):
    place = choice["prompt_logprobs"][5]
    other = next(i for i in place if i != str(prompt[5]))
    place["201090"] = place.pop(other)


def other_prompt(choice, prompt):
    choice["prompt_token_ids"][3] += 1


def prompt_with_a_start(choice, prompt):
    choice["prompt_token_ids"] = [199_998, *choice["prompt_token_ids"]]


def no_echo(choice, prompt):
    choice["prompt_token_ids"] = None


def nothing_asked(choice, prompt):
    choice["prompt_logprobs"] = None


def not_a_list(choice, prompt):
    choice["prompt_logprobs"][5] = [str(prompt[5])]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shifted_by_one, "has no log-prob for token"),
        (without_the_null, "its places are shifted"),
        (cut_short, "answered 13 places for 14 tokens"),
        (fewer_entries, r"its own token rank \d{4,} beside 3 ids, where 3"),
        (one_more_entry, "names 5 ids where 3 were asked for"),
        (another_token, "entry 5 has no log-prob for token"),
        (not_a_number, "entry 5 holds the log-prob nan"),
        (no_number, "entry 5 holds the log-prob None"),
        (above_zero, "entry 5 holds the log-prob 0.5"),
        (too_much_mass, "more probability than one"),
        (wrong_rank, "its own token rank 2 beside 4 ids"),
        (rank_of_another, "and 2 of the 3 likeliest ids are likelier"),
        (no_rank, "its own token rank 0"),
        (padding_row, "names id 201090, outside the vocabulary of 201,088"),
        (other_prompt, "14 and 14 tokens, different from token 3 on"),
        (prompt_with_a_start, "15 and 14 tokens, different from token 0 on"),
        (no_echo, "does not say which prompt"),
        (nothing_asked, "ignored prompt_logprobs"),
        (not_a_list, "not of the expected form"),
    ],
)
def test_every_fault_is_named(spoil, message):
    answer, prompt, k = longest(3)
    answer = copy.deepcopy(answer)
    spoil(answer["choices"][0], prompt)
    with pytest.raises(TeacherError, match=message):
        read_answer(answer, prompt, k)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [None]}, {"choices": 5}])
def test_answers_of_another_form_are_refused(answer):
    with pytest.raises(TeacherError, match="not of the expected form"):
        read_answer(answer, np.array([1, 2]), 0)


def test_a_truncated_list_is_seen_even_when_the_own_token_is_one_of_the_likeliest():
    entries = {"9": {"logprob": -0.1, "rank": 1}, "4": {"logprob": -4.0, "rank": 2}}
    choice = {"prompt_token_ids": [1, 9], "prompt_logprobs": [None, entries]}
    with pytest.raises(TeacherError, match="names 2 ids where 3 were asked for"):
        read_answer({"choices": [choice]}, np.array([1, 9]), 3)
