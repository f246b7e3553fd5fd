"""What the library takes for granted about lowering: a primitive may have one rule per platform.

None of these tests calls the library.
"""

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


# a call that XLA does not inline, on a CPU --------------------------------------------------------------

OPTIMISED = {"xla_backend_optimization_level": 3}  # whatever the flags of this process say


def tap_sum(x):
    padded = jnp.pad(x, ((0, 0), (2, 2), (0, 0)))
    return sum((p + 0.5) * lax.slice_in_dim(padded, p, p + x.shape[1], axis=1) for p in range(5))


def not_inlined(x):
    with set_xla_metadata(inlineable="false"):
        return jax.jit(tap_sum)(x)


@pytest.mark.parametrize("product", [tap_sum, not_inlined])
def test_nothing_is_fused_into_a_call_that_is_not_inlined(product):
    """What stands before the other is computed once per tap. Else the products need no fence on a CPU."""
    x = np.ones((4, 64, 16), np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        program = jax.jit(lambda x: jax.nn.relu(product(jax.nn.relu(x))).mean()).lower(x).compile(OPTIMISED)
    parts = program.as_text().split("\n\n")
    assert (sum(part.count(" maximum(") for part in parts) == 2) == (product is not_inlined)
    alone = any(part.count(" slice(") == 5 and "maximum(" not in part for part in parts)
    assert alone == (product is not_inlined)
