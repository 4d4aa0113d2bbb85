"""Which layers can run: rules of the tables, the device and the mode, and who asks for them."""

import dataclasses
import re
import types

import pytest

import cometrt
from cometrt import TileConfig
from cometrt.agreement import agree
from cometrt.legality import check_layer

SPEC = cometrt.MoESpec(hidden=64, intermediate=96, num_experts=128, topk=2, max_tokens=32)
COLUMNS_384 = TileConfig(order="columns", n_chunk=384)
BACKWARD_384 = TileConfig(backward_order="columns", backward_n_chunk=384)


@pytest.mark.parametrize(
    ("config", "size", "mode", "message"),
    [
        (TileConfig(gemm="cublas"), 8, "fused", "gemm must be 'engine' on device='cuda' in mode"),
        (TileConfig(gemm="cublas"), 8, "chunked", "gemm must be 'engine' on device='cuda' in mode"),
        (COLUMNS_384, 8, "fused", "n_chunk must be a multiple of 256 on device='cuda' in mode"),
        (BACKWARD_384, 8, "fused", "backward_n_chunk must be a multiple of 256 on device='cuda'"),
        (TileConfig(block_m=64), 8, "fused", "block_m must be 128 on device='cuda' with gemm="),
        (TileConfig(block_m=64), 8, "sequential", "block_m must be 128 on device='cuda' with ge"),
        (TileConfig(), 128, "fused", "topk + ranks must be at most 128 on device='cuda' in mode "
         "'fused' (got 130)"),
    ],
)  # fmt: skip
def test_what_kernels_cannot_run(config, size, mode, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_layer(SPEC, size, "cuda", mode, config)
    if mode != "chunked":
        assert check_layer(SPEC, size, "host", mode, config) == mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype must be 'bfloat16' on device='cuda' (got 'float32')"),
        ({"hidden": 28688}, "hidden must be at most 28672 on device='cuda' (got 28688)"),
        ({"topk": 1025, "num_experts": 2048}, "topk must be at most 1024 on device='cuda' (got 1"),
    ],
)
@pytest.mark.parametrize("mode", [None, "fused", "sequential", "chunked"])
def test_what_cuda_cannot_run_in_any_mode(change, message, mode):
    spec = dataclasses.replace(SPEC, **change)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_layer(spec, 1, "cuda", mode, None)
    assert check_layer(spec, 1, "host", None, None) == "fused"


def test_the_largest_sizes_are_legal():
    spec = dataclasses.replace(SPEC, hidden=28672, topk=126)
    assert check_layer(spec, 2, "cuda", "fused", None) == "fused"
    assert check_layer(dataclasses.replace(spec, topk=127), 1, "cuda", None, None) == "fused"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 1 << 30}, "max_tokens must keep the pairs of all ranks, and the rows of"),
        ({"num_experts": 1 << 40}, "num_experts must keep the padding rows of a rank below 2**31"),
    ],
)
@pytest.mark.parametrize("device", ["host", "cuda"])
def test_table_indices_fit_in_32_bits(change, message, device):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_layer(dataclasses.replace(SPEC, **change), 4, device, None, None)


def test_chunked_needs_cuda():
    assert check_layer(SPEC, 128, "cuda", "chunked", None) == "chunked"
    with pytest.raises(ValueError, match="mode must be 'fused' or 'sequential' on device='host'"):
        check_layer(SPEC, 2, "host", "chunked", None)
    with pytest.raises(ValueError, match=r"mode must be .* \[rank 0\]"):
        cometrt.spawn(lambda world: cometrt.MoELayer(world, SPEC, "chunked"), 2)


@pytest.mark.parametrize(
    ("device", "size", "config", "best"),
    [
        ("cuda", 64, TileConfig(), "fused"),
        ("cuda", 128, TileConfig(), "sequential"),
        ("cuda", 8, TileConfig(gemm="cublas"), "sequential"),
        ("cuda", 8, COLUMNS_384, "sequential"),
        ("host", 128, TileConfig(gemm="cublas"), "fused"),
    ],
)
def test_the_best_mode_can_run(device, size, config, best):
    assert check_layer(SPEC, size, device, None, config) == best
    assert check_layer(SPEC, size, device, best, config) == best


def test_the_layer_uses_the_same_rules():
    """Its construction on "cuda", as far as it goes without a GPU."""
    world = types.SimpleNamespace(
        nodes=1,
        device="cuda",
        rank=0,
        size=1,
        num_layers=0,
        allgather=lambda value, purpose: [value],
    )
    config = TileConfig(gemm="cublas")
    assert agree(world, SPEC, None, config) == (0, "sequential", config)
    with pytest.raises(ValueError, match=r"gemm must be 'engine' .* \[rank 0\]"):
        agree(world, SPEC, "fused", config)
    with pytest.raises(ValueError, match=r"hidden must be at most 28672 .* \[rank 0\]"):
        agree(world, dataclasses.replace(SPEC, hidden=28688), None, config)


def test_the_memory_of_a_layer_uses_the_same_rules():
    with pytest.raises(ValueError, match="gemm must be 'engine'"):
        SPEC.memory(4, mode="fused", config=TileConfig(gemm="cublas"))
