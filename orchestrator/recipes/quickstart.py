"""Quickstart: which way to a longer context is best for a small model, answered in minutes without a GPU."""

from __future__ import annotations

from orchestrator.spec import SweepSpec


def quickstart() -> SweepSpec:
    """LoRA, LoRA+ and full fine-tuning of a small built-in model, from linear interpolation and from YaRN.

    It takes minutes on two CPU cores. Learning rates are for each method and positions: from YaRN the untuned model is
    already close, and the rates that suit linear interpolation undo that.
    """
    return SweepSpec.of(
        {
            "context_lengths": (1024, 2048),
            "positions": ("linear", "yarn"),
            "steps": 32,
            "batch": 2,
            "learning_rate_lora": 3e-3,
            "learning_rate_lora_plus": 3e-3,
            "learning_rate_full": 1e-3,
            "learning_rate_for": {"method=lora+,positions=yarn": 1e-3, "method=full,positions=yarn": 1e-4},
            "learning_rates_chosen": (
                "for each method and positions by the final perplexity over both lengths, from a small grid "
                "(docs/log.md), on held-out documents of the same corpus, which flatters every one a little"
            ),
            "warmup_steps": 5,
            "eval_every": 16,
            "eval_documents": 20,
        }
    )
