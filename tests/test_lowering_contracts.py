"""What the library takes for granted about lowering: a primitive may have one rule per platform.

None of these tests calls the library.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir

shift_p = Primitive("test_shift")
shift_p.def_impl(jax.jit(shift_p.bind))
shift_p.def_abstract_eval(lambda x: x)
SHIFTS = {None: 1.0, "gpu": 2.0, "tpu": 3.0}  # None: of every platform that is not named


def lower_as_shift(by, platform):
    rule = mlir.lower_fun(lambda x: x + np.float32(by), multiple_results=False)
    mlir.register_lowering(shift_p, rule, platform=platform)


for _platform, _by in SHIFTS.items():
    lower_as_shift(_by, _platform)


def shifted(*platforms):
    exported = jax.export.export(jax.jit(shift_p.bind), platforms=platforms)
    return exported(jax.ShapeDtypeStruct((), np.float32))


def shifts_in(exported):
    return {by for by in SHIFTS.values() if f"dense<{by:.6e}>" in exported.mlir_module()}


@pytest.mark.parametrize(("platform", "by"), [("cpu", 1.0), ("rocm", 2.0), ("cuda", 2.0), ("tpu", 3.0)])
def test_a_platform_has_its_own_lowering_and_the_others_the_default(platform, by):
    assert shifts_in(shifted(platform)) == {by}


def test_a_program_for_several_platforms_has_a_branch_for_each():
    """The platform that runs it chooses."""
    exported = shifted("cpu", "cuda", "rocm", "tpu")
    assert shifts_in(exported) == set(SHIFTS.values())
    assert exported.mlir_module().count('"stablehlo.case"') == 2
    with jax.default_device(jax.devices("cpu")[0]):
        assert exported.call(np.float32(0)) == 1


def test_a_lowering_that_is_registered_later_wins():
    """So a test can run the forms of another platform here, once programs compiled before are forgotten."""
    with jax.default_device(jax.devices("cpu")[0]):
        assert shift_p.bind(np.float32(0)) == 1
        for by in (4, 1):
            lower_as_shift(by, "cpu")
            jax.clear_caches()
            assert shift_p.bind(np.float32(0)) == by


# a call that XLA does not inline -------------------------------------------------------------------------

OPTIMISED = {"xla_backend_optimization_level": 3}  # whatever the flags of this process say
X = np.ones((4, 64, 16), np.float32)


def tap_sum(x):
    padded = jnp.pad(x, ((0, 0), (2, 2), (0, 0)))
    return sum((p + 0.5) * lax.slice_in_dim(padded, p, p + x.shape[1], axis=1) for p in range(5))


def fenced_sum(x):
    with set_xla_metadata(inlineable="false"):
        return jax.jit(tap_sum)(x)


fence_p = Primitive("test_fence")
fence_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(fence_p, mlir.lower_fun(fenced_sum, multiple_results=False))


def between_neighbours(product):
    """The product of something that costs time, twice in a row, and its mean."""
    return lambda x: jnp.tanh(product(jnp.tanh(product(jnp.tanh(x))))).mean()


def fused(program):
    """How many computations of a compiled program hold both the taps of a sum and what stands beside it."""
    computations = program.as_text().split("\n\n")
    return sum(
        len(re.findall(r" slice\(", c)) >= 5 and bool(re.search(r" (tanh|reduce)\(", c)) for c in computations
    )


def compiled(function, *operands):
    return jax.jit(function).lower(*operands).compile(OPTIMISED)


TRANSFORMS = {
    "jit": lambda f: f,
    "grad": jax.grad,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x])),
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (c + f(x + c), None), 0.0, length=3)[0],
    "export": lambda f: jax.export.deserialize(
        jax.export.export(jax.jit(f), platforms=["cpu"])(X).serialize()
    ).call,
}


def bound(x):
    """A primitive of this library's kind: it is lowered to the call after all transforms."""
    return fence_vjp(x)


@jax.custom_batching.custom_vmap
def fence_of(x):
    return fence_p.bind(x)


@fence_of.def_vmap
def _fence_of_many(size, batched, x):
    return fence_p.bind(x.reshape(-1, *x.shape[2:])).reshape(x.shape), True


@jax.custom_vjp
def fence_vjp(x):
    return fence_of(x)


fence_vjp.defvjp(lambda x: (fence_of(x), None), lambda _, ct: (fence_of(ct),))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_nothing_is_fused_into_a_call_that_is_not_inlined(transform):
    with jax.default_device(jax.devices("cpu")[0]):
        assert not fused(compiled(transform(between_neighbours(bound)), X))


def test_the_rest_is_fused_into_a_sum_without_it():
    """Else the fence has become superfluous."""
    with jax.default_device(jax.devices("cpu")[0]):
        assert fused(compiled(between_neighbours(tap_sum), X))


def test_a_call_that_is_not_inlined_is_partitioned_and_lowered_alike():
    """Its attribute stands in the program; other platforms get none unless they ask for it."""
    assert 'inlineable = "false"' in jax.jit(fenced_sum).lower(X).as_text()
    assert "inlineable" not in jax.jit(tap_sum).lower(X).as_text()
