"""The grouped GEMM engine's backward forms against float64."""

import numpy as np
import pytest

from cometrt.activations import ACTIVATIONS, activate, activate_backward, is_gated
from cometrt.cuda.wgrad import Wgrad, num_wgrad_steps, wgrad_raster_group
from cometrt.plan.tile_order import work_tile_dtype
from tests.device.test_engine import EDGES, error_of, on_gpu, tiles_of

gpu = pytest.mark.gpu
MANY = tuple(np.random.default_rng(1).integers(0, 900, 24))
ROUNDED = 3e-3  # bound on the relative error of results that are rounded to bf16 once


def is_nan(array):
    return np.isnan(array.astype(np.float32))


def random_rows(tiles, rows, columns, rng):
    """Random rows [rows, columns] bf16, zero in padding rows; and the mask of real rows [rows]."""
    import ml_dtypes

    values = np.zeros((tiles.num_rows + 256, columns), ml_dtypes.bfloat16)
    real = np.zeros(len(values), bool)
    for n, begin in zip(rows, tiles.expert_offsets[:-1], strict=True):
        values[begin : begin + n] = rng.standard_normal((n, columns))
        real[begin : begin + n] = True
    return values, real


# ---- activation gradients ------------------------------------------------------------------


class Dgrad:
    """A problem: random operands, and the float64 result."""

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
        from cometrt.cuda.dgrad import GroupedDgrad, dgrad_n_tiles
        from cometrt.cuda.engine import order_tiles

        gemm = GroupedDgrad()
        order = order_tiles(on_gpu(self.tiles), dgrad_n_tiles(self.out.shape[1]))
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


# ---- the down GEMM's activation gradient, and what follows from it --------------------------


def norm_of_rows(array):
    return np.linalg.norm(array, axis=1, keepdims=True)


class DownDgrad:
    """A problem: random operands, and all results in float64 from the unrounded da'.

    Args:
        scale: factors of the rows of dy; row i has factor i modulo their number.
    """

    def __init__(self, rows, columns, inner, activation, seed=0, scale=(1.0,)):
        import cupy as cp
        import ml_dtypes

        rng = np.random.default_rng(seed)
        self.activation, halves = activation, 2 if is_gated(activation) else 1
        self.tiles = tiles_of(rows, seed)
        dy, self.real = random_rows(self.tiles, rows, inner, rng)
        dy = (dy.astype(np.float32) * np.resize(scale, (len(dy), 1))).astype(dy.dtype)
        z, _ = random_rows(self.tiles, rows, halves * columns, rng)
        w = (rng.standard_normal((len(rows), inner, columns)) / np.sqrt(inner)).astype(dy.dtype)
        weight = np.where(self.real, rng.random(len(dy)), 0).astype(np.float32)
        da = np.zeros((len(dy), columns))
        for e, begin in enumerate(self.tiles.expert_offsets[:-1]):
            of = slice(begin, begin + rows[e])
            da[of] = dy[of].astype(np.float64) @ w[e].astype(np.float64)
        wide, by_row = z.astype(np.float64), weight[:, None].astype(np.float64)
        a = activate(activation, wide).astype(dy.dtype).astype(np.float64)
        self.n_tiles = -(-columns // 256)
        self.expected = {
            "dz": activate_backward(activation, wide, by_row * da),
            "weighted_a": by_row * a,
            "dweight": np.stack(
                [(da * a)[:, 256 * n : 256 * (n + 1)].sum(1) for n in range(self.n_tiles)], axis=1
            ),
        }
        self.sizes = {n: norm_of_rows(self.expected[n]) for n in ("dz", "weighted_a")}
        self.sizes["dweight"] = norm_of_rows(da) * norm_of_rows(a)  # the sum itself may cancel
        self.inputs = [cp.asarray(array) for array in (dy, w, z, weight)]
        bf16 = np.dtype(ml_dtypes.bfloat16)
        self.outs = {
            "dz": cp.empty(z.shape, bf16),
            "weighted_a": cp.empty(da.shape, bf16),
            "dweight": cp.empty((len(dy), self.n_tiles), np.float32),
        }

    def run(self, fill=lambda: None, **how):
        """fill: called when the results are poisoned, before the launch."""
        from cometrt.cuda.dgrad import GroupedDownDgrad
        from cometrt.cuda.engine import order_tiles

        order = order_tiles(on_gpu(self.tiles), self.n_tiles)
        for out in self.outs.values():
            out.fill(np.nan)
        fill()
        GroupedDownDgrad(self.activation)(*self.inputs, *self.outs.values(), order, **how)
        return {name: out.get() for name, out in self.outs.items()}

    def errors(self, found):
        """Errors relative to each row's norm, so that small rows count as much as large ones."""
        result = {}
        for name, expected in self.expected.items():
            size = self.sizes[name][self.real]
            size = np.where(size > 0, size, 1)
            of, out = expected[self.real], found[name][self.real].astype(np.float64)
            result[name] = error_of(out / size, of / size)
        return result

    def check(self, **how):
        found, used = self.run(**how), self.tiles.num_rows
        for name, out in found.items():
            assert is_nan(out[used:]).all(), f"{name} beyond the tiles"
            assert (out[:used][~self.real[:used]] == 0).all(), f"padding of {name}"
        errors = self.errors(found)
        # One rounding to bf16 each: 1.66e-3 on average. With da' in bf16 dz would have 2.35e-3.
        assert errors["dz"] < 1.85e-3, errors
        assert errors["weighted_a"] < 1.85e-3, errors
        assert errors["dweight"] < 3e-4, errors
        again = self.run(**how)
        assert all(found[n][:used].tobytes() == again[n][:used].tobytes() for n in found)
        for array in self.inputs[:1] + self.inputs[2:]:  # NaN in padding rows changes nothing
            array[~self.real] = np.nan
        again = self.run(**how)
        assert all(found[n][:used].tobytes() == again[n][:used].tobytes() for n in found)


@gpu
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("columns", "inner"), [(16, 16), (48, 80), (256, 512), (272, 528), (400, 1040), (768, 2064)]
)
def test_down_dgrad(columns, inner, activation):
    DownDgrad(EDGES, columns, inner, activation, seed=columns).check()


@gpu
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("columns", "inner"), [(48, 80), (400, 1040)])
def test_dz_may_be_written_where_z_lies(columns, inner, activation):
    problem = DownDgrad(EDGES, columns, inner, activation, seed=columns)
    expected, used = problem.run(), problem.tiles.num_rows
    z = problem.inputs[2].copy()
    problem.outs["dz"] = problem.inputs[2]
    for _ in range(3):
        found = problem.run(fill=lambda: problem.inputs[2].__setitem__(slice(None), z))
        for name, out in expected.items():
            assert found[name][:used].tobytes() == out[:used].tobytes(), name


@gpu
def test_down_dgrad_of_many_tiles():
    DownDgrad(MANY, 528, 1040, "swiglu").check()
    DownDgrad(MANY, 272, 208, "relu2").check(sms=10)
    DownDgrad((0, 0), 64, 64, "geglu").check()


@gpu
def test_down_dgrad_of_rows_of_any_size():
    # In fp16 without a scale, many of these rows would be 0 or infinite.
    DownDgrad(EDGES, 272, 528, "swiglu", scale=10.0 ** np.arange(-25, 30, 5)).check()


@gpu
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_down_dgrad_keeps_what_is_not_finite_in_its_row(value):
    problem = DownDgrad((200,), 272, 528, "gelu")
    good = problem.run()
    problem.inputs[0][3, 7] = value
    found = problem.run()
    for name in ("dz", "dweight"):
        assert not np.isfinite(found[name][3].astype(np.float32)).any()
    for name, out in found.items():  # all other rows have the same bits
        assert np.delete(out[:200], 3, 0).tobytes() == np.delete(good[name][:200], 3, 0).tobytes()


# ---- weight gradients ----------------------------------------------------------------------


class WgradProblems:
    """Random operands of gradients of these shapes, and the float64 results.

    Padding rows are zero up to the next multiple of 64, and NaN after it: those must not be read.

    Args:
        rows: of each plan expert.
        float32: indices of the results that are float32.
        row_sets: how many plan experts have a gradient in common.

    Attributes:
        rows: of each expert, in all row sets.
    """

    def __init__(self, rows, shapes, seed=0, float32=(), row_sets=1):
        import cupy as cp
        import ml_dtypes

        rng = np.random.default_rng(seed)
        self.shapes, self.tiles, self.row_sets = shapes, tiles_of(rows, seed), row_sets
        self.rows = np.reshape(rows, (row_sets, -1)).sum(axis=0).tolist()
        self.expected, self.operands, self.outs = [], [], []
        for columns in shapes:
            a, b = (random_rows(self.tiles, rows, n, rng)[0] for n in columns)
            expected = np.zeros((len(self.rows), *columns))
            for p, (begin, end) in enumerate(
                zip(self.tiles.expert_offsets[:-1], self.tiles.expert_offsets[1:], strict=True)
            ):
                of = slice(begin, begin + rows[p])
                product = a[of].astype(np.float64).T @ b[of].astype(np.float64)
                expected[p % len(expected)] += product
                unread = slice(begin + -(-rows[p] // 64) * 64, end)
                a[unread], b[unread] = np.nan, np.nan
            a[self.tiles.num_rows :], b[self.tiles.num_rows :] = np.nan, np.nan
            self.expected.append(expected)
            self.operands.append((cp.asarray(a), cp.asarray(b)))
            # Room for one more expert, which must not be written.
            dtype = np.float32 if len(self.outs) in float32 else ml_dtypes.bfloat16
            self.outs.append(cp.empty((len(expected) + 1, *columns), dtype))
        self.old = [(3 * rng.standard_normal(out.shape)).astype(out.dtype) for out in self.outs]

    def run(self, *, accumulate=False, **how):
        from cometrt.cuda.wgrad import GroupedWgrad

        wgrads, how = [], {"row_sets": self.row_sets, "accumulate": accumulate, **how}
        for (a, b), out, old in zip(self.operands, self.outs, self.old, strict=True):
            if accumulate:
                out.set(old)
            else:
                out.fill(np.nan)
            wgrads.append(Wgrad(a, b, out[:-1]))
        GroupedWgrad().ordered(wgrads, on_gpu(self.tiles), **how)()
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

    def check_accumulated(self, **how):
        """Check old + sum, rounded once. Experts without rows keep their old values."""
        found, sums = self.run(accumulate=True, **how), self.run(**how)
        again = self.run(accumulate=True, **how)
        assert [out.tobytes() for out in found] == [out.tobytes() for out in again]
        for out, old, alone, expected in zip(found, self.old, sums, self.expected, strict=True):
            assert out[-1].tobytes() == old[-1].tobytes(), "written beyond the experts"
            for e, rows in enumerate(self.rows):
                if rows == 0:
                    assert out[e].tobytes() == old[e].tobytes()
                elif out.dtype == np.float32:
                    assert out[e].tobytes() == (old[e] + alone[e]).tobytes()
                else:
                    exact = old[e].astype(np.float64) + expected[e]
                    # Half a unit in the last place of bf16, and the float32 sum's own error.
                    bound = 2.0**-8 * np.abs(exact) + 1e-3
                    assert (np.abs(out[e].astype(np.float64) - exact) <= bound).all()


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
@pytest.mark.parametrize("float32", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("shapes", [[(16, 16), (16, 16)], [(400, 528), (528, 208)]])
def test_wgrads_are_written_and_accumulated_in_both_types(shapes, float32):
    for rows in (EDGES, (0, 300, 0, 1300)):
        problems = WgradProblems(rows, shapes, float32=float32)
        problems.check()
        problems.check_accumulated()


@gpu
@pytest.mark.parametrize("float32", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    "rows",
    [
        (384, 385, 448, 449, 513),  # 6 to 9 K blocks: the last tile leaves at once, or in steps
        (2300, 1, 700, 0, 130, 1024),  # long, short and no main loops in turns
    ],
)
def test_few_sms_write_and_accumulate_many_tiles_each(rows, float32):
    problems = WgradProblems(rows, [(208, 784), (144, 272)], float32=float32)
    problems.check(sms=4)
    problems.check_accumulated(sms=4)


@gpu
@pytest.mark.parametrize("columns", [16, 32, 48, 80, 144, 240, 256, 304])
@pytest.mark.parametrize("rows", [16, 112, 144])
def test_wgrad_boxes_at_the_edges(rows, columns):
    # A box has 16 rows of 32 float32 or 64 bf16 columns.
    shapes = [(rows, columns), (columns, rows)]
    problems = WgradProblems((600, 65), shapes, float32=(0,))
    problems.check(sms=2)
    problems.check_accumulated(sms=2)


@gpu
@pytest.mark.parametrize("float32", [(), (0, 1)])
def test_wgrad_without_rows(float32):
    problems = WgradProblems((0, 0, 0), [(144, 272), (272, 144)], float32=float32)
    problems.check()
    problems.check_accumulated()


SETS = {  # rows of each plan expert, by the number of row sets
    2: (
        *(0, 1, 63, 64, 65, 129, 0, 300),
        *(129, 65, 64, 63, 1, 0, 0, 900),
    ),
    3: (
        *(0, 1, 63, 64, 65, 129, 0, 0, 700),
        *(129, 0, 64, 0, 1, 63, 0, 65, 0),
        *(65, 64, 0, 129, 63, 1, 0, 0, 500),
    ),
    5: (*(0, 0), *(0, 129), *(64, 0), *(0, 0), *(65, 1)),
}


@gpu
@pytest.mark.parametrize("float32", [(), (0,), (0, 1)])
@pytest.mark.parametrize("shapes", [[(144, 272), (272, 144)], [(400, 528), (528, 208)]])
@pytest.mark.parametrize("row_sets", SETS)
def test_wgrads_are_summed_over_row_sets(row_sets, shapes, float32):
    problems = WgradProblems(SETS[row_sets], shapes, float32=float32, row_sets=row_sets)
    for sms in (None, 4):
        problems.check(sms=sms)
        problems.check_accumulated(sms=sms)


@gpu
def test_wgrads_without_rows_in_any_set():
    problems = WgradProblems((0,) * 6, [(144, 272), (272, 144)], row_sets=3)
    problems.check()
    problems.check_accumulated()


@gpu
def test_one_set_of_all_rows_gives_the_bits_of_several():
    """Where each set but the last is a multiple of 64 rows: K blocks are the same then."""
    import cupy as cp

    rows, shapes = (128, 256, 0, 128, 77, 65), [(400, 528)]
    several = WgradProblems(rows, shapes, row_sets=3)
    one = WgradProblems(several.rows, shapes)
    for to, of in zip(one.operands[0], several.operands[0], strict=True):
        for expert, begin in enumerate(one.tiles.expert_offsets[:-1].tolist()):
            for p in range(expert, len(rows), 2):
                first, used = int(several.tiles.expert_offsets[p]), -(-rows[p] // 64) * 64
                to[begin : begin + used] = of[first : first + used]
                begin += used
    cp.cuda.get_current_stream().synchronize()
    assert several.run()[0].tobytes() == one.run()[0].tobytes()


def wgrad_order_of(rows, shapes, group):
    """The specification of kernels_cu/gemm/wgrad_order.cuh: [steps, 2] of work_tile_dtype. rows: of
    each expert, in all row sets."""
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

    from cometrt.cuda.wgrad import GroupedWgrad, WgradOrder

    rows = (*EDGES, 700, 0, 1300, 700)
    expected = wgrad_order_of(rows, shapes, group)
    assert len(expected) == len(rows) * sum(num_wgrad_steps(*shape) for shape in shapes)
    problems = WgradProblems(rows, shapes)
    order = WgradOrder(len(rows), shapes)
    wgrads = [
        Wgrad(a, b, o[:-1]) for (a, b), o in zip(problems.operands, problems.outs, strict=True)
    ]
    GroupedWgrad().ordered(wgrads, on_gpu(problems.tiles), order, raster_group=group)()
    assert cp.asnumpy(order.counts).tolist() == [len(expected), 0, 0]
    assert (order.tiles() == expected).all()


@gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("row_sets", SETS)
def test_the_order_of_wgrads_follows_the_rows_of_all_sets(row_sets, accumulate):
    import cupy as cp

    from cometrt.cuda.wgrad import GroupedWgrad, WgradOrder

    shapes = [(400, 1040), (784, 256)]
    problems = WgradProblems(SETS[row_sets], shapes, row_sets=row_sets)
    expected = wgrad_order_of(problems.rows, shapes, 4)
    if accumulate:  # experts without rows come last
        used = sum(rows > 0 for rows in problems.rows)
        expected = expected[: len(expected) // len(problems.rows) * used]
    order = WgradOrder(len(problems.rows), shapes)
    how = {"raster_group": 4, "row_sets": row_sets, "accumulate": accumulate}
    wgrads = [
        Wgrad(a, b, o[:-1]) for (a, b), o in zip(problems.operands, problems.outs, strict=True)
    ]
    GroupedWgrad().ordered(wgrads, on_gpu(problems.tiles), order, **how)()
    assert cp.asnumpy(order.counts).tolist() == [len(expected), 0, 0]
    assert (order.tiles() == expected).all()


def test_the_raster_group_is_even_and_no_wider_than_the_clusters():
    assert [wgrad_raster_group(sms) for sms in (2, 16, 32, 132)] == [2, 2, 4, 8]
