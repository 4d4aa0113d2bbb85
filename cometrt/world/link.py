"""Link emulation: limits transfers between virtual ranks of one GPU to the rate of a real link.

A rank that has a fraction of the GPU's SMs gets the same fraction of the link's rate. Compute and
communication slow down alike, so their overlap stays that of ranks with a whole GPU each.
"""

from __future__ import annotations

import dataclasses

from cometrt.specs import check_choice

LINKS = {"h100": 380.0, "h200": 380.0, "h800": 160.0}  # GB/s per direction of a whole GPU
_LATENCY_US = 1.5


@dataclasses.dataclass(frozen=True)
class Link:
    """One rank's share of an emulated link.

    Args:
        gbps: rate in each direction, in 10^9 bytes per second.
        latency_us: latency of every transfer and flag between ranks, in microseconds.
        name: of the emulated link, a key of LINKS.
    """

    gbps: float
    latency_us: float
    name: str = ""

    @property
    def femtoseconds_per_byte(self) -> int:
        return round(1e6 / self.gbps)


def link_share(name: str, rank_sms: int, gpu_sms: int) -> Link:
    """The share of a rank that has `rank_sms` of the GPU's `gpu_sms` SMs."""
    check_choice("link", name, tuple(LINKS))
    return Link(LINKS[name] * rank_sms / gpu_sms, _LATENCY_US * gpu_sms / rank_sms, name)
