"""Every public function that takes arrays, with operands distributed over four devices.

Inside ``shard_map``, under jit with sharded arguments, and on a mesh with explicit axes: values, gradients in
every operand and result types are those of one device, and those of lax where lax has the function.
Devices are made when JAX starts, so each mode is a process of its own; this file is also its program.
"""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from environment import SEED, drawn, of_devices, rarely

HERE = Path(__file__)
DEVICES = 4
TOLERANCE = 1e-9  # of float64 results that one device and four may round differently


# what is computed ------------------------------------------------------------------------------------


def functions():
    """``{group: {name: f(k, x, y)}}`` of one example: kernel (4, 2, 3), x (2, 8), y (4, 8)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxconv_fc as fc
    from jaxconv_fc import spectrum

    spec = fc.conv_spec((1, 2, 8), (4, 2, 3), (1,), "SAME")
    edge = fc.conv_spec((1, 2, 8), (4, 2, 3), (1,), "SAME", padding_mode="edge")
    circular = fc.conv_spec((1, 2, 8), (4, 2, 3), (1,), "SAME", padding_mode="circular")
    square = fc.conv_spec((1, 4, 8), (4, 4, 3), (1,), "SAME", padding_mode="circular")
    groups = fc.conv_spec((1, 4, 8), (4, 2, 3), (1,), [(1, 1)], feature_group_count=2)
    second = fc.conv_spec((1, 4, 6), (4, 4, 1), (1,), "VALID")
    valid = fc.conv_spec((1, 2, 8), (4, 2, 3), (1,), "VALID")

    def square_kernel(k):  # invertible: a dominant tap
        return jnp.concatenate([k, 2 * k], axis=1) + 20 * jnp.eye(4)[:, :, None]

    def layer(k):
        return lambda x: lax.conv(x[None], k, (1,), "SAME")[0]

    def network(k):
        return lambda x: jax.nn.relu(layer(k)(x)) * k[:, 0, :1]

    def matrix(k, x):  # some matrix that depends on both
        return fc.as_matrix(spec, k) * (1 + x.sum()) + jnp.eye(32, 16) * x[0].sum()

    def sparse(m):
        return m.data

    def pair(k, x):
        return jnp.stack([x, x * k.sum()])

    rows = jnp.arange(3)
    return {
        "products": {
            "apply": lambda k, x, y: fc.apply(spec, k, x),
            "apply, edge": lambda k, x, y: fc.apply(edge, k, x),
            "apply, groups": lambda k, x, y: fc.apply(groups, k, y),
            "apply_transpose": lambda k, x, y: fc.apply_transpose(spec, k, y),
            "apply_transpose, edge": lambda k, x, y: fc.apply_transpose(edge, k, y),
            "kernel_vjp": lambda k, x, y: fc.kernel_vjp(spec, x, y),
            "batched_apply": lambda k, x, y: [
                fc.batched_apply(spec, k, pair(k, x), method=m) for m in ("convolution", "sparse", "dense")
            ],
            "as_linear_operator": lambda k, x, y: fc.as_linear_operator(spec, k).mv(x),
            "as_linear_operator.T": lambda k, x, y: fc.as_linear_operator(spec, k).T.mv(y),
        },
        "dense": {
            "as_matrix": lambda k, x, y: fc.as_matrix(spec, k),
            "as_matrix, edge": lambda k, x, y: fc.as_matrix(edge, k),
            "as_affine": lambda k, x, y: [fc.as_affine(spec, k, b) for b in (y, y.sum(1))],
            "matrix_rows": lambda k, x, y: fc.matrix_rows(spec, k, rows + (y.sum() > 1e9).astype(rows.dtype)),
            "matrix_columns": lambda k, x, y: fc.matrix_columns(spec, k, rows),
            "update_matrix": lambda k, x, y: fc.update_matrix(spec, matrix(k, x), k),
            "kernel_matrix": lambda k, x, y: fc.kernel_matrix(spec, x),
        },
        "sparse": {
            "as_bcoo": lambda k, x, y: sparse(fc.as_bcoo(spec, k)),
            "as_bcsr": lambda k, x, y: sparse(fc.as_bcsr(spec, k)),
            "as_bcsr, edge": lambda k, x, y: sparse(fc.as_bcsr(edge, k)),
            "diagonals": lambda k, x, y: list(fc.diagonals(spec, k).values()),
        },
        "adjoint": {
            "transpose": lambda k, x, y: fc.transpose(spec, k)[1],
            "matrix_vjp": lambda k, x, y: fc.matrix_vjp(spec, matrix(k, x)),
            "kernel_from_matrix": lambda k, x, y: fc.kernel_from_matrix(spec, matrix(k, x)),
            "kernel_from_matrix, edge": lambda k, x, y: fc.kernel_from_matrix(edge, matrix(k, x)),
            "conv_distance": lambda k, x, y: fc.conv_distance(spec, matrix(k, x)),
            "compose": lambda k, x, y: fc.compose((second, square_kernel(k)[:, :, :1]), (valid, k))[1],
        },
        "norms": {
            "frobenius_norm": lambda k, x, y: spectrum.frobenius_norm(edge, k),
            "one_norm": lambda k, x, y: spectrum.one_norm(spec, k),
            "inf_norm": lambda k, x, y: spectrum.inf_norm(edge, k),
            "row_norms": lambda k, x, y: spectrum.row_norms(spec, k),
            "column_norms": lambda k, x, y: spectrum.column_norms(edge, k, ord=1),
            "trace": lambda k, x, y: spectrum.trace(spec, k),
            "orthogonality_residual": lambda k, x, y: spectrum.orthogonality_residual(spec, k),
        },
        "blocks": {
            "singular_values": lambda k, x, y: spectrum.singular_values(circular, k),
            "singular_values, SAME": lambda k, x, y: spectrum.singular_values(spec, k),
            "condition_number": lambda k, x, y: spectrum.condition_number(spec, k),
            "rank": lambda k, x, y: spectrum.rank(spec, k).astype(float),
            "log_abs_det": lambda k, x, y: spectrum.log_abs_det(square, square_kernel(k)),
            "solve": lambda k, x, y: spectrum.solve(square, square_kernel(k), y),
            "pseudo_inverse": lambda k, x, y: spectrum.pseudo_inverse(circular, k, y),
        },
        "iterative": {
            "spectral_norm": lambda k, x, y: spectrum.spectral_norm(spec, k),
            "spectral_norm, groups": lambda k, x, y: spectrum.spectral_norm(groups, k),
            "singular_triplet": lambda k, x, y: lax.stop_gradient(spectrum.singular_triplet(spec, k).value),
            "top_singular_values": lambda k, x, y: spectrum.top_singular_values(edge, k, 2),
            "spectral_norm_bounds": lambda k, x, y: spectrum.spectral_norm_bounds(spec, k)[1],
            "power_step": lambda k, x, y: spectrum.power_step(spec, k, lax.stop_gradient(x)),
            "lstsq": lambda k, x, y: spectrum.lstsq(spec, k, y, rtol=1e-12),
        },
        "functions": {
            "fully_connected": lambda k, x, y: fc.fully_connected(network(k))(x),
            "matrix_of": lambda k, x, y: fc.matrix_of(lambda v: layer(k)(v) + y.sum(), x),
            "local_affine": lambda k, x, y: fc.local_affine(network(k), x),
        },
    }  # fmt: skip


def operands():
    """Four of each operand, for four devices."""
    rng = np.random.default_rng(7)
    return [rng.standard_normal((DEVICES, *shape)) for shape in ((4, 2, 3), (2, 8), (4, 8))]


def weighted(made):
    """A scalar of everything that a function returns, with weights that tell its entries apart."""
    import jax
    import jax.numpy as jnp

    leaves = jax.tree.leaves(made)
    weights = [jnp.cos(jnp.arange(v.size) + 1.0).reshape(v.shape) for v in leaves]
    return sum((w * v).sum() for w, v in zip(weights, leaves, strict=True))


def close(got, want, name):
    import jax

    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        size = TOLERANCE * np.abs(b).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=size, err_msg=name)


class Group:
    """Functions by name, and how they are computed: all of them by one program."""

    def __init__(self, functions):
        self.functions = functions

    def values(self, *args):
        return {name: f(*args) for name, f in self.functions.items()}

    def gradients_and_values(self, *args):
        """Each by name."""
        import jax

        def loss(*args, f):
            made = f(*args)
            return weighted(made), made

        both = {
            name: jax.grad(partial(loss, f=f), (0, 1, 2), has_aux=True)(*args)
            for name, f in self.functions.items()
        }
        return [{name: one[i] for name, one in both.items()} for i in range(2)]

    def only(self, names):
        return Group({name: self.functions[name] for name in names})


@cache
def on_one_device(group):
    """Gradients and values, compiled once for all deals."""
    import jax

    return jax.jit(group.gradients_and_values)


def expected(group, deal):
    """``(gradients, values)`` on one device: operands in ``deal`` are distributed, the others shared."""
    import jax
    import jax.numpy as jnp

    k, x, y = map(jnp.asarray, operands())
    args = [v if i in deal else v[0] for i, v in enumerate((k, x, y))]
    each = [[v[n] if i in deal else v for i, v in enumerate(args)] for n in range(DEVICES)]
    gradients, values = zip(*(on_one_device(group)(*a) for a in each), strict=True)

    def combined(name):
        stacked = [np.stack([g[name][i] for g in gradients]) for i in range(3)]
        return [v if i in deal else v.sum(0) for i, v in enumerate(stacked)]

    return {name: combined(name) for name in group.functions}, jax.tree.map(lambda *v: np.stack(v), *values)


def all_close(got, want, label):
    for name in got:
        close(got[name], want[name], f"{name}, {label}")


# the modes -------------------------------------------------------------------------------------------

DEALS = [(0,), (1, 2)]
OTHER_DEALS = [(1,), (2,), (0, 1, 2)]

# XLA's partitioner computes the kernel gradient of one example wrongly where the kernel's out channels are
# distributed to more devices than there are groups; lax's own gradient aborts the process there.
WRONG_IN_XLA = ("apply, groups", "spectral_norm, groups")
# Written with lax convolutions, which refuse an explicitly partitioned kernel.
OF_LAX = ("fully_connected", "matrix_of", "local_affine")


def shard_map(group, check_vma, deals):
    """Operands distributed and shared in all combinations; gradients taken inside and outside."""
    for deal in deals:
        mapped_group(group, check_vma, deal)


def mapped_group(group, check_vma, deal):
    import jax
    import jax.numpy as jnp
    from jax import lax

    label = f"distributed {deal}, check_vma={check_vma}"
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(jax.P("d") if i in deal else jax.P() for i in range(3))
    args = [jnp.asarray(v if i in deal else v[0]) for i, v in enumerate(operands())]
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma)
    gradients, want = expected(group, deal)
    # Where all devices have one value, none of the operands that are distributed is used.
    leaves = {name: jax.tree.leaves(made) for name, made in want.items()}
    used = [name for name, made in leaves.items() if any(np.ptp(v, axis=0).any() for v in made)]
    functions = group.only(used).functions

    def local(values):
        return [v[0] if i in deal else v for i, v in enumerate(values)]

    def varying(v):
        here = check_vma and "d" not in jax.typeof(v).manual_axis_type.varying
        return lax.pcast(v, ("d",), to="varying") if here else v

    def loss(*values, f):
        made = f(*local(values))
        return lax.psum(varying(weighted(made)), "d"), jax.tree.map(lambda v: varying(v)[None], made)

    def differentiated(*values):
        of = partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
        if check_vma:
            inside = lambda *values: {name: of(partial(loss, f=f))(*values) for name, f in functions.items()}  # noqa: E731
            both = mapped(inside, out_specs=dict.fromkeys(functions, (specs, jax.P("d"))))(*values)
        else:  # JAX does not know then which gradients inside of the map to sum
            both = {
                name: of(mapped(partial(loss, f=f), out_specs=(jax.P(), jax.P("d"))))(*values)
                for name, f in functions.items()
            }
        return [{name: one[i] for name, one in both.items()} for i in range(2)]

    if not functions:
        return
    slopes, made = jax.jit(differentiated)(*args)
    all_close(made, want, label)
    all_close(slopes, gradients, f"{label}, gradient")


def sharded(group, explicit, with_gradients=True):
    """Jit with operands partitioned by dimension: kernels over out channels, images over positions."""
    import jax
    import jax.numpy as jnp

    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    plain = [jnp.asarray(v[0]) for v in operands()]
    gradients, want = on_one_device(group)(*plain)
    for parts in ((jax.P("d"), jax.P(), jax.P()), (jax.P(), jax.P(None, "d"), jax.P("d"))):
        label = f"partitioned {parts}, explicit={explicit}"
        skipped = set()
        if parts[0] != jax.P():
            skipped = {*WRONG_IN_XLA, *(OF_LAX if explicit else ())}
        chosen = group.only(
            name
            for name in group.functions
            if name not in skipped  # and some of the operands that are partitioned are used
            and any(np.any(g) for g, part in zip(gradients[name], parts, strict=True) if part != jax.P())
        )
        if not chosen.functions:
            continue
        with jax.set_mesh(mesh):
            args = [jax.device_put(v, jax.NamedSharding(mesh, p)) for v, p in zip(plain, parts, strict=True)]
            if with_gradients:
                got, made = jax.jit(chosen.gradients_and_values)(*args)
            else:
                got, made = {}, jax.jit(chosen.values)(*args)
        all_close(made, want, label)
        all_close(got, gradients, f"{label}, gradient")
        for name, made in got.items():
            assert [jax.typeof(v) for v in made] == [jax.typeof(v) for v in args], f"{name}, {label}"


def as_lax():
    """Types and values of products on explicit axes, beside those of lax where lax has an answer."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxconv_fc as fc

    mesh = jax.make_mesh((DEVICES,), ("d",))
    spec = fc.conv_spec((4, 2, 8), (4, 2, 3), (1,), "SAME")
    kernel, xs, _ = map(jnp.asarray, operands())
    kernel = kernel[0]

    def ours(kernel, xs):
        return jax.vmap(lambda x: fc.apply(spec, kernel, x))(xs)

    def theirs(kernel, xs):
        return lax.conv_general_dilated(xs, kernel, (1,), "SAME")

    def both(conv, *args):
        gradient = jax.grad(lambda *a: (conv(*a) ** 2).sum(), argnums=(0, 1))
        results = conv(*args), gradient(*args), jax.jit(gradient)(*args)
        return results, [str(jax.typeof(v)) for v in jax.tree.leaves(results)]

    whole = jax.P()
    with jax.set_mesh(mesh):
        for part in (jax.P("d"), jax.P(None, None, "d"), whole):
            args = [jax.device_put(v, jax.NamedSharding(mesh, p)) for v, p in ((kernel, whole), (xs, part))]
            got, types = both(ours, *args)
            want, expected_types = both(theirs, *args)
            close(got, want, str(part))
            assert types == expected_types, (types, expected_types)


def example():
    """A replicated kernel under check_vma: its gradient is summed over the devices, as lax's is."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxconv_fc as fc

    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    x = jnp.arange(16.0).reshape(4, 1, 4)

    def loss(kernel, x):
        return lax.psum((jax.vmap(lambda v: fc.apply(spec, kernel, v))(x) ** 2).sum(), "d")

    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P())
    np.testing.assert_array_equal(gradient(jnp.array([[[1.0, 2.0]]]), x), [[[5352, 5904]]])


# mode -> what it does with a group
MODES = {
    "check_vma": lambda group: shard_map(group, True, DEALS),
    "no_check_vma": lambda group: shard_map(group, False, DEALS[:2]),
    "automatic": lambda group: sharded(group, False),
    "explicit": lambda group: sharded(group, True),
    "explicit, values": lambda group: sharded(group, True, with_gradients=False),
    "other deals": lambda group: shard_map(group, True, OTHER_DEALS),
}


def main(runs):
    """``{group: modes}``: every group of functions is compiled once for one device."""
    import jax

    jax.config.update("jax_enable_x64", True)
    table = functions()
    for name, modes in runs.items():
        group = Group(table[name])
        for mode in modes:
            MODES[mode](group)
    if "products" in runs:
        example()
        as_lax()
    print("done")


# the tests -------------------------------------------------------------------------------------------


TWO = ["check_vma", "explicit"]
COSTLY = ["check_vma", "explicit, values"]  # to compile
RARE = ["no_check_vma", "automatic"]  # one of them in every run
PRODUCTS = [{"products": ["check_vma", "explicit", RARE[(SEED + i) % 2]]} for i in range(2)]
TABLES = [{name: TWO} for name in ("dense", "sparse", "adjoint", "norms", "functions")]
TABLES += [{name: COSTLY} for name in ("blocks", "iterative")]
FURTHER = [
    PRODUCTS[1],
    {name: ["other deals"] for name in ("products", "norms", "functions")},
    {"functions": ["no_check_vma", "automatic"], "blocks": ["explicit"], "iterative": ["explicit"]},
]


@pytest.mark.parametrize("runs", [PRODUCTS[0], *drawn(TABLES, 1), *map(rarely, FURTHER)], ids=", ".join)
def test_four_devices_give_what_one_gives(runs):
    command = [sys.executable, "-W", "error", str(HERE), json.dumps(runs)]
    variables = of_devices(DEVICES)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("done\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
