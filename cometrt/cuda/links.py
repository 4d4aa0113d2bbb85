"""What kernels take for the link between ranks: an emulated one, or nothing."""

from __future__ import annotations

from cometrt.kernels.launch import Macros
from cometrt.kernels.params import ParamStruct, emulated_link_dtype
from cometrt.world.link import Link


class Links:
    """One rank's link, in both directions.

    Args:
        link: what is emulated; None: rows cross as fast as they can, and kernels are compiled
            without emulation.

    Attributes:
        dispatch, combine: EmulatedLink of what comes and of what leaves.
        macros: that kernels are compiled with.
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
