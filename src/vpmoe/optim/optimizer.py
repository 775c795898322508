"""One optimizer for a model: NorMuon for its matrices, AdamW for the rest, state by name."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vpmoe.errors import CheckpointError
from vpmoe.optim.adamw import AdamWList
from vpmoe.optim.config import AdamWConfig, NorMuonConfig
from vpmoe.optim.groups import Role, group_by_role
from vpmoe.optim.normuon import MatrixBucket, matrix_buckets
from vpmoe.optim.weights import ActiveSlices, Weight, batches

StateByName = dict[str, dict[str, Tensor]]


class NorMuonAdamW:
    """Moves the parameters it was given; which of a model's these are is decided elsewhere.

    Gradients are read from `param.main_grad` where a distributed wrapper put them, or else from
    `param.grad`; they are left as they are. Parameters narrower than float32 are trained as
    float32 copies and rounded after each step.

    Args:
        named_params: Names in the model, which decide the rule of each parameter, and parameters.
        config: NorMuon with AdamW, or AdamW throughout.
    """

    def __init__(
        self, named_params: Iterable[tuple[str, Tensor]], config: NorMuonConfig | AdamWConfig
    ) -> None:
        self.config = config
        self.num_steps = 0
        groups = group_by_role(named_params)
        weights: dict[Role, list[Weight]] = {
            role: [Weight(*member) for member in members] for role, members in groups.items()
        }
        self._weights = {w.name: w for members in weights.values() for w in members}
        self._buckets: list[MatrixBucket] = []
        if isinstance(config, NorMuonConfig):
            self._buckets = matrix_buckets(weights.pop("matrix"), config)
        self._lists: list[tuple[Role, AdamWList]] = [
            (role, AdamWList(batch, config, decay=config.decay_of(role)))
            for role, members in weights.items()
            for batch in batches(members)
        ]

    @torch.no_grad()
    def step(
        self,
        lr_factor: float,
        active_slices: ActiveSlices | None = None,
        *,
        gradient_scale: float = 1.0,
    ) -> None:
        """Move every parameter once.

        Args:
            lr_factor: The schedule's factor on every learning rate.
            active_slices: For stacks of experts, by name: which experts saw a token in this step.
                The others rest: no update, no decay, no change of state. Names that this optimizer
                does not own are passed over.
            gradient_scale: What multiplies every gradient on its way in: clipping costs no pass.
        """
        self.num_steps += 1
        active = active_slices or {}
        for bucket in self._buckets:
            lr = lr_factor * self.config.lr_of("matrix")
            bucket.step(lr, active, gradient_scale=gradient_scale)
        for role, members in self._lists:
            lr = lr_factor * self.config.lr_of(role)
            members.step(lr, active, step=self.num_steps, gradient_scale=gradient_scale)

    def state(self) -> StateByName:
        """Live tensors by parameter name, for checkpoints.

        Matrices under NorMuon hold `momentum` and `second_moment`, others `exp_avg` and
        `exp_avg_sq`; parameters narrower than float32 also `master`; all hold `step`.
        """
        parts = [*self._buckets, *(members for _, members in self._lists)]
        step = torch.tensor(self.num_steps)
        return {name: {**tensors, "step": step} for p in parts for name, tensors in p.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `state` gave for these parameters, whoever owned them then.

        Raises:
            CheckpointError: If a parameter's state is missing, or of another kind or shape.
        """
        own = self.state()
        for name, tensors in own.items():
            given = state.get(name, {})
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            found = {key: tuple(value.shape) for key, value in given.items()}
            if shapes != found:
                raise CheckpointError(
                    f"optimizer state of {name} is {found or 'missing'}, expected {shapes}",
                    hint="the checkpoint was written with another optimizer or model",
                )
            for key, tensor in tensors.items():
                tensor.copy_(given[key])
            self._weights[name].publish()
        steps = {int(state[name]["step"]) for name in own}
        if len(steps) > 1:
            raise CheckpointError(
                f"optimizer state mixes steps {sorted(steps)}", hint="load one checkpoint whole"
            )
        self.num_steps = steps.pop() if steps else 0
