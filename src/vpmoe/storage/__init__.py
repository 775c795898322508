"""What lies on disk: shards, manifests, checkpoints, run directories."""

import warnings

# Megatron-Core tells at every import which optional accelerators it lacks; we need none of them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
