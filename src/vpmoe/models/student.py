"""The student: embedding, layers of attention and feed-forward networks, norm, head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpmoe.errors import DataError
from vpmoe.models.attention.base import AttentionShape, LayerView
from vpmoe.models.attention.sink import AttentionScope
from vpmoe.models.cache import KeyValueCache, LayerCache
from vpmoe.models.config import StudentConfig
from vpmoe.models.init import cast_parameters, init_weights
from vpmoe.models.kernels import Kernels, kernels_named
from vpmoe.models.mlp import Linear, Mlp
from vpmoe.models.moe import ConstantWeight, Moe, shared_expert_weight
from vpmoe.models.norm import RmsNorm
from vpmoe.models.positions import Position, build_position
from vpmoe.models.router import MoeStatistics, Router, Segments, compact_dtype, segments_of
from vpmoe.vocabulary import VocabSubset

__all__ = ["Student", "StudentConfig", "StudentOutput", "build_student"]


@dataclass(frozen=True)
class StudentOutput:
    """What a forward pass gives.

    Attributes:
        hidden: Final normed states; `Student.logits` turns them into logits.
        load_balance_sum: Sum over mixture layers and documents of sum_i f_i P_i, with grad and
            without coefficient; 0 without experts and when decoding with a cache.
        num_documents: Documents it sums over.
        states: The stream after each layer that was asked for, in that order, not normed.
    """

    hidden: Float[Tensor, "batch seq dim"]
    load_balance_sum: Float[Tensor, ""]
    num_documents: int
    states: tuple[Float[Tensor, "batch seq dim"], ...] = ()


LayerResult = tuple[Tensor, Tensor | None, MoeStatistics | None]


class Layer(nn.Module):
    """Attention, then a feed-forward network, each on normed states and added to the stream."""

    def __init__(self, config: StudentConfig, number: int, kernels: Kernels) -> None:
        super().__init__()
        shape = AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            has_sinks=config.sinks,
            has_qk_norm=config.qk_norm,
            is_mixed=config.value_residual and number > 1,
            norm_eps=config.norm_eps,
        )
        size, activation, bias = config.hidden_size, config.activation, config.mlp_bias
        self.kernels = kernels
        self.attention_norm = RmsNorm(size, eps=config.norm_eps)
        self.attention = config.attention_of(number).build(shape)
        self.mlp_norm = RmsNorm(size, eps=config.norm_eps)
        self.mlp: Mlp | Moe
        if config.is_moe(number) and config.moe is not None:
            self.mlp = Moe(
                config.moe, hidden_size=size, activation=activation, bias=bias, kernels=kernels
            )
        else:
            self.mlp = Mlp(size, config.dense_hidden, activation=activation, bias=bias)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        first_values: Tensor | None,
        view: LayerView,
        segments: Segments | None,
        shared_weight: Tensor | None,
        cache: LayerCache | None,
        expert_ids: Integer[Tensor, "batch seq chosen"] | None,
    ) -> LayerResult:
        """The stream after the layer, values for later layers, and routing statistics."""
        # Prompts come in few shapes; single tokens have a decoder of their own where speed counts.
        is_step = cache is not None and not cache.step.is_prefill
        dense = dense_part if is_step else self.kernels.region(dense_part)
        hidden, normed, values = dense(self, hidden, first_values, view, shared_weight, cache)
        if not isinstance(self.mlp, Moe):
            return hidden, values, None
        for_router, for_experts = normed
        hidden, chosen, statistics = self.mlp.add_routed(
            hidden, for_router, for_experts, segments, expert_ids
        )
        if cache is not None:
            cache.note(chosen)
        return hidden, values, statistics


def dense_part(
    layer: Layer,
    hidden: Float[Tensor, "batch seq dim"],
    first_values: Tensor | None,
    view: LayerView,
    shared_weight: Tensor | None,
    cache: LayerCache | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """A layer without its routed experts: the stream, their inputs, values for other layers.

    References:
        own.
    """
    add_norm, attention, mlp = layer.kernels.add_norm, layer.attention, layer.mlp
    hidden, normed = add_norm(layer.attention_norm, hidden)
    gathered, values = attention.gather(normed, view, first_values, cache)
    if not isinstance(mlp, Moe):
        hidden, normed = add_norm(layer.mlp_norm, hidden, gathered, attention.o_proj)
        return hidden + mlp(normed), (), values
    readers = 2 if mlp.shared is None else 3
    hidden, *normed = add_norm(layer.mlp_norm, hidden, gathered, attention.o_proj, readers=readers)
    return mlp.add_shared(hidden, normed[-1], shared_weight), tuple(normed[:2]), values


class Student(nn.Module):
    """A decoder built from a `StudentConfig`; use `build_student` for one with weights.

    Attributes:
        activation_checkpointing: Recompute layers in the backward pass instead of keeping them.
        shared_weight: What multiplies shared experts; absent where it is always 1.
    """

    shared_weight: Tensor | None
    row_of: Tensor | None
    id_of: Tensor | None

    def __init__(self, config: StudentConfig, *, kernels: str = "reference") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.kernels = kernels_named(kernels)
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(config.num_rows, config.hidden_size), freeze=False
        )
        numbers = range(1, config.num_layers + 1)
        self.positions = nn.ModuleDict(
            {
                kind: build_position(
                    attention.position, num_heads=config.num_heads, head_dim=config.head_dim
                )
                for kind, attention in self.config.attention_kinds.items()
            }
        )
        self.layers = nn.ModuleList(Layer(config, n, self.kernels) for n in numbers)
        self.final_norm = RmsNorm(config.hidden_size, eps=config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.num_rows, bias=False)
        scheduled = config.moe is not None and not isinstance(
            config.moe.shared_expert_weight, ConstantWeight
        )
        self.register_buffer("shared_weight", torch.ones(()) if scheduled else None)
        self._register_subset()
        self.set_progress(0)

    def _register_subset(self) -> None:
        row_of = id_of = None
        if self.config.vocab_subset is not None:
            subset = VocabSubset(self.config.vocab_subset)
            row_of, id_of = torch.as_tensor(subset.row_of), torch.as_tensor(subset.ids)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("id_of", id_of, persistent=False)

    @property
    def head_weight(self) -> Float[Tensor, "rows dim"]:
        """Output embedding: logits are states times this, transposed."""
        return self.embedding.weight if self.head is None else self.head.weight

    def routers(self) -> list[Router]:
        """Routers of all mixture layers, first layer first."""
        return [layer.mlp.router for layer in self.layers if isinstance(layer.mlp, Moe)]

    @torch.no_grad()
    def set_progress(self, tokens_seen: int) -> None:
        """Tell the schedules inside the model how many tokens it was trained on, in all stages."""
        if self.shared_weight is not None and self.config.moe is not None:
            schedule = self.config.moe.shared_expert_weight
            self.shared_weight.fill_(shared_expert_weight(schedule, tokens_seen=tokens_seen))

    def rows_of(self, labels: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Embedding rows of o200k ids.

        Raises:
            DataError: If the vocabulary subset lacks one of them.
        """
        if self.row_of is None:
            return labels
        rows = self.row_of[labels]
        if bool((rows < 0).any()):
            missing = labels[rows < 0].unique()
            raise DataError(
                f"{missing.numel()} token ids are not in the model's vocabulary subset, "
                f"first {int(missing[0])}",
                hint="add them to vocab_subset, or drop the subset",
            )
        return rows

    def ids_of(self, rows: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The o200k ids of embedding rows."""
        return rows if self.id_of is None else self.id_of[rows]

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch rows"]:
        """Logits over embedding rows."""
        return F.linear(hidden, self.head_weight)

    def new_cache(self, *, batch: int, capacity: int, keeps_experts: bool = False) -> KeyValueCache:
        """An empty cache for conversations of up to `capacity` tokens.

        Args:
            batch: Conversations.
            capacity: Tokens of the longest.
            keeps_experts: Remember the experts of every token, where there are any.
        """
        config = self.config
        numbers = range(1, config.num_layers + 1)
        windows = tuple(config.attention_of(n).window_size for n in numbers)
        like = self.embedding.weight.detach().new_empty(config.num_kv_heads, config.head_dim)
        cache = KeyValueCache(windows, batch=batch, capacity=capacity, like=like)
        if keeps_experts and config.moe is not None:
            chosen = config.moe.num_experts_per_token
            cache.remember_experts(
                [number - 1 for number in numbers if config.is_moe(number)],
                chosen=chosen,
                dtype=compact_dtype(config.moe.num_experts, count=chosen),
            )
        return cache

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        cache: KeyValueCache | None = None,
        keep_layers: Sequence[int] = (),
        num_documents: int | None = None,
        expert_ids: Integer[Tensor, "batch seq moe_layers chosen"] | None = None,
    ) -> StudentOutput:
        """Final states of every token.

        Args:
            tokens: o200k ids.
            positions: Place of each token in its document.
            document_ids: Document of each token in its row; negative for padding.
            cache: Where keys and values are kept for the next call; its first call takes prompts
                padded at the end, later ones a single token each. Statistics are left out.
            keep_layers: Numbers of layers, from 1, whose states come back as well.
            num_documents: Documents in the batch or more, where that is known: it is not read back
                from the device then.
            expert_ids: Experts to send tokens to, those of `Batch`; chosen where they are not known
                or not given.
        """
        if cache is not None:
            cache.begin(document_ids)
        views = self._views(positions, document_ids, cache)
        segments = None
        if cache is None and self.config.moe:
            segments = segments_of(document_ids, num_documents=num_documents)
        hidden = self.kernels.embed(self.rows_of(tokens), self.embedding.weight)  # (B, T, D)
        balance = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        first_values, tallies, states = None, [], {}
        given = self._by_layer(expert_ids)
        for number, layer in enumerate(self.layers, start=1):
            view = views["global" if self.config.is_global(number) else "local"]
            layer_cache = None if cache is None else cache.layers[number - 1]
            own = segments, self.shared_weight, layer_cache, given[number - 1]
            arguments = (hidden, first_values, view, *own)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, values, statistics = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, values, statistics = layer(*arguments)
            if first_values is None and self.config.value_residual:
                first_values = values
            if number in keep_layers:
                states[number] = hidden
            if statistics is not None:
                balance = balance + statistics.load_balance_sum
                tallies.append(statistics.tokens_per_expert)
        self._tally(tallies)
        return StudentOutput(
            self.kernels.add_norm(self.final_norm, hidden)[1],
            balance,
            0 if segments is None else segments.num_documents,
            tuple(states[number] for number in keep_layers),
        )

    def _by_layer(self, expert_ids: Tensor | None) -> list[Tensor | None]:
        """The experts given to each layer."""
        if expert_ids is None:
            return [None] * len(self.layers)
        routers = self.routers()
        chosen = routers[0].num_experts_per_token if routers else 0
        if expert_ids.shape[2:] != (len(routers), chosen):
            raise ValueError(
                f"expert_ids of {expert_ids.shape[2]} mixture layers and {expert_ids.shape[3]} "
                f"experts a token for a student of {len(routers)} and {chosen}"
            )
        of_mixtures = iter(expert_ids.unbind(dim=2))
        return [next(of_mixtures) if isinstance(layer.mlp, Moe) else None for layer in self.layers]

    def _tally(self, tallies: list[Tensor]) -> None:
        """Count tokens per expert, here and not in checkpointed layers, which run twice."""
        if self.training and torch.is_grad_enabled():
            for router, counts in zip(self.routers(), tallies, strict=True):
                router.local_tokens_per_expert += counts

    def _views(
        self, positions: Tensor, document_ids: Tensor, cache: KeyValueCache | None
    ) -> dict[str, LayerView]:
        """What layers of each kind see."""
        views = {}
        for kind, attention in self.config.attention_kinds.items():
            window = attention.window_size
            key_places = None if cache is None else cache.key_places(window)
            if key_places is None:
                places = torch.arange(positions.shape[1], device=positions.device)[None]
                scope = AttentionScope(places, None, document_ids, window)
            else:
                scope = AttentionScope(positions, key_places, None, window)
            position = self.positions[kind]
            assert isinstance(position, Position)
            views[kind] = LayerView(
                self.kernels.scope(scope),
                position.rotation(positions),
                position.slopes,
                self.kernels.attend,
                self.kernels.heads,
            )
        return views


def build_student(
    config: StudentConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
) -> Student:
    """A student with its first weights.

    Args:
        config: What it is made of.
        seed: First weights are a function of this and of each parameter's name.
        device: Where it lives; "meta" gives shapes without values.
        dtype: Of weights and states. Router, sinks, lambdas and frequencies stay float32 or wider.
        kernels: Name of the implementation of the hot paths.

    Raises:
        ConfigError: If there are no kernels of that name here, or if they do not compute this
            student; others are never taken in their place.

    References:
        own; the parts cite their sources.
    """
    kernels_named(kernels).require(config, device=device, dtype=dtype)
    with torch.device(device):
        student = Student(config, kernels=kernels)
    if torch.device(device).type != "meta":
        init_weights(student, seed=seed, **config.init_settings)
    cast_parameters(student, dtype)
    return student
