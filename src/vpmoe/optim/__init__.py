"""Update rules: NorMuon with Polar Express for matrices, AdamW for the rest, and schedules."""

from vpmoe.optim.config import AdamWConfig, NorMuonConfig, OptimizerConfig
from vpmoe.optim.gradients import global_grad_norm, grad_norms
from vpmoe.optim.groups import Role, group_by_role, role_of
from vpmoe.optim.optimizer import NorMuonAdamW
from vpmoe.optim.schedule import ConstantConfig, CosineConfig, ScheduleConfig, WsdConfig

__all__ = [
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "NorMuonAdamW",
    "NorMuonConfig",
    "OptimizerConfig",
    "Role",
    "ScheduleConfig",
    "WsdConfig",
    "global_grad_norm",
    "grad_norms",
    "group_by_role",
    "role_of",
]
