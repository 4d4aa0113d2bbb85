"""Kernel arguments and macros for link emulation; without it the arguments are unused zeros."""

from __future__ import annotations

from cometrt.kernels.launch import Macros
from cometrt.kernels.params import ParamStruct, emulated_link_dtype
from cometrt.world.link import Link


class Links:
    """One rank's link, in both directions.

    Args:
        link: the link to emulate; None: kernels are compiled without emulation.

    Attributes:
        dispatch, combine: EmulatedLink for incoming and for outgoing rows.
        macros: macros with which kernels are compiled.
    """

    def __init__(self, link: Link | None) -> None:
        self.macros: Macros = ()
        self.dispatch, self.combine = (ParamStruct(emulated_link_dtype) for _ in range(2))
        if link is None:
            return
        import cupy as cp

        self.macros = (("LINK", 1),)
        self._clocks = cp.zeros(2, cp.uint64)  # when each direction is free again
        for index, params in enumerate((self.dispatch, self.combine)):
            params.fields["free_at_ns"] = self._clocks.data.ptr + 8 * index
            params.fields["femtoseconds_per_byte"] = link.femtoseconds_per_byte
            params.fields["latency_ns"] = round(link.latency_us * 1000)
