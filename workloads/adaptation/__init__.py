"""What trains, and how layers compute it: LoRA, fused LoRA, FP8, wrappers of modules."""
