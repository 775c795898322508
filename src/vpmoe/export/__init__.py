"""Checkpoints in other formats. Importing it tells transformers' Auto classes about ours."""

from transformers import AutoConfig, AutoModelForCausalLM

from vpmoe.export.modeling import MODEL_TYPE, VpmoeConfig, VpmoeForCausalLM

__all__ = ["VpmoeConfig", "VpmoeForCausalLM"]

AutoConfig.register(MODEL_TYPE, VpmoeConfig, exist_ok=True)
AutoModelForCausalLM.register(VpmoeConfig, VpmoeForCausalLM, exist_ok=True)
