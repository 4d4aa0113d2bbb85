"""The shape of a layer (`MoESpec`), one rank's share of it (`Geometry`), and its `Gradients`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import numbers
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from cometrt.activations import ACTIVATIONS, is_gated

if TYPE_CHECKING:
    from cometrt.memory import Memory
    from cometrt.plan import TileConfig

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
SAVE_MODES = ("rows", "z", "nothing")
ALIGNMENT = 16  # H and I / tp are multiples of it: the K of one wgmma instruction


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """Shape and numerics of one Mixture-of-Experts layer. All ranks pass an equal spec.

    With W ranks there are EP = W / tp expert groups. Each holds E_l = E / EP experts, split into
    tp shards of I_s = I / tp columns.

    Args:
        hidden: H, the columns of x and y; a multiple of 16.
        intermediate: I, the hidden columns of one expert; I / tp must be a multiple of 16.
        num_experts: E, the experts of all ranks together; divisible by EP.
        topk: K, the experts of one token; 1 <= K <= E.
        max_tokens: the most tokens that a rank passes to one call. On "cuda" the planner, the use
            of the L2 cache and the config follow it, not the tokens of a call: no host knows those
            of other ranks. So make one layer for each bucket of batch sizes. They share the
            world's heap, and may share weights.
        tp: shards per expert (tensor parallelism); divides W.
        activation: "swiglu" or "geglu" (gated), "silu", "gelu" (tanh form), "relu" or "relu2".
        dtype: of x, y and the weights: "bfloat16", or "float32" (device="host" only).
        save: what forward keeps for backward. "rows": the gathered token rows and the
            pre-activations z. "z": this rank's tokens and z; backward pulls the token rows again.
            "nothing": this rank's tokens; backward pulls the rows and computes z again. All give
            the same bits.
        capacity_factor: limits the rows that a rank can hold, to min(capacity_factor * W *
            max_tokens * K / EP, W * max_tokens * min(K, E_l)), plus up to block_m - 1 padding
            rows per local expert. A call that needs more raises CapacityError: its padding rows
            count, and rows may use the room that padding leaves. EP suffices always.
        rail_tokens: of a layer over several nodes: the most tokens of a rank that want experts of
            any one other node, at most max_tokens. With fewer than max_tokens only wanted tokens
            cross, and a home has memory for so many of each other node. This pays where the router
            limits the nodes of a token. A call with more raises CapacityError. None: all tokens
            cross to all nodes. On one node it means nothing.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    max_tokens: int
    tp: int = 1
    activation: str = "swiglu"
    dtype: str = "bfloat16"
    save: str = "rows"
    capacity_factor: float = 2.0
    rail_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "topk", "max_tokens", "tp"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=1))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("save", self.save, SAVE_MODES)
        if self.hidden % ALIGNMENT:
            raise ValueError(f"hidden must be a multiple of {ALIGNMENT} (got {self.hidden})")
        if self.intermediate % self.tp:
            raise ValueError(
                f"intermediate must be divisible by tp={self.tp} (got {self.intermediate})"
            )
        if (self.intermediate // self.tp) % ALIGNMENT:
            raise ValueError(
                f"intermediate / tp must be a multiple of {ALIGNMENT} "
                f"(got {self.intermediate} / {self.tp} = {self.intermediate // self.tp})"
            )
        if self.topk > self.num_experts:
            raise ValueError(f"topk must be <= num_experts={self.num_experts} (got {self.topk})")
        factor = check_positive("capacity_factor", self.capacity_factor)
        object.__setattr__(self, "capacity_factor", factor)
        if self.rail_tokens is not None:
            rail_tokens = check_int("rail_tokens", self.rail_tokens, minimum=1)
            if rail_tokens > self.max_tokens:
                raise ValueError(
                    f"rail_tokens must be at most max_tokens={self.max_tokens} (got {rail_tokens})"
                )
            object.__setattr__(self, "rail_tokens", rail_tokens)

    @functools.cached_property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def gated(self) -> bool:
        return is_gated(self.activation)

    @property
    def crossing_tokens(self) -> int:
        """Tokens of a rank for which every other node has room."""
        return self.rail_tokens or self.max_tokens

    def memory(
        self,
        size: int,
        *,
        device: str = "cuda",
        mode: str | None = None,
        config: TileConfig | None = None,
        training: bool = True,
        ranks_per_node: int | None = None,
    ) -> Memory:
        """Compute the bytes that a layer of this spec needs on each rank, without allocating any.

        Args:
            size: W, the number of ranks.
            device: "cuda" or "host".
            mode: as for `MoELayer`.
            config: as for `MoELayer`, but None means TileConfig().
            training: whether to count residuals and backward.
            ranks_per_node: G, which divides W; None: all ranks are on one host. Each rank holds
                what it needs for the tokens of W / G ranks.

        Raises:
            ValueError: naming the argument, or the field of the spec, its value and the rule.
        """
        from cometrt.memory import memory_of_layer  # above this module: it imports every executor

        return memory_of_layer(
            self,
            size,
            device=device,
            mode=mode,
            config=config,
            training=training,
            ranks_per_node=ranks_per_node,
        )

    def digest(self) -> int:
        """63-bit hash that ranks compare. Equal specs have equal digests on every platform."""
        return digest(self)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One rank's share of a layer: rank = group * tp + shard, with W = ep * tp ranks.

    A plan may have several row sets, each with plan experts of its own: then a rank's plan experts
    are those of its first set, then those of the next one. Plan expert p has the weights of its
    expert p % num_weights. With one set both are the same.

    Args:
        spec: its num_experts are the plan experts of all ranks.
        rank: of `size`.
        size: W.
        row_sets: number of row sets.
        part_rows, late_rows: rows of a home in set 1, and in all sets but set 0, whose rows come
            last. The last set may have fewer than part_rows.

    Raises:
        ValueError: if tp does not divide W, EP does not divide E, or row_sets does not divide the
            plan experts of a rank.
    """

    spec: MoESpec
    rank: int
    size: int
    row_sets: int = 1
    part_rows: int = 0
    late_rows: int = 0

    def __post_init__(self) -> None:
        spec = self.spec
        if self.size % spec.tp:
            raise ValueError(f"tp must divide the number of ranks {self.size} (got tp={spec.tp})")
        if spec.num_experts % self.ep:
            raise ValueError(
                f"num_experts must be divisible by the number of expert groups, "
                f"ranks / tp = {self.size} / {spec.tp} = {self.ep} (got {spec.num_experts})"
            )
        if self.row_sets < 1 or self.local_experts % self.row_sets:
            raise ValueError(
                f"row_sets must divide the experts of a rank, {self.local_experts} "
                f"(got {self.row_sets})"
            )

    @functools.cached_property
    def ep(self) -> int:
        return self.size // self.spec.tp

    @property
    def group(self) -> int:
        return self.rank // self.spec.tp

    @property
    def shard(self) -> int:
        return self.rank % self.spec.tp

    @functools.cached_property
    def local_experts(self) -> int:
        """Plan experts of this rank."""
        return self.spec.num_experts // self.ep

    @functools.cached_property
    def num_weights(self) -> int:
        """Experts whose weights this rank has."""
        return self.local_experts // self.row_sets

    @functools.cached_property
    def local_intermediate(self) -> int:
        return self.spec.intermediate // self.spec.tp

    @functools.cached_property
    def up_columns(self) -> int:
        """Rows of w_up and columns of z: 2 * I_s (gate, then up) if gated, else I_s."""
        return (2 if self.spec.gated else 1) * self.local_intermediate

    @functools.cached_property
    def w_up_shape(self) -> tuple[int, int, int]:
        return (self.num_weights, self.up_columns, self.spec.hidden)

    @functools.cached_property
    def w_down_shape(self) -> tuple[int, int, int]:
        return (self.num_weights, self.spec.hidden, self.local_intermediate)

    def distance(self, peer: int) -> int:
        """Ring distance from this rank to `peer`: (peer - rank) mod W. 0: this rank itself."""
        return (peer - self.rank) % self.size

    def ring(self) -> list[int]:
        """All ranks in the order of their ring distance, this rank first."""
        return [(self.rank + d) % self.size for d in range(self.size)]


class Gradients(NamedTuple):
    """Gradients that ``MoELayer.backward`` returns. In its argument ``out`` a field may be None.

    Attributes:
        x: [T, H] in the layer's dtype.
        topk_weights: [T, K] float32; 0 for a dropped pair.
        w_up, w_down: in the shapes of this rank's weights.
    """

    x: Any
    topk_weights: Any
    w_up: Any
    w_down: Any


def digest(*values: object) -> int:
    """63-bit hash of the values' reprs, the same on every platform."""
    text = repr(values).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int. Raise a ValueError if it is no integer or out of range."""
    if type(value) is int and value >= minimum and (maximum is None or value <= maximum):
        return value  # the usual case: the checks below cost a microsecond
    rule = (
        f"an integer >= {minimum}" if maximum is None else f"an integer in [{minimum}, {maximum}]"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be {rule} (got {value!r})")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {rule} (got {value})")
    return number


def check_unmasked(name: str, array: object) -> None:
    """Raise a ValueError for a masked array: NumPy would silently drop its mask."""
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(
            f"{name} must not be a masked array: its mask would be lost (got {type(array)!r})"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value` as a str. Raise a ValueError if it is none of the choices."""
    if not isinstance(value, str):
        quoted = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of the strings {quoted} (got {value!r})")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} (got {value!r})")
    return value


def check_positive(name: str, value: object) -> float:
    """`value` as a float. Raise a ValueError unless it is finite and > 0."""
    if type(value) is float and 0.0 < value < math.inf:
        return value
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be a finite number > 0 (got {value!r:.40})")
    return number


def check_timeout(timeout_sec: object) -> float:
    """`timeout_sec` as a float. Raise a ValueError if Python's locks cannot wait that long."""
    number = check_positive("timeout_sec", timeout_sec)
    if number > threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_sec must be at most {threading.TIMEOUT_MAX:.0f} (got {number})")
    return number
