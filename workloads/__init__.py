"""What a trial trains, in plain PyTorch: attention, adaptation, positions, models, data, training, evaluation.

Imports neither Ray nor MLflow, so that ``torchrun`` or a notebook can drive it as well as longspan's orchestrator.
"""

from workloads.engines.allocator import set_allocator

# Before anything else is imported: transformers imports bitsandbytes where it is installed, which asks the GPU what it
# is, and what torch is told of its allocator after that comes too late.
set_allocator()
