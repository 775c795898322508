"""A transformers model on one GPU as a fast teacher: sequences end to end, no padding in between.

Sequences lie in one row with positions that start anew; attention is told where each begins, by
FlexAttention in place of the model's own. Every layer is compiled, once per length of the row.
"""

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from vpmoe.errors import TeacherError
from vpmoe.teachers.distribution import Head, require_k

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vpmoe.kernels.packed import BlockScope

ATTENTION = "vpmoe_packed"  # its name in transformers' registry
MIN_ROW = 1_024  # rows are padded to this times a power of two, or to the batch's size
REGIONS = 64  # kinds of layers and lengths of rows that may be compiled
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class FusedHead(Head):
    """The head on a GPU: products of 16-bit numbers summed and kept in float32."""

    def _logits(self, hidden: Float[Tensor, "rows dim"]) -> Float32[Tensor, "rows vocab"]:
        if self.weight.dtype == torch.float32:
            return hidden @ self.weight.T
        return torch.mm(hidden, self.weight.T, out_dtype=torch.float32)

    def _read(
        self, logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"]
    ) -> tuple[Tensor, Tensor]:
        from vpmoe.kernels.likeliest import read_logits

        return read_logits(logits, tokens)

    def _read_top(
        self, logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"], k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from vpmoe.kernels.likeliest import read_likeliest

        require_k(k, logits.shape[1])
        return read_likeliest(logits, tokens, k)


@dataclass(frozen=True)
class Row:
    """Sequences end to end.

    Attributes:
        tokens: Embedding rows; 0 in the padding at the end.
        positions: From 0 in each sequence.
        documents: Number of the sequence; -1 in the padding.
        places: Where a token is followed by another one of its sequence.
    """

    tokens: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    places: np.ndarray


def lay_out(sequences: Sequence[np.ndarray], length: int) -> Row:
    """The sequences in one row of a given length, in their order."""
    lengths = np.array([len(sequence) for sequence in sequences])
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    tokens, positions = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    documents = np.full(length, -1, dtype=np.int64)
    tokens[:total] = np.concatenate(sequences)
    positions[:total] = np.arange(total) - np.repeat(starts, lengths)
    positions[total:] = np.arange(length - total)
    documents[:total] = np.repeat(np.arange(len(sequences)), lengths)
    places = np.delete(np.arange(total), starts + lengths - 1)
    return Row(tokens, positions, documents, places)


def row_length(num_tokens: int, batch_tokens: int) -> int:
    """The length that a row is padded to: one of few, so that few shapes are compiled."""
    length = MIN_ROW
    while length < num_tokens:
        length *= 2
    whole = -(-batch_tokens // MIN_ROW) * MIN_ROW
    return whole if num_tokens <= whole < length else length


def fill_rows(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Which sequences share a row of at most `batch_tokens`; a longer one has a row of its own.

    The longest first, each where it leaves the least room.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            rows.append([])
            left, row = max(batch_tokens, lengths[index]), len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


class PackedNetwork:
    """The layers of a model, compiled, over packed rows.

    Args:
        model: On its GPU, in evaluation mode. Its attention is replaced and its layers compiled.
        batch_tokens: Length of a full row.

    Raises:
        TeacherError: If the model has layers that this does not know, or answers differently.
    """

    def __init__(self, model: "PreTrainedModel", *, batch_tokens: int) -> None:
        self._model = model
        self._batch_tokens = batch_tokens
        self._plain_attention = str(model.config._attn_implementation)
        self._windows = _windows(model)
        probes = [np.arange(3, 12) % _vocab(model), np.arange(5, 26) % _vocab(model)]
        expected = [self._alone(probe) for probe in probes]
        _register()
        dynamo = import_module("torch._dynamo").config  # a second of importing, only when used
        dynamo.recompile_limit = max(dynamo.recompile_limit, REGIONS)
        model.set_attn_implementation(ATTENTION)
        for layer in _layers(model):
            # Without a graph break, and with an error rather than an uncompiled layer.
            layer.compile(dynamic=False, fullgraph=True)
        self._require_same(probes, expected)

    def states(self, sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Final states of all places that a token follows, and those tokens.

        Args:
            sequences: Embedding rows; together they should fill a row.
        """
        row = lay_out(sequences, row_length(sum(map(len, sequences)), self._batch_tokens))
        return self._run(row)

    def _run(self, row: Row) -> tuple[Tensor, Tensor]:
        from vpmoe.kernels.packed import block_scope

        device = self._model.device
        stacked = np.stack([row.tokens, row.positions, row.documents])
        tokens, positions, documents = on_device(stacked, device)
        places = on_device(row.places, device)
        scopes = {w: block_scope(documents[None], window_size=w) for w in self._windows}
        hidden = self._model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, scopes=scopes
        ).last_hidden_state
        return hidden[0, places], tokens[places + 1]

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model as transformers runs it, for generation."""
        self._model.set_attn_implementation(self._plain_attention)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._model.set_attn_implementation(ATTENTION)

    def _alone(self, tokens: np.ndarray) -> Tensor:
        ids = torch.from_numpy(tokens)[None].to(self._model.device)
        with torch.no_grad():
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0, :-1].float()

    def _require_same(self, probes: list[np.ndarray], expected: list[Tensor]) -> None:
        """A packed row must answer as the sequences alone do, whatever lies beside them."""
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # that it is slow uncompiled
            found, _ = self._run(lay_out(probes, 128))
            other, _ = self._run(lay_out([probes[0][::-1].copy(), probes[1]], 128))
        found, other, wanted = found.float(), other.float(), torch.cat(expected)
        gap = (found - wanted).norm() / wanted.norm()
        second = slice(len(probes[0]) - 1, None)
        leak = (found[second] - other[second]).norm() / wanted[second].norm()
        # In bfloat16 a token near the border of two experts goes to either, and its state with it.
        if gap > 0.5 or leak > 0.01:
            raise TeacherError(
                f"{type(self._model).__name__} answers otherwise in a packed row: states differ by "
                f"{float(gap):.1%}, and by {float(leak):.1%} with another neighbour",
                hint='set teacher.kernels = "reference"',
            )


def _windows(model: "PreTrainedModel") -> list[int | None]:
    """The sliding windows of a model's layers; None for those that see everything.

    Raises:
        TeacherError: If some layers mix tokens by other means than causal attention.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or {"full_attention"})
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise TeacherError(
            f"kernels 'fused' for heads of {head_dim}",
            hint='powers of two from 16 fit; or set teacher.kernels = "reference"',
        )
    if kinds - _KNOWN_LAYERS or not _layers(model):
        raise TeacherError(
            f"kernels 'fused' for {type(model).__name__} with layers of kind "
            f"{', '.join(sorted(kinds))}",
            hint='they know causal attention; set teacher.kernels = "reference"',
        )
    window = getattr(config, "sliding_window", None)
    return [None] if window is None else [None, int(window)]


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for what the GPU is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _vocab(model: "PreTrainedModel") -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _layers(model: "PreTrainedModel") -> Sequence[nn.Module]:
    found: Any = getattr(model.base_model, "layers", [])
    return list(found)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads seq dim"],
    value: Float[Tensor, "batch kv_heads seq dim"],
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Float[Tensor, "batch seq heads dim"], None]:
    """What transformers calls in place of its own attention."""
    from vpmoe.kernels.packed import attend_packed

    del attention_mask  # the scopes say it
    if settings.get("softcap") is not None or settings.get("position_bias") is not None:
        raise TeacherError(
            f"kernels 'fused' for {type(module).__name__}, which changes its attention scores",
            hint='set teacher.kernels = "reference"',
        )
    scopes: Mapping[int | None, BlockScope] = settings["scopes"]
    out = attend_packed(
        query,
        key,
        value,
        scopes[settings.get("sliding_window")],
        scale=settings["scaling"],
        sinks=settings.get("s_aux"),
    )
    return out, None
