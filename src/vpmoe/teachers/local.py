"""A transformers model in this process as the teacher."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vpmoe.config import Config
from vpmoe.errors import DataError, TeacherError
from vpmoe.teachers.base import (
    ROLLOUT_LOGPROBS,
    TARGETS,
    TEACHER_HIDDEN,
    TEACHER_LOGPROBS,
    SampledScores,
    TeacherIdentity,
    TopScores,
)
from vpmoe.teachers.batching import Arriving, equal_lengths, pad_right, similar_lengths
from vpmoe.teachers.checkpoint import (
    load_model,
    locate,
    output_head,
    read_vocab,
    require_plain_head,
    require_vocab,
    weights_sha256,
)
from vpmoe.teachers.distribution import Head
from vpmoe.teachers.draws import uniforms, weighted
from vpmoe.teachers.fused import FusedHead, PackedNetwork, fill_rows, on_device
from vpmoe.vocabulary import STOP_TOKENS, VOCAB_SIZE, VocabSubset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 logits in a chunk, whatever the vocabulary: 32 MiB are reused by the allocator of a CPU,
# while a GPU wants large products: 2,048 rows of the whole vocabulary were measured.
_LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2_048 * VOCAB_SIZE}


# From the states of a forward's places, the token after each, and the sequences they belong to, in
# order, to tensors with one row per place.
_Read = Callable[[Tensor, Tensor, list[int]], tuple[Tensor, ...]]


class LocalTeacherConfig(Config):
    """A causal language model of transformers, such as GPT-OSS, with the o200k Harmony vocabulary.

    A `vocab_ids.json` beside its weights lists the o200k id of each embedding row of a teacher
    that keeps a part of the vocabulary only.
    """

    kind: Literal["local"] = "local"
    path: str
    """Checkpoint folder, hub id, or a `config.json` alone (weights are then drawn at random)."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty takes its main branch and records the commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the network computes in; its head always works in float32."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """Where it runs: "cpu", "cuda" or "cuda:N"."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of one forward, padding included; a longer sequence goes alone."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "eager"
    """transformers' attention implementation; GPT-OSS has no sdpa."""
    experts: Literal["", "eager", "grouped_mm"] = ""
    """transformers' implementation of the experts; empty leaves the model's own default."""
    kernels: Literal["reference", "fused"] = "reference"
    """"fused" packs sequences without padding and compiles the layers; it needs a GPU, decides
    about the attention itself, and refuses models that it does not know."""
    seed: int = 0
    """Of the weights, when `path` is a config alone."""

    provides: ClassVar[frozenset[str]] = frozenset(
        {TEACHER_LOGPROBS, ROLLOUT_LOGPROBS, TARGETS, TEACHER_HIDDEN}
    )

    def build(self) -> "LocalTeacher":
        """The teacher, loaded and checked.

        Raises:
            TeacherError: If it is absent, incomplete, has another vocabulary or an unusual head,
                or cannot run the kernels that are asked for.
        """
        source, commit = locate(self.path, self.revision)
        subset = read_vocab(source)
        options: dict[str, Any] = {"attn_implementation": self.attention}
        if self.experts:
            options["experts_implementation"] = self.experts
        model, quantization = load_model(
            source,
            dtype=getattr(torch, self.dtype),
            device=self.device,
            seed=self.seed,
            options=options,
        )
        identity = TeacherIdentity(
            name=self.path if commit else _local_name(source),
            revision=commit,
            weights_sha256=weights_sha256(source, seed=self.seed),
            dtype=self.dtype,
            quantization=quantization,
            vocab_sha256=require_vocab(model, subset, source),
        )
        return LocalTeacher(
            model,
            identity=identity,
            subset=subset,
            batch_tokens=self.batch_tokens,
            fused=self.kernels == "fused",
        )

    @model_validator(mode="after")
    def _require_a_gpu_for_kernels(self) -> "LocalTeacherConfig":
        if self.kernels == "fused" and self.device == "cpu":
            raise ValueError("kernels = 'fused' needs device = 'cuda'")
        if self.kernels == "fused" and self.attention != "eager":
            raise ValueError("kernels = 'fused' brings its own attention: leave attention out")
        return self


class LocalTeacher:
    """A loaded model that scores, and for comparisons also answers.

    Everything runs without gradients, but not in PyTorch's inference mode, whose tensors a loss
    could not keep; one mode also means that layers are compiled once.

    Args:
        model: In evaluation mode, on its device.
        identity: Who it is.
        subset: The part of o200k it knows; None for all of it.
        batch_tokens: Tokens of one forward, padding included.
        fused: Whether to pack sequences without padding and to compile the layers.
    """

    provides: ClassVar[frozenset[str]] = LocalTeacherConfig.provides

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        identity: TeacherIdentity,
        subset: VocabSubset | None = None,
        batch_tokens: int = 16_384,
        fused: bool = False,
    ) -> None:
        require_plain_head(model, subset)
        self.identity = identity
        self.subset = subset
        self._model = model
        self._network: Any = model  # transformers' `generate` has no usable type
        self._batch_tokens = batch_tokens
        # Logits near 20 are 1/8 apart in bfloat16: the head multiplies in float32.
        weight = output_head(model).weight.detach()
        chunk_rows = max(1, _LOGITS_AT_ONCE[model.device.type] // weight.shape[0])
        self._packed = PackedNetwork(model, batch_tokens=batch_tokens) if fused else None
        self._head = FusedHead(weight, chunk_rows) if fused else Head(weight.float(), chunk_rows)
        self._max_len = int(getattr(model.config, "max_position_embeddings", 2**31))

    @torch.no_grad()
    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of every token after the first, given the tokens before it.

        Sequences of similar length share a forward, padded on the right, where a causal model
        cannot see it. Logits exist for a few hundred positions at a time.

        Args:
            sequences: o200k ids, one conversation each.

        Returns:
            Per sequence a float32 array one shorter than it, in nats; see `Teacher.score`.

        Raises:
            DataError: If a sequence is empty or uses tokens that the teacher does not know.
            TeacherError: If a sequence is longer than the teacher's positions reach.
        """
        scored = self._over_batches(sequences, lambda h, y, _: (self._head.logprobs(h, y),))
        return [logprobs.numpy() for (logprobs,) in scored]

    @torch.no_grad()
    def score_top(self, sequences: Sequence[np.ndarray], k: int) -> list[TopScores]:
        """As `score`, with the K likeliest ids at every place.

        Args:
            sequences: o200k ids, one conversation each.
            k: How many ids; of equally likely ones the lower id comes first.

        Raises:
            TeacherError: If the teacher does not know K tokens; see also `score`.
        """
        found = self._over_batches(sequences, lambda h, y, _: self._head.top(h, y, k))
        return [
            TopScores(logprobs.numpy(), self._ids_of(ids.numpy()).astype(np.int32), top.numpy())
            for logprobs, ids, top in found
        ]

    @torch.no_grad()
    def score_sampled(
        self, sequences: Sequence[np.ndarray], num_draws: int, seed: int, *, power: float = 1.0
    ) -> list[SampledScores]:
        """As `score`, with ids drawn from the teacher's distribution at every place.

        Args:
            sequences: o200k ids, one conversation each.
            num_draws: How often is drawn at a place; fewer ids come out, as likely ones repeat.
            seed: Decides the draws, together with the sequence and nothing else.
            power: Draws are from p to this power, and weighted by what that distorts; at 1 the
                weights are plain frequencies, and unbiased.

        References:
            Anshumann et al., "Sparse Logit Sampling" (ACL 2025), arXiv:2503.16870. Difference: one
            draw in each of `num_draws` equal parts of the distribution, which never varies more.
        """
        if num_draws < 1:
            raise TeacherError(f"asked for {num_draws} draws at a place", hint="give at least 1")

        def draw(hidden: Tensor, labels: Tensor, members: list[int]) -> tuple[Tensor, ...]:
            chances = [uniforms(sequences[i], num_draws=num_draws, seed=seed) for i in members]
            places = on_device(np.concatenate(chances), hidden.device)
            logprobs, ids, drawn = self._head.drawn(hidden, labels, places, power=power)
            return logprobs, *weighted(ids, drawn, power=power)

        out = []
        for logprobs, once, log_weights in self._over_batches(sequences, draw):
            used, ids = torch.isfinite(log_weights).numpy(), self._ids_of(once.numpy())
            ids = np.where(used, ids, 0).astype(np.int32)
            out.append(SampledScores(logprobs.numpy(), ids, log_weights.numpy()))
        return out

    @property
    def head_weight(self) -> Float[Tensor, "vocab teacher_dim"]:
        """Output embedding, one row per known id, ascending, in the network's dtype."""
        return output_head(self._model).weight.detach()

    @torch.no_grad()
    def hidden(self, sequences: Sequence[np.ndarray]) -> list[Float[Tensor, "places teacher_dim"]]:
        """Final normed states of each sequence but for its last token, on the teacher's device.

        Raises:
            DataError: As `score`.
            TeacherError: As `score`.
        """
        device = self._model.device
        return [h for (h,) in self._over_batches(sequences, lambda h, *_: (h,), to=device)]

    @property
    def width(self) -> int:
        """Of its states."""
        return int(self.head_weight.shape[1])

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return int(self._model.config.num_hidden_layers)

    @torch.no_grad()
    def layer_states(
        self, sequences: Sequence[np.ndarray], layers: Sequence[int]
    ) -> list[Float[Tensor, "places layers teacher_dim"]]:
        """The stream after each of these layers, counted from 1; after the last one it is normed.

        Raises:
            TeacherError: If there is no such layer; see also `score`.
        """
        if not all(1 <= number <= self.num_layers for number in layers):
            raise TeacherError(
                f"asked for layers {list(layers)} of a teacher with {self.num_layers}"
            )
        device = self._model.device
        found = self._over_batches(sequences, lambda h, *_: (h,), to=device, layers=layers)
        return [states for (states,) in found]

    @torch.no_grad()
    def complete(self, prompts: Sequence[np.ndarray], *, max_new_tokens: int) -> list[np.ndarray]:
        """Greedy completions, each up to and including its stop token.

        Prompts of equal length share a batch, so that none needs padding.

        Args:
            prompts: o200k ids that end in the assistant's header.
            max_new_tokens: A completion is cut there.

        Returns:
            o200k ids, int64, in the order of the prompts.
        """
        from transformers import GenerationConfig

        stops = [int(row) for row in self._rows_of(np.array(self._known_stops()))]
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        rows = [self._rows_of(prompt) for prompt in prompts]
        out = [np.empty(0, dtype=np.int64)] * len(rows)
        for members in equal_lengths([len(row) for row in rows], self._batch_tokens):
            tokens = torch.from_numpy(np.stack([rows[i] for i in members])).to(self._model.device)
            with nullcontext() if self._packed is None else self._packed.plain():
                generated = self._network.generate(
                    tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
                )
            for index, completion in zip(members, generated[:, tokens.shape[1] :], strict=True):
                out[index] = self._ids_of(_up_to_stop(completion.cpu().numpy(), stops))
        return out

    def _known_stops(self) -> list[int]:
        return [s for s in STOP_TOKENS if self.subset is None or self.subset.row_of[s] >= 0]

    def _rows_of(self, tokens: np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise DataError(
                f"a sequence to score has shape {ids.shape}", hint="give 1-d, not empty"
            )
        if ids.size > self._max_len:
            raise TeacherError(
                f"a sequence of {ids.size} tokens is longer than the teacher's "
                f"{self._max_len} positions",
                hint="build the dataset with a smaller seq_len",
            )
        if self.subset is None:
            return ids
        self.subset.require(ids, what="a sequence to score")
        return self.subset.row_of[ids]

    def _ids_of(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.subset is None else self.subset.ids[rows]

    def _over_batches(
        self,
        sequences: Sequence[np.ndarray],
        read: _Read,
        *,
        to: torch.device | str = "cpu",
        layers: Sequence[int] = (),
    ) -> list[tuple[Tensor, ...]]:
        """What `read` says of the places of every sequence, in the order of the sequences."""
        rows = [self._rows_of(sequence) for sequence in sequences]
        out: list[tuple[Tensor, ...]] = [()] * len(rows)
        lengths = [len(row) for row in rows]
        batches = similar_lengths if self._packed is None else fill_rows
        earlier: Arriving | None = None  # fetched while the GPU is at work on the next batch
        for members in batches(lengths, self._batch_tokens):
            try:
                hidden, labels = self._states([rows[i] for i in members], layers)
                found = Arriving(read(hidden, labels, members), to, members)
            except torch.OutOfMemoryError as error:
                raise TeacherError(
                    f"the teacher ran out of GPU memory with {len(members)} sequences of up to "
                    f"{max(lengths[i] for i in members)} tokens in a forward",
                    hint=f"lower teacher.batch_tokens (now {self._batch_tokens})",
                ) from error
            if earlier is not None:
                earlier.give(out, lengths)
            earlier = found
        if earlier is not None:
            earlier.give(out, lengths)
        return out

    def _states(self, rows: list[np.ndarray], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Final states, or those of some layers, where a token follows, and those tokens."""
        if self._packed is not None and layers:
            raise TeacherError(
                "states of single layers come from the plain network alone",
                hint="leave the teacher's kernels out",
            )
        if self._packed is not None:
            return self._packed.states(rows)
        tokens, real = pad_right(rows)
        tokens, real = tokens.to(self._model.device), real.to(self._model.device)
        found = self._model.base_model(
            input_ids=tokens, use_cache=False, output_hidden_states=bool(layers)
        )
        hidden = found.last_hidden_state
        if layers:
            hidden = torch.stack([found.hidden_states[number] for number in layers], dim=2)
        asked = real[:, 1:]  # (B, T-1): the token after each position exists
        return hidden[:, :-1][asked], tokens[:, 1:][asked]


def _local_name(source: Path) -> str:
    """The folder's name; a bare config is named with the folder it lies in."""
    resolved = source.resolve()
    return resolved.name if source.is_dir() else f"{resolved.parent.name}/{resolved.name}"


def _up_to_stop(rows: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    found = np.flatnonzero(np.isin(rows, stops))
    return rows[: found[0] + 1] if found.size else rows
