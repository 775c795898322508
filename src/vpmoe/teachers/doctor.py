"""What may be wrong with a teacher, looked for by asking it a few questions before many."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vpmoe.errors import DataError, TeacherError
from vpmoe.teachers.examination import (
    PROBES,
    Examination,
    Finding,
    State,
    fit_to_reference,
    likeliest,
    mean_gap,
    scores_of,
)
from vpmoe.vocabulary import START_OF_TEXT, VOCAB_SIZE

_MAX_SHIFT = 3  # places that log-probs are looked for around their own
_MAX_MASS = 1 + 1e-3


def examine(case: Examination) -> list[Finding]:
    """Every check of the teacher's answers, in a fixed order; a failed one does not stop the rest.

    References:
        own. The faults looked for have each cost somebody a run: shifted log-probs, other prompts
        than the student's, order-dependent answers of a prefix cache, a served model in another
        precision.
    """
    return [_guarded(name, check, case) for name, check in CHECKS.items()]


def _guarded(name: str, check: "Check", case: Examination) -> Finding:
    try:
        return Finding(name, *check(case))
    except (TeacherError, DataError) as error:
        return Finding(name, "failed", error.message)


def _verdict(passed: bool, good: str, bad: str) -> tuple[State, str]:
    return ("ok", good) if passed else ("failed", bad)


def _form(case: Examination) -> tuple[State, str]:
    scores = scores_of(case, case.asked)
    values = np.concatenate(scores)
    return "ok", f"{values.size:,} log-probs, mean {values.mean():.3f} nats"


def _order(case: Examination) -> tuple[State, str]:
    together = scores_of(case, case.asked)
    backwards = scores_of(case, case.asked[::-1])[::-1]
    alone = [scores_of(case, [sequence])[0] for sequence in case.asked[:PROBES]]
    order, company = mean_gap(together, backwards), mean_gap(together[:PROBES], alone)
    return _verdict(
        max(order, company) <= case.tolerance_nats,
        f"{order:.4f} nats per token between two orders, {company:.4f} alone and in company",
        f"the same text differs by {order:.4f} nats per token in another order and by "
        f"{company:.4f} alone: start vLLM with --no-enable-prefix-caching",
    )


def _changed_answers(case: Examination, place_of: Callable[[int], int]) -> list["_Change"]:
    """What happens to the answers when the token at `place_of(i)` of conversation i is another."""
    asked = list(case.asked[:PROBES])
    others = []
    for index, sequence in enumerate(asked):
        changed = np.array(sequence)
        place = place_of(index)
        # Another token of the same text: a teacher may know only a part of the vocabulary.
        candidates = [t for t in np.unique(sequence) if t != sequence[place]]
        changed[place] = candidates[(place * 7) % len(candidates)]
        others.append(changed)
    # One by one, and each change right after its original, as a stale cache would have it.
    found = []
    for original, changed in zip(asked, others, strict=True):
        first, other, again = (scores_of(case, [s])[0] for s in (original, changed, original))
        found.append(_Change(np.abs(first - other), np.abs(first - again)))
    return found


@dataclass(frozen=True)
class _Change:
    """|difference| of answers place by place: of a changed text, and of the same one repeated."""

    gaps: np.ndarray
    repeats: np.ndarray

    def is_nothing(self, begin: int = 0) -> bool:
        """Whether the text's change does no more than a repetition, from `begin` on."""
        return bool(self.gaps[begin:].mean() <= 2 * self.repeats[begin:].mean())


def _middle(case: Examination) -> Callable[[int], int]:
    return lambda i: (case.prompt_lens[i] + len(case.asked[i])) // 2


def _first_changes(case: Examination) -> list[int | None]:
    """Where answers first change near a changed token, relative to where they should."""
    place_of, first = _middle(case), []
    for index, change in enumerate(_changed_answers(case, place_of)):
        due = place_of(index) - 1
        begin = max(due - _MAX_SHIFT, 0)
        changed = np.flatnonzero(change.gaps[begin : due + _MAX_SHIFT + 1] > case.tolerance_nats)
        first.append(int(changed[0]) + begin - due if changed.size else None)
    return first


def _position(case: Examination) -> tuple[State, str]:
    changes = [change for change in _first_changes(case) if change is not None]
    if not changes:
        return "skipped", "no answer changed with its text"
    offset, count = Counter(changes).most_common(1)[0]
    return _verdict(
        offset == 0,
        f"a changed token changes its own log-prob first, {count} of {len(changes)} times",
        f"log-probs are shifted by {offset:+d}: answer t must speak of token t + 1",
    )


def _fresh(case: Examination) -> tuple[State, str]:
    changes = _changed_answers(case, _middle(case))
    stale = sum(change.is_nothing() for change in changes)
    return _verdict(
        stale == 0,
        f"{len(changes)} changed texts, {len(changes)} changed answers",
        f"{stale} of {len(changes)} changed texts got the old answer: a cache is stale",
    )


def _first_token(case: Examination) -> tuple[State, str]:
    blind = sum(change.is_nothing() for change in _changed_answers(case, lambda _: 0))
    return _verdict(
        blind == 0,
        "changing the first token changes the answers",
        f"{blind} answers do not depend on the first token: it is dropped before the model",
    )


def _prompt(case: Examination) -> tuple[State, str]:
    blind = []
    lens = case.prompt_lens
    for name, place_of in {
        "the beginning": lambda i: min(4, lens[i] - 1),
        "the question": lambda i: max(lens[i] - 4, 0),
    }.items():
        changes = _changed_answers(case, place_of)
        if any(change.is_nothing(lens[i] - 1) for i, change in enumerate(changes)):
            blind.append(name)
    return _verdict(
        not blind,
        "answers depend on the beginning and on the end of the prompt",
        f"answers do not depend on {' and '.join(blind)} of the prompt: the teacher is asked "
        "another prompt than the student; render both with the same settings",
    )


def _effort(case: Examination) -> tuple[State, str]:
    if not case.other_effort:
        return "skipped", "no effort is named in these prompts"
    asked = list(case.asked[:PROBES])
    first, again = scores_of(case, asked), scores_of(case, asked)
    other = scores_of(case, case.other_effort[:PROBES])
    # From the end: another effort may be spelled with another number of tokens.
    answers = [len(s) - n for s, n in zip(asked, case.prompt_lens, strict=False)]
    repeat = mean_gap(
        [a[-n:] for a, n in zip(first, answers, strict=True)],
        [a[-n:] for a, n in zip(again, answers, strict=True)],
    )
    change = mean_gap(
        [a[-n:] for a, n in zip(first, answers, strict=True)],
        [a[-n:] for a, n in zip(other, answers, strict=True)],
    )
    return _verdict(
        change > 2 * repeat,
        f"another effort changes answers by {change:.4f} nats per token",
        f"another effort changes nothing ({change:.4f} nats per token, repetition "
        f"{repeat:.4f}): something resets the system message",
    )


def _likeliest(case: Examination) -> tuple[State, str]:
    tops = likeliest(case, case.teacher)
    if tops is None:
        return "skipped", "no likeliest ids will be asked for"
    for index, (sequence, top) in enumerate(zip(case.asked, tops, strict=False)):
        shape = (len(sequence) - 1, case.k)
        if top.top_ids.shape != shape or top.top_logprobs.shape != shape:
            return "failed", (
                f"asked for {case.k} likeliest ids, got {top.top_ids.shape[-1]}: start the server "
                f"with --max-logprobs {case.k}"
            )
        ids = np.sort(top.top_ids, axis=1)
        values = top.top_logprobs
        if not np.isfinite(values).all() or (ids[:, 1:] == ids[:, :-1]).any():
            return "failed", (
                f"fewer than {case.k} different ids with log-probs in conversation {index}: "
                f"start the server with --max-logprobs {case.k}"
            )
        if (np.diff(values, axis=1) > 0).any() or (np.exp(values).sum(axis=1) > _MAX_MASS).any():
            return "failed", f"unsorted, or more mass than one, in conversation {index}"
        own = top.top_ids == np.asarray(sequence)[1:, None]
        listed = own.any(axis=1)
        gap = np.abs(values[own] - top.logprobs[listed])
        if gap.size and gap.mean() > case.tolerance_nats:
            return "failed", f"a token's own log-prob and its entry differ by {gap.mean():.4f} nats"
    mass = np.concatenate([np.exp(top.top_logprobs).sum(axis=1) for top in tops]).mean()
    return "ok", f"{case.k} at every place, {100 * mass:.1f} % of the mass on average"


def _vocabulary(case: Examination) -> tuple[State, str]:
    tops = likeliest(case, case.teacher)
    if tops is not None:
        highest = max(int(top.top_ids.max()) for top in tops)
        if highest >= VOCAB_SIZE:
            return "failed", (
                f"id {highest} is among the likeliest, the vocabulary ends at {VOCAB_SIZE - 1}: "
                "the model is padded with rows that take probability"
            )
    fit = fit_to_reference(case)
    if fit is None:
        return "skipped", "needs likeliest ids and a reference"
    if fit.is_tempered:
        return "skipped", "hidden by a temperature"
    return _verdict(
        not fit.is_offset,
        f"log-probs are {fit.offset:+.4f} nats from the reference's on average",
        f"all log-probs of a place are {fit.offset:+.4f} nats from the reference's: the softmax "
        "runs over other rows than the vocabulary's; mask its padding",
    )


def _temperature(case: Examination) -> tuple[State, str]:
    fit = fit_to_reference(case)
    if fit is None:
        return "skipped", "needs likeliest ids and a reference"
    return _verdict(
        not fit.is_tempered,
        f"differences between log-probs are {fit.slope:.3f} times the reference's",
        f"differences between log-probs are {fit.slope:.3f} times the reference's: a temperature "
        f"of {1 / fit.slope if fit.slope else float('inf'):.2f} is applied; serve with "
        "--logprobs-mode raw_logprobs",
    )


def _reference(case: Examination) -> tuple[State, str]:
    if case.reference is None:
        return "skipped", "no reference is configured"
    scores = scores_of(case, case.asked)
    theirs = case.reference.score(case.asked)
    gap = mean_gap(scores, theirs)
    said = f"{gap:.4f} nats per token from the reference"
    if gap <= case.tolerance_nats:
        return "ok", said
    name, best = _explanation(case, scores, theirs)
    if best <= max(case.tolerance_nats, gap / 4):
        return "failed", f"{said}, but {best:.4f} if {name}"
    fit = fit_to_reference(case)
    if fit and (fit.is_tempered or fit.is_offset):
        return "failed", f"{said}; see the checks of temperature and vocabulary"
    return "failed", (
        f"{said}: other weights, or numbers of a lower precision such as fp8; serve what the "
        "config names"
    )


def _explanation(
    case: Examination, scores: list[np.ndarray], theirs: list[np.ndarray]
) -> tuple[str, float]:
    """What the reference would have to be asked to answer likewise, and the gap that is left."""
    assert case.reference is not None
    asked, reference = list(case.asked), case.reference
    gaps = {
        "its answers are shifted by +1": mean_gap(
            [s[1:] for s in scores], [t[:-1] for t in theirs]
        ),
        "its answers are shifted by -1": mean_gap(
            [s[:-1] for s in scores], [t[1:] for t in theirs]
        ),
        "the first token is dropped": mean_gap(
            [s[1:] for s in scores], reference.score([a[1:] for a in asked])
        ),
    }
    try:
        begun = [np.concatenate([[START_OF_TEXT], a]).astype(np.int32) for a in asked]
        gaps["a start of text is put before it"] = mean_gap(
            scores, [s[1:] for s in reference.score(begun)]
        )
    except DataError:
        pass  # a teacher of a part of the vocabulary may not know that token
    if case.other_effort:
        other = reference.score(case.other_effort)
        answers = [len(s) - n for s, n in zip(asked, case.prompt_lens, strict=True)]
        gaps["another effort is asked for"] = mean_gap(
            [s[-n:] for s, n in zip(scores, answers, strict=True)],
            [o[-n:] for o, n in zip(other, answers, strict=True)],
        )
    name = min(gaps, key=lambda key: gaps[key])
    return name, gaps[name]


Check = Callable[[Examination], tuple[State, str]]

CHECKS: dict[str, Check] = {
    "form": _form,
    "position": _position,
    "first token": _first_token,
    "freshness": _fresh,
    "order and company": _order,
    "prompt": _prompt,
    "effort": _effort,
    "likeliest ids": _likeliest,
    "vocabulary": _vocabulary,
    "temperature": _temperature,
    "reference": _reference,
}
