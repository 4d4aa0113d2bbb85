"""A soak: thousands of forwards and backwards with random tokens, routing and delays.

    python tests/device/soak.py --calls 10000 --ranks 8              virtual ranks, or a GPU each
    mpirun -n 4 python3 tests/device/soak.py --calls 5000            a process for each GPU

Layers of different shapes and orders, and of every `save`, follow each other at random, each rank
brings a batch of its own choice, and each launch of a call may be held up on the device. A token's
result depends on its own row, ids and weights alone: so the bits of each batch are known from its
first call, whatever the other ranks bring, and a kernel compares them after every call while the
host goes on. Most forwards have a backward, several calls later and in any order; dx and dweight
depend on the batch alone too, but not to the bit. Every `--every` calls the host waits: it reads
what those kernels have found, repeats the last call in mode "sequential", and makes a call with a
wrong id, with its backward and a right call behind it: the error must be raised on every rank, in
any of them, and only once.

At every second check all saved forwards get their backward, and memory is measured. It must not
have grown from the second quarter of the samples to the last. At the end a step of each layer must
have the bits that it had at first, and weight gradients that repeat, and that agree with mode
"sequential".

Exits with 0 if there was no failure. All waits have deadlines; should the process hang even so,
it tells where, and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cometrt
from cometrt.specs import SAVE_MODES
from tests.cases import on_host, relative_error, tolerance
from tests.device.pauses import Differences, Pauses

BATCHES = 12  # of each rank and model
LONGEST_SETUP_SEC, LONGEST_STALL_SEC = 400, 60
MOST_FAILURES = 20
REPORT_SEC = 10
MOST_IN_FLIGHT = 6  # forwards that wait for their backward
MIB = 1 << 20
# Bytes that memory may grow between quarters of a run: graphs come and go, and the memory of the
# last calls is freed late.
MOST_GROWTH = {"GPU": 64 * MIB, "pool": 16 * MIB, "host": 64 * MIB}
FEWEST_SAMPLES = 20  # else nothing is said of memory
CALLS = {False: 10_000, True: 5_000}  # by whether ranks are processes under mpirun


class Model:
    """A shape of layer with its weights, equal on all ranks."""

    def __init__(self, name, size, seed, *, config, tp=1, **shape):
        self.name, tp = name, tp if size % tp == 0 else 1
        self.spec = spec = cometrt.MoESpec(
            num_experts=4 * size // tp,
            tp=tp,
            capacity_factor=4.0 * size,  # every routing fits
            **shape,
        )
        self.config = cometrt.TileConfig(block_tokens=16, min_token_blocks=4, **config)
        rng = np.random.default_rng(seed)
        self.weights = [
            (rng.standard_normal(s, np.float32) / np.sqrt(s[2])).astype(spec.numpy_dtype)
            for s in (
                (spec.num_experts, 2 * spec.intermediate, spec.hidden),
                (spec.num_experts, spec.hidden, spec.intermediate),
            )
        ]


def make_models(size):
    """One shape in both orders; and one whose rows take several pieces, and whose tokens lie in the
    heap where the others have something else. All with every `save`."""
    shape = {"hidden": 528, "intermediate": 144, "topk": 3, "max_tokens": 150}
    wide = {"hidden": 2064, "intermediate": 96, "topk": 4, "max_tokens": 100, "tp": 2}
    columns = {"order": "columns", "num_phases": 3}
    kinds = {
        "phases": ({"backward_order": "columns", "backward_dispatch_ctas": 2}, shape),
        "columns": (columns | {"backward_combine_ctas": 1}, shape),
        "wide": (columns | {"num_phases": 2, "n_chunk": 1024, "backward_order": "phases"}, wide),
    }
    return [
        Model(f"{name} save={save}", size, seed, config=config, save=save, **of)
        for seed, (name, (config, of)) in enumerate(kinds.items())
        for save in SAVE_MODES
    ]


def make_batch(spec, rank, size, rng):
    """x, ids and weights: any number of tokens, any pairs dropped, near or far experts."""
    tokens = int(rng.choice([0, 1, spec.max_tokens, rng.integers(spec.max_tokens)]))
    scores = rng.normal(scale=rng.choice([0.0, 2.0]), size=spec.num_experts)
    if rng.random() < 0.25:  # all at home: no peer holds this rank back
        experts = spec.num_experts // (size // spec.tp)
        first = rank // spec.tp * experts
        scores[:first] = scores[first + experts :] = -np.inf
    noisy = scores + rng.gumbel(size=(tokens, spec.num_experts))
    ids = np.argsort(-noisy, axis=1)[:, : spec.topk]
    ids[rng.random(ids.shape) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])] = -1
    return (
        rng.standard_normal((tokens, spec.hidden)).astype(spec.numpy_dtype),
        ids.astype(np.int64 if rng.random() < 0.5 else np.int32),
        rng.uniform(0.1, 1.5, ids.shape).astype(np.float32),
    )


class Subject:
    """One model on one rank: its layers, its batches, and the bits that they give."""

    def __init__(self, world, model, seed):
        import cupy

        self.name, self._spec = model.name, model.spec
        self.fused, self.sequential = (
            cometrt.MoELayer(world, model.spec, mode, config=model.config)
            for mode in ("fused", "sequential")
        )
        shards = cometrt.shard_weights(*model.weights, world.rank, world.size, model.spec)
        self._weights = [cupy.asarray(shard) for shard in shards]
        rng = np.random.default_rng((seed, world.rank))
        made = [make_batch(self._spec, world.rank, world.size, rng) for _ in range(BATCHES)]
        while not len(made[0][0]):  # it gets a wrong id at times
            made[0] = make_batch(self._spec, world.rank, world.size, rng)
        self._batches = [tuple(cupy.asarray(array) for array in batch) for batch in made]
        made[0][1][-1, -1] = self._spec.num_experts
        self._wrong_ids = cupy.asarray(made[0][1])
        rows = (self._spec.max_tokens, self._spec.hidden)
        self._y = [cupy.empty(rows, self._spec.numpy_dtype) for _ in range(2)]  # of either mode
        self._dy = [cupy.asarray(rng.standard_normal(x.shape).astype(x.dtype)) for x, _, _ in made]
        self._sums = [cupy.zeros(w.shape, cupy.float32) for w in self._weights]
        self.expected, self.gradients = [], []

    def learn(self):
        """The bits of each batch, from a call that the other mode confirms."""
        for batch in range(BATCHES):
            y, saved = self.forward(batch, in_heap=batch % 2 == 1, training=True)
            self.expected.append(y.copy())
            self.gradients.append(self.backward(batch, saved))
            error, _ = self.compare(batch, self.expected[-1])
            assert error < tolerance("bfloat16"), f"{self.name}, batch {batch}: error {error:.1e}"

    def forward(self, batch, *, ids=None, in_heap=False, sequential=False, training=False):
        """y, in poisoned memory, with `in_heap` in that of x, and x in the heap; and what backward
        needs."""
        layer = self.sequential if sequential else self.fused
        x, good_ids, weights = self._batches[batch]
        out = self._y[sequential][: len(x)]
        if in_heap:
            out = layer.buffer()[: len(x)]
            out[...] = x
            x = out
        elif len(x):
            out.data.memset_async(0xFF, out.nbytes)
        tables = (good_ids if ids is None else ids, weights)
        return layer.forward(x, *tables, *self._weights, out=out, training=training)

    def backward(self, batch, saved, *, accumulate=False):
        """dx and dweight; the weights' gradients depend on what other ranks bring, and are added to
        sums of micro-batches with `accumulate`."""
        out = cometrt.Gradients(None, None, *self._sums) if accumulate else None
        return self.fused.backward(self._dy[batch], saved, out=out, accumulate=accumulate)[:2]

    def step(self, batch, *, sequential=False):
        """y and all gradients of a forward and its backward, on the host."""
        layer = self.sequential if sequential else self.fused
        y, saved = self.forward(batch, sequential=sequential, training=True)
        y = y.copy()
        grads = layer.backward(self._dy[batch], saved)
        layer.synchronize()
        return {"y": on_host(y)} | {k: on_host(v) for k, v in grads._asdict().items()}

    def last_check(self, batch):
        """What is amiss in a step, of the same batch number on all ranks."""
        first, second = self.step(batch), self.step(batch)
        expected, limit = self.step(batch, sequential=True), tolerance("bfloat16")
        wrong = [
            f"{name} is not repeatable" for name in first
            if first[name].tobytes() != second[name].tobytes()
        ]  # fmt: skip
        if first["y"].tobytes() != on_host(self.expected[batch]).tobytes():
            wrong.append("y has other bits than at first")
        for name, found in first.items():
            error = relative_error(found, expected[name].astype(np.float64))
            if not error < limit:
                wrong.append(f"{name}: relative error {error:.1e} to sequential")
        if not all(np.isfinite(on_host(total)).all() for total in self._sums):
            wrong.append("sums of weight gradients are not finite")
        return wrong

    def compare(self, batch, y):
        """The relative error of y to what mode "sequential" gives, and whether they are the same
        bits. Waits for the device."""
        found = on_host(y)  # the next call may overwrite it
        expected, _ = self.forward(batch, sequential=True)
        self.sequential.synchronize()
        expected = on_host(expected)
        error = relative_error(found, expected.astype(np.float64))
        return error, found.tobytes() == expected.tobytes()

    def wrong_call(self, is_wrong):
        """What is amiss in a call in which one rank's ids are wrong: nothing, if it raises."""
        y, saved = self.forward(0, ids=self._wrong_ids if is_wrong else None, training=True)
        y, found = y.copy(), []
        queued = (lambda: self.backward(0, saved), lambda: self.forward(1))
        for call in (*queued, self.fused.synchronize):  # a rank may learn of it in any of them
            try:
                call()
            except cometrt.CometError as error:
                found.append(type(error).__name__)
                break  # a call after it would be one that other ranks have made in vain
        for layer in (self.fused, self.sequential):
            try:
                layer.synchronize()
            except cometrt.CometError as error:
                found.append(f"later {type(error).__name__}")
        if found != ["RoutingError"]:
            return f"a wrong id was told as {found}"
        return "" if np.isnan(on_host(y).astype(np.float32)).all() else "y is not NaN"


class Rank:
    """A rank's calls, one after the other; `failures` is common to all ranks."""

    def __init__(self, world, models, options, failures):
        self._world, self._options, self._failures = world, options, failures
        self._pauses, self._differences = Pauses(), Differences(options.every)
        self._subjects = [Subject(world, model, options.seed + i) for i, model in enumerate(models)]
        for subject in self._subjects:
            subject.learn()
            self._pauses.hold_up(subject.fused)
        self._common = np.random.default_rng(options.seed)  # equal on all ranks
        self._own = np.random.default_rng((options.seed, world.rank, 1))
        self._recent = []  # calls since the last check
        self._saved = []  # of forwards whose backward is to come
        self._num_checks, self.memory = 0, []
        self.num_compared = self.num_same = self.num_backwards = 0
        world.timeout_sec = options.timeout  # nothing is compiled any more

    def run(self):
        """Returns the number of calls and the seconds that they took."""
        options, begin, call = self._options, time.monotonic(), 0
        reported = begin
        while call < options.calls:
            self._call(call)
            call += 1
            if call % options.every and call < options.calls:
                continue
            faulthandler.dump_traceback_later(LONGEST_STALL_SEC, exit=True)
            self._check()
            now, failed = time.monotonic(), len(self._failures)
            if any(self._world.allgather(now - begin > options.seconds or failed > MOST_FAILURES)):
                break
            if self._world.rank == 0 and now - reported > REPORT_SEC:
                reported = now
                rate = call / (now - begin)
                print(f"{call} calls, {rate:.0f} a second, {failed} failures", flush=True)
        faulthandler.dump_traceback_later(LONGEST_STALL_SEC, exit=True)
        self._finish(call)
        return call, time.monotonic() - begin

    def _call(self, call):
        own, number = self._own, call % self._options.every
        subject = self._subjects[self._common.integers(len(self._subjects))]
        batch = int(own.integers(BATCHES))
        how = {"in_heap": bool(own.random() < 0.2), "training": bool(self._common.random() < 0.6)}
        if own.random() < 0.1:
            time.sleep(own.uniform(0, 2e-3))
        replays = bool(own.random() < 0.5)  # then as its launches are, or were: without pauses
        subject.fused.executor.graphs.enabled = replays
        self._pauses.next = iter(() if replays else self._draw_pauses())
        while len(self._saved) > self._common.integers(1, MOST_IN_FLIGHT + 1):
            self._any_backward(number)
        y, saved = subject.forward(batch, **how)
        self._differences.count(number, y, subject.expected[batch])
        self._recent.append((call, subject, batch, y, how))
        if saved is not None:
            self._saved.append((subject, batch, saved))

    def _any_backward(self, number):
        """Of the saved forwards, the same one on all ranks."""
        index = self._common.integers(len(self._saved))
        subject, batch, saved = self._saved.pop(index)
        found = subject.backward(batch, saved, accumulate=bool(self._common.random() < 0.5))
        for gradient, expected in zip(found, subject.gradients[batch], strict=True):
            self._differences.measure(number, gradient, expected)
        self.num_backwards += 1

    def _draw_pauses(self):
        """Of the first five launches of a call, in us: mostly none, or a few, or one long one."""
        kind = self._own.random()
        if kind < 0.5:
            return []
        if kind < 0.8:
            return self._own.integers(0, 60, 5)
        late = np.zeros(5, int)
        late[self._own.integers(5)] = self._own.integers(100, 2000)
        return late

    def _check(self):
        """Wait for all that is queued and see whether it was right; then a wrong call."""
        counts, errors = self._differences.read(), self._differences.read_errors()
        for call, subject, batch, _, how in self._recent:
            if words := int(counts[call % self._options.every]):
                text = f"{words} words differ from the first call of batch {batch} ({how})"
                self._fail(call, subject, text)
            if not errors[call % self._options.every] < tolerance("bfloat16"):
                text = f"gradients of backwards before it are {errors[call % self._options.every]}"
                self._fail(call, subject, f"{text} from their batches' first")
        call, subject, batch, y, _ = self._recent[-1]
        self._recent.clear()
        self._pauses.next = iter(())
        subject.fused.synchronize()
        error, same = subject.compare(batch, y)
        self.num_compared += 1
        self.num_same += same
        if not error < tolerance("bfloat16"):
            self._fail(call, subject, f"relative error {error:.1e} to sequential")
        self._pauses.next = iter(self._draw_pauses())
        culprit = int(self._common.integers(self._world.size))
        if problem := subject.wrong_call(self._world.rank == culprit):
            self._fail(call + 1, subject, problem)
        self._num_checks += 1
        if self._num_checks % 2 == 0:
            self._measure_memory()

    def _measure_memory(self):
        """While nothing is saved or runs on any rank."""
        while self._saved:
            self._any_backward(0)
        self._subjects[0].fused.synchronize()
        self._world.barrier()
        if self._world.rank == 0 or not self._world.shares_process:
            gc.collect()  # errors that were raised hold their calls' arrays
            self.memory.append(memory_now())
        self._world.barrier()

    def _finish(self, call):
        """Results at the end; whether memory has grown."""
        self._pauses.next = iter(())
        self._measure_memory()
        for subject in self._subjects:
            subject.fused.executor.graphs.enabled = True
            for problem in subject.last_check(int(self._common.integers(BATCHES))):
                self._fail(call, subject, f"at the end {problem}")
        for name, grown in growth(self.memory).items():
            if grown > MOST_GROWTH[name]:
                self._fail(call, self._subjects[0], f"{name} memory has grown by {grown:,} bytes")

    def _fail(self, call, subject, text):
        failure = f"call {call}, rank {self._world.rank}, {subject.name}: {text}"
        print(failure, flush=True)
        self._failures.append(failure)


def memory_now():
    """Bytes: of this GPU that are taken, of CuPy's pool that are in use, and of this process."""
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "GPU": total - free,
        "pool": cupy.get_default_memory_pool().used_bytes(),
        "host": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def growth(samples):
    """Bytes by which the most of the last quarter exceeds that of the second one, by kind; empty
    where there are too few samples. In the first quarter caches fill."""
    quarter = len(samples) // 4
    if len(samples) < FEWEST_SAMPLES:
        return {}
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: max(sample[name] for sample in late) - max(sample[name] for sample in early)
        for name in samples[0]
    }


def soak(options, comm=None):
    """Returns the failures of this process; prints how it goes.

    Args:
        comm: MPI's communicator, whose ranks have a world together; None: of threads.
    """
    faulthandler.dump_traceback_later(LONGEST_SETUP_SEC, exit=True)
    models, failures = make_models(options.ranks), []

    def fn(world):
        rank = Rank(world, models, options, failures)
        if world.rank == 0:
            print(f"{len(models)} models on {world.size} ranks are ready", flush=True)
        counts = rank.run(), rank.num_compared, rank.num_same, rank.num_backwards
        found = world.allgather((*counts, len(failures)))
        grown = growth(rank.memory)
        return found, ", ".join(f"{name} {size / MIB:+.1f} MiB" for name, size in grown.items())

    timeout_sec = LONGEST_SETUP_SEC / 4
    try:
        if comm is None:
            results, grown = cometrt.spawn(
                fn, options.ranks, "cuda", link=options.link, timeout_sec=timeout_sec
            )[0]
        else:
            with cometrt.connect(comm, "cuda", timeout_sec=timeout_sec) as world:
                results, grown = fn(world)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if comm is not None and comm.rank > 0:
        return failures
    (calls, seconds), *_ = results[0]
    compared, same = (sum(result[i] for result in results) for i in (1, 2))
    count = len(failures) if comm is None else sum(result[4] for result in results)
    print(
        f"{calls} forwards and {results[0][3]} backwards on {options.ranks} ranks in "
        f"{seconds:.1f} s: {count} failures; {compared} results compared with sequential, "
        f"{same} of them the same bits; memory grew by {grown or '(too few samples)'}"
    )
    if calls < options.calls:
        print(f"stopped by --seconds after {calls} of {options.calls} calls")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, help="default: 10,000, or 5,000 under mpirun")
    parser.add_argument("--ranks", type=int, default=8, help="not under mpirun: all of its ranks")
    parser.add_argument("--seconds", type=float, default=480, help="after that the soak ends")
    parser.add_argument("--every", type=int, default=50, help="calls from check to check")
    parser.add_argument("--timeout", type=float, default=10, help="seconds of any one wait")
    parser.add_argument("--link", help="pace what crosses ranks: h100, h200 or h800")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from cometrt.cli.ranks import is_under_mpi

    comm = None
    if is_under_mpi():
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        options.ranks = comm.size
    options.calls = options.calls or CALLS[comm is not None]
    return 1 if soak(options, comm) else 0


if __name__ == "__main__":
    sys.exit(main())
