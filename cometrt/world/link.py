"""Modelled links: what crosses virtual ranks of one GPU goes at the rate of a real link.

Each rank has a part of the GPU's SMs, and gets the same part of the link: the twin runs in slow
motion, and what hides under what stays as it is.
"""

from __future__ import annotations

import dataclasses

from cometrt.specs import check_choice

LINKS = {"h100": 380.0, "h200": 380.0, "h800": 160.0}  # GB/s, each way, of a rank's GPU
_LATENCY_US = 1.5


@dataclasses.dataclass(frozen=True)
class Link:
    """A rank's share.

    Args:
        gbps: 10^9 bytes a second, each way.
        latency_us: added to every transfer and flag that crosses.
        name: of the real link.
    """

    gbps: float
    latency_us: float
    name: str = ""

    @property
    def femtoseconds_per_byte(self) -> int:
        return round(1e6 / self.gbps)


def link_share(name: str, rank_sms: int, gpu_sms: int) -> Link:
    """The share of a rank with `rank_sms` of the GPU's `gpu_sms` SMs."""
    check_choice("link", name, tuple(LINKS))
    return Link(LINKS[name] * rank_sms / gpu_sms, _LATENCY_US * gpu_sms / rank_sms, name)
