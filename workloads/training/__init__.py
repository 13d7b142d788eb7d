"""The training loop and its parts: loss, optimiser, checkpoints, compilation, recompute, offload."""
