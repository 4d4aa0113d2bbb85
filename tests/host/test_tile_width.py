"""Which columns the tiles of a fused forward have."""

import pytest

import cometrt
from cometrt.cuda.buffers import held
from cometrt.cuda.engine import layer_n_tiles
from cometrt.cuda.fused import forward_block_n
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry

QWEN3 = {"hidden": 2048, "intermediate": 768, "num_experts": 128, "topk": 8}
MIXTRAL = {"hidden": 4096, "intermediate": 14336, "num_experts": 8, "topk": 2}


def shape_of(model, ranks, tokens):
    spec = cometrt.MoESpec(**model, max_tokens=tokens)
    return PlanShape(Geometry(spec, 0, ranks), TileConfig())


@pytest.mark.parametrize(
    ("model", "ranks", "tokens", "width"),
    [
        (QWEN3, 1, 1, (128, 128)),  # 8 experts have a row: 64 tiles of the down GEMM
        (QWEN3, 4, 1, (128, 128)),
        (QWEN3, 4, 8, (128, 256)),  # 32 experts: 256 tiles
        (QWEN3, 1, 1024, (128, 256)),  # 64 rows an expert
        (QWEN3, 1, 1025, (256, 256)),
        (QWEN3, 4, 8192, (256, 256)),
        (MIXTRAL, 1, 256, (128, 128)),  # 128 tiles of the down GEMM, whatever the batch
        (MIXTRAL, 1, 257, (256, 256)),
    ],
)
def test_small_batches_have_narrow_tiles(model, ranks, tokens, width):
    assert forward_block_n(shape_of(model, ranks, tokens)) == width


def test_memory_has_room_for_the_order_of_narrow_tiles():
    shape = shape_of(QWEN3, 4, 1)
    narrow, wide = layer_n_tiles(shape, (128, 128)), layer_n_tiles(shape)
    assert narrow == (12, 16)
    assert wide == (6, 8)
    of_mode = {mode: held(shape, mode)["up_work_tiles"][0][0] for mode in ("fused", "sequential")}
    assert of_mode["fused"] == 2 * of_mode["sequential"]
