"""Devices by the names that torch gives them: memory, peaks, and how much of a peak training reaches."""

from __future__ import annotations

from dataclasses import dataclass

from workloads.config import Precision

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one worker computes on.

    Args:
        name: as ``torch.cuda.get_device_name`` gives it.
        memory: bytes that torch sees (``total_memory``: less than the label says).
        bfloat16, float32: peak of dense matrix products, FLOP/s. Float32 is without TF32, which torch leaves off.
        linear_efficiency, attention_efficiency: the share of the peak that this package's training reaches, everything
            around the matrix products included (norms, activation functions, optimiser, communication).
        efficiency_source: where these two come from.
        link, host_link: bytes/s to another device of the same machine, and to the host's memory.
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    linear_efficiency: float
    attention_efficiency: float
    efficiency_source: str
    link: float
    host_link: float

    def peak(self, precision: Precision) -> float:
        return self.bfloat16 if precision == "bfloat16" else self.float32

    @classmethod
    def named(cls, name: str) -> Device | None:
        """The device of this name, or None if it is not known."""
        return DEVICES.get(name)

    @classmethod
    def cpu(cls, cores: int, memory: int) -> Device:
        """``cores`` cores for one worker, with ``memory`` bytes.

        100 GFLOP/s a core is what 32 FLOPs a cycle at about 3 GHz give (AVX-512 or two AVX2 units, multiply and add);
        the efficiencies fit docs/performance.md's speeds of builtin:tiny, within 10%.
        """
        return cls(
            name="CPU",
            memory=memory,
            bfloat16=cores * 100e9,
            float32=cores * 100e9,
            linear_efficiency=0.69,
            attention_efficiency=0.48,
            efficiency_source="docs/performance.md, builtin:tiny on an AMD EPYC",
            link=5e9,
            host_link=5e9,
        )


# Whole training steps on one H200 (torch 2.11, transformers 5.17, PEFT 0.21; Llama-2-7B, LoRA+, batch 1): 7,869, 5,651,
# 4,052 and 3,126 tokens/s at 8k, 32k, 64k and 98k with checkpointing, and 10,898 at 8k without and with cuDNN's
# attention, are predicted within 2%. Without cuDNN that one was 9,835, which is predicted 10% too fast.
HOPPER = dict(
    linear_efficiency=0.34,
    attention_efficiency=0.56,
    efficiency_source="measured on one H200, Llama-2-7B",
)
# LongLoRA v3 table 12 (8 A100, ZeRO-2, checkpointing), 8k to 64k: LoRA 6.0, 14.0, 36.5 and 92.5 hours for 64,000
# sequences, LongLoRA 5.2, 11.3, 24.6 and 52.4, all within 6%.
AMPERE = dict(
    linear_efficiency=0.41,
    attention_efficiency=0.66,
    efficiency_source="LongLoRA v3 table 12, 8 A100, Llama-2-7B",
)
ASSUMED = AMPERE | dict(efficiency_source="assumed as on an A100: give a measured speed")

NVLINK, PCIE = 200e9, 20e9  # bytes/s that collectives reach, about two thirds of a direction's peak
PCIE_HOST = 20e9  # pinned copies over PCIe 4 x16; 55e9 was measured over PCIe 5 on an H200


def _gpu(name: str, gib: float, teraflops: float, float32: float, efficiency: dict, link: float, host: float) -> Device:
    return Device(
        name=name,
        memory=int(gib * GIB),
        bfloat16=teraflops * 1e12,
        float32=float32 * 1e12,
        link=link,
        host_link=host,
        **efficiency,
    )


# Peaks: NVIDIA's data sheet of each, dense (where a sheet tells the rate with sparsity: half of it), bfloat16 with
# float32 accumulation, SXM clocks for SXM names.
DEVICES = {
    device.name: device
    for device in (
        # H200 data sheet: 1,979 TFLOP/s with sparsity, 141 GB.
        _gpu("NVIDIA H200", 139.8, 989.4, 67, HOPPER, NVLINK * 1.5, 55e9),
        # H100 data sheet: SXM 1,979, PCIe 1,513, NVL 1,671 TFLOP/s with sparsity; 80, 80 and 94 GB.
        _gpu("NVIDIA H100 80GB HBM3", 79.1, 989.4, 67, HOPPER, NVLINK * 1.5, 55e9),
        _gpu("NVIDIA H100 PCIe", 79.1, 756.4, 51, HOPPER, PCIE * 2, 55e9),
        _gpu("NVIDIA H100 NVL", 93.1, 835.5, 60, HOPPER, PCIE * 2, 55e9),
        # A100 data sheet: 312 TFLOP/s, 19.5 in float32.
        _gpu("NVIDIA A100-SXM4-40GB", 39.4, 312, 19.5, AMPERE, NVLINK, PCIE_HOST),
        _gpu("NVIDIA A100-SXM4-80GB", 79.2, 312, 19.5, AMPERE, NVLINK, PCIE_HOST),
        _gpu("NVIDIA A100-PCIE-40GB", 39.4, 312, 19.5, AMPERE, PCIE, PCIE_HOST),
        _gpu("NVIDIA A100 80GB PCIe", 79.2, 312, 19.5, AMPERE, PCIE, PCIE_HOST),
        # L40S data sheet: 733 TFLOP/s with sparsity, 48 GB.
        _gpu("NVIDIA L40S", 44.4, 366, 91.6, ASSUMED, PCIE, PCIE_HOST),
        # A10G data sheet (the A10 of AWS' g5 instances): 70 TFLOP/s, 35 in float32, 24 GB.
        _gpu("NVIDIA A10G", 22.0, 70, 35, ASSUMED, PCIE, PCIE_HOST),
        # L4 data sheet: 242 TFLOP/s with sparsity, 24 GB.
        _gpu("NVIDIA L4", 22.0, 121, 30.3, ASSUMED, PCIE, PCIE_HOST),
        # T4 and V100 data sheets. Their tensor cores know float16 (65 and 125 TFLOP/s) but no bfloat16, which runs at
        # no more than float32's rate.
        _gpu("Tesla T4", 14.6, 8.1, 8.1, ASSUMED, PCIE / 2, PCIE_HOST / 2),
        _gpu("Tesla V100-SXM2-16GB", 15.8, 15.7, 15.7, ASSUMED, NVLINK / 2, PCIE_HOST / 2),
        _gpu("Tesla V100-SXM2-32GB", 31.7, 15.7, 15.7, ASSUMED, NVLINK / 2, PCIE_HOST / 2),
    )
}
