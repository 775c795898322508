"""A student on many ranks: gradients summed by Megatron-Core, optimizer work shared out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vpmoe.batch import Batch
from vpmoe.errors import RunError
from vpmoe.models.router import Router, router_health
from vpmoe.models.student import Student, StudentOutput
from vpmoe.optim import NorMuonAdamW, OptimizerConfig, grad_norms, role_of
from vpmoe.storage.megatron_cpu import megatron_device
from vpmoe.train.accumulate import SmallGradients
from vpmoe.train.device import World
from vpmoe.train.graph import GraphedStudent, forward
from vpmoe.train.metrics import router_metrics
from vpmoe.train.reduce import all_sums

BROADCAST_NUMEL = 1 << 26  # parameters sent in one message; bounds the copy made of them


class Replica:
    """This rank's copy of the student, with its share of the optimizer.

    Every rank holds all parameters and, after `finish_gradients`, all summed gradients. A
    parameter belongs to one rank, which keeps its optimizer state, updates it and sends it to the
    others: the matrix rules need whole matrices, and stay whole this way.

    Args:
        student: On the world's device; parameters without `requires_grad` are left alone.
        config: The optimizer's settings.
        world: The ranks that share the work.
        cuda_graph: Replay forward and backward passes; the replica lives inside a `graph_stream`.
    """

    def __init__(
        self,
        student: Student,
        config: OptimizerConfig,
        world: World,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.student = student
        self.world = world
        self.parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise RunError("the student has no trainable parameter", hint="unfreeze some")
        self.owner_of = share_out(self.parameters, world.size)
        mine = [(n, p) for n, p in self.parameters.items() if self.owner_of[n] == world.rank]
        self.optimizer = NorMuonAdamW(mine, config)
        self._ddp = _data_parallel(student, world.device)
        self._ddp.broadcast_params()
        self._small = SmallGradients(self.parameters.values())
        self._graphed = GraphedStudent(student, self._small.add) if cuda_graph else None
        self._routers = _routers_by_path(student)
        self._stacks = {path: self._stacks_of(path) for path in self._routers}

    def forward(
        self, batch: Batch, num_documents: int, *, layers: Sequence[int] = ()
    ) -> StudentOutput:
        """The student's output for a batch on its device, with grad.

        Raises:
            RunError: If states of layers are asked for where passes are replayed.
        """
        if self._graphed is None:
            return forward(self.student, batch, num_documents, layers=layers)
        if layers:
            raise RunError(
                f"cuda_graph = true with a loss on the states of layers {tuple(layers)}",
                hint="set cuda_graph = false",
            )
        return self._graphed(batch, num_documents)

    def after_backward(self) -> None:
        """To be called after each backward pass: gradients that were kept back are added."""
        self._small.add()

    def last_backward(self, is_last: bool) -> AbstractContextManager[None]:
        """Inside, gradients pile up; ranks exchange them only after the last micro-batch."""
        return nullcontext() if is_last else self._ddp.no_sync()

    def drop_graphs(self) -> None:
        """From now on every pass is launched kernel by kernel; the graphs' memory is free."""
        self._graphed = None

    def zero_gradients(self) -> None:
        """Start a step: empty gradient buffers."""
        self._ddp.zero_grad_buffer()

    def finish_gradients(self) -> None:
        """Sum the gradients over all ranks."""
        self._ddp.finish_grad_sync()

    def gradient_norms(self) -> dict[str, float | int]:
        """Norm of the summed gradient per optimizer role, equal on all ranks."""
        norms = grad_norms(self.parameters.items())
        values = torch.stack([norm.double() for norm in norms.values()]).tolist()
        return dict(zip(norms, values, strict=True))

    def sum_expert_counts(self) -> dict[str, Float[Tensor, " experts"]]:
        """Tokens sent to each expert in this step over all ranks, by router."""
        return all_sums({p: router.local_tokens_per_expert for p, router in self._routers.items()})

    def update(
        self,
        lr_factor: float,
        expert_counts: Mapping[str, Tensor],
        *,
        gradient_scale: float = 1.0,
    ) -> None:
        """One optimizer step: update what is owned here, then hand the parameters around.

        Args:
            lr_factor: The schedule's factor.
            expert_counts: Tokens of the whole global batch, by router; experts without any rest.
            gradient_scale: What multiplies the gradients.
        """
        used = {path: expert_counts[path] > 0 for path in self._stacks}
        active = {name: used[path] for path, names in self._stacks.items() for name in names}
        self.optimizer.step(lr_factor, active_slices=active, gradient_scale=gradient_scale)
        if self.world.size > 1:
            self._send_parameters()

    def balance_experts(self, expert_counts: Mapping[str, Tensor]) -> dict[str, float | int]:
        """Move each router's bias against its load and start to count anew; what to log."""
        health = self._health(expert_counts)
        for path, router in self._routers.items():
            router.update_expert_bias(expert_counts[path].to(router.expert_bias.dtype))
            router.local_tokens_per_expert.zero_()
        return router_metrics(health)

    def _health(self, expert_counts: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Health of each router; all of them are read back at once."""
        if not self._routers:
            return {}
        counts = torch.stack([expert_counts[path] for path in self._routers]).cpu()
        biases = torch.stack([router.expert_bias for router in self._routers.values()]).cpu()
        return {
            path: router_health(loads.to(bias.dtype), bias)
            for path, loads, bias in zip(self._routers, counts, biases, strict=True)
        }

    def _stacks_of(self, router_path: str) -> list[str]:
        """Parameters with one slice per expert of the router's layer."""
        prefix = f"{router_path.rpartition('.')[0]}.experts."
        return [name for name in self.parameters if name.startswith(prefix)]

    @torch.no_grad()
    def _send_parameters(self) -> None:
        group = cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())
        for owner, params in _messages(self.parameters, self.owner_of):
            flat = torch.cat([p.detach().reshape(-1) for p in params])
            dist.broadcast(flat, src=dist.get_global_rank(group, owner), group=group)
            for param, new in zip(params, flat.split([p.numel() for p in params]), strict=True):
                param.copy_(new.view_as(param))


def share_out(parameters: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Rank that owns each parameter: the costliest first, each to the least loaded rank.

    Cost is the work of the matrix rule for stacks of matrices, the size for the rest. Ties go to
    the lower rank and the earlier name, so that every rank finds the same answer.
    """
    load = [0] * num_ranks
    owner_of: dict[str, int] = {}
    costs = {name: _cost(name, param) for name, param in parameters.items()}
    for name in sorted(parameters, key=lambda name: (-costs[name], name)):
        owner = load.index(min(load))
        load[owner] += costs[name]
        owner_of[name] = owner
    return owner_of


def _cost(name: str, param: Tensor) -> int:
    """Multiplications of an update, up to a constant factor."""
    if role_of(name, param) != "matrix":
        return param.numel()
    return param.numel() * min(param.shape[-2:])


def _messages(
    parameters: Mapping[str, nn.Parameter], owner_of: Mapping[str, int]
) -> Iterator[tuple[int, Sequence[nn.Parameter]]]:
    """Parameters of one owner and one dtype, as many as fit into a message."""
    open_messages: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
    for name, param in parameters.items():
        key = (owner_of[name], param.dtype)
        message = open_messages.setdefault(key, [])
        if message and sum(p.numel() for p in message) + param.numel() > BROADCAST_NUMEL:
            yield owner_of[name], message
            message = open_messages[key] = []
        message.append(param)
    for (owner, _), message in open_messages.items():
        yield owner, message


def _data_parallel(student: Student, device: torch.device) -> DistributedDataParallel:
    """The student with one gradient buffer per dtype that Megatron-Core sums over ranks.

    Gradients are summed, not averaged (`calculate_per_token_loss`): losses were divided by
    global counts already. Buffers are float32, or float64 for a float64 student.
    """
    wide = any(p.dtype == torch.float64 for p in student.parameters())
    # Megatron-Core's wrapper wants a transformer's config and reads one field of it.
    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
    )
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not wide, use_distributed_optimizer=False, overlap_grad_reduce=False
    )
    with megatron_device(device):
        return DistributedDataParallel(config, options, student)


def _routers_by_path(student: Student) -> dict[str, Router]:
    """Routers under their dotted names, first layer first."""
    return {path: m for path, m in student.named_modules() if isinstance(m, Router)}
