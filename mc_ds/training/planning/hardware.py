"""Figures of GPUs and their interconnects, from data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A GPU model and its interconnects."""

    name: str
    peak_tflops: float
    """Peak of dense bf16 operations, in 10^12 per second."""
    memory_gib: float
    memory_tb_s: float
    """Memory bandwidth, TB/s."""
    link_gb_s: float
    """Bandwidth to other GPUs of the host, GB/s in one direction."""
    network_gb_s: float = 50.0
    """Bandwidth to other hosts, GB/s per GPU in one direction (default: one 400 Gb/s
    adapter each).
    """
    per_host: int = 8
    """GPUs per host."""

    def bandwidth(self, ranks: int) -> float:
        """Return the bandwidth of a collective of `ranks` GPUs, in bytes/s per GPU and
        direction.
        """
        return 1e9 * (self.link_gb_s if ranks <= self.per_host else self.network_gb_s)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("a100", 312.0, 79.2, 2.0, 300.0, network_gb_s=25.0),
        Hardware("h100", 989.0, 79.2, 3.35, 450.0),
        Hardware("h200", 989.0, 139.8, 4.8, 450.0),
        Hardware("b200", 2250.0, 178.0, 8.0, 900.0),
    )
}

DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Hardware by the driver's device name, without boards of another peak (H100 PCIe, H100 NVL)."""


def of_device(name: str) -> Hardware | None:
    """Return the hardware for a driver's device name; None if its figures are unknown."""
    return HARDWARE[DEVICE_NAMES[name]] if name in DEVICE_NAMES else None
