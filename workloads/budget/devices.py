"""Devices by torch's names for them: memory, peak rates, and the share of a peak that training reaches."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from workloads.config import Precision

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The device of one worker.

    Args:
        name: as ``torch.cuda.get_device_name`` gives it.
        memory: bytes that torch reports (``total_memory``, less than the device's nominal memory).
        bfloat16, float32, float8: peak of dense matrix products, FLOP/s. Float32 is without TF32, which torch disables
            by default; float8 is zero on devices without FP8 units.
        bandwidth: peak of its memory, bytes/s read and written.
        linear_efficiency, attention_efficiency, bandwidth_efficiency, streaming_efficiency: the share of these peaks
            that training reaches in products with weights, in attention, in other operations on tokens, and in
            operations on all weights at once: the optimiser's update, copies, sums of gradients (traffic.py).
        launch: seconds that the host takes to launch one kernel.
        efficiency_source: the source of these.
        link, host_link: bytes/s to another device of the same machine, and to host memory.
        host_memory: bytes of host memory for each worker; 0 if unknown.
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float
    linear_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    streaming_efficiency: float
    launch: float
    efficiency_source: str
    link: float
    host_link: float
    float8: float = 0.0
    host_memory: int = 0

    def peak(self, precision: Precision) -> float:
        """Peak of matrix products in a precision, FLOP/s; 0 if unknown."""
        return self.bfloat16 if precision == "bfloat16" else self.float32

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU, not CPU cores."""
        return self.name != "CPU"

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether it has units for products in bfloat16 (GPUs from compute capability 8.0 on); assumed if unknown."""
        return self.bfloat16 > self.float32 or not self.bfloat16

    @property
    def multiplies_float8(self) -> bool:
        """Whether it can multiply in FP8 (GPUs from compute capability 8.9 on, CPUs); assumed if unknown."""
        return self.float8 > 0 or not self.bfloat16

    @property
    def float8_rate(self) -> float:
        """FLOP/s that products in FP8 reach: on GPUs the same share of the peak as in bfloat16.

        On an H200 products reached 1,313 to 1,509 TFLOP/s, 0.66 to 0.76 of it; whole steps are predicted within 3%.
        """
        return self.float8 * (self.linear_efficiency if self.is_gpu else 1.0)

    @classmethod
    def named(cls, name: str) -> Device | None:
        """The device of this name, or None if it is unknown."""
        return DEVICES.get(name)

    @classmethod
    def cpu(cls, cores: int, memory: int, multiplies_bfloat16: bool = False) -> Device:
        """``cores`` cores for one worker, with ``memory`` bytes.

        100 GFLOP/s a core follow from 32 FLOPs a cycle at about 3 GHz (AVX-512 or two AVX2 units, multiply and add);
        20 GB/s are about what one core reads from caches and memory. The first two efficiencies fit the speeds of
        builtin:tiny in docs/performance.md within 4%. On a processor that multiplies in bfloat16 (AMD EPYC with AVX-512
        BF16) steps were 1.8 to 2.0 times as fast, at 1,024 and 2,048 tokens, LoRA+ and full: predicted within 7%.
        Products in FP8, for which it has no units, ran at 31 to 40 GFLOP/s a core.
        """
        return cls(
            name="CPU",
            memory=memory,
            bfloat16=cores * (250e9 if multiplies_bfloat16 else 100e9),
            float32=cores * 100e9,
            float8=cores * 35e9,
            bandwidth=cores * 20e9,
            linear_efficiency=0.99,
            attention_efficiency=0.35,
            bandwidth_efficiency=1.0,
            streaming_efficiency=1.0,
            launch=0.0,
            efficiency_source="docs/performance.md, builtin:tiny on an AMD EPYC",
            link=5e9,
            host_link=5e9,
        )


def host_memory() -> int:
    """Returns the bytes of this machine's memory, or the limit of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max": none
            limits.append(int(Path(path).read_text(encoding="utf-8")))
    return min(limits)


# A kernel of eager PyTorch with autograd, autocast and PEFT's modules: builtin:tiny's sweep on an H200, 800 to 1,000
# kernels a step, reached 100,000 to 230,000 tokens/s at 1,024 and 2,048 tokens (docs/performance.md).
LAUNCH = 20e-6

# Large products alone were timed on one H200 at 691 to 802 TFLOP/s, up to 0.81 of the peak. The other two fit whole
# training steps there (torch 2.11, transformers 5.17, PEFT 0.21, all in bfloat16; Llama-2-7B, LoRA+, batch 1): 7,869,
# 5,651, 4,052 and 3,126 tokens/s at 8k, 32k, 64k and 98k with checkpointing, and 10,898 at 8k without and with cuDNN's
# attention, within 2.5%. Not fitted: 9,835 without cuDNN's, predicted 9% too fast; SmolLM2-135M at 32k, 95,000 (LoRA+)
# and 103,000 (full), predicted within 5%.
#
# Streaming: copies of whole tensors were timed at 3.7 to 4.3 of 4.8 TB/s, 0.77 to 0.90. The share was chosen to fit
# full fine-tuning of the 7B, which it predicts within 1%: compiled, 8k with S², 12,588 and 12,623 tokens/s.
STREAMING = 0.80
HOPPER = dict(
    linear_efficiency=0.80,
    attention_efficiency=0.555,
    bandwidth_efficiency=0.43,
    streaming_efficiency=STREAMING,
    launch=LAUNCH,
    efficiency_source="measured on one H200, Llama-2-7B",
)
# The last two fit LongLoRA v3 table 12 (8 A100, ZeRO-2, checkpointing), 8k to 64k: LoRA 6.0, 14.0, 36.5 and 92.5 hours
# for 64,000 sequences, LongLoRA 5.2, 11.3, 24.6 and 52.4, all within 7%; with an H200's shares, within 16%.
AMPERE = dict(
    linear_efficiency=0.80,
    attention_efficiency=0.61,
    bandwidth_efficiency=0.485,
    streaming_efficiency=STREAMING,
    launch=LAUNCH,
    efficiency_source="LongLoRA v3 table 12, 8 A100, Llama-2-7B",
)
ASSUMED = AMPERE | dict(efficiency_source="assumed as on an A100: give a measured speed")

NVLINK, PCIE = 200e9, 20e9  # bytes/s that collectives reach, about two thirds of a direction's peak
PCIE_HOST = 20e9  # pinned copies over PCIe 4 x16; 55e9 was measured over PCIe 5 on an H200


def _gpu(
    name: str,
    gib: float,
    teraflops: float,
    float32: float,
    gigabytes: float,
    efficiency: dict,
    link: float,
    host: float,
    float8: float = 0.0,
) -> Device:
    return Device(
        name=name,
        memory=int(gib * GIB),
        bfloat16=teraflops * 1e12,
        float32=float32 * 1e12,
        float8=float8 * 1e12,
        bandwidth=gigabytes * 1e9,
        link=link,
        host_link=host,
        **efficiency,
    )


# Peaks: NVIDIA's data sheets, dense (half the rate where a sheet has it with sparsity), bfloat16 with float32
# accumulation, SXM clocks for SXM names.
DEVICES = {
    device.name: device
    for device in (
        # H200 data sheet: 1,979 TFLOP/s with sparsity, in FP8 3,958; 141 GB, 4.8 TB/s.
        _gpu("NVIDIA H200", 139.8, 989.4, 67, 4_800, HOPPER, NVLINK * 1.5, 55e9, float8=1_979),
        # H100 data sheet: SXM 1,979, PCIe 1,513, NVL 1,671 TFLOP/s with sparsity, in FP8 3,958, 3,026 and 3,341; 80, 80
        # and 94 GB; 3.35, 2 and 3.9 TB/s.
        _gpu("NVIDIA H100 80GB HBM3", 79.1, 989.4, 67, 3_350, HOPPER, NVLINK * 1.5, 55e9, float8=1_979),
        _gpu("NVIDIA H100 PCIe", 79.1, 756.4, 51, 2_000, HOPPER, PCIE * 2, 55e9, float8=1_513),
        _gpu("NVIDIA H100 NVL", 93.1, 835.5, 60, 3_900, HOPPER, PCIE * 2, 55e9, float8=1_671),
        # A100 data sheet: 312 TFLOP/s, 19.5 in float32; 1,555 GB/s with 40 GB, with 80 GB 2,039 (SXM) and 1,935 (PCIe).
        _gpu("NVIDIA A100-SXM4-40GB", 39.4, 312, 19.5, 1_555, AMPERE, NVLINK, PCIE_HOST),
        _gpu("NVIDIA A100-SXM4-80GB", 79.2, 312, 19.5, 2_039, AMPERE, NVLINK, PCIE_HOST),
        _gpu("NVIDIA A100-PCIE-40GB", 39.4, 312, 19.5, 1_555, AMPERE, PCIE, PCIE_HOST),
        _gpu("NVIDIA A100 80GB PCIe", 79.2, 312, 19.5, 1_935, AMPERE, PCIE, PCIE_HOST),
        # L40S data sheet: 733 TFLOP/s with sparsity, in FP8 1,466; 48 GB, 864 GB/s.
        _gpu("NVIDIA L40S", 44.4, 366, 91.6, 864, ASSUMED, PCIE, PCIE_HOST, float8=733),
        # A10G data sheet (the A10 of AWS' g5 instances): 70 TFLOP/s, 35 in float32, 24 GB, 600 GB/s.
        _gpu("NVIDIA A10G", 22.0, 70, 35, 600, ASSUMED, PCIE, PCIE_HOST),
        # L4 data sheet: 242 TFLOP/s with sparsity, in FP8 485; 24 GB, 300 GB/s.
        _gpu("NVIDIA L4", 22.0, 121, 30.3, 300, ASSUMED, PCIE, PCIE_HOST, float8=242.5),
        # T4 and V100 data sheets. Their tensor cores support float16 (65 and 125 TFLOP/s) but not bfloat16, which runs
        # at float32's rate at most; 320 and 900 GB/s.
        _gpu("Tesla T4", 14.6, 8.1, 8.1, 320, ASSUMED, PCIE / 2, PCIE_HOST / 2),
        _gpu("Tesla V100-SXM2-16GB", 15.8, 15.7, 15.7, 900, ASSUMED, NVLINK / 2, PCIE_HOST / 2),
        _gpu("Tesla V100-SXM2-32GB", 31.7, 15.7, 15.7, 900, ASSUMED, NVLINK / 2, PCIE_HOST / 2),
    )
}
