"""How good a model is at a length: perplexity over held-out documents, and how sure that is.

``bootstrap`` needs only NumPy; ``perplexity`` needs PyTorch and is imported where a model is at hand.
"""
