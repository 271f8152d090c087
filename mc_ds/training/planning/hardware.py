"""What the planner knows of GPUs and the links between them: figures of their data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and its surroundings."""

    name: str
    peak_tflops: float
    """Dense bf16 operations, 10^12 per second."""
    memory_gib: float
    memory_tb_s: float
    """Bandwidth of its memory."""
    link_gb_s: float
    """Bandwidth to the GPUs of its host, one direction."""
    network_gb_s: float = 50.0
    """Bandwidth to other hosts, per GPU and direction (one 400 Gb/s adapter for each)."""
    per_host: int = 8

    def bandwidth(self, ranks: int) -> float:
        """Return bytes per second and direction that a collective of `ranks` GPUs moves per GPU."""
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
"""What the driver calls them. Boards of the same chip with another peak (H100 PCIe, H100 NVL) are
left out.
"""


def of_device(name: str) -> Hardware | None:
    """Return the hardware of a GPU by the name that its driver gives; None where its figures are
    not known.
    """
    return HARDWARE[DEVICE_NAMES[name]] if name in DEVICE_NAMES else None
