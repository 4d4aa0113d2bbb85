"""The rank side of test_nodes.py: layers over several nodes, in one launch.

Arguments: slices, and late parts.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time

import numpy as np
from mpi4py import MPI

import cometrt
from tests.cases import ROUTINGS, Case, make_inputs, run_case
from tests.faults import at, jitter, slow
from tests.host.test_failures import caught
from tests.host.test_orders import Rank, batches_of
from tests.multi.aborting import aborting
from tests.multi.run_cases import checked

ACTIVATIONS = itertools.cycle(["swiglu", "gelu", "geglu", "relu2", "silu"])
SAVES = itertools.cycle(["rows", "z", "nothing"])
ORDERS = itertools.cycle(["phases", "columns"])


SLICES, LATE = map(int, sys.argv[1:]) if sys.argv[0].endswith("run_nodes.py") else (1, 0)


def case_of(world, tp=1, **more) -> Case:
    return Case(
        (world.size, min(tp, world.ranks_per_node)), **({"slices": SLICES, "late": LATE} | more)
    )


def cases(size: int, slices: int, most_tp: int = 2, late: int = 0) -> list[Case]:
    """Every routing with every kind of `save`, in both modes, and one and two shards an expert. In
    every second one only wanted tokens cross."""
    found = []
    for seed, (routing, save) in enumerate(itertools.product(ROUTINGS, ["rows", "z", "nothing"])):
        found.append(
            Case(
                (size, min(1 + seed % 2, most_tp)),
                routing,
                next(ACTIVATIONS),
                "float32" if seed % 5 == 3 else "bfloat16",
                save=save,
                order=next(ORDERS),
                mode="sequential" if seed % 7 == 4 and not late else "fused",
                seed=seed,
                slices=slices,
                wanted_only=seed % 2 == 1,
                late=late,
            )
        )
    return found


def recovers(world, rank, case, inputs):
    world.reset()
    rank.layer.tracer = cometrt.trace.NullTracer()
    rank.forward(0)
    checked(world, case, inputs, rank.backward(0))


def together(world):
    """A failure that comes next finds no rank in an earlier call."""
    world.barrier()
    time.sleep(0.2)


def orders(world):
    """Calls in a row with different numbers of tokens, and a slow or an unsteady rank."""
    for save in ("rows", "z"):
        case = case_of(world, 1, save=save)
        batches = batches_of(case, 4, ("uniform", "at_home", "one_token", "empty_rank"))
        for tracer in (slow(0.002) if world.rank == 1 else None, jitter(world.rank, 0.003)):
            rank = Rank(world, case, batches, tracer)
            for batch in range(4):
                rank.forward(batch)
            for batch in (0, 2, 1, 3):
                checked(world, case, batches[batch], rank.backward(batch))
            rank.layer.close()


def planned(world):
    """A plan made ahead, the buffer as x, the result over x, gradients that are accumulated."""
    case = case_of(world, 2, save="nothing")
    inputs, r = make_inputs(case), world.rank
    rank = Rank(world, case, [inputs])
    weights = {"w_up": rank.w_up, "w_down": rank.w_down}
    expected, _ = rank.layer.forward(inputs.x[r], inputs.ids[r], inputs.weights[r], **weights)
    plan = rank.layer.plan(inputs.ids[r], inputs.weights[r])
    x = rank.layer.buffer()[: len(inputs.x[r])]
    x[...] = inputs.x[r]
    y, saved = rank.layer.forward(x, plan=plan, **weights, out=x)
    assert y.tobytes() == expected.tobytes()
    few = len(expected) - 1
    x = rank.layer.buffer()[1 : 1 + few]  # another place of the buffer
    x[...] = inputs.x[r][:few]
    again, _ = rank.layer.forward(x, inputs.ids[r][:few], inputs.weights[r][:few], **weights)
    assert again.tobytes() == expected[:few].tobytes()
    ones, values = ([np.full_like(w, n, np.float32) for w in weights.values()] for n in (1, 0))
    dy = inputs.dy[r]
    rank.layer.backward(dy, saved, out=cometrt.Gradients(None, None, *ones), accumulate=True)
    _, saved = rank.layer.forward(inputs.x[r], plan=plan, **weights)
    rank.layer.backward(dy, saved, out=cometrt.Gradients(None, None, *values))
    for accumulated, alone in zip(ones, values, strict=True):
        assert np.abs(alone).max() > 0
        assert (accumulated == 1 + alone).all()
    rows = world.allgather(rank.layer.stats().rows)
    pairs = sum(int((ids >= 0).sum()) for ids in inputs.ids)
    assert sum(map(np.sum, rows)) == case.spec.tp * pairs  # each on all shards of its expert
    rank.layer.close()


def same_bits(world):
    """A token's results depend neither on its slice nor on what else crosses."""
    for routing in ("uniform", "at_home", "empty_rank", "skewed"):
        case = case_of(world, routing=routing, save="z", seed=5, slices=1, late=0)
        inputs = make_inputs(case)
        expected = run_case(world, case, inputs)
        for change in (
            {"slices": 5},
            {"wanted_only": True},
            {"slices": 4, "wanted_only": True},
            {"late": 2},
            {"late": 3, "wanted_only": True},
        ):
            found = run_case(world, dataclasses.replace(case, **change), inputs)
            assert found.y.tobytes() == expected.y.tobytes()
            assert found.grads.x.tobytes() == expected.grads.x.tobytes()
            assert found.grads.topk_weights.tobytes() == expected.grads.topk_weights.tobytes()


@dataclasses.dataclass(frozen=True)
class Limited(Case):
    """A token's experts are all on one node, and a rank has room for `rail_tokens` of another. Some
    rank has max_tokens tokens."""

    max_tokens: int = 0
    rail_tokens: int = 0

    @property
    def spec(self) -> cometrt.MoESpec:
        more = {"max_tokens": self.max_tokens, "rail_tokens": self.rail_tokens}
        return dataclasses.replace(super().spec, **more)


def limited_cases(world, case: Case) -> tuple[Limited, Limited]:
    """With room for exactly as many tokens as cross, and for one less; `limited_inputs` has the
    inputs of both."""
    inputs, most = limited_inputs(world, case), 0
    for rank, ids in enumerate(inputs.ids):
        chosen = ids[ids[:, 0] >= 0, 0] * world.nodes // case.spec.num_experts
        shares = np.bincount(chosen, minlength=world.nodes)
        shares[rank // world.ranks_per_node] = 0
        most = max(most, int(shares.max()))
    given = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
    given["max_tokens"] = max(map(len, inputs.x))
    return Limited(**given, rail_tokens=most), Limited(**given, rail_tokens=most - 1)


def limited_inputs(world, case: Case, at_home: bool = False):
    """Each token's experts are on one node: on unequal shares of all nodes, or at home."""
    inputs, of_node = make_inputs(case), case.spec.num_experts // world.nodes
    for rank, ids in enumerate(inputs.ids):
        home = rank // world.ranks_per_node
        nodes = np.arange(len(ids)) * (rank + 1) % 7 % world.nodes
        nodes = np.full(len(ids), home) if at_home else nodes
        ids[:] = nodes[:, None] * of_node + np.argsort(ids % of_node, axis=1)
        ids[2:3] = -1
    return inputs


def refused(error, world, most: int) -> None:
    """It is the same on all ranks, of `most` tokens for which there is no room."""
    assert isinstance(error, cometrt.CapacityError), error
    assert len(set(world.allgather(str(error)))) == 1, error
    assert (error.need, error.capacity) == (most, most - 1), vars(error)
    assert f"wants {most} tokens of rank {error.rank} but MoESpec.rail_tokens" in str(error), error


def limited(world):
    """Exactly as many tokens cross as may; then one more does, and a wrong table wants all to."""
    case = case_of(world, seed=3)
    (tight, less), inputs = limited_cases(world, case), limited_inputs(world, case)
    assert 1 < tight.rail_tokens < min(map(len, inputs.ids))
    checked(world, tight, inputs, run_case(world, tight, inputs))
    at_home, r = limited_inputs(world, case, at_home=True), world.rank
    rank = Rank(world, less, [inputs, at_home])
    for call in (
        lambda: rank.forward(0),
        lambda: rank.layer.plan(inputs.ids[r], inputs.weights[r]),
    ):
        refused(caught(call), world, tight.rail_tokens)
    wrong = [ids + case.spec.num_experts for ids in inputs.ids]
    wrong = wrong[r] if r == 1 else at_home.ids[r]
    error = caught(rank.layer.plan, wrong, inputs.weights[r])
    assert isinstance(error, cometrt.RoutingError), error
    assert (error.rank, error.token, error.k) == (1, 0, 0), vars(error)
    rank.forward(1)
    checked(world, less, at_home, rank.backward(1))
    # Some parts have no tokens.
    one = dataclasses.replace(less, rail_tokens=1, **({"late": 2} if LATE else {"slices": 4}))
    checked(world, one, at_home, run_case(world, one, at_home))


def stalled(world, where: str, call: str, node: int):
    """All ranks of one node, or one of them, sleep through the deadline in the middle of a call."""
    case = case_of(world)
    inputs = make_inputs(case)
    rank = Rank(world, case, [inputs])
    if call == "backward":
        rank.forward(0)
    whole = where == "whole node"
    sleeps = world.node_index == node and (whole or world.rank == node * world.ranks_per_node)
    together(world)
    if sleeps and whole:
        time.sleep(3 * world.timeout_sec)
    elif sleeps:
        rank.layer.tracer = at(where, lambda: time.sleep(3 * world.timeout_sec))
    begin = time.monotonic()
    error = caught(getattr(rank, call), 0)
    assert isinstance(error, cometrt.PeerTimeout), error
    if not sleeps:
        assert time.monotonic() - begin < 2.5 * world.timeout_sec + 0.5
        assert 0.5 * world.timeout_sec < time.monotonic() - begin
    assert 0 <= error.waiter < world.size
    assert error.peer // world.ranks_per_node == node or not whole, error
    assert isinstance(caught(rank.forward, 0), cometrt.PeerTimeout)
    assert isinstance(caught(world.barrier), cometrt.PeerTimeout)
    world.timeout_sec, kept = 60.0, world.timeout_sec  # reset waits for the stalled ranks
    recovers(world, rank, case, inputs)
    world.timeout_sec = kept


def raising(world):
    """A rank of the last node raises in the middle; nobody sits out the deadline of a minute."""
    case, culprit = case_of(world), world.size - 1
    inputs = make_inputs(case)
    rank = Rank(world, case, [inputs])

    def fail():
        raise KeyError("out of luck")

    together(world)
    if world.rank == culprit:
        rank.layer.tracer = at("down", fail)
    begin = time.monotonic()
    error = caught(rank.forward, 0)
    assert time.monotonic() - begin < 20
    assert isinstance(error, KeyError if world.rank == culprit else cometrt.PeerTimeout), error
    if world.rank != culprit:
        assert f"rank {culprit} raised KeyError in down of tile" in str(error)
        assert error.peer == culprit
    recovers(world, rank, case, inputs)


def mismatched(world):
    case = case_of(world)
    inputs = make_inputs(case)
    rank = Rank(world, case, [inputs])
    rank.forward(0)
    together(world)
    last = world.size - 1
    error = caught(rank.backward if world.rank == last else rank.forward, 0)
    assert isinstance(error, cometrt.MismatchError), error
    assert f"rank {last}: backward of layer" in str(error), error
    recovers(world, rank, case, inputs)
    together(world)
    # A collective on one rank, a call on the others.
    error = caught(world.barrier) if world.rank == last else caught(rank.forward, 0)
    assert isinstance(error, cometrt.MismatchError), error
    assert "ranks made different calls" in str(error)
    recovers(world, rank, case, inputs)


def resetting(world):
    """A reset on one rank ends the calls of the others at once."""
    case = case_of(world)
    inputs = make_inputs(case)
    rank, begin = Rank(world, case, [inputs]), time.monotonic()
    for turn in range(6):
        if world.rank != turn % world.size:
            error = caught(rank.forward, 0)
            assert isinstance(error, cometrt.PeerTimeout), error
        world.reset()
    assert time.monotonic() - begin < 30
    recovers(world, rank, case, inputs)


def wrong_tables(world):
    """All ranks raise what one node alone would raise, and the layer goes on."""
    case = case_of(world)
    inputs, r, last = make_inputs(case), world.rank, world.size - 1
    rank = Rank(world, case, [inputs])
    weights = {"w_up": rank.w_up, "w_down": rank.w_down}
    experts = case.spec.num_experts

    def error_of(change, call="forward"):
        ids, gates = inputs.ids[r].astype(np.int64), inputs.weights[r].copy()
        change(ids, gates)
        if call == "plan":
            error = caught(rank.layer.plan, ids, gates)
        else:
            y = np.zeros_like(inputs.x[r])
            error = caught(rank.layer.forward, inputs.x[r], ids, gates, **weights, out=y)
            assert np.isnan(y.astype(np.float32)).all()
        assert len(set(world.allgather(str(error)))) == 1, error
        assert isinstance(error, cometrt.RoutingError), error
        place = f"of rank {error.rank}, token {error.token}, k {error.k} "
        assert place in str(error), vars(error)
        return str(error)

    def outside(ids, gates):
        if r in (1, last):
            ids[2, 1] = experts + r
        if r == 1:
            ids[2] = 0, 2**40, 1

    def repeated(ids, gates):
        if r == last:
            ids[1] = experts - 1, 0, experts - 1

    def infinite(ids, gates):
        if r == 0:
            gates[3, 0] = np.inf

    text = "topk_ids of rank 1, token 2, k 1 must be in [-1, "
    for call in ("forward", "plan"):
        assert error_of(outside, call).startswith(f"{text}{experts}) (got 2147483647 or more)")
    text = f"topk_ids of rank {last}, token 1, k 2 must be distinct within the token (got "
    assert error_of(repeated).startswith(f"{text}{experts - 1} again in [{experts - 1}, 0, ")
    assert error_of(infinite) == "topk_weights of rank 0, token 3, k 0 must be finite (got inf)"
    rank.forward(0)
    checked(world, case, inputs, rank.backward(0))


def too_many_rows(world):
    """One node has too few rows; all ranks raise, and say which rank."""
    case = case_of(world)
    spec = dataclasses.replace(case.spec, capacity_factor=1.0)
    inputs, r = make_inputs(case), world.rank
    tokens = np.ones((spec.max_tokens, spec.hidden), spec.numpy_dtype)
    ids = np.tile(np.arange(spec.topk), (spec.max_tokens, 1))  # all on rank 0
    gates = np.ones(ids.shape, np.float32)
    w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, world.size, spec)
    with cometrt.MoELayer(world, spec, config=case.config) as layer:
        for call in (
            lambda: layer.forward(tokens, ids, gates, w_up, w_down),
            lambda: layer.plan(ids, gates),
        ):
            error = caught(call)
            assert isinstance(error, cometrt.CapacityError), error
            assert error.rank == 0
            needed = error.capacity_factor
            assert (0.8 if SLICES == 1 and not LATE else 0.5) * world.size < needed <= world.size, (
                needed
            )
            assert len(set(world.allgather(str(error)))) == 1
    enough = dataclasses.replace(spec, capacity_factor=needed)
    with cometrt.MoELayer(world, enough, config=case.config) as layer:
        y, _ = layer.forward(tokens, ids, gates, w_up, w_down)
        assert np.isfinite(y.astype(np.float32)).all()


def misuse(world):
    spec = case_of(world).spec

    def refuses(rule: str, **change):
        error = caught(cometrt.MoELayer, world, dataclasses.replace(spec, **change))
        assert isinstance(error, ValueError), error
        assert rule in str(error), error

    tp = world.size
    refuses(f"all shards of an expert are on one node (got tp={tp})", tp=tp, intermediate=16 * tp)
    refuses("topk must be at most the number of experts of a node", num_experts=world.size, topk=3)
    change = {"hidden": 64} if world.rank == 0 else {}
    refuses("spec must be equal on all ranks", **change)
    layer = cometrt.MoELayer(world, spec)
    assert "tune() needs device='cuda' and mode 'fused' (got 'host'" in str(caught(layer.tune))
    assert caught(layer.forward, np.zeros((1, 16)), None, None, None, None) is not None
    layer.close()
    memory = spec.memory(world.size, device="host", ranks_per_node=world.ranks_per_node)
    alone = spec.memory(world.size, device="host")
    assert memory.heap > alone.heap
    assert memory.weights == alone.weights
    long = bytes(300_000)  # several messages, which MPI does not buffer
    assert world.allgather((world.rank, long)) == [(r, long) for r in range(world.size)]


def left(world):
    """A rank that leaves by an exception tells all others why."""
    last = world.size - 1

    def body():
        with world:
            if world.rank == last:
                raise LookupError("mine")
            world.barrier()

    error = caught(body)
    assert isinstance(error, LookupError if world.rank == last else cometrt.PeerTimeout), error
    assert world.rank == last or f"rank {last} raised LookupError: mine" in str(error), error


def closes_early(world):
    """A rank closes after one call; the others, in their second, are told at once."""
    case = case_of(world)
    rank, begin = Rank(world, case, [make_inputs(case)]), time.monotonic()
    rank.forward(0)
    together(world)
    error = caught(world.close) if world.rank == 0 else caught(rank.forward, 0)
    assert isinstance(error, cometrt.PeerTimeout), error
    assert "rank 0 has closed the world after 1 call" in str(error), error
    world.abandon(error)
    assert time.monotonic() - begin < 10


def connect(timeout_sec=60.0):
    return cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=timeout_sec)


def main() -> None:
    with aborting():
        with connect() as world:
            assert world.size == MPI.COMM_WORLD.size
            assert world.ranks_per_node == int(os.environ["COMETRT_RANKS_PER_NODE"])
            assert world.nodes == world.size // world.ranks_per_node
            assert world.rank == MPI.COMM_WORLD.rank
            for case in cases(world.size, SLICES, world.ranks_per_node, LATE):
                inputs = make_inputs(case)
                checked(world, case, inputs, run_case(world, case, inputs))
            for part in (
                orders, planned, same_bits, limited, wrong_tables, too_many_rows, misuse,
                mismatched, raising, resetting,
            ):  # fmt: skip
                part(world)
            world.timeout_sec = 0.5
            last = world.nodes - 1
            stalled(world, "whole node", "forward", last)
            stalled(world, "whole node", "backward", 0)
            stalled(world, "up", "forward", 0)
            stalled(world, "up dgrad", "backward", last)
        left(connect())
        closes_early(connect())
        with connect() as world:  # the same processes again
            case = case_of(world, 1, seed=77)
            inputs = make_inputs(case)
            checked(world, case, inputs, run_case(world, case, inputs))
        print("all parts passed", flush=True)


if __name__ == "__main__":
    main()
