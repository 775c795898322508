"""The decoding step on one GPU: eight launches per layer, in buffers that stay where they are.

A layer's projections are put together into one matrix, and the router's weight is split in two
halves, when a decoder is made; everything else is read where the parameters lie.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from vpmoe.errors import ConfigError
from vpmoe.kernels import decode, decode_attention, decode_experts
from vpmoe.kernels.decode_attention import Heads
from vpmoe.kernels.decode_experts import Network, Record
from vpmoe.kernels.router import GroupChoice, split_weight
from vpmoe.models.attention.base import Attention
from vpmoe.models.attention.tpa import Tpa
from vpmoe.models.cache import LayerCache
from vpmoe.models.config import StudentConfig
from vpmoe.models.decode import Decoder
from vpmoe.models.mlp import Mlp
from vpmoe.models.moe import Moe
from vpmoe.models.positions import Position
from vpmoe.models.router import DeepseekV3Config

if TYPE_CHECKING:
    from vpmoe.models.student import Layer, Student

ROUNDED = 128  # prompts are padded to this or a power of two above: few shapes are compiled


@dataclass(frozen=True)
class Step:
    """One layer's weights and buffers, as its kernels take them."""

    kind: str
    cache: LayerCache
    attention_gamma: Tensor
    joint: Tensor
    joint_bias: Tensor | None
    heads: Heads
    out: Tensor
    out_bias: Tensor | None
    mlp_gamma: Tensor
    halves: Tensor | None
    router_bias: Tensor | None
    expert_bias: Tensor | None
    routed: Network | None
    shared: Network | None
    shared_weight: Tensor | None


@dataclass(frozen=True)
class PromptGraph:
    """A captured prompt pass and what it reads."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    placed: Tensor


class FusedDecoder(Decoder):
    """Kernels for bandwidth; the prompt pass is the student's own, compiled.

    A prompt pass of a shape that was seen before is captured in a CUDA graph, unless the student
    has a vocabulary subset, whose ids are checked on the host.
    """

    is_static = True

    def __init__(
        self, student: "Student", *, slots: int, capacity: int, keeps_experts: bool = False
    ) -> None:
        require_decodable(student.config)
        super().__init__(student, slots=slots, capacity=capacity, keeps_experts=keeps_experts)
        config, moe = student.config, student.config.moe
        device = self.hidden.device

        def bf16(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device=device)

        self.steps = [
            step_of(student, number, layer, cache)  # pyright: ignore[reportArgumentType]
            for number, (layer, cache) in enumerate(
                zip(student.layers, self.cache.layers, strict=True), start=1
            )
        ]
        self.refresh()
        self._passes: dict[tuple[int, ...], PromptGraph | None] = {}
        self._pool: Any = None
        self.normed = bf16(slots, config.hidden_size)
        self.gathered = bf16(slots, config.num_heads * config.head_dim)
        self.first_values = bf16(slots, config.num_kv_heads, config.head_dim)
        self.choice = None
        if moe is not None and isinstance(moe.router, DeepseekV3Config):
            router, chosen = moe.router, moe.num_experts_per_token
            self.choice = GroupChoice(
                num_groups=router.num_groups,
                num_kept=router.num_groups_kept,
                num_judges=router.group_score_topk,
                count=chosen,
                scaling=router.scaling,
            )
            self.logits = torch.empty(slots, 2 * moe.num_experts, device=device)
            self.scores = torch.empty(slots, moe.num_experts, device=device)
            self.expert_ids = torch.empty(slots, chosen, dtype=torch.int32, device=device)
            self.expert_weights = torch.empty(slots, chosen, device=device)

    def read(self, rows: Int[Tensor, " slots"], places: Int[Tensor, " slots"]) -> None:
        """One more token per slot."""
        student, eps = self.student, self.student.config.norm_eps
        rotations = {}
        for kind, position in student.positions.items():
            assert isinstance(position, Position)
            found = position.rotation(places[:, None])
            tables = None if found is None else (found.cosines, found.sines)
            rotations[kind] = None if tables is None else tuple(t.contiguous() for t in tables)
        stream, parts = F.embedding(rows, student.embedding.weight), None
        for number, step in enumerate(self.steps, start=1):
            decode.normalise(stream, step.attention_gamma, parts, self.normed, eps=eps)
            projected = stream.new_empty(self.slots, step.joint.shape[0])
            decode.linear(self.normed, step.joint, step.joint_bias, projected)
            decode_attention.attend_cached(
                projected,
                step.heads._replace(rotation=rotations[step.kind]),
                places,
                step.cache.keys,
                step.cache.values,
                self.first_values,
                self.gathered,
                keep_values=number == 1,
            )
            decode.linear(self.gathered, step.out, step.out_bias, stream, residual=stream)
            decode.normalise(stream, step.mlp_gamma, None, self.normed, eps=eps)
            parts = self._experts(step, places)
        decode.normalise(stream, student.final_norm.gamma, parts, self.hidden, eps=eps)

    def _experts(self, step: Step, places: Tensor) -> Tensor:
        """Parts of what the layer's experts add to the stream."""
        ids = weights = None
        width = chosen = 0
        if step.routed is not None and self.choice is not None:
            assert step.halves is not None and step.expert_bias is not None
            ids, weights = self.expert_ids, self.expert_weights
            decode.linear(self.normed, step.halves, None, self.logits)
            kept = step.cache.expert_ids
            decode_experts.choose_experts(
                self.logits, step.router_bias, step.expert_bias, self.choice, self.scores, ids,
                weights, None if kept is None else Record(kept, places),
            )  # fmt: skip
            width, chosen = step.routed.up.shape[1], self.choice.count
        wide = 0 if step.shared is None else step.shared.up.shape[0]
        count = decode_experts.num_parts(width, wide, chosen=chosen)
        parts = self.normed.new_empty(self.slots, count, self.normed.shape[1])
        decode_experts.run_experts(
            self.normed, ids, weights, step.routed, step.shared, step.shared_weight, parts
        )
        return parts

    def refresh(self) -> None:
        """Put the projections together again, where they are."""
        into: list[Tensor] = []
        parameters: list[Tensor] = []
        for layer, step in zip(self.student.layers, self.steps, strict=True):
            parts = projections_of(layer.attention)  # pyright: ignore[reportArgumentType]
            sizes = [len(part.weight) for part in parts]
            into += step.joint.split(sizes)
            parameters += (part.weight.detach() for part in parts)
            if step.joint_bias is not None:
                for part, rows in zip(parts, step.joint_bias.split(sizes), strict=True):
                    if part.bias is not None:
                        into.append(rows)
                        parameters.append(part.bias.detach())
            if step.halves is not None and isinstance(layer.mlp, Moe):
                split_weight(layer.mlp.router.weight.detach(), out=step.halves)
        # A few launches for the projections of all layers.
        torch._foreach_copy_(into, parameters)  # pyright: ignore[reportPrivateImportUsage]

    def _read_prompts(
        self, tokens: Int[Tensor, "rows width"], placed: Int[Tensor, "2 rows"]
    ) -> None:
        shape = tuple(tokens.shape)
        if shape not in self._passes or self.student.row_of is not None:
            super()._read_prompts(tokens, placed)
            self._passes[shape] = None
            return
        known = self._passes[shape]
        if known is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            known = PromptGraph(torch.cuda.CUDAGraph(), tokens.clone(), placed.clone())
            with torch.cuda.graph(known.graph, pool=self._pool):
                super()._read_prompts(known.tokens, known.placed)
            self._passes[shape] = known
        known.tokens.copy_(tokens)
        known.placed.copy_(placed)
        known.graph.replay()

    def _rounded_width(self, longest: int) -> int:
        return max(ROUNDED, 1 << (longest - 1).bit_length())

    def _rounded_rows(self, rows: int, most: int) -> int:
        """An eighth of the slots, or as many as there are: two shapes of prompt passes."""
        few, many = -(-self.slots // 8), min(self.slots, most)
        return few if rows <= few <= most else many


def step_of(student: "Student", number: int, layer: "Layer", cache: LayerCache) -> Step:
    """A layer as its kernels take it, with room for what `refresh` puts together.

    References:
        own.
    """
    config = student.config
    kind = "global" if config.is_global(number) else "local"
    attention, mlp = layer.attention, layer.mlp
    projections = projections_of(attention)
    width = sum(len(projection.weight) for projection in projections)
    has_bias = any(projection.bias is not None for projection in projections)
    made = attention.o_proj.weight.new_zeros
    moe = mlp if isinstance(mlp, Moe) else None
    dense = mlp if isinstance(mlp, Mlp) else (None if moe is None else moe.shared)
    position = student.positions[kind]
    assert isinstance(position, Position)
    routed = None
    if moe is not None:
        experts = moe.experts.weights
        routed = Network(experts.up, experts.up_bias, experts.down, experts.down_bias)
    shared = None
    if dense is not None:
        shared = Network(dense.up.weight, dense.up.bias, dense.down.weight, dense.down.bias)
    return Step(
        kind=kind,
        cache=cache,
        attention_gamma=layer.attention_norm.gamma,
        joint=made(width, config.hidden_size),
        joint_bias=made(width) if has_bias else None,
        heads=heads_of(attention, position, config.attention_of(number).window_size),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_gamma=layer.mlp_norm.gamma,
        halves=None if moe is None else made(2 * len(moe.router.weight), config.hidden_size),
        router_bias=None if moe is None else moe.router.bias,
        expert_bias=None if moe is None else moe.router.expert_bias,
        routed=routed,
        shared=shared,
        shared_weight=None if moe is None else student.shared_weight,
    )


def projections_of(attention: Attention) -> list[nn.Linear]:
    """All projections of queries, keys and values: vectors first, then mixtures.

    References:
        own.
    """
    if isinstance(attention, Tpa):
        plain = [attention.q_b, attention.k_b, attention.v_b]
        return [*plain, attention.q_a, attention.k_a, attention.v_a]
    return [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]


def heads_of(attention: Attention, position: Position, window_size: int | None) -> Heads:
    """What a layer does between its projections.

    References:
        own.
    """
    biases = gammas = None
    ranks = (0, 0)
    if isinstance(attention, Tpa):
        ranks = (attention.q_rank, attention.rank)
        if attention.q_bias is not None:
            assert attention.k_bias is not None and attention.v_bias is not None
            biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    if attention.q_norm is not None and attention.k_norm is not None:
        gammas = (attention.q_norm.gamma, attention.k_norm.gamma)
    return Heads(
        num_heads=attention.shape.num_heads,
        q_rank=ranks[0],
        rank=ranks[1],
        window_size=window_size,
        biases=biases,
        gammas=gammas,
        rotation=None,
        value_lambda=attention.value_lambda,
        sinks=attention.sinks,
        slopes=position.slopes,
        eps=attention.shape.norm_eps,
    )


def require_decodable(config: StudentConfig) -> None:
    """Refuse students that the decoding kernels do not compute.

    Raises:
        ConfigError: Naming everything that is in the way.

    References:
        own.
    """
    problems = []
    if config.head_dim < 32:
        problems.append((f"sampling with head_dim {config.head_dim}", "at least 32 fits"))
    if config.activation != "relu2":
        problems.append((f"sampling with {config.activation} units", "the kernels compute relu2"))
    widths = [config.dense_hidden] if config.dense_layers else []
    if config.moe is not None:
        widths += [config.moe.expert_hidden, config.moe.shared_expert_hidden]
    if any(width % 16 for width in widths):
        problems.append((f"sampling with widths {widths}", "multiples of 16 fit"))
    if problems:
        raise ConfigError(
            [
                (f"kernels 'fused': {what}", f'{hint}, or set kernels = "reference"')
                for what, hint in problems
            ]
        )
