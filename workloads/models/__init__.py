"""Base models: where they come from, their families, their rotary positions, adapters and quantisation."""
