"""The cases of ``benchmarks.training_speed``: what is trained, by which code, and the targets.

All are Llama-2-7B's shape, bfloat16, one sequence a step; one with its frozen base in FP8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from benchmarks.memory import MODELS
from workloads.budget import ModelShape, training_flops
from workloads.config import Method, OffloadActivations, Quantization, TrainingConfig

Implementation = Literal["longspan", "user's way", "published S²", "Liger", "Unsloth"]

# Rate of large matrix products measured on one H200 (8192x4096x4096: 802 TFLOP/s, 16384x11008x4096: 789).
PRODUCTS_RATE = 790e12

# Rate of FP8 products: twice that, as their peaks are. Measured: 1,352 to 1,509 TFLOP/s (float8_products.py).
FLOAT8_RATE = 2 * PRODUCTS_RATE

# tokens/s that one H200 cannot exceed with LoRA+ and nothing recomputed, by (context, group size): matrix products at
# 790 TFLOP/s, attention at cuDNN's published rate for its length, element-wise work at 4.3 TB/s, nothing overlapped;
# frozen weights 4N FLOPs a token. Those of 98,304 tokens were calculated for 102,400 (groups of 8,192 and of a
# quarter); the true ones are up to 3% higher.
LIMITS = {
    (8_192, 2_048): 24_288,
    (8_192, None): 20_248,
    (32_768, 8_192): 20_590,
    (32_768, None): 11_663,
    (98_304, 8_192): 20_356,
    (98_304, 24_576): 13_772,
    (98_304, None): 5_246,
}

# Estimated seconds to start on a GPU: random weights, CUDA, and longspan's compilation.
START_SECONDS = {"longspan": 30.0, "user's way": 12.0, "published S²": 12.0, "Liger": 15.0, "Unsloth": 75.0}


@dataclass(frozen=True)
class Case:
    """What is trained, and by which code.

    Args:
        group_size: of S²-Attn in tokens; None: full attention.
        warmup, steps: uncounted and counted steps.
        expected: tokens/s, to estimate the duration; for longspan, the target.
        stretch: the ambitious target, tokens/s.
        offload_activations: as in ``ExecutionConfig``; for longspan only.
    """

    name: str
    implementation: Implementation
    context_length: int
    group_size: int | None
    warmup: int
    steps: int
    expected: float
    stretch: float | None = None
    method: Method = "lora+"
    quantization: Quantization = "none"
    offload_activations: OffloadActivations = "auto"

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            context_length=self.context_length,
            method=self.method,
            attention="s2" if self.group_size else "full",
            group_size=self.group_size,
            steps=self.warmup + self.steps,
            batch=1,
            quantization=self.quantization,
            precision="bfloat16",
            eval_span=self.context_length,
        )

    @property
    def must_reach(self) -> float | None:
        return self.expected if self.implementation == "longspan" and self.offload_activations == "auto" else None

    @property
    def seconds(self) -> float:
        """About how long it takes on an H200."""
        return START_SECONDS[self.implementation] + (self.warmup + self.steps) * self.context_length / self.expected

    @cached_property
    def limit(self) -> float | None:
        """The tokens/s that one H200 cannot exceed; None if not calculated.

        For full fine-tuning: its FLOPs alone, at the rate of matrix products (6N and causal attention, whose backward
        pass takes 2.5 times its forward). For an FP8 base: the limit of bfloat16, with frozen products at FP8's rate.
        """
        flops = training_flops(ModelShape.of(MODELS["7B"]), self.training)
        if self.method != "lora+":
            return PRODUCTS_RATE * self.context_length / flops.total
        limit = LIMITS.get((self.context_length, self.group_size))
        saved = flops.float8 / self.context_length * (1 / PRODUCTS_RATE - 1 / FLOAT8_RATE)
        return limit and (1 / (1 / limit - saved) if saved else limit)


# A trial that trains all weights must reach 60% of its limit of 19,080 tokens/s, and 70% would be good.
ALL_WEIGHTS = dict(method="full", expected=0.6 * 19_080)

# Most important first, long cases last. A step at 98k takes 8 to 31 s, so the baselines take fewer of them.
CASES = {
    case.name: case
    for case in (
        Case("8k-s2", "longspan", 8_192, 2_048, 3, 10, expected=19_500, stretch=21_500),
        Case("8k-s2-fp8", "longspan", 8_192, 2_048, 3, 10, expected=25_000, stretch=30_000, quantization="fp8"),
        Case("8k-full", "longspan", 8_192, None, 3, 10, expected=16_500, stretch=18_000),
        Case("8k-user", "user's way", 8_192, None, 1, 5, expected=7_869),
        Case("8k-published", "published S²", 8_192, 2_048, 1, 5, expected=8_600),
        Case("32k-s2", "longspan", 32_768, 8_192, 3, 10, expected=16_500, stretch=18_500),
        Case("32k-full", "longspan", 32_768, None, 3, 10, expected=10_000, stretch=11_200),
        Case("32k-user", "user's way", 32_768, None, 1, 3, expected=5_651),
        Case("32k-published", "published S²", 32_768, 8_192, 1, 3, expected=10_000),
        Case("98k-s2", "longspan", 98_304, 8_192, 2, 10, expected=13_000, stretch=15_500),
        Case("98k-user", "user's way", 98_304, None, 1, 2, expected=3_126),
        Case("98k-published", "published S²", 98_304, 8_192, 1, 2, expected=10_000),
        Case("98k-s2-quarter", "longspan", 98_304, 24_576, 2, 10, expected=9_400, stretch=10_700),
        Case("98k-s2-recompute", "longspan", 98_304, 8_192, 2, 5, expected=12_900, offload_activations=0),
        Case("8k-s2-all-weights", "longspan", 8_192, 2_048, 3, 10, stretch=0.7 * 19_080, **ALL_WEIGHTS),
        Case("8k-user-all-weights", "user's way", 8_192, None, 1, 5, expected=6_000, method="full"),
        Case("8k-liger", "Liger", 8_192, None, 1, 5, expected=8_700),
        Case("32k-liger", "Liger", 32_768, None, 1, 3, expected=6_000),
        Case("98k-liger", "Liger", 98_304, None, 1, 2, expected=3_200),
        Case("8k-unsloth", "Unsloth", 8_192, None, 2, 5, expected=11_400),
        Case("32k-unsloth", "Unsloth", 32_768, None, 2, 3, expected=7_200),
        Case("98k-unsloth", "Unsloth", 98_304, None, 1, 2, expected=3_600),
    )
}
PROFILED = ("8k-s2", "98k-s2")
PROFILED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a case.

    Args:
        outcome: ``measured``, ``out of memory``, or why it failed.
        seconds: of each counted step.
        peak_gib, reserved_gib: the most that torch had allocated, and reserved from the device, in all steps.
        mfu: None if the device's peak is unknown.
        settings: the execution settings that differ from longspan's defaults, and its resolved choices.
        profile: see step_profile.py.
        reason: torch's message when memory ran out; in a measured row, that of the first attempt: ``settings`` are
            then those of the next smaller memory plan.
    """

    case: str
    outcome: str
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    reserved_gib: float | None = None
    mfu: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    reason: str | None = None


def baseline(case: Case, implementation: Implementation) -> Case | None:
    """The same case by other code, in bfloat16.

    With S²-Attn too if that code has it, else with full attention.
    """
    group_size = case.group_size if implementation == "published S²" else None
    for other in CASES.values():
        alike = other.context_length == case.context_length and other.method == case.method
        if other.implementation == implementation and alike and other.group_size == group_size:
            return other
    return None
