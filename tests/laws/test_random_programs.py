"""Random affine programs of floats and integers, and random piecewise linear networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from environment import count
from handwritten import conv
from jax import lax
from jax.experimental import sparse

import jaxconv_fc as fc

PROGRAMS = count("PROGRAMS", 12)
NETWORKS = count("NETWORKS", 4)


# programs -----------------------------------------------------------------------------------------
# A step draws its constants from rng, and returns a function of one array that is affine in it.


def numbers(rng, *shape, dtype=np.float64):
    """Small whole numbers, so that no accuracy is lost."""
    values = rng.integers(-2, 3, shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.integers(-2, 3, shape)
    if np.issubdtype(dtype, np.unsignedinteger):
        values = values + 2
    return jnp.asarray(values.astype(dtype))


def is_whole(y):
    return not jnp.issubdtype(y.dtype, jnp.inexact)


def like(rng, y, *shape):
    return numbers(rng, *(shape or y.shape), dtype=y.dtype)


def axis_of(rng, y):
    return int(rng.integers(y.ndim))


def scaled(rng, y):
    weights = like(rng, y)
    return [
        lambda y: y * weights,
        lambda y: weights - y,
        lambda y: -y if is_whole(y) else y / 2 + weights,
        lambda y: -(y**1),
        lambda y: y << 1 if is_whole(y) else y,
        lambda y: ~y if is_whole(y) else 1 - y,
    ][rng.integers(6)]


def reshaped(rng, y):
    axis, order = axis_of(rng, y), rng.permutation(y.ndim)
    return [
        lambda y: y.reshape(-1),
        lambda y: y.reshape(1, -1),
        lambda y: jnp.transpose(y, order),
        lambda y: jnp.flip(y, axis),
        lambda y: jnp.expand_dims(y, axis),
        lambda y: jnp.squeeze(jnp.expand_dims(y, axis), axis),
        lambda y: jnp.roll(y, 1, axis),
        lambda y: jnp.swapaxes(y, 0, -1)[::2],
    ][rng.integers(8)]


def joined(rng, y):
    axis, other = axis_of(rng, y), like(rng, y)
    return [
        lambda y: jnp.concatenate([y, other, 2 * y], axis),
        lambda y: jnp.stack([other, y], axis),
        lambda y: jnp.tile(y, (2,) + (1,) * (y.ndim - 1)),
        lambda y: jnp.repeat(y, 2, axis),
        lambda y: jnp.split(y, [y.shape[axis] // 2], axis)[rng_free(y)],
        lambda y: jnp.stack(jnp.unstack(y, axis=axis)[::-1], axis=-1),
    ][rng.integers(6)]


def rng_free(y):
    return y.size % 2


def padded(rng, y):
    pads = [(int(a), int(b), int(c)) for a, b, c in rng.integers((-1, -1, 0), (3, 3, 2), (y.ndim, 3))]
    fill = like(rng, y, 1)[0]
    modes = ["wrap", "edge", "reflect", "symmetric", "linear_ramp"]  # a ramp of integers is rounded
    dilated = [max(0, n + (n - 1) * c) if n else 0 for n, (_, _, c) in zip(y.shape, pads, strict=True)]
    if any(n + a + b < 0 for n, (a, b, _) in zip(dilated, pads, strict=True)):
        return lambda y: y
    if rng.integers(2) or not y.size:
        return lambda y: lax.pad(y, fill, pads)
    mode = modes[rng.integers(5 if jnp.issubdtype(y.dtype, jnp.floating) else 4)]
    return lambda y: jnp.pad(y, 1, mode=mode)


def indexed(rng, y):
    """Gathers and scatters, in every mode, with indices inside and outside."""
    n = y.shape[0]
    index = jnp.asarray(rng.integers(-n - 2, n + 3, 3))
    inside = jnp.asarray(rng.permutation(n)[: max(1, n // 2)])
    at = [int(i) for i in index]
    mode = ["fill", "clip", "drop", "promise_in_bounds"][rng.integers(4)]
    values, fill = like(rng, y), int(rng.integers(5))
    rows = like(rng, y, 3, *y.shape[1:])
    return [
        lambda y: y.at[index].get(mode="fill", fill_value=fill),
        lambda y: y.at[index].get(mode="clip"),
        lambda y: y[inside],
        lambda y: jnp.take(y, index, axis=0, mode="wrap"),
        lambda y: y.at[inside].set(2 * values[inside], mode=mode),
        lambda y: values.at[inside].set(y[inside], mode=mode),
        lambda y: values.at[index].add(y[:1] * rows, mode="drop"),
        lambda y: y.at[inside].multiply(values[inside]),
        lambda y: y.at[inside].subtract(y[inside[::-1]]),
        lambda y: lax.dynamic_slice_in_dim(y, at[0], max(1, n // 2)),
        lambda y: lax.dynamic_update_slice_in_dim(values, y[:1], at[1], 0),
        lambda y: jnp.take_along_axis(y, jnp.flip(jnp.argsort(values.real, axis=0), 0), axis=0),
    ][rng.integers(12)]


def masked(rng, y):
    mask = jnp.asarray(rng.integers(0, 2, y.shape).astype(bool))
    other = like(rng, y)
    counts = jnp.asarray(rng.integers(0, 3, y.shape), jnp.int8)
    return [
        lambda y: jnp.where(mask, y, other),
        lambda y: jnp.where(mask, other, 3 * y),
        lambda y: y * mask.astype(y.dtype) + other,
        lambda y: lax.select_n(counts.astype(jnp.int32), y, other, -y),
        lambda y: y * counts.astype(y.dtype),
    ][rng.integers(5)]


def summed(rng, y):
    axis = axis_of(rng, y)
    window = (1,) * axis + (min(2, y.shape[axis]),) + (1,) * (y.ndim - 1 - axis)
    zero = np.zeros((), y.dtype)
    return [
        lambda y: y.sum(axis, keepdims=True, dtype=y.dtype),
        lambda y: y - y[:1] if is_whole(y) else y - y.mean(axis, keepdims=True),
        lambda y: jnp.cumsum(y, axis, dtype=y.dtype),
        lambda y: lax.cumsum(y, axis, reverse=True),
        lambda y: lax.reduce_window(y, zero, lax.add, window, (1,) * y.ndim, "SAME"),
        lambda y: jnp.diff(y, axis=axis, append=y),
        lambda y: lax.associative_scan(jnp.add, y, axis=axis),
    ][rng.integers(7)]


def multiplied(rng, y):
    n = y.shape[-1]
    matrix, many = like(rng, y, n, 3), like(rng, y, *y.shape[:-1], n, 2)
    if is_whole(y):
        wide = [np.int32, None][rng.integers(2)] if y.dtype.itemsize < 4 else None
        return [
            lambda y: y @ matrix,
            lambda y: jnp.einsum("...i,...ij->j...", y, many),
            lambda y: jnp.matmul(y, matrix, preferred_element_type=wide),
            lambda y: jnp.kron(y.ravel()[:3], matrix[:, 0]),
        ][rng.integers(4)]
    square = like(rng, y, n, n) + 9 * jnp.eye(n, dtype=y.dtype)
    stored = sparse.BCOO.fromdense(like(rng, y, 4, n))
    return [
        lambda y: y @ matrix,
        lambda y: jnp.einsum("...i,...ij->j...", y, many),
        lambda y: jnp.linalg.solve(square, y[..., None])[..., 0] if y.ndim == 1 else y @ square,
        lambda y: jax.scipy.linalg.solve_triangular(square, y.reshape(-1, n).T, lower=True),
        lambda y: jnp.kron(y.ravel()[:3], matrix[:, 0]),
        lambda y: (stored @ y.reshape(-1, n).T).T,
        lambda y: jnp.convolve(y.ravel(), matrix[:, 0], mode="same"),
    ][rng.integers(7)]


def convolved(rng, y):
    x = y.reshape(1, 1, -1) if y.ndim < 3 else y.reshape(1, y.shape[0], -1)
    kernel = like(rng, y, 2, x.shape[1], 3)
    options = {
        "strides": (int(rng.integers(1, 3)),),
        "padding": [tuple(map(int, rng.integers(0, 3, 2)))],
        "lhs_dilation": (int(rng.integers(1, 3)),),
    }
    if is_whole(y) and y.dtype.itemsize < 4 and rng.integers(2):
        options["preferred_element_type"] = np.dtype(np.int32 if y.dtype.kind == "i" else np.uint32)
    spec = fc.conv_spec(x.shape, kernel.shape, (1,), "SAME", padding_mode="circular")
    return [
        lambda y: conv(y.reshape(x.shape), kernel, **options),
        lambda y: fc.apply(spec, kernel, y.reshape(spec.in_shape)),
        lambda y: (
            fc.apply_transpose(spec, kernel, jnp.stack([y.ravel()] * 2)[:, : x.shape[2]]) if y.ndim < 3 else y
        ),
    ][rng.integers(3)]


WHOLE = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64)


def of_dtype(rng, y):
    """Other dtypes, and back."""
    if is_whole(y):
        dtype = np.dtype([*WHOLE, np.float32, np.float64][rng.integers(9)])
        return lambda y: y.astype(dtype)
    if jnp.iscomplexobj(y):
        return [lambda y: y.real, lambda y: y.imag, jnp.conj, lambda y: (y * (1 - 2j)).astype(y.dtype)][
            rng.integers(4)
        ]
    weights = numbers(rng, *y.shape, dtype=np.complex128)
    return [
        lambda y: y.astype(np.complex128) * weights,
        lambda y: lax.complex(y, 2 * y),
        lambda y: jnp.fft.irfft(jnp.fft.rfft(y, axis=-1), axis=-1) if y.shape[-1] > 1 else y,
        lambda y: jnp.fft.fft(y.astype(np.complex128), axis=-1),
        lambda y: y.astype(np.float32 if y.dtype == np.float64 else np.float64),
    ][rng.integers(5)]


def ruled(rng, y):
    """Calls, with rules for derivatives that the values do not follow."""
    inner = step(rng, y)
    with_jvp, with_vjp = jax.custom_jvp(inner), jax.custom_vjp(inner)
    with_jvp.defjvp(lambda p, t: (inner(p[0]), jax.jvp(inner, p, t)[1]))
    with_vjp.defvjp(lambda v: (inner(v), v), lambda v, g: jax.vjp(inner, v)[1](g))
    return [
        jax.jit(inner),
        jax.checkpoint(inner),
        with_jvp,
        with_vjp,
        jax.jit(lambda y: jax.jit(inner)(y)),
        lambda y: jax.vmap(lambda v: v * 2 + v.sum(dtype=v.dtype))(y),
        lambda y: jax.vmap(inner)(jnp.stack([y, 2 * y])),
        lambda y: lax.optimization_barrier(inner(y)),
    ][rng.integers(8)]


def controlled(rng, y):
    weights, known = like(rng, y), jnp.asarray(rng.integers(3))
    inner = step(rng, y)
    rows = like(rng, y, 3, *y.shape)
    return [
        lambda y: lax.scan(lambda c, w: (c * w + 1, c - w), y, rows)[1],
        lambda y: lax.scan(lambda c, v: (c + v, c), y[0], y, reverse=True)[1],
        lambda y: lax.fori_loop(0, 3, lambda i, c: c * weights + i, y),
        lambda y: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + weights), (0, y))[1],
        lambda y: lax.switch(known, [lambda v: v, lambda v: -v, lambda v: v * weights], y),
        lambda y: lax.cond(known > 0, inner, inner, y),
        lambda y: lax.map(lambda v: 2 * v + 1, y),
    ][rng.integers(7)]


def empty(rng, y):
    axis = axis_of(rng, y)
    return [
        lambda y: jnp.concatenate([lax.slice_in_dim(y, 0, 0, axis=axis), y, y], axis),
        lambda y: y + lax.slice_in_dim(y, 0, 0, axis=axis).sum(dtype=y.dtype),
    ][rng.integers(2)]


STEPS = [scaled, reshaped, joined, padded, indexed, masked, summed, multiplied, convolved, of_dtype, ruled,
         controlled, empty]  # fmt: skip


def step(rng, y):
    """A step that suits an array of this shape and dtype."""
    if y.ndim == 0:
        return lambda y: y.reshape(1) * 2
    if y.size == 0:
        return lambda y: jnp.concatenate([y.ravel(), numbers(np.random.default_rng(0), 2, dtype=y.dtype)])
    if y.size > 120:
        return lambda y: y.reshape(-1)[:: math.ceil(y.size / 24)]
    return STEPS[rng.integers(len(STEPS))](rng, y)


def program(rng):
    """(a function of one array, three points)"""
    shape = tuple(map(int, rng.integers(0 if rng.random() < 0.05 else 1, 5, rng.integers(1, 4))))
    dtype = np.dtype([np.float64, np.float32, *[WHOLE[rng.integers(len(WHOLE))]] * 2][rng.integers(4)])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        points = [rng.integers(info.min, info.max, shape, dtype, endpoint=True) for _ in range(2)]
        points.append(np.full(shape, info.min if rng.integers(2) else info.max, dtype))
    else:
        points = [numbers(rng, *shape, dtype=dtype) * (1 + i) for i in range(3)]
    steps, y = [], np.zeros(shape, dtype)
    for _ in range(rng.integers(1, 7)):
        near = y.size and is_whole(y) and rng.integers(2)  # half of the steps of integers are conversions
        steps.append((of_dtype if near else step)(rng, y))
        out = jax.eval_shape(steps[-1], y)
        y = np.zeros(out.shape, out.dtype)

    def fn(x):
        for one in steps:
            x = one(x)
        return x

    return fn, list(map(jnp.asarray, points))


def compare_sparse(fn, x, matrix, offset, accuracy, replay):
    try:
        sparse = fc.sparse_matrix_of(fn, x)
    except TypeError as error:
        if "SciPy cannot multiply" not in str(error):
            raise AssertionError(replay) from error
        return
    for got, known in ((sparse.matrix.toarray(), matrix), (sparse.offset, offset)):
        assert got.dtype == known.dtype, replay
        scale = accuracy * (1 + np.max(abs(known), initial=0)) if accuracy else 0
        np.testing.assert_allclose(got, known, rtol=0, atol=scale, err_msg=replay)


def test_random_affine_programs_are_their_matrices(run_seed):
    """At three points, for integers the extreme ones. Only what may have wrapped is refused."""
    refused = 0
    for i in range(PROGRAMS):
        if i % 50 == 49:
            jax.clear_caches()
        rng = np.random.default_rng([run_seed, i])
        fn, points = program(rng)
        text = str(jax.make_jaxpr(fn)(points[0]))
        replay = f"JAXCONV_FC_SEED={run_seed}, program {i}: {text}"

        def both(points, fn=fn):
            return fc.matrix_of(fn, points[0]), list(map(fn, points))

        try:
            (matrix, offset), values = jax.tree.map(np.asarray, jax.jit(both)(points))
        except jax.errors.JaxRuntimeError as error:
            if "fft_thunk" not in str(error):  # XLA on CPU says that it cannot do an FFT in every layout
                raise AssertionError(replay) from error
            refused += 1
            continue
        except ValueError as error:
            if "may have wrapped around" not in str(error) or points[0].dtype.kind == "f":
                raise AssertionError(replay) from error
            refused += 1
            continue
        whole, accuracy = values[0].dtype.kind in "iu", 2e-4 if "f32" in text else 1e-10
        wide = np.int64 if whole else values[0].dtype
        A, b = matrix.astype(wide), offset.astype(wide)
        for x, value in zip(points, values, strict=True):
            x = np.asarray(x).astype(wide).ravel()
            if whole:  # modulo 2**n
                np.testing.assert_array_equal((A @ x + b).astype(value.dtype), value.ravel(), err_msg=replay)
            else:
                size = 1 + np.max(abs(A) @ abs(x) + abs(b), initial=0)
                off = np.max(abs(A @ x + b - value.ravel()), initial=0)
                assert off <= accuracy * size, (off, size, replay)
        if matrix.size:
            row = int(rng.integers(len(matrix)))
            field = fc.neurons.receptive_field(fn, points[0], row)
            assert field.mask.ravel()[matrix[row] != 0].all(), replay
        if i % 4 == 0:  # outside of jit
            compare_sparse(fn, points[0], matrix, offset, 0 if whole else accuracy, replay)
            for got, known in zip(fc.matrix_of(fn, points[0]), (matrix, offset), strict=True):
                scale = 0 if whole else accuracy * (1 + np.max(abs(known), initial=0))
                np.testing.assert_allclose(got, known, rtol=0, atol=scale, err_msg=replay)
            if points[0].dtype.kind == "f":
                local = fc.local_affine(fn, points[0])
                assert local.radius == np.inf, replay
                scale = accuracy * (1 + np.max(abs(matrix), initial=0))
                np.testing.assert_allclose(local.matrix, matrix, rtol=0, atol=scale, err_msg=replay)
    assert refused <= PROGRAMS / 4, f"{refused} of {PROGRAMS} are refused"
    print(f"{refused} of {PROGRAMS} programs are refused")


# networks -----------------------------------------------------------------------------------------
# A layer draws its weights from rng, and returns a piecewise linear function of one array.


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def bent(rng, y):
    bound = abs(float(rng.standard_normal()))
    other = normal(rng, *y.shape)
    return [
        jax.nn.relu,
        jax.nn.leaky_relu,
        jax.nn.relu6,
        lambda y: jnp.clip(y, -bound, bound),
        jnp.abs,
        lambda y: jnp.maximum(y, other),
        lambda y: jnp.minimum(2 * y, y),
        lambda y: jnp.where(y > bound, y, 0.1 * y + 0.9 * bound),
        lambda y: jnp.where(jnp.sign(y) > 0, y, -3 * y),
        jax.nn.hard_tanh,
    ][rng.integers(10)]


def pooled(rng, y):
    axis = axis_of(rng, y)
    window = (1,) * axis + (min(2, y.shape[axis]),) + (1,) * (y.ndim - 1 - axis)
    n = y.shape[0] // 2
    return [
        lambda y: lax.reduce_window(y, -jnp.inf, lax.max, window, window, "SAME"),
        lambda y: lax.reduce_window(y, jnp.inf, lax.min, window, (1,) * y.ndim, "VALID"),
        lambda y: jnp.maximum(y[:n], y[n : 2 * n]) if n else -y,  # maxout
        lambda y: y.max(axis, keepdims=True) - y,
        lambda y: y.min(axis, keepdims=True) + y,
    ][rng.integers(5)]


def weighted(rng, y):
    if y.ndim == 3 and rng.integers(2):
        kernel = normal(rng, 2, y.shape[0], 2, 2)
        return lambda y: conv(y[None], kernel, (int(y.shape[1] > 3), 1) if y.shape[1] > 3 else (1, 1))[0]
    weights, bias = normal(rng, y.size, 6), normal(rng, 6)
    return lambda y: y.ravel() @ weights + bias


def residual(rng, y):
    inner = bent(rng, y)
    scale = normal(rng, *y.shape)
    return lambda y: y + inner(y * scale)


def network(rng):
    x = normal(rng, *([(2, 4, 4), (1, 3, 5), (7,)][rng.integers(3)]))
    layers, y = [], np.zeros(x.shape)
    for _ in range(rng.integers(2, 5)):
        for kind in (weighted, [bent, bent, pooled, residual][rng.integers(4)]):
            layers.append(kind(rng, y))
            y = np.zeros(jax.eval_shape(layers[-1], y).shape)

    def fn(x):
        for layer in layers:
            x = layer(x)
        return x

    return fn, x


def test_no_point_inside_the_radius_is_off_the_affine_map(run_seed):
    for i in range(NETWORKS):
        rng = np.random.default_rng([run_seed, i])
        fn, x = network(rng)
        replay = f"JAXCONV_FC_SEED={run_seed}, network {i}: {jax.make_jaxpr(fn)(x)}"
        steps = rng.standard_normal((100, x.size))
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        steps[1::2] *= rng.random((50, 1))

        def sampled(x, steps, fn=fn):
            local = fc.local_affine(fn, x)
            reach = jnp.where(jnp.isinf(local.radius), 1e3, 0.999 * local.radius)
            points = x[None] + (reach * steps).reshape(-1, *x.shape)
            return local, points, jax.vmap(lambda z: fn(z).ravel())(points)

        local, points, values = jax.tree.map(np.asarray, jax.jit(sampled)(x, jnp.asarray(steps)))
        assert local.radius > 0, replay
        affine = points.reshape(100, -1) @ local.matrix.T + local.offset
        size = 1 + np.max(abs(local.matrix)) * (1 + np.max(abs(points)))
        assert np.max(abs(affine - values)) <= 1e-11 * size, replay
