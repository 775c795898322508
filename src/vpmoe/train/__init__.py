"""The engine: one loop, its state, and Megatron-Core underneath."""
