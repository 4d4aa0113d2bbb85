"""What launches of kernels_cu/router are given, and what those of losses compute, in NumPy.

For arrays of `tests.cupy_stand_in`. Each kernel reads and writes by its structs alone.
"""

import ctypes

import numpy as np

from cometrt.router import cuda


class Launches(list):
    """(kernel, macros, stream, grid, struct) of each launch. Those of losses compute, in NumPy."""

    def load(self, _source, *names, macros=()):
        return tuple(Recorder(self, name, macros) for name in names)


class Recorder:
    block = 128

    def __init__(self, launches, name, macros):
        self._launches, self._name, self._macros = launches, name, macros

    def __call__(self, stream, grid, *params):
        structs = [of.fields.copy()[0] for of in params]
        self._launches.append((self._name, self._macros, stream, grid, structs[0]))
        if self._name in LOSS_KERNELS:
            LOSS_KERNELS[self._name](grid, *structs)


def array_at(address, shape, dtype):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * nbytes).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


def ids_of(address, shape, are_64):
    return array_at(address, shape, np.int64 if are_64 else np.int32)


def softmax_of(logits):
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


class Loss:
    """The arrays of a loss kernel's structs."""

    def __init__(self, p, more):
        self.tokens, self.experts = int(p["num_tokens"]), int(p["num_experts"])
        self.length, self.chunks = int(more["sequence_tokens"]), int(more["chunks_per_sequence"])
        self.chunk_tokens, self.balance = int(more["chunk_tokens"]), bool(more["balance"])
        self.sequences = self.tokens // self.length
        assert (self.chunks - 1) * self.chunk_tokens < self.length
        assert self.length <= self.chunks * self.chunk_tokens
        logits = array_at(p["logits"], (self.tokens, self.experts), cuda.DTYPES[p["logits_type"]])
        self.logits = logits.astype(np.float64)
        self.kept = np.ones((self.tokens, 1), bool)
        if p["ids"]:
            self.ids = ids_of(p["ids"], (self.tokens, int(p["topk"])), p["ids_are_64"])
            self.kept = (self.ids >= 0) & (self.ids < self.experts)
        self.counted = self.kept.any(axis=1)
        columns = self.experts if self.balance else 0
        self.groups = max(1, -(-columns // 32))
        shape = (self.sequences, self.chunks, 2 * columns + 2)
        self.chunk_sums = array_at(more["chunk_sums"], shape, np.float64)
        self.pairs = array_at(more["pairs"], (self.sequences, columns), np.float64)
        self.factors = array_at(more["factors"], (self.sequences,), np.float64)
        self.loss = array_at(more["loss"], (), np.float64)
        self.denominator = array_at(more["denominator"], (), np.float64)
        terms = array_at(more["terms"], (self.sequences * self.groups, 2), np.float64)
        terms[...] = array_at(more["num_done"], (1,), np.uint32) * 0.0  # both can be accessed
        self.counts = None
        if more["counts"]:
            dtype = cuda.NUMBER_DTYPES[more["counts_type"]]
            self.counts = array_at(more["counts"], (self.experts,), dtype).astype(np.float64)
        self.dloss = float(more["dloss_value"])
        if more["dloss"]:
            dtype = cuda.NUMBER_DTYPES[more["dloss_type"]]
            self.dloss = float(array_at(more["dloss"], (1,), dtype)[0])


def loss_sums(grid, p, more):
    of = Loss(p, more)
    assert grid == of.sequences * of.chunks
    for index in np.ndindex(of.sequences, of.chunks):
        begin = index[0] * of.length + index[1] * of.chunk_tokens
        end = min(begin + of.chunk_tokens, (index[0] + 1) * of.length)
        rows = np.arange(begin, end)[of.counted[begin:end]]
        out = of.chunk_sums[index]
        out[...] = 0
        if of.balance:
            out[: of.experts] = softmax_of(of.logits[rows]).sum(axis=0)
            kept = of.ids[rows][of.kept[rows]]
            out[of.experts : -2] = np.bincount(kept, minlength=of.experts)
            out[-2:] = len(rows), len(kept)
        else:
            out[:] = (np.log(np.exp(of.logits[rows]).sum(axis=1)) ** 2).sum(), len(rows)


def loss_totals(grid, p, more):
    of = Loss(p, more)
    assert grid == of.sequences * of.groups
    sums = of.chunk_sums.sum(axis=1)
    numerator, denominator = sums[:, -2].sum(), sums[:, -1].sum()
    if of.balance:
        pairs = sums[:, of.experts : -2] if of.counts is None else of.counts[None]
        divisor = np.maximum(sums[:, -2], 1) * np.maximum(pairs.sum(axis=1), 1)
        of.pairs[...], of.factors[...] = pairs, of.experts / divisor
        numerator = (of.factors[:, None] * pairs * sums[:, : of.experts]).sum()
        denominator = (sums[:, -2] > 0).sum()
    of.denominator[...] = max(denominator, 1)
    of.loss[...] = numerator / of.denominator


def loss_backward(grid, p, more):
    of = Loss(p, more)
    assert grid == -(-of.tokens // 4)
    probability, slope = softmax_of(of.logits), 2 * np.log(np.exp(of.logits).sum(axis=1))[:, None]
    if of.balance:
        sequence = np.arange(of.tokens) // of.length
        pairs = of.pairs[sequence]
        mean = (pairs * probability).sum(axis=1, keepdims=True)
        slope = of.factors[sequence, None] * (pairs - mean)
    found = of.counted[:, None] * probability * slope * of.dloss / of.denominator
    array_at(p["dlogits"], found.shape, np.float32)[...] = found


def load(grid, p):
    assert grid == 1
    num_ids, experts = int(p["num_ids"]), int(p["num_experts"])
    ids = ids_of(p["ids"], (num_ids,), p["ids_are_64"])
    found = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
    array_at(p["counts"], (experts + 1,), np.int32)[...] = [*found, (found == 0).sum()]
    mean = found.mean() or np.inf
    dropped = 1 - found.sum() / num_ids if num_ids else 0
    statistics = found.max() / mean, found.std() / mean, dropped
    array_at(p["statistics"], (3,), np.float64)[...] = statistics


def update_bias(grid, p):
    assert grid == 1
    experts, stride = int(p["num_experts"]), int(p["bias_stride"])
    counts = array_at(p["counts"], (experts,), cuda.NUMBER_DTYPES[p["counts_type"]])
    spread = (experts - 1) * stride + 1
    bias = array_at(p["bias"], (spread,), cuda.DTYPES[p["bias_type"]])[::stride]
    bias += float(p["rate"]) * np.sign(counts.mean() - counts)


# What kernels_cu/router/losses.cu and load.cu do, from the structs alone.
LOSS_KERNELS = {
    "router_loss_sums": loss_sums,
    "router_loss_totals": loss_totals,
    "router_loss_backward": loss_backward,
    "router_load": load,
    "router_update_bias": update_bias,
}
