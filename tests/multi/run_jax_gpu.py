"""One process, one GPU, one rank: programs of JAX against a dense layer, and bits of CuPy calls.

python -m tests.multi.run_jax_gpu
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import cometrt
from cometrt.interop import jax as cometrt_jax
from cometrt.interop.jax.primitive import buffer_call
from tests.jax_cases import arrays_of, bits, dense, gradients, small_spec, step_of


def test_programs(moe, arrays):
    from tests.host.test_jax import PROGRAMS

    for name, (program, num_exchanges) in PROGRAMS.items():
        found = gradients(program(moe), arrays)
        moe.check()
        expected = gradients(program(dense), arrays)
        for ours, theirs in zip(found, expected, strict=True):
            wide = np.asarray(theirs, np.float32)
            error = np.linalg.norm(np.asarray(ours, np.float32) - wide) / np.linalg.norm(wide)
            assert error < 3e-2, (name, num_exchanges, error)
        print(f"{name}: agrees", flush=True)


def test_bits(moe, arrays, own):
    import cupy

    dy, step = jnp.sin(arrays[0]), step_of(moe)
    with cometrt.MoELayer(own, moe.spec) as layer:
        y, saved = layer.forward(*map(cupy.from_dlpack, arrays))
        grads = layer.backward(cupy.from_dlpack(dy), saved)
        expected = [array.get() for array in (y, *grads)]
    for _ in range(3):
        assert bits(step(dy, *arrays)) == bits(expected)


def test_after_a_failed_call_later_ones_wait_for_the_check(moe, arrays):
    x, ids, *rest = arrays
    step = jax.jit(moe)
    expected = bits([step(*arrays)])
    for given in ([x, ids.at[3, 1].set(99), *rest], arrays, arrays):
        assert bool(jnp.isnan(step(*given)).all())
    try:
        moe.check()
    except cometrt.RoutingError:
        pass
    else:
        raise AssertionError("check did not raise")
    assert bits([step(*arrays)]) == expected
    moe.check()


def test_independent_calls_keep_their_order():
    """Of arrays of any sizes; XLA by itself would order them by size."""
    log = []

    def note(number, *_buffers):
        log.append(number)

    notes = [functools.partial(note, number) for number in range(4)]

    @jax.jit
    def program(*arrays):
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        calls = zip(notes, shapes, arrays, strict=True)
        return [buffer_call(run, [shape], 2 * array)[0] for run, shape, array in calls]

    for sizes in itertools.permutations((16, 1 << 10, 1 << 16, 1 << 22)):
        log.clear()
        jax.block_until_ready(program(*(jnp.ones(size) for size in sizes)))
        assert log == [0, 1, 2, 3], (sizes, log)


def test_a_program_does_not_wait_for_the_one_before(moe, arrays):
    step, dy, square = step_of(moe), jnp.sin(arrays[0]), jnp.ones((8192, 8192), jnp.bfloat16)
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 50, lambda _, b: (a @ b) * 1e-4, a))
    jax.block_until_ready([busy(square), step(dy, *arrays)])
    first = busy(square)  # tens of milliseconds
    results = [step(dy, *arrays) for _ in range(3)]
    assert not first.is_ready()
    jax.block_until_ready(results)


def test_no_memory_is_taken_in_a_loop(moe, arrays):
    import cupy

    step = step_of(moe)
    dy = jnp.sin(arrays[0])
    jax.block_until_ready([step(dy, *arrays) for _ in range(3)])
    before = cupy.get_default_memory_pool().total_bytes()
    jax.block_until_ready([step(dy, *arrays) for _ in range(20)])
    assert cupy.get_default_memory_pool().total_bytes() == before


def main() -> None:
    jax.config.update("jax_cuda_visible_devices", "0")  # before JAX starts
    spec = small_spec(dtype="bfloat16", hidden=64, intermediate=64, max_tokens=64)
    arrays = arrays_of(spec, 48)
    with cometrt_jax.connect() as world:
        with cometrt_jax.MoE(world, spec) as moe:
            test_independent_calls_keep_their_order()
            test_programs(moe, arrays)
            test_bits(moe, arrays, next(iter(world.ranks.values())))
            test_a_program_does_not_wait_for_the_one_before(moe, arrays)
            test_after_a_failed_call_later_ones_wait_for_the_check(moe, arrays)
            test_no_memory_is_taken_in_a_loop(moe, arrays)
        print(f"on {world.device}: all is well", flush=True)


if __name__ == "__main__":
    main()
