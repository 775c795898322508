"""The training loop, for every stage."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vpmoe.models.count import count
from vpmoe.models.student import Student
from vpmoe.train.config import TrainConfig
from vpmoe.train.device import World
from vpmoe.train.graph import graph_stream
from vpmoe.train.hooks import Hook, Observer, Position, is_due, run_hooks
from vpmoe.train.metrics import Stopwatch
from vpmoe.train.parallel import Replica
from vpmoe.train.plan import Plan, tokens_before
from vpmoe.train.record import Record
from vpmoe.train.state import open_run, restore, save
from vpmoe.train.step import take_step


def train(
    student: Student,
    plan: Plan,
    config: TrainConfig,
    *,
    world: World,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    observers: Sequence[Observer] = (),
) -> Position:
    """Where training ended: after the plan's last step. Called on every rank.

    Args:
        student: On the world's device; trained in place.
        plan: Batches and loss of each step.
        config: The stage's settings, of which this reads only what all stages share.
        world: The ranks that train together.
        resume: Go on from the newest checkpoint of the run's folder.
        hooks: Evaluations.
        observers: Readers of the numbers.
    """
    run_dir = config.run_dir
    readers = [*observers, *(tracker.build() for tracker in config.trackers)]
    flops = flops_per_token(student, config)
    tokens_earlier = tokens_before(plan.inputs)
    student.train()
    student.activation_checkpointing = config.activation_checkpointing
    torch.manual_seed(config.seed + world.rank)
    run, checkpoint = open_run(run_dir, config, resume=resume, world=world)
    stream = graph_stream(world.device) if config.cuda_graph else nullcontext()
    with (
        Record(run, config, world=world, observers=readers, flops_per_token=flops) as record,
        stream,
    ):
        replica = Replica(student, config.optimizer, world, cuda_graph=config.cuda_graph)
        position = restore(checkpoint, replica, plan) if checkpoint else Position()
        record.start(position, plan.num_steps)
        while position.step < plan.num_steps:
            watch = Stopwatch(world.device)
            # Before the batches: on-policy ones are sampled by the student that will train on them.
            student.set_progress(tokens_earlier + position.tokens_seen)
            with watch("step"):
                summed, applied = take_step(replica, plan, config, step=position.step, watch=watch)
            position = position.after(summed.num_tokens)
            with watch("eval"):
                measured = run_hooks(hooks, student, position, plan.num_steps)
            record.row(position, [summed.metrics(), applied, plan.metrics(), measured], watch)
            saves = position.step < plan.num_steps or config.checkpoint.last
            if saves and is_due(config.checkpoint.every_steps, position.step, plan.num_steps):
                with watch("checkpoint"):
                    save(run_dir, replica, plan, position, config=config)
                record.saved(watch)
    return position


def flops_per_token(student: Student, config: TrainConfig) -> float:
    """Forward and backward of one token, where utilization is to be logged; else 0."""
    if not config.peak_tflops:
        return 0.0
    return float(count(student.config, seq_len=config.batch.seq_len).training_flops_per_token)
