"""Named memory of a world that peers reach: as large as the largest of its open layers needs.

A layer's making is where sizes change, since all ranks meet there: what is too small is replaced by
new memory, and so is what is larger than any open layer needs. The old memory is given back then.
On the host that is to drop it: a peer, or a view of the caller, that still has it keeps it alive.
On "cuda" ranks let go of each other's old memory first; where a call has been captured in a CUDA
graph, which may be replayed at any time, it is kept as long as the world.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cometrt.world.base import World

_KEPT_ZERO = "flags"  # holds epochs; everything else is poisoned


class Regions:
    """One rank's view of them.

    Attributes:
        version: grows whenever any rank's memory moves.
    """

    def __init__(self, world: World) -> None:
        self._world = weakref.proxy(world)
        self._memory: dict[str, list[Any]] = {}  # by rank
        self._bytes: dict[str, int] = {}
        self._needs: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
        self._numbers: dict[str, int] = {}  # of the allocation that each region is
        self.version = 0

    def of(self, name: str, rank: int) -> Any:
        """Bytes of one rank's region, on "cuda" its address on this rank's device; look it up
        at each call, it may have moved."""
        return self._memory[name][rank]

    def nbytes(self, name: str) -> int:
        return self._bytes[name]

    def to_allocate(self, needs: dict[str, int]) -> int:
        """Bytes of the regions that `fit` would make new, as far as this rank knows."""
        wanted = self._wanted([*self._needs.values(), needs])
        return sum(n for name, n in wanted.items() if n != self._bytes.get(name))

    def fit(self, owner: Any, needs: dict[str, int]) -> None:
        """Collective: give every region the size that open owners need.

        What changes is new, zeroed memory; nothing is carried over.

        Args:
            owner: who needs them, until it is dropped or calls `forget`.
            needs: bytes by name, the same names in every call.
        """
        world = self._world
        self._needs[owner] = needs
        try:
            self._replace_outgrown()
        except BaseException as error:
            self.forget(owner)
            if not world.stopped:  # else the others know already
                world.stop_for(error, " in allocating shared memory")
            raise

    def forget(self, owner: Any) -> None:
        """It needs nothing any more."""
        self._needs.pop(owner, None)

    def clear(self) -> None:
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
        agreed = {}  # sizes of memory that all ranks have; a failure may have left some without
        for name in wanted:
            places = {(sizes.get(name), numbers.get(name)) for _, sizes, numbers, _ in ranks}
            if len(places) == 1:
                agreed[name] = places.pop()[0]
        changed = {name: n for name, n in wanted.items() if n != agreed.get(name)}
        if not changed:
            return
        fresh = {}
        for name, nbytes in changed.items():
            world._num_allocations += 1
            fresh[name] = world.allocate(nbytes), world._num_allocations
            if name != _KEPT_ZERO:
                self._poison(fresh[name][0][world.rank], nbytes)
        world.barrier()  # before a peer writes into it; on "cuda" the calls of all ranks have ended
        outgrown = [self._memory.pop(name) for name in changed if name in self._memory]
        for name, (memory, number) in fresh.items():
            self._memory[name], self._numbers[name] = memory, number
        self._bytes.update(changed)
        self.version += 1
        if world.gpu:
            world.gpu.give_back(outgrown)

    def _poison(self, memory: Any, nbytes: int) -> None:
        """NaN, or -1, until it is written: what is read too early shows."""
        if self._world.gpu:
            self._world.gpu.poison(memory, nbytes)
        else:
            memory[:] = 0xFF
