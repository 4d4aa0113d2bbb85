"""What runs when XLA reaches a call of the layer: its buffers go to the layer of the rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cometrt.buffers import Buffers
from cometrt.layer import MoELayer
from cometrt.residuals import Residuals
from cometrt.specs import Gradients, MoESpec
from cometrt.world import World

_FAILED = -1  # in place of the epoch, in the residuals of a forward that failed


class BufferLayer(MoELayer):
    """A layer whose calls have all their arrays in buffers of XLA.

    Attributes:
        kept: the arrays that a forward keeps for its backward, but for the weights, by name.
    """

    caller_allocates = True

    def __init__(self, world: World, spec: MoESpec, mode: str | None) -> None:
        super().__init__(world, spec, mode)
        # `meta` is first and the weights are last.
        self.kept: Buffers = {of.name: (of.shape, of.dtype) for of in self.residuals(0)[1:-2]}

    def check_open(self) -> None:
        """Raise a ValueError if the layer or its world is closed."""
        self._scope.check_open()
        self.world.check_open()

    @property
    def is_closed(self) -> bool:
        return self._scope.closed

    def calling(self) -> contextlib.AbstractContextManager[None]:
        """Around what a call does: the only call of the world on this rank, of an open layer."""
        return self._scope.call("moe")

    def on_gpu(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the rank's GPU is the thread's."""
        return contextlib.nullcontext()

    def raise_pending(self) -> None:
        """Raise what the device has found wrong so far, without waiting for it."""
        with self.on_gpu():
            self.executor.raise_pending()

    def forward_scratch(self, training: bool) -> Buffers:
        """Arrays that a forward needs besides its arguments, its result and `kept`."""
        raise NotImplementedError

    def backward_scratch(self) -> Buffers:
        """Arrays that a backward needs besides its arguments and its results."""
        raise NotImplementedError

    def forward_into(
        self,
        context: Any,
        arguments: Sequence[Any],
        y: Any,
        kept: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        """Fill y, and kept if it is not empty."""
        raise NotImplementedError

    def backward_into(
        self,
        context: Any,
        dy: Any,
        kept: Sequence[Any],
        weights: Sequence[Any],
        results: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        """Fill the results, in the order of `Gradients`."""
        raise NotImplementedError

    def fail(self, context: Any, results: Sequence[Any], kept: Sequence[Any]) -> None:
        """Make the results of a call that raised NaN, and its residuals those of a failure."""
        raise NotImplementedError


class HostLayer(BufferLayer):
    """On the CPU. Residuals are copied to XLA's buffers."""

    def forward_scratch(self, training: bool) -> Buffers:
        return {}

    def backward_scratch(self) -> Buffers:
        return {}

    def forward_into(
        self,
        context: Any,
        arguments: Sequence[Any],
        y: Any,
        kept: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        given, training = map(np.asarray, arguments), bool(kept)
        with self._exchange("moe", None):
            made = self.executor.forward(
                *given, training=training, out=np.asarray(y), tracer=self.tracer
            )
        if made is not None:
            values = made["epoch"], made["x"], made["z"], *made["tables"]
            saved = [value for value in values if value is not None]  # z may be computed again
            for buffer, value in zip(kept, saved, strict=True):
                _bytes_of(np.asarray(buffer))[:] = _bytes_of(value)

    def backward_into(
        self,
        context: Any,
        dy: Any,
        kept: Sequence[Any],
        weights: Sequence[Any],
        results: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        arrays = {
            name: _bytes_of(np.asarray(buffer)).view(dtype).reshape(shape)
            for buffer, (name, (shape, dtype)) in zip(kept, self.kept.items(), strict=True)
        }
        epoch, x, z = arrays.pop("epoch"), arrays.pop("x"), arrays.pop("z", None)
        if epoch[0] == _FAILED:
            self.fail(context, results, ())
            return
        w_up, w_down = map(np.asarray, weights)
        given = np.asarray(dy)
        saved = Residuals(0, len(given), epoch, x, z, tuple(arrays.values()), w_up, w_down)
        with self._exchange("moe", None):
            self.executor.backward(
                given,
                saved,
                out=Gradients(*map(np.asarray, results)),
                accumulate=False,
                tracer=self.tracer,
            )

    def fail(self, context: Any, results: Sequence[Any], kept: Sequence[Any]) -> None:
        for result in results:
            np.asarray(result).fill(np.nan)
        for buffer in kept[:1]:  # the epoch
            _bytes_of(np.asarray(buffer)).view(np.int64)[:] = _FAILED


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


class Rank:
    """One rank of this process: its layer, and the first error of its calls.

    Args:
        lock: of the rank's world. It is held during each call.
    """

    def __init__(self, layer: BufferLayer, lock: threading.Lock) -> None:
        self.layer, self._lock, self._error = layer, lock, None

    _error: BaseException | None

    def forward(
        self, context: Any, arguments: Sequence[Any], y: Any, kept: Any, scratch: Any
    ) -> None:
        with self._calling(context, (y,), kept):
            self.layer.forward_into(context, arguments, y, kept, scratch)

    def backward(
        self, context: Any, dy: Any, kept: Any, weights: Any, results: Any, scratch: Any
    ) -> None:
        with self._calling(context, results, ()):
            self.layer.backward_into(context, dy, kept, weights, results, scratch)

    @contextlib.contextmanager
    def _calling(self, context: Any, results: Any, kept: Any) -> Iterator[None]:
        """Around a call. Its error is remembered and not raised, since the program must go on: a
        peer may wait for this rank in a collective of XLA, and JAX would fail all later programs.
        """
        with self._lock:
            try:
                yield
            except Exception as error:
                self._error = self._error or error
                self.layer.fail(context, results, kept)

    def raise_found(self) -> None:
        """Raise the first error that calls have found so far."""
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            self.layer.raise_pending()

    def check(self) -> None:
        """Wait for what is queued, and raise the first error."""
        self.layer.check_open()
        self.raise_found()
        with self._lock, self.layer.on_gpu():
            self.layer.synchronize()

    def close(self) -> None:
        """Close the layer, and raise the first error. May be repeated."""
        with self._lock, self.layer.on_gpu():
            if self.layer.is_closed:
                return
            self.layer.close()
        if self._error is not None:
            raise self._error


def struct(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """A buffer of XLA; 64-bit integers are pairs of 32-bit ones, which JAX always has."""
    if dtype.kind in "iu" and dtype.itemsize == 8:
        return jax.ShapeDtypeStruct((*shape, 2), np.int32)
    return jax.ShapeDtypeStruct(shape, dtype)


def structs(buffers: Buffers) -> list[jax.ShapeDtypeStruct]:
    return [struct(*of) for of in buffers.values()]
