"""The grouped GEMM engine against float64, and its order of tiles against NumPy's."""

import re
import shutil
import subprocess
import types

import numpy as np
import pytest

from cometrt.activations import ACTIVATIONS, activate
from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.plan.tile_order import make_tile_order

pytestmark = pytest.mark.gpu

EDGES = (0, 1, 63, 64, 65, 127, 129, 0)


def tiles_of(rows, seed=0):
    """Tables of a plan whose experts have these rows."""
    rng = np.random.default_rng(seed)
    num_tiles = [-(-n // 128) for n in rows]
    offsets = np.concatenate([[0], np.cumsum(num_tiles)]) * 128
    expert = np.repeat(np.arange(len(rows)), num_tiles)
    # Two passes over the experts, as with two phases: of each some tiles, then the rest.
    cut = rng.integers(0, np.array(num_tiles, int) + 1)
    index = np.arange(len(expert)) - np.repeat(offsets[:-1] // 128, num_tiles)
    late = index >= cut[expert] if len(expert) else np.zeros(0, bool)
    order = np.concatenate([np.flatnonzero(~late), np.flatnonzero(late)])
    tables = {
        "tile_order": np.append(order, [-1, -1]),
        "num_tiles": [len(order)],
        "tile_expert": np.append(expert, [-1, -1]),
        "expert_offsets": offsets,
        "expert_rows": rows,
    }
    tables = {name: np.asarray(table, np.int32) for name, table in tables.items()}
    return types.SimpleNamespace(
        **tables,
        dispatch_order=lambda: [int(tile) for tile in order],
        num_rows=int(offsets[-1]),
    )


def on_gpu(tiles):
    import cupy

    names = "tile_order num_tiles tile_expert expert_offsets expert_rows".split()
    return types.SimpleNamespace(**{name: cupy.asarray(getattr(tiles, name)) for name in names})


@pytest.mark.parametrize(
    ("backwards", "n_chunk"), [(False, None), (True, None), (True, 1), (True, 2), (True, 3)]
)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("group", [None, 2, 4])
@pytest.mark.parametrize("columns", [1, 2, 5, 16])
@pytest.mark.parametrize("rows", [EDGES, (700,), (0, 0), (2048, 1999, 5000, 40)] + [
    tuple(np.random.default_rng(s).integers(0, 700, 40)) for s in range(3)] + [(300,) * 700],
    ids=lambda rows: f"{len(rows)}experts{sum(rows)}rows")  # fmt: skip
def test_the_tile_order_is_that_of_numpy(rows, columns, group, chunks, backwards, n_chunk):
    from cometrt.cuda.engine import order_tiles

    tiles = tiles_of(rows, seed=len(rows))
    how = {"backwards": backwards, "n_chunk": n_chunk, "raster_group": group}
    order = order_tiles(on_gpu(tiles), columns, pipeline_chunks=chunks, **how)
    for index in range(chunks):
        expected = make_tile_order(tiles, columns, pipeline_chunk=(index, chunks), **how)
        assert order.counts[3 * index : 3 * index + 3].tolist() == [len(expected), 0, 0]
        assert (order.tiles(index) == expected).all()


@pytest.mark.parametrize("weights", [1, 3, 20])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("rows", [EDGES[1:7], (700, 300, 0, 2048, 1999, 65), (300,) * 60])
def test_the_tile_order_of_several_row_sets_is_that_of_numpy(rows, backwards, chunks, weights):
    from cometrt.cuda.engine import order_tiles

    tiles = tiles_of(rows, seed=len(rows))
    how = {"backwards": backwards, "raster_group": 2, "num_weights": weights}
    order = order_tiles(on_gpu(tiles), 5, pipeline_chunks=chunks, **how)
    for index in range(chunks):
        expected = make_tile_order(tiles, 5, pipeline_chunk=(index, chunks), **how)
        assert order.counts[3 * index : 3 * index + 3].tolist() == [len(expected), 0, 0]
        assert (order.tiles(index) == expected).all()


class Problem:
    """Random operands of a grouped GEMM, on the GPU, and the float64 result."""

    def __init__(self, rows, columns, inner, activation, seed=0):
        import cupy as cp
        import ml_dtypes

        rng = np.random.default_rng(seed)
        bf16 = np.dtype(ml_dtypes.bfloat16)
        self.tiles, self.activation = tiles_of(rows, seed), activation
        self.gated = activation in ("swiglu", "geglu")
        parts = 2 if self.gated else 1
        a = np.zeros((self.tiles.num_rows + 256, inner), bf16)
        self.real = np.zeros(len(a), bool)
        for n, begin in zip(rows, self.tiles.expert_offsets[:-1], strict=True):
            a[begin : begin + n] = rng.standard_normal((n, inner))
            self.real[begin : begin + n] = True
        b = rng.standard_normal((len(rows), parts * columns, inner)).astype(bf16) / bf16.type(4)
        self.z64 = np.zeros((len(a), parts * columns))
        for e, begin in enumerate(self.tiles.expert_offsets[:-1]):
            rows_of = slice(begin, begin + rows[e])
            self.z64[rows_of] = a[rows_of].astype(np.float64) @ b[e].astype(np.float64).T
        self.a, self.b = cp.asarray(a), cp.asarray(b)
        self.out = cp.full((len(a), columns), np.nan, bf16)
        self.z = cp.full((len(a), parts * columns), np.nan, bf16)

    def run(self, write_z):
        from cometrt.cuda.engine import GroupedGemm, order_tiles

        gemm = GroupedGemm(self.activation, write_z=write_z)
        order = order_tiles(on_gpu(self.tiles), gemm.num_n_tiles(self.b.shape[1]))
        self.out.fill(np.nan)
        self.z.fill(np.nan)
        gemm(self.a, self.b, self.out, order, z=self.z if write_z else None)
        return self.out.get(), self.z.get()

    def check(self, write_z):
        out, z = self.run(write_z)
        used = self.tiles.num_rows
        for name, array in (("out", out), ("z", z)):
            if name == "z" and not write_z:
                assert np.isnan(array.astype(np.float32)).all()
                continue
            assert np.isnan(array[used:].astype(np.float32)).all(), f"{name} beyond the tiles"
            assert (array[:used][~self.real[:used]] == 0).all(), f"padding of {name}"
        if self.activation is None:
            assert error_of(out[self.real], self.z64[self.real]) < 3e-3
            return
        rounded = self.z64.astype(self.out.dtype)
        if write_z:
            assert error_of(z[self.real], self.z64[self.real]) < 3e-3
            rounded = z  # then what is left is the activation's own error
        expected = activate(self.activation, rounded[self.real].astype(np.float64))
        assert error_of(out[self.real], expected) < (3e-3 if write_z else 8e-3)
        again = self.run(write_z)
        used_rows = slice(0, used)
        assert out[used_rows].tobytes() == again[0][used_rows].tobytes()
        if write_z:
            assert out[used_rows].tobytes() == self.run(False)[0][used_rows].tobytes()


def error_of(found, expected):
    size = np.linalg.norm(expected)
    return np.linalg.norm(found.astype(np.float64) - expected) / size if size else 0.0


@pytest.mark.parametrize("inner", [16, 48, 64, 80, 256, 528])
@pytest.mark.parametrize("columns", [16, 48, 128, 256, 272, 400, 640])
def test_down(columns, inner):
    Problem(EDGES, columns, inner, None, seed=columns + inner).check(False)


@pytest.mark.parametrize("write_z", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("columns", "inner"), [(48, 48), (128, 80), (208, 256)])
def test_up(columns, inner, activation, write_z):
    Problem(EDGES, columns, inner, activation, seed=columns).check(write_z)


def test_many_tiles():
    rows = tuple(np.random.default_rng(1).integers(0, 900, 24))
    Problem(rows, 384, 192, "swiglu").check(True)
    Problem(rows, 1000 // 16 * 16, 192, None).check(False)


@pytest.mark.parametrize("inner", [512, 560, 1024, 2064])
def test_results_leave_while_the_next_tile_is_multiplied(inner):
    # Enough K for one K block per epilogue step; with less (the other tests) stores come first.
    Problem((200, 130, 0, 600), 528, inner, None).check(False)
    Problem((200, 130, 0, 600), 272, inner, "geglu").check(True)


def test_order_serve_many_launches():
    from cometrt.cuda.engine import GroupedGemm, order_tiles

    problem = Problem((200, 77, 400), 272, 192, None)
    gemm = GroupedGemm()
    order = order_tiles(on_gpu(problem.tiles), gemm.num_n_tiles(problem.b.shape[1]))
    first = problem.run(False)[0].tobytes()
    for _ in range(20):
        problem.out.fill(np.nan)
        gemm(problem.a, problem.b, problem.out, order)
        assert problem.out.get().tobytes() == first


@pytest.mark.parametrize(("activation", "write_z"), [(-1, 0), (0, 0), (0, 1), (3, 1)])
def test_machine_code(activation, write_z):
    program = shutil.which("cuobjdump") or shutil.which("nvdisasm")
    if program is None:
        pytest.skip("needs cuobjdump or nvdisasm")
    defines = (("ACTIVATION", activation), ("WRITE_Z", write_z))
    cubin = compile_cubin(kernels_folder() / "gemm" / "grouped_gemm.cu", defines)
    arguments = ["-sass"] if program.endswith("cuobjdump") else ["-c"]
    command = [program, *arguments, str(cubin.path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "HGMMA.64x256x16.F32.BF16" in code
    assert "UTMALDG.4D.MULTICAST" in code
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.parametrize("count", [4, 8, 15])
def test_partitions(count):
    # Of 32, 16 and 8 SMs on a GPU of 132: all busy at once.
    import cupy as cp

    from cometrt.world.partitions import split_gpu, use_partition

    problem = Problem((300, 20, 700), 400, 528, None)
    cp.cuda.Device().synchronize()
    for part in split_gpu(count):
        with use_partition(part):
            problem.check(False)


def test_no_rows_at_all():
    Problem((0, 0, 0), 64, 64, "swiglu").check(True)
