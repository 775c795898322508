"""The engine: one loop, its state, and Megatron-Core underneath."""

import warnings

# Megatron-Core tells at every import which optional accelerators it lacks, and at every load what
# it will call by another name; a user can act on neither.
for kind in (UserWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=kind, module=r"megatron\.")
