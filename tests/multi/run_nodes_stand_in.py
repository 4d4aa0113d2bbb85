"""The rank side of test_nodes.py: the host's part of calls over several nodes on CUDA, on the CPU.

Arrays are in the host's memory, MPI stands for NCCL, and the kernels of nodes/rail.cu are written
out in NumPy, over the addresses that they are launched with. A node's layer is that of the host.
What is queued on the stream of transfers runs as late as the events allow.
Everything else is what runs on GPUs: addresses and sizes of transfers, their order, reports, the
thread that watches them, `reset`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
from mpi4py import MPI

import cometrt
from cometrt.arrays import HostArrays
from cometrt.errors import CapacityError, RoutingError
from cometrt.host import HostExecutor
from cometrt.kernels.params import call_stats_dtype, exchange_state_dtype, plan_progress_dtype
from cometrt.kernels.rail_params import header_dtype, outcome_dtype, report_dtype
from cometrt.nodes.crossing import slots_of, wanted
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape
from cometrt.world.failure import Failure
from cometrt.world.layout import world_dtype
from tests.cases import Case, Output, make_inputs
from tests.host.test_failures import caught
from tests.multi.aborting import aborting
from tests.multi.run_cases import checked
from tests.multi.run_nodes import cases, limited_cases, limited_inputs, refused, together

# ---- a stand-in for CuPy and NCCL ---------------------------------------------------------------


class ndarray(np.ndarray):
    @property
    def _c_contiguous(self):
        return self.flags.c_contiguous

    @property
    def data(self):
        ptr = self.ctypes.data if self.size else 0

        def copy(source, nbytes, stream):
            assert stream.ptr == Stream.ptr
            ctypes.memmove(ptr, source.ptr, nbytes)

        return types.SimpleNamespace(device_id=0, ptr=ptr, copy_from_device_async=copy)

    def get(self):
        return np.array(self.view(np.ndarray))


class Stream:
    """The call's stream, where work runs at once."""

    ptr = 5

    def __init__(self, non_blocking=False):
        pass

    def is_capturing(self):
        return False

    def wait_event(self, event):
        SIDE.run_until(getattr(event, "position", 0))

    def synchronize(self):
        pass


class SideStream(Stream):
    """Its work waits until the call's stream waits for it."""

    ptr = 7

    def __init__(self):
        self.pending, self.done = [], 0

    def queue(self, stream, work):
        if stream == self.ptr:
            self.pending.append(work)
        else:
            assert stream == Stream.ptr
            work()

    def wait_event(self, event):
        assert event.position == 0  # of the call's stream

    def run_until(self, position):
        while self.done < position:
            self.done += 1
            self.pending.pop(0)()


SIDE = SideStream()


class Event:
    def __init__(self, disable_timing=False):
        self.position = 0

    def record(self, stream=None):
        self.position = SIDE.done + len(SIDE.pending) if stream is SIDE else 0

    def synchronize(self):
        pass


class NcclCommunicator:
    """MPI among the ranks of a rail. A transfer blocks until it is complete or aborted."""

    made = 0

    def __init__(self, size, unique_id, rank):
        NcclCommunicator.made += 1
        SIDE.run_until(SIDE.done + len(SIDE.pending))  # of a failed call
        self.aborted, self.failed = False, False
        self.tag = 40_000 + NcclCommunicator.made
        self.peers = {node: world_rank(node) for node in range(size)}
        self.group = []
        COMMS.append(self)

    def send(self, address, nbytes, datatype, node, stream):
        self.queue(MPI.COMM_WORLD.Isend, address, nbytes, node, stream)

    def recv(self, address, nbytes, datatype, node, stream):
        self.queue(MPI.COMM_WORLD.Irecv, address, nbytes, node, stream)

    def queue(self, call, address, nbytes, node, stream):
        if self.aborted:
            raise RuntimeError("of NCCL: the communicator was aborted")
        self.group.append((call, at(address, nbytes, np.uint8), self.peers[node]))
        grouped[self] = stream

    def end_group(self, stream):
        group, self.group = self.group, []
        SIDE.queue(stream, lambda: self.complete(group))

    def complete(self, group):
        if self.aborted:
            return
        self.requests = [call([memory, MPI.BYTE], peer, self.tag) for call, memory, peer in group]
        while self.requests and not self.aborted:
            try:
                self.requests = [request for request in self.requests if not request.Test()]
                time.sleep(1e-4)
            except MPI.Exception:  # of another size: NCCL would wait
                while not self.aborted:
                    time.sleep(1e-4)
                self.requests = []
        for request in self.requests:
            request.Cancel()

    def check_async_error(self):
        if self.failed:
            raise RuntimeError("of NCCL")

    def abort(self):
        self.aborted = True


COMMS: list[NcclCommunicator] = []
grouped: dict[NcclCommunicator, int] = {}  # the stream of each


def group_end():
    for comm, stream in list(grouped.items()):
        del grouped[comm]
        comm.end_group(stream)


def world_rank(node):
    """The rank of this rank's rail on that node."""
    ranks_per_node = int(os.environ["COMETRT_RANKS_PER_NODE"])
    return ranks_per_node * node + MPI.COMM_WORLD.rank % ranks_per_node


def at(address, count, dtype):
    """An array over an address."""
    nbytes = count * np.dtype(dtype).itemsize
    if not nbytes:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(int(address)), dtype)


def stand_in() -> types.ModuleType:
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    nccl = types.ModuleType("cupy.cuda.nccl")
    nccl.available, nccl.NCCL_INT8, nccl.NcclCommunicator = True, 0, NcclCommunicator
    nccl.get_unique_id = lambda: (MPI.COMM_WORLD.rank,) * 128
    nccl.groupStart, nccl.groupEnd = lambda: None, group_end
    cuda.nccl, cuda.Stream, cuda.Event = nccl, Stream, Event
    cuda.Device = lambda *_: types.SimpleNamespace(id=0, use=lambda: None)
    cuda.get_current_stream = Stream
    cuda.alloc_pinned_memory = lambda nbytes: bytearray(nbytes)
    kept = []

    def alloc(nbytes):
        kept.append(np.zeros(nbytes, np.uint8))
        return types.SimpleNamespace(ptr=kept[-1].ctypes.data)

    cuda.alloc = alloc
    cupy.cuda, cupy.ndarray = cuda, lambda shape, dtype: np.full(shape, 77, dtype).view(ndarray)
    cupy.full = lambda shape, value, dtype: np.full(shape, value, dtype).view(ndarray)
    cupy.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(ndarray)
    cupy.uint8, cupy.int32, cupy.float32 = np.uint8, np.int32, np.float32
    sys.modules |= {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl}
    return cupy


# ---- the kernels of nodes/rail.cu ---------------------------------------------------------------


class Kernels:
    """Of one rank. `inner` is the executor whose state they read."""

    def __init__(self, world):
        self.world, self.inner = world, None
        self.stopped = False  # whether the device alone has been told that the world has stopped

    def load(self, source, *names):
        assert source in ("nodes/rail.cu", "nodes/rail_choose.cu")
        return [
            lambda stream, ctas, params, name=name: self.queue(stream, name, params.fields[0])
            for name in names
        ]

    def queue(self, stream, name, fields):
        p, generation = fields.copy(), self.world.generation

        def run():
            self.is_stale = generation != self.world.generation
            getattr(self, name)(p)

        SIDE.queue(stream, run)

    def rail_step(self, p):
        steps = at(p["steps"], 4, np.uint64)
        newest = int(steps[0])
        if p["ends"]:
            steps[1] = newest
        if p["begins"]:
            steps[0] = 2 * (newest // 2 + 1) + int(p["begins"]) - 1

    def row_of(self, p, node, slot=0):
        part_tokens, own = int(p["part_tokens"]), int(p["node"])
        slices = RailSlices(int(p["nodes"]), own, int(p["max_tokens"]), 1, int(p["crossing"]))
        if part_tokens and p["num_parts"]:
            slices = dataclasses.replace(slices, late_parts=int(p["num_parts"]))
            assert slices.part_tokens == part_tokens
        elif part_tokens:
            parts = -(-slices.crossing // part_tokens)
            slices = dataclasses.replace(slices, count=2 + parts)
            assert slices.part_tokens == part_tokens
        return slices.row_of(node, slot)

    def plan_experts(self, p, ids, node, slots):
        """Plan experts of a rank's ids [n, K] of this node's experts."""
        parts, experts = int(p["num_parts"]), int(p["local_experts"])
        sets = 1 + slots // int(p["part_tokens"]) if parts and node != p["node"] else 0 * slots
        rank, expert = np.divmod(ids, experts)
        found = (rank * (parts + 1) + sets[:, None]) * experts + expert
        return np.where(ids >= 0, found, ids) if parts else ids

    def rail_ready(self, p):
        assert p["num_parts"] > p["part"]
        self.rail_step(p)

    def rail_wait(self, p):
        assert p["num_parts"] >= p["part"]
        self.rail_step(p)

    def message(self, p, node, array="messages"):
        pairs = int(p["crossing"] * p["topk"])
        begin = int(p[array]) + node * int(p["message_bytes"])
        ids = begin + header_dtype.itemsize
        shape = int(p["crossing"]), int(p["topk"])
        return (
            at(begin, 1, header_dtype)[0],
            at(ids, pairs, np.int32).reshape(shape),
            at(ids + 4 * pairs, pairs, np.float32).reshape(shape),
        )

    def tables(self, p):
        """This rank's."""
        count, topk = int(p["num_tokens"]), int(p["topk"])
        dtype = {4: np.int32, 8: np.int64}[int(p["id_bytes"])]
        limits = np.iinfo(np.int32)
        ids = np.clip(at(p["ids"], count * topk, dtype), limits.min, limits.max).astype(np.int32)
        weights = at(p["weights"], count * topk, np.float32)
        return ids.reshape(count, topk), weights.reshape(count, topk)

    def slots(self, p):
        return at(p["slots"], int(p["nodes"] * p["max_tokens"]), np.int32).reshape(
            int(p["nodes"]), int(p["max_tokens"])
        )

    def rail_choose(self, p):
        nodes, own, topk = (int(p[name]) for name in ("nodes", "node", "topk"))
        spec = types.SimpleNamespace(
            num_experts=int(p["num_experts"]), topk=topk, max_tokens=int(p["max_tokens"]),
            crossing_tokens=int(p["crossing"]),
        )  # fmt: skip
        ids, weights = self.tables(p)
        self.slots(p)[:], _ = slots_of(ids, weights, spec, nodes, own)
        counts = at(p["counts"], nodes, np.int32)
        counts[:] = wanted(ids, weights, spec, nodes).sum(axis=1)
        experts = spec.num_experts // nodes
        wrong = (ids < -1) | (ids >= spec.num_experts) | ~np.isfinite(weights)
        for k in range(1, topk):
            same = (ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0)
            wrong[:, k] |= same.any(axis=1)
        marks = -2 - np.arange(ids.size).reshape(ids.shape)
        counts[own] = np.flatnonzero(wrong)[0] if wrong.any() else 2**31 - 1
        for node in range(nodes):
            here = (ids >= node * experts) & (ids < (node + 1) * experts)
            local = np.where(wrong, marks, np.where(here, ids - node * experts, -1))
            if node == own:
                pairs, first = spec.max_tokens * topk, 4 * topk * self.row_of(p, own)
                all_ids = at(p["all_ids"] + np.uint64(first), pairs, np.int32)
                all_weights = at(p["all_weights"] + np.uint64(first), pairs, np.float32)
                slots = np.arange(len(ids))
                local = self.plan_experts(p, local, node, slots)
            else:
                _, all_ids, all_weights = self.message(p, node, "outgoing")
                slots = self.slots(p)[node, : len(ids)]
            all_ids, all_weights = all_ids.reshape(-1, topk), all_weights.reshape(-1, topk)
            all_ids[:], all_weights[:] = -1, 0
            all_ids[slots[slots >= 0]] = local[slots >= 0]
            all_weights[slots[slots >= 0]] = weights[slots >= 0]

    def rail_pack(self, p):
        count, topk, hidden = int(p["num_tokens"]), int(p["topk"]), int(p["hidden"])
        nodes, own = int(p["nodes"]), int(p["node"])
        others = [node for node in range(nodes) if node != own]
        first = self.row_of(p, int(p["node"])) * hidden * 2
        if p["rows"]:
            source = at(p["rows"], count * hidden, np.uint16)
            at(p["all_rows"] + np.uint64(first), count * hidden, np.uint16)[:] = source
        if p["wanted_rows"]:
            source = at(p["wanted_rows"], count * hidden, np.uint16).reshape(count, hidden)
            for index, node in enumerate(others):
                slots = self.slots(p)[node, :count]
                target = p["crossing_rows"] + np.uint64(2 * hidden * index * int(p["crossing"]))
                rows = at(target, int(p["crossing"]) * hidden, np.uint16).reshape(-1, hidden)
                rows[slots[slots >= 0]] = source[slots >= 0]
        header, ids, weights = self.message(p, own)
        if p["id_bytes"] and not p["slots"]:
            ids[:], weights[:] = -1, 0
            ids[:count], weights[:count] = self.tables(p)
        messages = [self.message(p, node, "outgoing") for node in others if p["slots"]]
        for name in ("operation", "layer", "spec_hash", "forward"):
            for of in (header, *(of for of, *_ in messages)):
                of[name] = p[name]
        if p["slots"]:
            counts = at(p["counts"], nodes, np.int32)
            most, wrong = int(counts[others].max()), int(counts[own])
            if p["id_bytes"] and most > p["crossing"]:
                pair = p["all_ids"] + np.uint64(4 * topk * self.row_of(p, own))
                for first in (at(pair, 1, np.int32), *(ids[0] for _, ids, _ in messages)):
                    first[0] = most - 2**31 if wrong == 2**31 - 1 else -2 - wrong
        self.rail_step(p)

    def rail_localize(self, p):
        nodes, tokens = int(p["nodes"]), int(p["crossing"])
        topk, all_experts = int(p["topk"]), int(p["num_experts"])
        experts = all_experts // nodes
        first = int(p["node"]) * experts
        messages = [self.message(p, node) for node in range(nodes)]
        if p["id_bytes"]:
            ids = np.concatenate([ids for _, ids, _ in messages])
            here = (ids >= first) & (ids < first + experts)
            slots = np.arange(tokens)
            found = [
                self.plan_experts(p, of if p["slots"] else of - first, node, slots)
                for node, (_, of, _) in enumerate(messages)
            ]
            local = np.where(here, np.concatenate(found), -1)
            wrong = (ids < -1) | (ids >= all_experts)
            for k in range(1, topk):
                same = (ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0)
                wrong[:, k] |= same.any(axis=1)
            local[wrong] = 2**31 - 1
            local = np.concatenate(found) if p["slots"] else local
            weights = np.concatenate([weights for *_, weights in messages])
            for index in range(nodes * tokens):
                of, token = divmod(index, tokens)
                if not p["own" if of == int(p["node"]) else "others"]:
                    continue
                row = 4 * topk * self.row_of(p, of, token)
                at(p["all_ids"] + np.uint64(row), topk, np.int32)[:] = local[index]
                at(p["all_weights"] + np.uint64(row), topk, np.float32)[:] = weights[index]
        calls = [
            tuple(int(header[name]) for name in ("operation", "layer", "spec_hash", "forward"))
            for header, *_ in messages
        ]
        if p["others"]:
            self.inner.different = len(set(calls)) > 1
            if self.inner.different and not self.world.is_stopped and not self.is_stale:
                at(p["steps"], 4, np.uint64)[3] = 7
        self.rail_step(p)

    def rail_outcome(self, p):
        nodes = int(p["nodes"])
        outcomes = at(p["outcomes"], nodes, outcome_dtype)
        own = outcomes[int(p["node"])]
        if p["slice"] == 0 or own["kind"] == 0:
            own["kind"], own["largest_need"], own["wrong_pair"] = self.inner.outcome
            if self.stopped:
                own["kind"], own["largest_need"], own["wrong_pair"] = 3, 0, 0
            failed = at(p["steps"], 4, np.uint64)
            if own["kind"] == 2 and failed[2] == 0:
                failed[2] = 256 * int(p["layer"]) + int(p["slice"]) + 1
        assert p["progress"] or not own["largest_need"]
        self.rail_step(p)

    def rail_add(self, p):
        nodes, node, count = int(p["nodes"]), int(p["node"]), int(p["num_tokens"])
        outcomes = at(p["outcomes"], nodes, outcome_dtype)
        failed = p["others"] and (self.world.is_stopped or (outcomes["kind"] != 0).any())
        bf16 = np.dtype("bfloat16")
        for out, own, other, columns, dtype in (
            ("out", "partials", "returned", "hidden", bf16),
            ("out_dweight", "dweight_partials", "returned_dweight", "topk", np.float32),
        ):
            width = int(p[columns])
            if not p[out] or not (failed or p["own"]):
                continue
            sums = np.zeros((count, width), np.float32)
            for of, token in itertools.product(range(nodes), range(count)):
                slot = self.slots(p)[of, token] if p["slots"] and of != node else token
                if slot < 0:
                    continue
                begin = width * np.dtype(dtype).itemsize * self.row_of(p, of, slot)
                row = at(p[own if of == node else other] + np.uint64(begin), width, dtype)
                sums[token] += row.astype(np.float32)
            sums[:] = np.nan if failed else sums
            at(p[out], count * width, dtype)[:] = sums.astype(dtype).ravel()
        if not p["others"]:
            return
        report = at(p["report"], 1, report_dtype)[0]
        for slice_idx in range(int(p["num_epochs"]) if outcomes["kind"][node] else 0):
            at(p["epochs"][slice_idx], 1, np.int64)[0] = 0
        # Slices behind one that has failed do nothing, which `finish` takes for a failure too.
        reported = self.inner.reported or outcomes["kind"][node] in (1, 2)
        silent = not reported and report["kind"] == 0
        if silent and (self.stopped or self.world.is_stopped):
            report["node"], report["kind"], silent = node, 3, False
        wrong = [n for n in range(nodes) if outcomes["kind"][n] > 1]
        if wrong and silent:
            report["node"] = wrong[0]
            for name in ("largest_need", "wrong_pair", "kind"):
                report[name] = outcomes[wrong[0]][name]
        self.rail_step(p)


SLICES, LATE = map(int, sys.argv[1:])


def case_of(world, **more):
    return Case((world.size, 1), slices=SLICES, late=LATE, **more)


# ---- a rank -------------------------------------------------------------------------------------


class Inner:
    """The host's executor as that of a device: errors come later, results are NaN meanwhile."""

    kernels = None  # of the rank

    def __init__(self, world, shape, layer, mode):
        self.host, self.shape = HostExecutor(world, shape, layer, mode), shape
        self._dy = np.zeros_like(self.host.buffer()).view(ndarray)
        self.buffer_range = self.host.buffer_range
        self.graphs = types.SimpleNamespace(enabled=True)
        self.captured, self.generation, self.found, self.outcome = [], 0, None, (0, 0, 0)
        self.different, self.ended = False, Event()
        self.reported = False  # whether the call has failed here, as `finish` has found
        state = np.zeros(exchange_state_dtype.itemsize, np.uint8).view(ndarray)
        progress = np.zeros(plan_progress_dtype.itemsize, np.uint8).view(ndarray)
        self.queue = types.SimpleNamespace(
            state=state,
            planner=types.SimpleNamespace(progress=progress),
            part_sums=np.zeros(5, np.uint32).view(ndarray),
        )
        self._world, self._of = world, world.generation

    def buffer(self):
        return self.host.buffer().view(ndarray)

    def dy_buffer(self):
        return self._dy

    def check_capture(self, operation):
        pass

    def name_in_reports(self):
        self.kernels.inner = self  # they run for the executor whose call begins

    def reschedule(self, config):
        return PlanShape(self.shape.geometry, config).digest == self.shape.digest

    def retire(self):
        pass

    def _call(self, name, results, *arguments, **more):
        try:
            if self.different:
                text, self.different = "ranks made different calls in epoch", False
                self._world.stop(Failure("mismatch", self._world.first_rank, text))
                raise cometrt.MismatchError(text)
            self.outcome, self.reported = (0, 0, 0), False
            if LATE:  # it would wait for them
                SIDE.run_until(SIDE.done + len(SIDE.pending))
            kept = getattr(self.host, name)(*arguments, **more)
            stats = self.host.stats()
            waits = np.array([stats.waited_us, stats.rows_waited_us], np.float32).view(np.uint32)
            geometry = self.shape.geometry
            words = at(self.stats_address, len(waits) + geometry.local_experts, call_stats_dtype)
            others = [0] * (geometry.local_experts - geometry.num_weights)
            words["epoch"], words["value"] = stats.epoch, [*waits, *stats.rows, *others]
            if kept:
                kept["epoch"] = kept["epoch"].view(ndarray)
                if kept.get("x") is not None:
                    kept["x"] = kept["x"].view(ndarray)
            return kept
        except (RoutingError, CapacityError, cometrt.PeerTimeout, cometrt.MismatchError) as error:
            self.found, self.reported = self.found or error, True
            for result in results:
                result.fill(np.nan)
            need = (error.need << 16 | 0xFFFF - error.rank) if hasattr(error, "need") else 2**64 - 1
            kind = 2 if isinstance(error, (RoutingError, CapacityError)) else 3
            self.outcome = (kind, need if kind == 2 else 0, 0)
            epoch = np.zeros(1, np.int64).view(ndarray)
            kept = {"epoch": epoch, "tables": ()}
            return kept if name == "plan" else kept | {"x": None, "z": None}

    def forward(self, *arguments, out, **more):
        return self._call("forward", [out], *arguments, out=out, **more)

    def plan(self, *arguments, **more):
        return self._call("plan", [], *arguments, **more)

    def backward(self, *arguments, out, **more):
        return self._call("backward", out[:2], *arguments, out=out, **more)

    def raise_pending(self):
        if self._of != self._world.generation:  # what was found before a reset
            self._of, self.found = self._world.generation, None
        error, self.found = self.found, None
        if error is not None:
            raise error

    def synchronize(self):
        self.raise_pending()

    def __getattr__(self, name):
        return getattr(self.host, name)


class Gpu:
    """Stands for the memory of the node's world on the device."""

    last_call, captured = None, False

    def abort(self, generation):
        pass

    def complete_abort(self):
        pass


class GpuOfTrials(Gpu):
    """The memory of peers is the host's."""

    def __init__(self, node):
        self.node = node

    def allocate(self, nbytes):
        return self.node.allocate_host(nbytes)

    def poison(self, memory, nbytes):
        memory[:] = 0xFF

    def free(self, memory):
        pass


class Tight(Case):
    """A case with little room."""

    @property
    def spec(self):
        return dataclasses.replace(super().spec, capacity_factor=0.7)


class Full(Case):
    """A case in which some rank has max_tokens tokens."""

    @property
    def spec(self):
        tokens = max(map(len, make_inputs(Case(self.ranks, seed=self.seed)).ids))
        return dataclasses.replace(super().spec, max_tokens=tokens)


class Rank:
    """A layer whose executor is that of CUDA."""

    def __init__(self, world, kernels, case, config=None, inputs=None):
        from cometrt.cuda import stats
        from cometrt.nodes import cuda, cuda_rail, nccl_sms

        cuda_rail.load_kernels, cuda_rail.num_sms = kernels.load, lambda: 1
        cuda_rail.world_params = lambda node: np.zeros(1, world_dtype)
        cuda_rail.pinned = stats.pinned = lambda dtype, count=1: np.zeros(count, dtype)
        cuda_rail.auxiliary_stream = lambda number, priority: SIDE
        cuda.CudaExecutor, nccl_sms.num_sms = Inner, lambda: 132
        Inner.kernels = kernels
        inputs = inputs or make_inputs(case)
        self.world, self.case, self.inputs, self.kernels = world, case, inputs, kernels
        config = config or case.config
        self.layer = cometrt.MoELayer(world, case.spec, config=config)
        count = config.rail_slices
        rail = count, config.rail_parts
        slices = RailSlices.of(case.spec, world.nodes, world.node_index, *rail)
        given = world, case.spec, self.layer.shape, slices, 0, self.layer.mode
        self.executor = cuda.CudaNodesExecutor(*given)
        self.layer.executor = self.executor
        r, inputs = world.rank, self.inputs
        self.weights = [
            w.view(ndarray)
            for w in cometrt.shard_weights(inputs.w_up, inputs.w_down, r, world.size, case.spec)
        ]
        self.x, self.dy, self.ids, self.gates = (
            part[r].view(ndarray) for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights)
        )

    @contextlib.contextmanager
    def device(self):
        """The node has a GPU while a call is queued, but not while the world meets."""
        self.world.node.gpu = Gpu()
        try:
            yield
        finally:
            self.world.node.gpu = None

    def forward(self, plan=None):
        with self.device():
            y = np.full(self.x.shape, np.nan, self.x.dtype).view(ndarray)
            tables = (None, None) if plan else (self.ids, self.gates)
            w_up, w_down = self.weights
            given = {"plan": plan, "w_up": w_up, "w_down": w_down, "out": y}
            return self.layer.forward(self.x, *tables, **given)

    def plan(self):
        with self.device():
            return self.layer.plan(self.ids, self.gates)

    def backward(self, saved):
        out = [np.full_like(w, 0, np.float32).view(ndarray) for w in self.weights]
        x = np.full(self.x.shape, np.nan, self.x.dtype).view(ndarray)
        gates = np.full(self.gates.shape, np.nan, np.float32).view(ndarray)
        with self.device():
            return self.layer.backward(self.dy, saved, out=cometrt.Gradients(x, gates, *out))

    def check(self, y, grads):
        self.layer.synchronize()
        arrays = [array.get() for array in (y, *grads)]
        output = Output(arrays[0], cometrt.Gradients(*arrays[1:]))
        checked(self.world, self.case, self.inputs, output)

    def step(self):
        y, saved = self.forward()
        self.check(y, self.backward(saved))


def steps(world, kernels):
    given = {"slices": SLICES, "late": LATE}
    full = [Full((world.size, 1), seed=seed, **given) for seed in range(3)]
    for case in (*cases(world.size, SLICES, world.ranks_per_node, LATE), *full):
        if case.dtype == "bfloat16":
            rank = Rank(world, kernels, case)
            rank.step()
            y, saved = rank.forward(rank.plan())
            rank.check(y, rank.backward(saved))


def failures(world, kernels):
    """Wrong tables on one rank, too many rows on one node: all ranks raise when they ask."""
    wrong_tables(world, kernels, case_of(world))
    wrong_tables(world, kernels, case_of(world, wanted_only=True))
    tight = Rank(world, kernels, Tight((world.size, 1), slices=SLICES, late=LATE))
    tight.ids[...] = [0, 1, 2]
    for call in (tight.forward, tight.plan):
        call()
        error = caught(tight.layer.synchronize)
        assert isinstance(error, cometrt.CapacityError), error
        assert error.rank == 0, error
        assert len(set(world.allgather(str(error)))) == 1, error


def limited(world, kernels):
    """Exactly as many tokens cross as may; then one more does."""
    case = case_of(world, seed=3)
    (tight, less), inputs = limited_cases(world, case), limited_inputs(world, case)
    Rank(world, kernels, tight, inputs=inputs).step()
    rank = Rank(world, kernels, less, inputs=inputs)
    for call in (rank.forward, rank.plan):
        call()
        refused(caught(rank.layer.synchronize), world, tight.rail_tokens)
    rank.inputs = limited_inputs(world, case, at_home=True)
    rank.ids[...] = rank.inputs.ids[world.rank]
    if world.rank == 1:
        rank.ids[3:] = inputs.ids[1][3:] + case.spec.num_experts  # wrong, and wanted by all nodes
    rank.plan()
    error = caught(rank.layer.synchronize)
    assert isinstance(error, cometrt.RoutingError), error
    assert (error.rank, error.token, error.k) == (1, 3, 0), vars(error)
    rank.ids[...] = rank.inputs.ids[world.rank]
    rank.step()


def wrong_tables(world, kernels, case):
    rank, last = Rank(world, kernels, case), world.size - 1
    good = rank.ids.copy()
    tokens = world.allgather(len(good))[last]
    for token in (2, tokens - 1):  # of the first slice of its rank's tokens, and of the last
        if world.rank == last:
            rank.ids[token, 1] = rank.case.spec.num_experts
        y, saved = rank.forward()
        error = caught(rank.layer.synchronize)
        assert isinstance(error, cometrt.RoutingError), error
        assert f"of rank {last}, token {token}, k 1 break a rule" in str(error), error
        assert (error.rank, error.token, error.k) == (last, token, 1), vars(error)
        assert np.isnan(y.astype(np.float32)).all()
        epochs = [array for array in saved[1:] if getattr(array, "dtype", None) == np.int64]
        assert len(epochs) == SLICES
        assert not any(epochs)  # no slice of it has a backward
        rank.ids[...] = good
        rank.step()
    pairs = sum(int((ids >= 0).sum()) for ids in rank.inputs.ids)
    rows = world.allgather(rank.layer.stats().rows)
    assert sum(map(np.sum, rows)) == pairs


def mismatched(world, kernels):
    rank = Rank(world, kernels, case_of(world))
    _, saved = rank.forward()
    rank.layer.synchronize()
    together(world)
    begin = time.monotonic()
    error = caught(rank.backward, saved) if world.node_index else caught(rank.forward)
    error = error or caught(rank.layer.synchronize)
    assert isinstance(error, cometrt.MismatchError), error
    assert time.monotonic() - begin < 5  # though transfers of different calls never end
    world.reset()
    rank.step()


def bounds(world, kernels):
    """Slices need a bound on NCCL's CTAs, and a config that leaves SMs to them."""
    from cometrt.nodes.nccl_sms import sms_for_nccl

    def sms(ctas, given):
        world.nccl.max_ctas = ctas
        return sms_for_nccl(world, cometrt.TileConfig(rail_slices=3, nccl_sms=given))

    bound = world.nccl.max_ctas
    assert bound == 4  # NCCL rounds three up
    assert sms(4, None) == 8
    assert sms(4, 12) == 12
    assert "set NCCL_MAX_CTAS" in str(caught(sms, None, None))
    assert "at least 8, two for each of NCCL's 4 CTAs (got 6)" in str(caught(sms, 4, 6))
    assert "nccl_sms must leave two of 132 SMs (got 132)" in str(caught(sms, 4, 132))
    one_rank = None if world.rank == 1 else 4
    assert "[rank 1]" in str(caught(sms, one_rank, None))
    world.nccl.max_ctas = bound


@contextlib.contextmanager
def tuning(rank, milliseconds):
    """`layer.tune` of the rank finds a GPU. Trials run, and take what `milliseconds` of their
    config and pass says."""
    import cupy

    from cometrt import memory
    from cometrt.cuda import trials
    from cometrt.tuner import cache, tune
    from cometrt.world.room import Room

    world, real = rank.world, trials.Trials.time

    def time_of(self, config, which, counts=None):
        real(self, config, which, (1, 2))
        return milliseconds(config, which)

    rooms = Room(f"GPU {world.rank}", 1 << 40, 1 << 40)
    changes = [
        (world, "device", "cuda"),
        (world.node, "gpu", GpuOfTrials(world.node)),
        (memory, "gpu_room", lambda: rooms),
        (tune, "num_sms", lambda: 132),
        (cache, "num_sms", lambda: 132),
        (cache, "gpu_name", lambda: "a GPU"),
        *((of, "cache_file", lambda: Path(folder) / "tuned.json") for of in (cache, tune)),
        (trials, "_normal", lambda shape, _, dtype, rng: np.ones(shape, dtype).view(ndarray)),
        (trials, "StartBarrier", lambda sec: types.SimpleNamespace(close=int, open=int)),
        (trials.Trials, "time", time_of),
        (cupy, "empty_like", np.empty_like),
        (cupy, "asarray", lambda array: np.asarray(array).view(ndarray)),
        (tune, "sweep", lambda base, found, *_: found),
        (cupy.cuda, "get_elapsed_time", lambda begin, end: 1.0),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        cuda = types.ModuleType("cometrt.cuda.arrays")
        cuda.CudaArrays = HostArrays
        stack.enter_context(mock.patch.dict(sys.modules, {"cometrt.cuda.arrays": cuda}))
        yield


def tuned(world, kernels):
    """All ranks find the same config, whose layer is right; it is found again."""
    from cometrt.agreement import agree

    case = case_of(world, gemm="engine", save="z")
    rank = Rank(world, kernels, case)
    wanted = 3 if SLICES != 3 else 4
    timed = []

    def milliseconds(config, which):
        timed.append((config.rail_slices, config.nccl_sms))
        return 1.0 if timed[-1] == (wanted, 16) else 2.0 + abs(config.rail_slices - wanted)

    inputs = (rank.x, rank.ids, rank.gates, *rank.weights)
    with tuning(rank, milliseconds):
        for given in (None, inputs):
            timed.clear()
            config = rank.layer.tune(given, budget_sec=60)
            assert (config.rail_slices, config.nccl_sms) == (wanted, 16), config
            assert len(set(world.allgather((config, *timed)))) == 1
            assert {slices for slices, _ in timed} >= {1, 3, 4, 6}
        assert agree(world, case.spec, None, None)[2] == config
        bound, world.nccl.max_ctas = world.nccl.max_ctas, None
        alone = dataclasses.replace(config, rail_slices=1, nccl_sms=None)
        assert agree(world, case.spec, None, None)[2] == alone
        world.nccl.max_ctas = bound
    # The tuned layer's executor, in a layer with arrays of the host.
    other = Rank(world, kernels, case, dataclasses.replace(config, nccl_sms=None))
    other.executor = other.layer.executor = rank.layer.executor
    other.step()
    if world.rank == 1:
        rank.ids[1, 1] = case.spec.num_experts
    with tuning(rank, milliseconds):
        error = caught(rank.layer.tune, (rank.x, rank.ids, rank.gates, *rank.weights))
    assert isinstance(error, cometrt.RoutingError), error
    assert (error.rank, error.token, error.k) == (1, 1, 1), vars(error)
    assert rank.layer.config == config
    other.step()


def stalled(world, kernels):
    """A node comes too late; all ranks raise in time, and a reset makes new communicators."""
    rank = Rank(world, kernels, case_of(world))
    rank.step()
    for node in range(world.nodes):
        made = NcclCommunicator.made
        world.timeout_sec = 0.5
        together(world)
        begin = time.monotonic()
        if world.node_index == node:
            time.sleep(1.5)
        error = caught(rank.forward) or caught(rank.layer.synchronize)
        assert isinstance(error, cometrt.PeerTimeout), error
        if world.node_index != node:
            assert time.monotonic() - begin < 1.4
            assert world.nodes > 2 or error.peer // world.ranks_per_node == node, error
            assert "for rail_tokens from rank" in str(error), error
        world.timeout_sec = 30.0
        world.reset()
        assert NcclCommunicator.made == made + 1
        rank.step()


def stopped_late(world, kernels):
    """The device is told behind `finish` that the world has stopped, before the hosts are."""
    rank = Rank(world, kernels, case_of(world))
    rank.step()
    together(world)
    kernels.stopped = True
    y, _ = rank.forward()
    error = caught(rank.layer.synchronize)
    assert np.isnan(y.astype(np.float32)).all()
    assert isinstance(error, cometrt.PeerTimeout), error
    assert "the world has stopped on node" in str(error), error
    kernels.stopped = False
    world.reset()
    rank.step()


def cut_short(world, kernels):
    """A rank waits for a peer while it queues a transfer, until the deadline. The step that should
    end it is never queued; a reset does not take that for a transfer."""
    rank = Rank(world, kernels, case_of(world))
    rank.step()
    world.timeout_sec = 0.5
    together(world)

    def blocked():
        while not COMMS[-1].aborted:
            time.sleep(1e-3)
        grouped.clear()
        raise RuntimeError("aborted")

    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            nccl = sys.modules["cupy.cuda.nccl"]
            stack.enter_context(mock.patch.object(nccl, "groupEnd", blocked))
        error = caught(rank.forward) or caught(rank.layer.synchronize)
    assert isinstance(error, cometrt.PeerTimeout), error
    world.timeout_sec = 2.0
    time.sleep(2.2)
    world.reset()
    world.timeout_sec = 30.0
    rank.step()


def failing(world, kernels):
    """NCCL reports an error on one rank, between calls: all ranks are told."""
    rank = Rank(world, kernels, case_of(world))
    rank.step()
    together(world)
    if world.rank == 1:
        COMMS[-1].failed = True
    begin = time.monotonic()
    while not world.is_stopped:
        assert time.monotonic() - begin < 5
        time.sleep(1e-3)
    error = caught(rank.forward)
    assert "rank 1 cannot wait for" in str(error), error
    assert "NCCL failed: RuntimeError('of NCCL')" in str(error), error
    world.reset()
    rank.step()


def main() -> None:
    with aborting():
        with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=30) as world:
            os.environ["NCCL_MAX_CTAS"] = "3"
            stand_in()
            from cometrt.world.nccl import NcclRail

            world.nccl = NcclRail(world)
            kernels = Kernels(world)
            tunes = world.size == 2 and SLICES > 1  # elsewhere it would only take longer
            for part in (
                steps, failures, limited, bounds, mismatched, stalled, stopped_late, cut_short,
                failing, *[tuned] * tunes,
            ):  # fmt: skip
                part(world, kernels)
        print("all parts passed", flush=True)


if __name__ == "__main__":
    main()
