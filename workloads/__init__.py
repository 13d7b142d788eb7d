"""What a trial trains, in plain PyTorch: attention, adaptation, positions, models, data, training, evaluation.

Imports neither Ray nor MLflow, so that ``torchrun`` or a notebook can drive it as well as longspan's orchestrator.
"""
