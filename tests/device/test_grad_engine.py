"""The grouped GEMM engine's backward forms against float64."""

import numpy as np
import pytest

from cometrt.cuda.grad_gemm import (
    Wgrad,
    num_wgrad_steps,
    wgrad_raster_group,
)
from cometrt.plan.tile_order import work_tile_dtype
from tests.device.test_engine import EDGES, error_of, on_gpu, tiles_of

gpu = pytest.mark.gpu
MANY = tuple(np.random.default_rng(1).integers(0, 900, 24))
ROUNDED = 3e-3  # relative error of results rounded to bf16 once


def is_nan(array):
    return np.isnan(array.astype(np.float32))


def random_rows(tiles, rows, columns, rng):
    """[rows, columns] bf16, zero in padding rows; which rows are real."""
    import ml_dtypes

    values = np.zeros((tiles.num_rows + 256, columns), ml_dtypes.bfloat16)
    real = np.zeros(len(values), bool)
    for n, begin in zip(rows, tiles.expert_offsets[:-1], strict=True):
        values[begin : begin + n] = rng.standard_normal((n, columns))
        real[begin : begin + n] = True
    return values, real


# ---- activation gradients ------------------------------------------------------------------


class Dgrad:
    """Random operands, and the float64 result."""

    def __init__(self, rows, columns, inner, seed=0):
        import cupy as cp
        import ml_dtypes

        rng = np.random.default_rng(seed)
        self.tiles = tiles_of(rows, seed)
        a, self.real = random_rows(self.tiles, rows, inner, rng)
        b = rng.standard_normal((len(rows), inner, columns)).astype(a.dtype)
        self.expected = np.zeros((len(a), columns))
        for e, begin in enumerate(self.tiles.expert_offsets[:-1]):
            of = slice(begin, begin + rows[e])
            self.expected[of] = a[of].astype(np.float64) @ b[e].astype(np.float64)
        self.a, self.b = cp.asarray(a), cp.asarray(b)
        self.out = cp.empty((len(a), columns), ml_dtypes.bfloat16)

    def run(self):
        from cometrt.cuda.engine import order_tiles
        from cometrt.cuda.grad_gemm import GroupedDgrad

        gemm = GroupedDgrad()
        order = order_tiles(on_gpu(self.tiles), gemm.num_n_tiles(self.out.shape[1]))
        self.out.fill(np.nan)
        gemm(self.a, self.b, self.out, order)
        return self.out.get()

    def check(self):
        out, used = self.run(), self.tiles.num_rows
        assert is_nan(out[used:]).all(), "written beyond the tiles"
        assert (out[:used][~self.real[:used]] == 0).all(), "padding rows"
        assert error_of(out[self.real], self.expected[self.real]) < ROUNDED
        assert out[:used].tobytes() == self.run()[:used].tobytes()
        self.a[~self.real] = np.nan
        assert out[self.real].tobytes() == self.run()[self.real].tobytes()


@gpu
@pytest.mark.parametrize("inner", [16, 48, 64, 80, 256, 528])
@pytest.mark.parametrize("columns", [16, 48, 128, 256, 272, 400, 640])
def test_dgrad(columns, inner):
    Dgrad(EDGES, columns, inner, seed=columns + inner).check()


@gpu
def test_dgrad_of_many_tiles():
    Dgrad(MANY, 992, 1040).check()
    Dgrad((300,), 528, 2064).check()
    Dgrad((0, 0), 64, 64).check()


# ---- weight gradients ----------------------------------------------------------------------


class WgradProblems:
    """Random operands of gradients of these shapes, and the float64 results.

    Padding rows are zero up to the next multiple of 64, NaN behind.
    """

    def __init__(self, rows, shapes, seed=0):
        import cupy as cp
        import ml_dtypes

        rng = np.random.default_rng(seed)
        self.rows, self.shapes, self.tiles = rows, shapes, tiles_of(rows, seed)
        self.expected, self.operands, self.outs = [], [], []
        for columns in shapes:
            a, b = (random_rows(self.tiles, rows, n, rng)[0] for n in columns)
            expected = np.zeros((len(rows), *columns))
            for e, (begin, end) in enumerate(
                zip(self.tiles.expert_offsets[:-1], self.tiles.expert_offsets[1:], strict=True)
            ):
                of = slice(begin, begin + rows[e])
                expected[e] = a[of].astype(np.float64).T @ b[of].astype(np.float64)
                unread = slice(begin + -(-rows[e] // 64) * 64, end)
                a[unread], b[unread] = np.nan, np.nan
            a[self.tiles.num_rows :], b[self.tiles.num_rows :] = np.nan, np.nan
            self.expected.append(expected)
            self.operands.append((cp.asarray(a), cp.asarray(b)))
            # One expert more than there is, which must stay as it is.
            self.outs.append(cp.empty((len(rows) + 1, *columns), ml_dtypes.bfloat16))

    def run(self, **how):
        from cometrt.cuda.grad_gemm import GroupedWgrad

        wgrads = []
        for (a, b), out in zip(self.operands, self.outs, strict=True):
            out.fill(np.nan)
            wgrads.append(Wgrad(a, b, out[:-1]))
        GroupedWgrad()(wgrads, on_gpu(self.tiles), **how)
        return [out.get() for out in self.outs]

    def check(self, **how):
        found = self.run(**how)
        for out, expected in zip(found, self.expected, strict=True):
            assert is_nan(out[-1]).all(), "written beyond the experts"
            for e, rows in enumerate(self.rows):
                assert error_of(out[e], expected[e]) < ROUNDED, f"expert {e} of {rows} rows"
                assert rows or (out[e] == 0).all()
        again = self.run(**how)
        assert [out.tobytes() for out in found] == [out.tobytes() for out in again]


@gpu
@pytest.mark.parametrize("columns", [16, 48, 128, 256, 272, 400, 528])
@pytest.mark.parametrize("rows", [16, 64, 80, 128, 144, 256, 400])
def test_wgrad(rows, columns):
    WgradProblems(EDGES, [(rows, columns)], seed=rows + columns).check()


@gpu
@pytest.mark.parametrize("group", [None, 2, 4])
def test_two_wgrads_in_one_launch(group):
    WgradProblems((*EDGES, 700, 0, 1300), [(512, 784), (784, 256)]).check(raster_group=group)
    WgradProblems(MANY, [(400, 1040), (208, 528)]).check(raster_group=group)


@gpu
def test_wgrad_without_rows():
    WgradProblems((0, 0, 0), [(144, 272), (272, 144)]).check()


def wgrad_order_of(rows, shapes, group):
    """The specification of kernels_cu/gemm/wgrad_order.cuh: [steps, 2] of work_tile_dtype."""
    items = []
    for expert in sorted(range(len(rows)), key=lambda e: (-rows[e], e)):
        for kind, (m_size, n_size) in enumerate(shapes):
            items += steps_of(expert, kind, m_size, -(-n_size // 256), group)
    return np.array(items, work_tile_dtype).reshape(-1, 2)


def steps_of(expert, kind, m_size, n_tiles, group):
    def tile(m, n, a, b):
        return (m, n, expert, min(128, m_size - 128 * m), a | b << 2 | kind << 4)

    m_tiles, items = -(-m_size // 128), []
    for first in range(0, n_tiles, group):
        columns = range(first, min(n_tiles, first + group))
        for m in range(0, m_tiles - 1, 2):
            for n in columns:
                items += [tile(m, n, 3, 1), tile(m + 1, n, 3, 2)]
        if m_tiles % 2:
            m = m_tiles - 1
            second_half = 2 if m_size - 128 * m > 64 else 0
            for n in columns[::2]:
                if n + 1 in columns:
                    items += [tile(m, n, 1, 3), tile(m, n + 1, second_half, 3)]
                else:
                    items += [tile(m, n, 3, 3), (-1, 0, expert, 0, kind << 4)]
    return items


@gpu
@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize(
    "shapes", [[(16, 16)], [(400, 1040), (784, 256)], [(1536, 2048), (2048, 768)]]
)
def test_the_order_of_wgrads(shapes, group):
    import cupy as cp

    from cometrt.cuda.grad_gemm import GroupedWgrad, new_wgrad_order

    rows = (*EDGES, 700, 0, 1300, 700)
    expected = wgrad_order_of(rows, shapes, group)
    assert len(expected) == len(rows) * sum(num_wgrad_steps(*shape) for shape in shapes)
    problems = WgradProblems(rows, shapes)
    order = new_wgrad_order(len(rows), shapes)
    wgrads = [
        Wgrad(a, b, o[:-1]) for (a, b), o in zip(problems.operands, problems.outs, strict=True)
    ]
    GroupedWgrad()(wgrads, on_gpu(problems.tiles), order, raster_group=group)
    assert cp.asnumpy(order.counts).tolist() == [len(expected), 0, 0]
    assert (order.items.get().view(work_tile_dtype).reshape(-1, 2) == expected).all()


def test_the_raster_group_is_even_and_no_wider_than_the_clusters():
    assert [wgrad_raster_group(sms) for sms in (2, 16, 32, 132)] == [2, 2, 4, 8]
