"""Columns that Arcee's DistillKit has captured: a polynomial for the tail, ids in full."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, Self

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import (
    Codec,
    Column,
    Entries,
    Needs,
    damaged,
    require_ids,
    require_size,
    tail_of,
)
from vpmoe.teachers.codecs.bits import MAX_WIDTH, get, put
from vpmoe.teachers.codecs.values import numbers
from vpmoe.vocabulary import VOCAB_SIZE

Number = Literal["float16", "bfloat16", "float32", "float64"]
Term = int | Literal["sqrt", "exp"]
VALUES, IDS = "compressed_logprobs", "bytepacked_indices"  # the names of its parquet columns
_SMALLEST_SINGULAR = 1e-5  # absolute; what is below plays no part in a fit


class Bin(Config):
    """Residuals of the fit at consecutive ranks, in steps of one scale."""

    scale_dtype: Number = "float16"
    """Of the scale, the largest residual over half the range."""
    element_bits: int = Field(ge=1, le=MAX_WIDTH)
    """Of each residual."""
    num_elements: int = Field(ge=1)
    """Ranks covered."""


class DistillKitConfig(Config):
    """DistillKit's `logprob_compressor` settings; the defaults are those it recommends."""

    kind: Literal["distillkit"] = "distillkit"
    d: Literal[201_088] = VOCAB_SIZE
    """Vocabulary, which decides the bits of an id."""
    k: int = Field(default=128, ge=1, le=1_024)
    """How many ids."""
    exact_k: int = Field(default=16, ge=0)
    """Log-probs stored as they are."""
    exact_dtype: Number = "bfloat16"
    """Of these."""
    polynomial_terms: tuple[Term, ...] = (0, 1, 2, 3, 4, "sqrt")
    """Functions of the rank, whose sum stands for the other log-probs."""
    term_dtype: Number = "float32"
    """Of their coefficients."""
    residual_bins: tuple[Bin, ...] = ()
    """What the fit leaves, for the first ranks after the exact ones."""
    delta_encoding: bool = False
    """Whether all but the first log-prob are differences."""
    normalize_t: bool = False
    """Whether ranks go from 0 to 1; otherwise the fit is ill-conditioned in float32."""
    fit_dtype: Literal["float32", "float64"] = "float32"
    """In which a fit is solved; reading does not depend on it."""
    monotone: bool = True
    """Whether reading mends log-probs that rise with the rank."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        rest = self.k - self.exact_k
        if rest < 0:
            raise ValueError("exact_k is above k")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("give polynomial_terms or residual_bins where exact_k is below k")
        if sum(b.num_elements for b in self.residual_bins) > rest:
            raise ValueError("residual_bins cover more ranks than k - exact_k")
        return self

    def build(self) -> "DistillKit":
        """The codec."""
        return DistillKit(self)


class DistillKit(Codec):
    """See `DistillKitConfig`. The mass of all other ids is what is missing to one.

    Args:
        config: As in the capture's own `compression_config`.

    References:
        arcee-ai/DistillKit (2025), https://github.com/arcee-ai/DistillKit; written from its
        format. Difference: no error diffusion when writing; a sum above one is brought down to
        one when reading, and log-probs do not rise with the rank.
    """

    needs: Needs = "top"
    columns = (VALUES, IDS)
    rounding_nats = math.inf  # of a fitted curve

    def __init__(self, config: DistillKitConfig) -> None:
        self._config = config
        self.asked = self.max_entries = config.k
        self._id_bits = (config.d - 1).bit_length()
        self._id_bytes = -(-config.k * self._id_bits // 8)
        self._exact_bytes = config.exact_k * _dtype(config.exact_dtype).itemsize
        self._fitted = config.k - config.exact_k
        self._terms = config.polynomial_terms if self._fitted else ()
        self._coefficient_bytes = len(self._terms) * _dtype(config.term_dtype).itemsize
        self._bin_bytes = [
            (_dtype(b.scale_dtype).itemsize, -(-b.element_bits * b.num_elements // 8))
            for b in config.residual_bins
        ]
        self._row_bytes = (
            self._exact_bytes + self._coefficient_bytes + sum(s + n for s, n in self._bin_bytes)
        )

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """What DistillKit writes for the same log-probs."""
        config = self._config
        values = entries.logprobs
        if config.delta_encoding:
            values = torch.diff(values, prepend=torch.zeros_like(values[:, :1]))
        parts = [_bytes(values[:, : config.exact_k], config.exact_dtype)]
        rest = values[:, config.exact_k :].to(_dtype(config.fit_dtype))
        if self._terms:
            basis = _basis(self._terms, self._fitted, config.normalize_t, config.fit_dtype)
            coefficients = _fit(basis.to(rest.device), rest).to(_dtype(config.term_dtype))
            parts.append(_bytes(coefficients, config.term_dtype))
            rest = rest - self._curve(coefficients)
        begin = 0
        for one in config.residual_bins:
            part = rest[:, begin : begin + one.num_elements]
            parts += _binned(part, one)
            begin += one.num_elements
        ids = _packed_rows(entries.ids, self._id_bits)
        rows = torch.cat(parts, dim=1).reshape(-1)
        return {
            VALUES: Column(rows, places * self._row_bytes),
            IDS: Column(ids.reshape(-1), places * self._id_bytes),
        }

    def decode(
        self, columns: Mapping[str, UInt8[Tensor, " bytes"]], places: Int64[Tensor, " samples"]
    ) -> Entries:
        """The entries in the order of their ranks."""
        config, count = self._config, int(places.sum())
        require_size(VALUES, len(columns[VALUES]), count * self._row_bytes)
        require_size(IDS, len(columns[IDS]), count * self._id_bytes)
        ids = _unpacked_rows(columns[IDS].reshape(count, -1), self._id_bits, config.k)
        require_ids(ids)
        logprobs = self._values(columns[VALUES].reshape(count, self._row_bytes))
        if not bool((logprobs < torch.inf).all()):
            raise damaged("a log-prob is not a number")
        if config.monotone:
            logprobs = logprobs.cummin(1).values
        logprobs = logprobs - logprobs.logsumexp(1, keepdim=True).clamp_min(0.0)
        return Entries(ids, logprobs, tail_of(logprobs))

    def _values(self, rows: UInt8[Tensor, "places bytes"]) -> Float32[Tensor, "places entries"]:
        config, at = self._config, self._exact_bytes
        values = [_numbers(rows[:, :at], config.exact_dtype).float()]
        if self._fitted:
            fitted = rows.new_zeros((len(rows), self._fitted), dtype=torch.float32)
            if self._terms:
                stop = at + self._coefficient_bytes
                fitted = self._curve(_numbers(rows[:, at:stop], config.term_dtype)).float()
                at = stop
            begin = 0
            for one, (scale_bytes, size) in zip(config.residual_bins, self._bin_bytes, strict=True):
                scale = _numbers(rows[:, at : at + scale_bytes], one.scale_dtype).float()
                codes = _unpacked_rows(
                    rows[:, at + scale_bytes : at + scale_bytes + size],
                    one.element_bits,
                    one.num_elements,
                )
                fitted[:, begin : begin + one.num_elements] += _levels(codes, one) * scale
                begin, at = begin + one.num_elements, at + scale_bytes + size
            values.append(fitted)
        joined = torch.cat(values, dim=1)
        return joined.cumsum(1) if config.delta_encoding else joined

    def _curve(self, coefficients: Float[Tensor, "places terms"]) -> Tensor:
        """The fitted values; the sum runs in the coefficients' own precision, as theirs does."""
        config = self._config
        basis = _basis(self._terms, self._fitted, config.normalize_t, config.term_dtype)
        return (basis.to(coefficients.device) * coefficients[:, None, :]).sum(-1)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@lru_cache
def _basis(
    terms: Sequence[Term], count: int, normalize: bool, dtype: str
) -> Float[Tensor, "entries terms"]:
    ranks = torch.linspace(0, 1, count) if normalize else torch.arange(count)
    ranks = ranks.to(_dtype(dtype))
    return torch.stack(
        [ranks**term if isinstance(term, int) else getattr(ranks, term)() for term in terms], dim=1
    )


def _fit(basis: Tensor, values: Float[Tensor, "places entries"]) -> Tensor:
    """Least squares by the pseudo-inverse that drops small singular values."""
    left, singular, right = torch.linalg.svd(basis.to(values.dtype), full_matrices=False)
    inverse = torch.where(singular > _SMALLEST_SINGULAR, 1 / singular, 0.0)
    return (values @ left * inverse) @ right


def _bytes(values: Tensor, dtype: str) -> UInt8[Tensor, "places bytes"]:
    return values.to(_dtype(dtype)).contiguous().view(torch.uint8).reshape(len(values), -1)


def _numbers(rows: UInt8[Tensor, "places bytes"], dtype: str) -> Float[Tensor, "places numbers"]:
    width = _dtype(dtype).itemsize
    return numbers(rows.reshape(-1), _dtype(dtype)).reshape(len(rows), rows.shape[1] // width)


def _packed_rows(values: Int64[Tensor, "places numbers"], width: int) -> Tensor:
    size = -(-values.shape[1] * width // 8)
    return put(values.reshape(-1), _row_starts(values.shape, width, size), width, len(values) * size
    ).reshape(len(values), size)  # fmt: skip


def _unpacked_rows(rows: UInt8[Tensor, "places bytes"], width: int, count: int) -> Tensor:
    starts = _row_starts((len(rows), count), width, rows.shape[1]).to(rows.device)
    return get(rows.reshape(-1), starts, width).reshape(len(rows), count)


def _row_starts(shape: Sequence[int], width: int, size: int) -> Int64[Tensor, " numbers"]:
    return (torch.arange(shape[0])[:, None] * 8 * size + torch.arange(shape[1]) * width).reshape(-1)


def _lowest(one: Bin) -> int:
    return 0 if one.element_bits == 1 else -(1 << (one.element_bits - 1))


def _binned(values: Tensor, one: Bin) -> list[Tensor]:
    half = 1 if one.element_bits == 1 else 1 << (one.element_bits - 1)
    scale = values.abs().amax(1, keepdim=True) / half
    scale = torch.where(scale == 0, 1.0, scale).to(_dtype(one.scale_dtype))
    low = _lowest(one)
    steps = (values / scale.to(values.dtype)).round().clamp(low, low + (1 << one.element_bits) - 1)
    return [_bytes(scale, one.scale_dtype), _packed_rows((steps - low).long(), one.element_bits)]


def _levels(codes: Int64[Tensor, "places numbers"], one: Bin) -> Tensor:
    return codes.float() * 2 - 1 if one.element_bits == 1 else codes.float() + _lowest(one)
