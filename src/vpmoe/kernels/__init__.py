"""Hand-written GPU kernels; each equals a reference in another room, in values and in gradients.

Nothing here is imported unless it was asked for: Triton exists only beside a CUDA build of PyTorch.
"""
