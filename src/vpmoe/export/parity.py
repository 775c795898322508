"""Whether an export gives the logits of the student it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import vpmoe.export  # noqa: F401  registers the classes that the Auto API is asked for
from vpmoe.errors import CheckFailedError
from vpmoe.models.student import Student
from vpmoe.vocabulary import END_OF_TEXT, FIRST_SPECIAL

PROBE_ROWS, PROBE_LENGTH = 2, 64


@dataclass(frozen=True)
class Parity:
    """How far apart two sets of logits are.

    Attributes:
        num_logits: Logits compared.
        max_difference: Largest absolute difference.
        is_exact: Whether every one is equal bit for bit.
    """

    num_logits: int
    max_difference: float
    is_exact: bool


def probe_tokens(student: Student, *, seed: int = 0) -> Int[Tensor, "rows seq"]:
    """Ordinary tokens that the student knows, drawn evenly."""
    subset = student.config.vocab_subset or range(student.config.vocab_size)
    ordinary = torch.tensor([i for i in subset if i < FIRST_SPECIAL] or [END_OF_TEXT])
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(ordinary), (PROBE_ROWS, PROBE_LENGTH), generator=generator)
    return ordinary[places]


@torch.no_grad()
def check_parity(student: Student, folder: Path) -> Parity:
    """Load the export in `folder` as anyone would, and compare its logits with the student's.

    Raises:
        CheckFailedError: If a logit differs.
    """
    device = student.head_weight.device
    loaded = cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder))
    loaded.to(device)
    tokens = probe_tokens(student).to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    hidden = student(tokens, positions=positions, document_ids=torch.zeros_like(tokens)).hidden
    expected = student.logits(hidden).float()
    found = loaded(tokens).logits
    if student.id_of is not None:
        found = found[..., student.id_of]
    difference = float((found - expected).abs().max())
    parity = Parity(expected.numel(), difference, bool(torch.equal(found, expected)))
    if not parity.is_exact:
        raise CheckFailedError(
            f"the export's logits differ from the student's by up to {difference:.3g}",
            hint="the export is not to be trusted; is another version of vpmoe installed?",
        )
    return parity
