"""M distributed over devices: 8 virtual ones in a process, and 2 processes that talk over loopback.

Devices are made when JAX starts, so each run is a process of its own; this file is also its program.
"""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from environment import SEED, of_devices, rarely

HERE = Path(__file__)


# the programs ----------------------------------------------------------------------------------------


def specs():
    """Rows that divide among 8 devices and rows that do not, with and without taps that meet."""
    import jaxconv_fc as fc

    return {
        "even": fc.conv_spec((1, 3, 8, 8), (8, 3, 3, 3), (1, 1), "SAME"),
        "uneven": fc.conv_spec((1, 2, 7, 5), (3, 2, 3, 2), (2, 1), [(2, 0), (1, 1)]),
        "reflect": fc.conv_spec((1, 2, 6, 5), (3, 2, 3, 3), (1, 1), "SAME", padding_mode="reflect"),
        "NHWC": fc.conv_spec(
            (1, 6, 6, 4), (3, 3, 2, 4), (1, 1), "SAME", (2, 1), None, ("NHWC", "HWIO", "NHWC"), 2
        ),
        "fewer rows than devices": fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID"),
    }


def local(array):
    """{first index on axis 0: block} of what this process holds of an array."""
    return {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}


def check(mesh, specs):
    """Both sharded builders against the oracle, on every block that this process holds."""
    import jax
    import jax.numpy as jnp

    import jaxconv_fc as fc

    devices = mesh.size
    for name, spec in specs.items():
        rng = np.random.default_rng(0)
        kernel = rng.integers(-4, 5, spec.rhs_shape).astype(np.float32)
        x = rng.integers(-4, 5, spec.in_size).astype(np.float32)
        y = rng.integers(-4, 5, spec.out_size).astype(np.float32)
        want = oracle.matrix(kernel, spec)
        stored = oracle.pattern(spec).sum(axis=1)  # of each row
        share = -(-spec.out_size // devices)
        padded = np.pad(want, ((0, share * devices - spec.out_size), (0, 0)))

        dense = fc.shard_matrix(spec, kernel, mesh)
        assert dense.shape == padded.shape, name
        for start, block in local(dense).items():
            assert block.shape == (share, spec.in_size), name
            np.testing.assert_array_equal(block, padded[start : start + share])
        sparse = fc.shard_bcoo(spec, kernel, mesh)
        assert sparse.shape == spec.shape, name
        indices = local(sparse.indices)
        for start, data in local(sparse.data).items():
            first = start // len(data) * share
            block = np.zeros((share, spec.in_size), np.float32)
            kept = indices[start][:, 0] < spec.out_size
            row, column = indices[start][kept].T
            np.add.at(block, (row - first, column), data[kept])
            np.testing.assert_array_equal(block, padded[first : first + share])
            assert kept.sum() == stored[first : first + share].sum()
        most = max(stored[n : n + share].sum() for n in range(0, spec.out_size, share))
        assert {len(data) for data in local(sparse.data).values()} == {most}, name
        # A padded share ends with one repeated index beyond those of the next share: not unique, not sorted.
        full = most * devices == stored.sum()
        assert (sparse.indices_sorted, sparse.unique_indices) == (full, full), name
        nbytes = most * (4 + 2 * sparse.indices.dtype.itemsize)
        with fc.memory_limit(nbytes):
            fc.shard_bcoo(spec, kernel, mesh)
        with fc.memory_limit(nbytes - 1), pytest.raises(ValueError, match=r"shard_bcoo: .* more devices"):
            fc.shard_bcoo(spec, kernel, mesh)

        # One program from kernel to result: the matrix is made, used and dropped on the devices.
        def products(build, kernel, x, y, spec=spec):
            matrix = build(spec, kernel, mesh)
            y = jnp.pad(y, (0, matrix.shape[0] - len(y)))
            return (matrix @ x)[: spec.out_size], matrix.T @ y

        for build in (fc.shard_matrix, fc.shard_bcoo):
            run = jax.jit(products, static_argnums=0, out_shardings=jax.NamedSharding(mesh, jax.P()))
            mx, mty = run(build, kernel, x, y)
            np.testing.assert_array_equal(local(mx)[0], want @ x, err_msg=name)
            np.testing.assert_array_equal(local(mty)[0], want.T @ y, err_msg=name)


def check_program(mesh):
    """Shares are an eighth of the whole; the compiled programs hold no more and gather no matrix."""
    import jax
    import jax.numpy as jnp

    import jaxconv_fc as fc

    spec = specs()["even"]
    kernel = np.random.default_rng(1).standard_normal(spec.rhs_shape, np.float32)
    x, y = np.ones(spec.in_size, np.float32), np.ones(spec.out_size, np.float32)
    dense, sparse = fc.shard_matrix(spec, kernel, mesh), fc.shard_bcoo(spec, kernel, mesh)
    assert len(dense.addressable_shards) == 8
    for shard in dense.addressable_shards:
        assert shard.data.nbytes == spec.nbytes().dense // 8
    for data, indices in zip(sparse.data.addressable_shards, sparse.indices.addressable_shards, strict=True):
        assert abs(data.data.nbytes + indices.data.nbytes - spec.nbytes().bcoo / 8) < 1
    assert len({shard.device for shard in sparse.data.addressable_shards}) == 8
    assert sparse.indices_sorted
    assert sparse.unique_indices

    def largest(compiled):
        """Entries of the largest array that one device holds, and what is sent between devices."""
        text = compiled.as_text()
        sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\[(\d[\d,]*)\]", text)]
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        sent = re.findall(rf"= (\S+) ({kinds})", text)
        counts = [np.prod([int(n) for n in re.findall(r"\d+", shape)[1:]]) for shape, _ in sent]
        return max(sizes), max(counts, default=0), {kind for _, kind in sent}

    build = jax.jit(lambda kernel: fc.shard_matrix(spec, kernel, mesh)).lower(kernel).compile()
    entries, _, kinds = largest(build)
    assert not kinds
    assert entries <= spec.out_size * spec.in_size // 8
    build = jax.jit(lambda kernel: fc.shard_bcoo(spec, kernel, mesh).data).lower(kernel).compile()
    entries, _, kinds = largest(build)
    assert not kinds
    assert entries < spec.nse, "the pattern of one share, padding included, is less than the whole"

    for matrix in (dense, sparse):
        for product, vector in ((lambda m, x: m @ x, x), (lambda m, y: m.T @ y, y)):
            _, sent, kinds = largest(jax.jit(product).lower(matrix, vector).compile())
            assert sent <= max(spec.shape), kinds
    gradient = jax.jit(jax.grad(lambda k: ((fc.shard_matrix(spec, k, mesh) @ x) ** 2).sum()))(kernel)
    want = jax.grad(lambda k: (fc.apply(spec, k, x.reshape(spec.in_shape)) ** 2).sum())(jnp.asarray(kernel))
    np.testing.assert_allclose(gradient, want, rtol=1e-4)


def check_data_parallel(most):
    """With the batch shared by all devices, every product sends one sum and gathers nothing: in so many
    forms, others from run to run."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxconv_fc as fc

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    shared, whole = jax.NamedSharding(mesh, jax.P("batch")), jax.NamedSharding(mesh, jax.P())
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"

    def sent(function, *operands):
        program = jax.jit(function).lower(*operands).compile().as_text()
        return re.findall(rf" ({kinds})(?:-start)?\(", program)

    def ones(shape, sharding=whole):
        return jax.device_put(jnp.ones(shape), sharding)

    # (positions, kernel, groups, options) of each form that the CPU has
    last, three = ("NHWC", "HWIO", "NHWC"), ("NDHWC", "DHWIO", "NDHWC")
    forms = {
        "depthwise": ((6, 6), (3, 3, 1, 4), 4, {}),
        "one axis": ((40,), (3, 1, 4), 4, {"dimension_numbers": ("NWC", "WIO", "NWC")}),
        "few channels": ((6, 6), (3, 3, 1, 1), 1, {}),
        "groups of few channels": ((6, 6), (3, 3, 2, 8), 4, {}),
        "a few groups": ((6, 6), (3, 3, 8, 32), 4, {}),
        "one tap": ((6, 6), (1, 1, 8, 8), 1, {}),
        "three axes": ((4, 4, 4), (3, 3, 3, 8, 8), 1, {"dimension_numbers": three}),
        "a convolution": ((6, 6), (3, 3, 8, 8), 1, {}),
        "dilated input": ((6, 6), (4, 4, 8, 8), 1, {"lhs_dilation": (2, 2)}),
        "circular": ((6, 6), (3, 3, 1, 4), 4, {"padding_mode": "circular"}),
    }
    for name in (list(forms)[(SEED + i) % len(forms)] for i in range(most)):
        positions, kernel, groups, options = forms[name]
        options = {"dimension_numbers": last} | options
        padding = [(1, 1)] * len(positions)
        image = (*positions, kernel[-2] * groups)
        spec = fc.conv_spec(
            (1, *image), kernel, (1,) * len(positions), padding, feature_group_count=groups, **options
        )
        batched = jax.vmap(lambda k, x, spec=spec: fc.apply(spec, k, x), (None, 0))
        k, x = ones(kernel), ones((16, *image), shared)
        y = ones(jax.eval_shape(batched, k, x).shape, shared)

        def three(k, x, y, f=batched):  # of them the kernel gradient alone is a sum over the batch
            ahead, pull = jax.vjp(f, k, x)
            return ahead, pull(y)

        assert sent(three, k, x, y) == ["all-reduce"], name

    def loss(kernels, x):
        for k, stride, groups in zip(kernels, (2, 1, 1, 1), (1, 1, 8, 1), strict=True):
            x = lax.conv_general_dilated(
                x, k, (stride,) * 2, "SAME", dimension_numbers=last, feature_group_count=groups
            )
            x = jax.nn.relu(x)
        return (x**2).mean()

    kernels = [ones(shape) for shape in ((3, 3, 3, 4), (1, 1, 4, 8), (3, 3, 1, 8), (1, 1, 8, 4))]
    ours, lax_s = (
        sent(jax.value_and_grad(f), kernels, ones((16, 8, 8, 3), shared))
        for f in (fc.with_products(loss), loss)
    )
    assert set(ours) == {"all-reduce"}
    assert len(ours) <= len(lax_s), (ours, lax_s)


def one_process(most):
    import jax

    mesh = jax.make_mesh((8,), ("rows",))
    check(mesh, specs())
    check_program(mesh)
    check_data_parallel(int(most))
    # Rows along one axis of two, copies along the other.
    import jaxconv_fc as fc

    spec, mesh = specs()["uneven"], jax.make_mesh((2, 4), ("data", "rows"))
    kernel = np.ones(spec.rhs_shape, np.float32)
    for axis_name, count in (("rows", 4), ("data", 2), (None, 2)):  # the first axis, where none is named
        shards = fc.shard_matrix(spec, kernel, mesh, axis_name).addressable_shards
        assert {shard.data.shape[0] for shard in shards} == {-(-spec.out_size // count)}
    # A mesh whose axes are explicit for the whole program.
    mesh = jax.make_mesh((8,), ("rows",))
    with jax.set_mesh(mesh):
        for build in (lambda k: fc.shard_matrix(spec, k, mesh), lambda k: fc.shard_bcoo(spec, k, mesh).data):
            for made in (build(kernel), jax.jit(build)(kernel)):
                assert jax.typeof(made).sharding.spec[0] == "rows"
        dense = fc.shard_matrix(spec, kernel, mesh)
        np.testing.assert_array_equal(np.asarray(dense)[: spec.out_size], fc.as_matrix(spec, kernel))
        x = np.arange(spec.in_size, dtype=np.float32)
        gradient = jax.grad(lambda k: (fc.shard_matrix(spec, k, mesh) @ x).sum())(kernel)
    want = jax.grad(lambda k: (fc.as_matrix(spec, k) @ x).sum())(kernel)
    np.testing.assert_array_equal(gradient, want)
    check_sites(jax.sharding.Mesh(jax.devices(), ("rows",)))


def check_sites(mesh):
    """find_convs reports a convolution of shards as that of one share, whose value is unknown outside."""
    import jax
    import jax.numpy as jnp

    import jaxconv_fc as fc

    def convolve(x, kernel):
        return jax.lax.conv(x, kernel, (1,), "SAME")

    split = jax.shard_map(convolve, mesh=mesh, in_specs=(jax.P("rows"), jax.P()), out_specs=jax.P("rows"))
    (site,) = fc.find_convs(split, jnp.ones((16, 3, 5)), jnp.ones((2, 3, 3)))
    assert site.spec.lhs_shape == site.x.shape == (2, 3, 5)


def two_processes(port, process):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    assert jax.process_count() == 2
    assert len(jax.local_devices()) == 2
    check(jax.make_mesh((4,), ("rows",)), {name: specs()[name] for name in ("uneven", "reflect")})


# the tests -------------------------------------------------------------------------------------------


def start(devices, *arguments):
    command = [sys.executable, "-W", "error", str(HERE), *map(str, arguments)]
    return subprocess.Popen(
        command, env=of_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*runs):
    try:
        outputs = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output[-4000:]
        assert output.endswith("done\n")


@pytest.mark.parametrize("most", [4, rarely(10)])
def test_eight_devices(most):
    finish(start(8, "one_process", most))


def test_two_processes_over_loopback():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish(*(start(2, "two_processes", port, process) for process in range(2)))


@pytest.mark.parametrize("name", ["shard_matrix", "shard_bcoo"])
def test_bad_meshes(name):
    import jax

    import jaxconv_fc as fc

    build = getattr(fc, name)
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    kernel = np.ones(spec.rhs_shape)
    with pytest.raises(TypeError, match=r"mesh must be a Mesh, got 8\. Write jax\.make_mesh"):
        build(spec, kernel, 8)
    mesh = jax.make_mesh((1,), ("rows",))
    with pytest.raises(ValueError, match=r"axis_name must be one of the mesh's \('rows',\), got 'columns'"):
        build(spec, kernel, mesh, "columns")
    with pytest.raises(ValueError, match="limit of 10 bytes") as caught, fc.memory_limit(10):
        build(spec, kernel, mesh)
    assert "matrix_rows" not in str(caught.value)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("done")
