"""What NVIDIA's data sheets say of a GPU: the limits that measurements and plans are compared with.

A data sheet's figure for Tensor Cores is often with sparsity, and a dense product has half of it. Sources are the
data sheets of A100, H100, H200 and L40S. For the RTX 4090 it is the white paper of the Ada architecture (bfloat16 with
sums in float32). Cards without NVLink talk through PCIe 4.0, which reaches about 25 of its 32 GB/s.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """GiB, dense bfloat16 TFLOP/s, TB/s of memory, GB/s to other cards in one direction."""

    memory: float
    peak: float
    bandwidth: float
    link: float


CARDS = {
    "H100 80 GB": Card(80, 989, 3.35, 450),
    "H200 141 GB": Card(141, 989, 4.8, 450),
    "A100 80 GB": Card(80, 312, 2.04, 300),
    "A100 40 GB": Card(40, 312, 1.56, 300),
    "L40S 48 GB": Card(48, 362, 0.864, 25),
    "RTX 4090 24 GB": Card(24, 165, 1.008, 25),
}
# a part of the name that CUDA gives to a card -> dense bfloat16 TFLOP/s. The first that fits counts
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_of(name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of the card that CUDA calls so. None: not known, or only a part of a card (MIG)."""
    if "MIG" in name:
        return None
    return next((float(peak) for part, peak in PEAKS.items() if part in name), None)
