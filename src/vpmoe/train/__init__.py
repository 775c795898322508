"""The engine: one loop, its state, and Megatron-Core underneath."""

import warnings

# Megatron-Core tells at every import which optional accelerators it lacks; we need none of them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
