"""`Regions`: named shared memory of a world, as large as its largest open layer needs.

Sizes change only when a layer is made, which is collective. A region that is too small, or larger
than any open layer needs, is replaced by new memory, and the old memory is freed.

On "host" the old memory lives as long as a peer or a caller has an array in it. On "cuda" all ranks
first close their peers' old memory. If a call has been captured in a CUDA graph, which may be
replayed at any time, the old memory is kept as long as the world.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cometrt.world.base import World

_ZEROED = "flags"  # new memory holds epoch 0; every other region is poisoned


class Regions:
    """One rank's view of the regions of all ranks.

    Attributes:
        version: incremented whenever any rank's memory moves.
    """

    def __init__(self, world: World) -> None:
        self._world = weakref.proxy(world)
        self._memory: dict[str, list[Any]] = {}  # [rank]
        self._bytes: dict[str, int] = {}
        self._needs: weakref.WeakKeyDictionary[object, dict[str, int]] = weakref.WeakKeyDictionary()
        self._numbers: dict[str, int] = {}  # the allocation number of each region's memory
        self.version = 0

    def of(self, name: str, rank: int) -> Any:
        """One rank's region: a byte array; on "cuda" its address on this rank's device.

        Look it up in each call, since it may have moved.
        """
        return self._memory[name][rank]

    def nbytes(self, name: str) -> int:
        """Size of a region."""
        return self._bytes[name]

    def to_allocate(self, needs: dict[str, int]) -> int:
        """Bytes that `fit` would allocate, as far as this rank knows."""
        wanted = self._wanted([*self._needs.values(), needs])
        return sum(n for name, n in wanted.items() if n != self._bytes.get(name))

    def fit(self, owner: object, needs: dict[str, int]) -> None:
        """Collective: resize the regions to what all open owners need.

        A region that changes its size is new memory; its contents are not copied.

        Args:
            owner: holds the claim, until it is dropped or calls `forget`.
            needs: region -> bytes, with the same regions in every call.
        """
        world = self._world
        self._needs[owner] = needs
        try:
            self._replace_outgrown()
        except BaseException as error:
            self.forget(owner)
            if not world.stopped:  # else peers already know of a failure
                world.stop_for(error, " in allocating shared memory")
            raise

    def forget(self, owner: object) -> None:
        """Drop the owner's claim."""
        self._needs.pop(owner, None)

    def clear(self) -> None:
        """Drop all memory."""
        self._memory.clear()

    def _wanted(self, needs: list[dict[str, int]]) -> dict[str, int]:
        return {name: max(1, *(need[name] for need in needs)) for name in needs[0]}

    def _replace_outgrown(self) -> None:
        world = self._world
        mine = self._wanted(list(self._needs.values()))
        state = (mine, self._bytes, self._numbers, world._num_allocations)
        ranks = world.allgather(state, purpose="regions")
        wanted = self._wanted([sizes for sizes, *_ in ranks])
        world._num_allocations = max(count for *_, count in ranks)
        agreed = {}  # sizes of the regions that are the same allocation on all ranks
        for name in wanted:
            found = {(sizes.get(name), numbers.get(name)) for _, sizes, numbers, _ in ranks}
            if len(found) == 1:  # not so after an allocation that failed on some ranks
                agreed[name] = found.pop()[0]
        changed = {name: n for name, n in wanted.items() if n != agreed.get(name)}
        if not changed:
            return
        fresh = {}
        for name, nbytes in changed.items():
            world._num_allocations += 1
            fresh[name] = world.allocate(nbytes), world._num_allocations
            if name != _ZEROED:
                self._poison(fresh[name][0][world.rank], nbytes)
        world.barrier()  # peers may write now; on "cuda" the calls of all ranks have ended
        outgrown = [self._memory.pop(name) for name in changed if name in self._memory]
        for name, (memory, number) in fresh.items():
            self._memory[name], self._numbers[name] = memory, number
        self._bytes.update(changed)
        self.version += 1
        if world.gpu:
            world.gpu.free(outgrown)

    def _poison(self, memory: Any, nbytes: int) -> None:
        """Fill with 0xFF, which is NaN or -1: a read before the first write becomes visible."""
        if self._world.gpu:
            self._world.gpu.poison(memory, nbytes)
        else:
            memory[:] = 0xFF
