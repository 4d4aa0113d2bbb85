"""The layer inside JAX programs on the CPU: in one process with several ranks, and in several."""

import contextlib
import re
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import cometrt
from tests.launch import ROOT, mpirun, python_path

jax = pytest.importorskip("jax", reason="needs JAX")

import jax.numpy as jnp  # noqa: E402

from cometrt.interop import jax as cometrt_jax  # noqa: E402
from cometrt.interop.jax import primitive  # noqa: E402
from tests.jax_cases import (  # noqa: E402
    DEVICES,
    SHARDED,
    arrays_of,
    bits,
    check_equal,
    dense,
    environment,
    epoch_of,
    gradients,
    mapped,
    small_spec,
)


def mesh_of(shape=(DEVICES,), axes=("expert",)):
    devices = jax.devices("cpu")
    if len(devices) < DEVICES:
        pytest.skip("needs JAX with four CPU devices: tests/conftest.py asks for them")
    return jax.sharding.Mesh(np.array(devices[:DEVICES]).reshape(shape), axes)


@pytest.fixture(scope="module")
def layer():
    """(moe, mesh, arrays): a layer on four ranks of this process."""
    mesh, spec = mesh_of(), small_spec()
    with cometrt_jax.connect(mesh, timeout_sec=20) as world, cometrt_jax.MoE(world, spec) as moe:
        yield moe, mesh, arrays_of(spec, DEVICES * spec.max_tokens)


@contextlib.contextmanager
def making(spec, mesh=None, **options):
    with cometrt_jax.connect(mesh, timeout_sec=20, **options) as world:
        moe = cometrt_jax.MoE(world, spec)
        yield moe
        moe.close()


def two_layers(layer):
    return lambda x, *rest: x + layer(jnp.sin(x + layer(x, *rest)), *rest)


def scanned(layer, wrap=lambda body: body):
    """Three layers whose weights differ, in a scan."""

    def function(x, ids, weights, w_up, w_down):
        body = wrap(lambda x, scale: x + layer(x, ids, weights, w_up * scale, w_down))
        scales = jnp.array([0.5, 1, 0.25], x.dtype)
        return jax.lax.scan(lambda x, scale: (body(x, scale), None), x, scales)[0]

    return function


def microbatches(layer, wrap):
    """Independent of each other, with weights of their own: only the program orders them."""

    def function(x, ids, weights, w_up, w_down):
        step = wrap(two_layers(layer))
        return sum(step(x * s, ids, weights, w_up * s, w_down) for s in (1.0, 0.5, 0.25))

    return function


REMAT = jax.checkpoint
SAVING = lambda f: jax.checkpoint(f, policy=cometrt_jax.save_residuals())  # noqa: E731
PROGRAMS = {  # name -> (program of a layer, exchanges of its value and gradient)
    "one layer": (lambda layer: layer, 2),
    "two layers": (two_layers, 4),
    "checkpoint": (lambda layer: REMAT(two_layers(layer)), 6),
    "checkpoint that saves": (lambda layer: SAVING(two_layers(layer)), 4),
    "scan": (scanned, 6),
    "scan of checkpoints": (lambda layer: scanned(layer, REMAT), 9),
    "scan of checkpoints that save": (lambda layer: scanned(layer, SAVING), 6),
    "independent jits": (lambda layer: microbatches(layer, jax.jit), 12),
    "independent checkpoints": (lambda layer: microbatches(layer, REMAT), 18),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients_are_those_of_a_dense_layer(layer, name):
    moe, mesh, arrays = layer
    program, num_exchanges = PROGRAMS[name]
    before = epoch_of(moe.world)
    found = gradients(mapped(program(moe), mesh), arrays)
    moe.check()
    assert epoch_of(moe.world) - before == num_exchanges
    check_equal(found, gradients(program(dense), arrays))


def test_a_checkpoint_around_the_shard_map(layer):
    moe, mesh, arrays = layer
    found = gradients(jax.checkpoint(mapped(two_layers(moe), mesh, check_vma=False)), arrays)
    check_equal(found, gradients(two_layers(dense), arrays))


@pytest.mark.parametrize("save", ["z", "nothing"])
def test_data_parallel_times_expert_parallel(save):
    mesh, spec = mesh_of((2, 2), ("data", "expert")), small_spec(save=save)
    arrays = arrays_of(spec, DEVICES * spec.max_tokens)
    with making(spec, mesh) as moe:
        assert sorted(world.rank for world in moe.world.ranks.values()) == [0, 0, 1, 1]
        axes = ("data", "expert")
        for options in ({}, {"check_vma": False}):
            found = gradients(mapped(moe, mesh, axes, **options), arrays)
            check_equal(found, gradients(dense, arrays))


def test_shards_of_experts_and_bits_of_the_layer():
    """EP x TP in bfloat16: the bits are those of `MoELayer` under `spawn`."""
    spec = small_spec(dtype="bfloat16", tp=2, intermediate=64)
    mesh, (x, ids, weights, *whole) = mesh_of(), arrays_of(spec, DEVICES * spec.max_tokens)
    whole = [np.asarray(array) for array in whole]
    shards = [cometrt.shard_weights(*whole, rank, DEVICES, spec) for rank in range(DEVICES)]
    stacked = [jnp.concatenate([shard[i] for shard in shards]) for i in (0, 1)]
    dy = jnp.sin(x)

    def run(world):
        own = slice(world.rank * spec.max_tokens, (world.rank + 1) * spec.max_tokens)
        with cometrt.MoELayer(world, spec) as layer:
            tables = [np.asarray(array)[own] for array in (x, ids, weights)]
            y, saved = layer.forward(*tables, *shards[world.rank])
            return [y, *layer.backward(np.asarray(dy)[own], saved)]

    expected = [np.concatenate(parts) for parts in zip(*cometrt.spawn(run, DEVICES), strict=True)]
    with making(spec, mesh) as moe:

        @jax.jit
        def step(*arrays):
            y, backward = jax.vjp(mapped(moe, mesh), *arrays)
            dx, _, *others = backward(dy)
            return [y, dx, *others]

        found = step(x, ids, weights, *stacked)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.asarray(ours).tobytes() == theirs.tobytes()


def test_many_steps_with_collectives_around_the_layer(layer):
    moe, mesh, (x, *rest) = layer

    def body(x, *rest):
        y = moe(x, *rest) + 1e-3 * jax.lax.psum(moe(jnp.sin(x), *rest), "expert")
        return y / jnp.sqrt(1e-3 + jnp.square(y).mean())

    step = jax.jit(mapped(body, mesh), donate_argnums=0)
    given = jnp.copy(x)
    for _ in range(20):
        given = step(given, *rest)
    moe.check()
    assert bool(jnp.isfinite(given).all())


def test_donated_arguments_give_the_same_bits(layer):
    """A training step that replaces tokens, tables and weights."""
    moe, mesh, arrays = layer
    function = mapped(moe, mesh)

    def step(x, ids, weights, w_up, w_down):
        def loss(x, weights, w_up, w_down):
            return jnp.square(function(x, ids, weights, w_up, w_down)).sum()

        before = x, weights, w_up, w_down
        value, found = jax.value_and_grad(loss, (0, 1, 2, 3))(*before)
        x, *others = (array - 0.1 * grad for array, grad in zip(before, found, strict=True))
        return [x, (ids + 1) % moe.spec.num_experts, *others, value]

    expected = bits(jax.jit(step)(*arrays))
    given = [jax.device_put(a.copy(), jax.NamedSharding(mesh, SHARDED)) for a in arrays]
    found = jax.jit(step, donate_argnums=range(5))(*given)
    moe.check()
    assert all(array.is_deleted() for array in given)
    assert bits(found) == expected


def test_one_process_alone_jitted_and_not():
    spec = small_spec()
    arrays = arrays_of(spec, 5)
    with making(spec) as moe:
        assert (moe.world.rank, moe.world.size, moe.world.device) == (0, 1, "host")
        check_equal([moe(*arrays)], [dense(*arrays)])
        check_equal([jax.jit(moe)(*arrays)], [dense(*arrays)])
        eager = jax.grad(lambda w_up: moe(*arrays[:3], w_up, arrays[4]).sum())(arrays[3])
        check_equal(
            [eager], [jax.grad(lambda w: dense(*arrays[:3], w, arrays[4]).sum())(arrays[3])]
        )
        empty = jax.jit(moe)(*(array[:0] for array in arrays[:3]), *arrays[3:])
        assert empty.shape == (0, spec.hidden)


def test_a_world_of_connect_may_be_used(tmp_path):
    def run(world):
        with cometrt_jax.MoE(world, small_spec()) as moe:
            return np.asarray(moe(*arrays_of(moe.spec, 4)))

    (y,) = cometrt.spawn(run, 1)
    check_equal([y], [dense(*arrays_of(small_spec(), 4))])


def test_a_call_whose_result_is_not_used_is_made_all_the_same(layer):
    moe, mesh, arrays = layer
    before = epoch_of(moe.world)

    def body(x, *rest):
        moe(x, *rest)
        return x

    jax.block_until_ready(jax.jit(mapped(body, mesh))(*arrays))
    moe.check()
    assert epoch_of(moe.world) == before + 1


# ---- errors ---------------------------------------------------------------------------------


def replaced(arrays, **changes):
    names = ("x", "topk_ids", "topk_weights", "w_up", "w_down")
    return [changes.get(name, array) for name, array in zip(names, arrays, strict=True)]


def test_wrong_arguments_are_refused_when_traced(layer):
    moe, mesh, arrays = layer
    x, ids, _, w_up, _ = arrays
    twice = {
        "x": jnp.tile(x, (2, 1)),
        "topk_ids": jnp.tile(ids, (2, 1)),
        "topk_weights": jnp.tile(arrays[2], (2, 1)),
    }
    wrong = [
        (replaced(arrays, **twice), r"x must have at most max_tokens=8 rows on each rank.*got 16"),
        (replaced(arrays, x=x[:, :16]), r"x must have shape \(T, 32\)"),
        (replaced(arrays, x=x.astype(jnp.bfloat16)), "x must have dtype float32"),
        (replaced(arrays, topk_ids=ids.astype(jnp.uint8)), "topk_ids must have dtype int32 or"),
        (replaced(arrays, w_up=w_up[:4]), r"w_up must have shape \(2, 96, 32\).*got \(1, 96, 32\)"),
    ]
    for given, text in wrong:
        with pytest.raises(ValueError, match=text):
            jax.jit(mapped(moe, mesh))(*given)
    replicated = jax.shard_map(
        moe, mesh=mesh, in_specs=(*[SHARDED] * 4, jax.P()), out_specs=SHARDED
    )
    with pytest.raises(ValueError, match=r"w_down.*shard it over axis 'expert' \(got \(8, 32"):
        jax.jit(replicated)(*arrays)
    moe.check()


def test_outside_of_its_shard_map_it_is_refused(layer):
    moe, _, arrays = layer
    local = [array[: len(array) // DEVICES] for array in arrays]
    with pytest.raises(ValueError, match=r"inside jax\.shard_map over all axes of its mesh"):
        jax.jit(moe)(*local)
    other = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("expert",))
    with pytest.raises(ValueError, match="axis 'expert' has 2 devices here"):
        jax.jit(mapped(moe, other))(*(a[: len(a) // 2] for a in arrays))


def test_a_world_of_processes_is_refused_on_several_devices_of_one():
    mesh, spec = mesh_of(), small_spec()
    with (
        making(spec) as moe,
        pytest.raises(ValueError, match=r"world must come from connect\(mesh"),
    ):
        jax.jit(jax.shard_map(moe, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED))(
            *arrays_of(spec, 32)
        )


def test_other_devices_than_the_worlds_are_refused_when_compiled():
    """In one process results would be right; in several each rank would get another's experts."""
    mesh, spec = mesh_of((2, 2), ("data", "expert")), small_spec()
    arrays = arrays_of(spec, DEVICES * spec.max_tokens)
    axes = ("data", "expert")

    def transposed(devices):
        return jax.sharding.Mesh(devices.T, ("expert", "data"))

    with making(spec, mesh) as moe:
        before = epoch_of(moe.world)
        swapped = mesh.devices[:, ::-1]
        wrong = [jax.sharding.Mesh(swapped, axes), transposed(swapped)]
        for other in wrong:
            order = "cpu:0, cpu:1, cpu:2, cpu:3.*got cpu:1, cpu:0, cpu:3, cpu:2"
            for function in (jax.jit(mapped(moe, other, axes)), mapped(moe, other, axes)):
                with pytest.raises(ValueError, match=order):
                    function(*arrays)
            with pytest.raises(ValueError, match="must have the devices of the world"):
                gradients(mapped(jax.checkpoint(moe), other, axes), arrays)
        with pytest.raises(ValueError, match="must be known"):
            jax.jit(mapped(moe, mesh.abstract_mesh, axes))(
                *(jax.device_put(a, jax.NamedSharding(mesh, jax.P())) for a in arrays)
            )
        moe.check()
        assert epoch_of(moe.world) == before
        check_equal(
            [jax.jit(mapped(moe, transposed(mesh.devices), axes))(*arrays)], [dense(*arrays)]
        )
        moe.check()


def test_several_devices_without_a_shard_map_are_refused_when_compiled():
    mesh, spec = mesh_of(), small_spec()
    sharding = jax.NamedSharding(mesh, SHARDED)
    arrays = [jax.device_put(array, sharding) for array in arrays_of(spec, spec.max_tokens)]
    with making(spec) as moe:
        for call in (moe, jax.jit(moe)):
            with pytest.raises(ValueError, match=r"inside jax\.shard_map.*this one runs on 4"):
                call(*arrays)
        moe.check()
        assert epoch_of(moe.world) == 0


def test_vmap_and_second_derivatives_are_refused():
    spec = small_spec()
    x, *rest = arrays_of(spec, 4)
    with making(spec) as moe:
        with pytest.raises(ValueError, match="moe must not be called under vmap"):
            jax.vmap(lambda x: moe(x, *rest))(jnp.stack([x, x]))
        with pytest.raises(ValueError, match="moe must not be called under vmap"):
            jax.vmap(jax.jit(lambda x: moe(x, *rest)))(jnp.stack([x, x]))
        with pytest.raises(ValueError, match="must be differentiated once"):
            jax.hessian(lambda scale: moe(x * scale, *rest).sum())(1.0)


def test_a_routing_error_comes_at_check_and_at_the_next_call():
    mesh, spec = mesh_of(), small_spec()
    x, ids, *rest = arrays_of(spec, DEVICES * spec.max_tokens)
    wrong = ids.at[3, 1].set(spec.num_experts)
    with making(spec, mesh) as moe:
        program = mapped(moe, mesh)
        step = jax.jit(program)
        for ask in (moe.check, lambda: program(x, ids, *rest)):
            assert bool(jnp.isnan(jax.block_until_ready(step(x, wrong, *rest))).all())
            with pytest.raises(cometrt.RoutingError, match="rank 0"):
                ask()
            moe.check()  # it has been raised for all ranks of the process
        found = gradients(program, (x, wrong, *rest))
        assert all(bool(jnp.isnan(array).all()) for array in found)
        # A program that is compiled already runs on the CPU before anybody has asked.
        check_equal([step(x, ids, *rest)], [dense(x, ids, *rest)])
        with pytest.raises(cometrt.RoutingError):
            moe.check()
        moe.check()


def test_after_close_every_use_is_refused():
    spec = small_spec()
    arrays = arrays_of(spec, 4)
    with making(spec) as moe:
        step = jax.jit(moe)
        step(*arrays)
        moe.close()
        for use in (lambda: moe(*arrays), moe.check):
            with pytest.raises(ValueError, match="layer must be open"):
                use()
        assert bool(jnp.isnan(step(*arrays)).all())
    with pytest.raises(cometrt.RoutingError), making(spec) as moe:
        jax.jit(moe)(arrays[0], arrays[1] + 9, *arrays[2:])  # runs before close gives up the layer
    with making(spec) as moe:  # programs of other layers still run
        check_equal([jax.jit(moe)(*arrays)], [dense(*arrays)])


def test_after_its_world_has_closed_every_use_is_refused():
    spec = small_spec()
    arrays = arrays_of(spec, 4)
    world = cometrt_jax.connect()
    moe = cometrt_jax.MoE(world, spec)
    step = jax.jit(moe)
    step(*arrays)
    world.close()
    for use in (lambda: moe(*arrays), moe.check):
        with pytest.raises(ValueError, match="world must be open"):
            use()
    assert bool(jnp.isnan(step(*arrays)).all())
    with pytest.raises(ValueError, match="world must be open"):
        moe.close()
    moe.close()


def test_a_world_of_several_hosts_is_refused(monkeypatch):
    def refused(world):
        monkeypatch.setattr(cometrt.World, "nodes", 2)
        with pytest.raises(ValueError, match=r"world must be of one host \(got 2 nodes\)"):
            cometrt_jax.MoE(world, small_spec())
        monkeypatch.undo()

    cometrt.spawn(refused, 1, "host")


def test_wrong_worlds():
    mesh = mesh_of()
    with pytest.raises(ValueError, match=r"mesh must be a jax.sharding.Mesh"):
        cometrt_jax.connect((4,))
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's .*got 'ep'"):
        cometrt_jax.connect(mesh, "ep")
    with pytest.raises(ValueError, match="comm must be None if a process has several ranks"):
        cometrt_jax.connect(mesh, comm=object())
    with pytest.raises(ValueError, match="timeout_sec"):
        cometrt_jax.connect(timeout_sec=0)
    with pytest.raises(ValueError, match="world must come from connect"):
        cometrt_jax.MoE(mesh, small_spec())
    with cometrt_jax.connect(mesh) as world:
        with pytest.raises(ValueError, match="rank must be one"):
            world.rank  # noqa: B018
        with pytest.raises(ValueError, match="num_experts must be divisible"):
            cometrt_jax.MoE(world, small_spec(num_experts=6))


def test_several_gpus_of_one_process_are_refused(monkeypatch):
    from cometrt.interop.jax import worlds

    monkeypatch.setattr(worlds, "_kind", lambda device: "cuda")
    with pytest.raises(ValueError, match=r"needs one process for each GPU.*has 4 GPUs of the mesh"):
        cometrt_jax.connect(mesh_of())
    with pytest.raises(ValueError, match=r"needs one process for each GPU.*visible_devices"):
        cometrt_jax.connect()


def test_programs_on_a_gpu_wait_for_no_token_of_an_earlier_one(monkeypatch):
    """Here on a CPU that is said to be a GPU: no token is kept, and the barrier waits all the
    same."""
    from jax._src import dispatch

    ran = []

    def run(context, results, x):
        time.sleep(0.05)
        ran.append(np.asarray(x)[0])

    form = jax.ShapeDtypeStruct((2,), jnp.float32)
    program = jax.jit(lambda x: primitive.buffer_call(run, [form], x)[0])

    def kept():
        tokens = dispatch.runtime_tokens.current_tokens
        return [effect for effect in tokens if isinstance(effect, primitive.CallEffect)]

    jax.effects_barrier()
    program(jnp.ones(2))
    assert kept()
    jax.effects_barrier()
    monkeypatch.setattr(primitive, "_is_on_gpu", lambda token: True)
    for number in range(3):
        program(jnp.full(2, float(number)))
    assert not kept()
    jax.effects_barrier()
    assert ran == [1, 0, 1, 2]


def test_a_process_that_is_alone_under_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    for mesh in (mesh_of(), None):
        with pytest.raises(ValueError, match=r"it started 4 \(PMI_SIZE\).*jax.distributed"):
            cometrt_jax.connect(mesh)


def test_a_rank_that_does_not_come_ends_the_wait():
    from cometrt.interop.jax.bootstrap import LocalStore, StoreComm

    comm = StoreComm(LocalStore(), "alone", rank=1, size=2, timeout_sec=0.1)
    with pytest.raises(cometrt.PeerTimeout, match="rank 0 did not call it"):
        comm.allgather("here")


# ---- several processes --------------------------------------------------------------------------


def test_jit_in_each_process_under_mpirun(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    result = mpirun(2, "-m", "mpi4py", "-m", "tests.multi.run_jax", timeout_sec=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("all is well") == 2, result.stdout + result.stderr


SEVERAL_NODES = """
from mpi4py import MPI
from cometrt.interop import jax
try:
    jax.connect(comm=MPI.COMM_WORLD)
except ValueError as error:
    print(error)
"""


def test_several_nodes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("COMETRT_RANKS_PER_NODE", "1")
    (tmp_path / "nodes.py").write_text(SEVERAL_NODES)
    result = mpirun(2, str(tmp_path / "nodes.py"), timeout_sec=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("needs all ranks on one host (got 2 nodes)") == 2


def run_processes(count: int, *arguments: str, timeout_sec: float = 150) -> list[str]:
    """Run ``python arguments... --process i --port p`` for each process; what they printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments, "--process", str(i), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": python_path()},
        )
        for i in range(count)
    ]
    deadline = time.monotonic() + timeout_sec
    try:
        outputs = [
            process.communicate(timeout=max(1, deadline - time.monotonic()))[0]
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return outputs


def test_processes_without_mpi():
    for output in run_processes(2, "-m", "tests.multi.run_jax_distributed", "--processes", "2"):
        assert "all is well" in output


def test_example(monkeypatch):
    command = [sys.executable, str(ROOT / "examples/jax_moe.py")]
    env = environment() | {"PYTHONPATH": python_path()}
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    check_example(result)


def test_example_under_mpirun(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device in each process
    check_example(mpirun(2, "-m", "mpi4py", "examples/jax_moe.py", timeout_sec=150))


def check_example(result):
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [float(text) for text in re.findall(r"^step \d+: loss (\S+)$", result.stdout, re.M)]
    assert len(losses) == 5  # one process prints them
    assert losses[-1] < 0.5 * losses[0]


def test_readme_code():
    if jax.default_backend() != "cpu":
        pytest.skip("it takes JAX's default devices")
    blocks = re.findall(
        r"^```[a-z]*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (block,) = (block for block in blocks if "cometrt_jax" in block)
    names = {"spec": small_spec()}
    exec(block, names)
    with names["world"], names["moe"]:
        arrays = arrays_of(names["spec"], names["world"].size * names["spec"].max_tokens)
        check_equal([names["layer"](*arrays)], [arrays[0] + dense(*arrays)])


# ---- on a GPU: which addresses a call gets ------------------------------------------------------


class Buffer:
    """Stands for XLA's, at an address of its own."""

    def __init__(self, address, shape, dtype):
        self.address, self.shape, self.dtype = address, shape, np.dtype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_the_address_of_a_buffer_of_xla(dtype):
    from cometrt.interop.jax.cuda_calls import address_of
    from cometrt.interop.jax.primitive import buffer_call

    found = []

    def note(context, results, *operands):
        for buffer in (*results, *operands):
            found.append((address_of(buffer), np.asarray(buffer).ctypes.data))

    x = jnp.ones((4, 3), dtype)
    form = jax.ShapeDtypeStruct(x.shape, x.dtype)
    jax.block_until_ready(jax.jit(lambda *arrays: buffer_call(note, [form], *arrays))(x, x[:, :1]))
    assert len(found) == 3
    assert len({address for address, _ in found}) == 3
    assert all(address == expected for address, expected in found)


class Device(contextlib.nullcontext):
    pass


def cuda_layer(monkeypatch, spec, calls, memsets):
    """A CudaLayer without a GPU: its executor only notes the calls."""
    from cometrt.cuda import buffers
    from cometrt.interop.jax import cuda_calls
    from cometrt.plan import PlanShape, TileConfig
    from cometrt.residuals import array_specs
    from cometrt.specs import Geometry

    shape = PlanShape(Geometry(spec, 0, 2), TileConfig())
    data = types.SimpleNamespace
    cupy = data(
        cuda=data(
            Device=Device,
            Stream=data(
                from_external=lambda stream: contextlib.nullcontext(
                    data(ptr=stream.__cuda_stream__()[1])
                )
            ),
            runtime=data(memsetAsync=lambda *arguments: memsets.append(arguments)),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda_calls, "address_of", lambda buffer: buffer.address)

    def made(layer, world, spec, mode):
        layer.config, layer.spec = shape.config, spec
        layer.executor = data(
            forward_buffers={
                training: buffers.forward_buffers(shape, "fused", training)
                for training in (False, True)
            },
            backward_buffers=buffers.backward_buffers(shape),
            check_running=lambda prefix: None,
            guard=lambda operation: contextlib.nullcontext(),
            enqueue=calls.append,
        )

    saved = array_specs(shape, buffers.residuals(shape))
    monkeypatch.setattr(cometrt.MoELayer, "__init__", made)
    monkeypatch.setattr(cometrt.MoELayer, "residuals", lambda layer, num_tokens: saved)
    monkeypatch.setattr(cuda_calls.CudaLayer, "calling", lambda layer: contextlib.nullcontext())
    return cuda_calls.CudaLayer(object(), spec, None)


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_addresses_of_calls_on_a_gpu(monkeypatch, save):
    spec, calls, memsets = small_spec(dtype="bfloat16", save=save), [], []
    layer = cuda_layer(monkeypatch, spec, calls, memsets)
    addresses = iter(range(1024, 1 << 20, 1024))

    def new(shape=(5, 2), dtype=np.float32):
        return Buffer(next(addresses), shape, dtype)

    def of(buffers):
        return {name: new(shape, dtype) for name, (shape, dtype) in buffers.items()}

    context = types.SimpleNamespace(stream=77)
    arguments = {name: new(dtype=np.int64) for name in ("x", "ids", "weights", "w_up", "w_down")}
    y, kept = new(), of(layer.kept)
    for training in (False, True):
        scratch = of(layer.forward_scratch(training))
        saved = list(kept.values()) if training else []
        layer.forward_into(context, list(arguments.values()), y, saved, list(scratch.values()))
        call = calls.pop()
        assert (call.operation, call.num_tokens, call.ids_are_64) == ("forward", 5, True)
        expected = arguments | {"out": y} | scratch
        if training:
            own = {"x": "x_rows" if save == "rows" else "saved_x"}
            expected |= {own.get(name, name): buffer for name, buffer in kept.items()}
        expected = {name: buffer.address for name, buffer in expected.items()}
        assert call.at == expected
    names = ["out", "out_dweight", "dw_up", "dw_down"]
    dy, results = new(), {name: new((3,), spec.numpy_dtype) for name in names}
    weights = {name: arguments[name] for name in ("w_up", "w_down")}
    scratch = of(layer.backward_scratch())
    parts = (list(each.values()) for each in (kept, weights, results, scratch))
    layer.backward_into(context, dy, *parts)
    (call,) = calls
    given = {own.get(name, name): buffer for name, buffer in kept.items()}
    expected = {"dy": dy} | given | weights | results | scratch
    addresses = {name: buffer.address for name, buffer in expected.items()}
    assert call.at == addresses
    layer.fail(context, list(results.values()), ())
    assert memsets == [(results[name].address, 0xFF, 6, 77) for name in names]
    memsets.clear()
    layer.fail(context, [y], list(kept.values()))  # its backward finds 0 in place of the epoch
    assert memsets == [(y.address, 0xFF, 40, 77), (kept["epoch"].address, 0, 8, 77)]
