"""`StoreComm`: a communicator over a store of keys and values, to make a world without MPI."""

from __future__ import annotations

import pickle
import threading
import time
from typing import Any, Protocol

from cometrt.errors import PeerTimeout
from cometrt.world.failure import SLOW


class Store(Protocol):
    """Keys and values that all ranks see. A key is set once."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, timeout_sec: float) -> bytes:
        """Wait for the key. Raises TimeoutError."""
        ...


class LocalStore:
    """A store for ranks that are all in this process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, timeout_sec: float) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_sec):
                raise TimeoutError(key)
            return self._values[key]


class DistributedStore:
    """The key-value store of `jax.distributed`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def set(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str, timeout_sec: float) -> bytes:
        try:
            value = self._client.blocking_key_value_get_bytes(key, max(1, int(1000 * timeout_sec)))
        except Exception as error:  # of the runtime, which has one type for all its errors
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError(key) from error
            raise
        return bytes(value)


class StoreComm:
    """One rank's communicator: the part of an mpi4py communicator that a world needs.

    Args:
        name: of this group of ranks, equal on all of them and new for each group.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, timeout_sec: float) -> None:
        self._store, self._name, self._timeout_sec = store, name, timeout_sec
        self._rank, self._size, self._round = rank, size, 0

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size

    def allgather(self, value: Any) -> list[Any]:
        """Collective: the values of all ranks, in rank order.

        Raises:
            PeerTimeout: if a rank does not come within timeout_sec.
        """
        self._round += 1
        key = f"cometrt/{self._name}/{self._round}"
        self._store.set(f"{key}/{self._rank}", pickle.dumps(value))
        deadline = time.monotonic() + self._timeout_sec
        values = []
        for rank in range(self._size):
            try:
                payload = self._store.get(f"{key}/{rank}", max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise PeerTimeout(
                    f"rank {self._rank} waited {self._timeout_sec:g} s in connect: "
                    f"rank {rank} did not call it; {SLOW}"
                ) from error
            values.append(pickle.loads(payload))
        return values
