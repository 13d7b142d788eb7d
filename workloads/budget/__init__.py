"""What a trial costs before it runs: FLOPs, memory and seconds, from configurations alone.

``shape``    a model's sizes and parameter counts, and what of it a configuration trains
``flops``    FLOPs of patterns, forward passes and training steps, in closed form; the paper's table
"""
