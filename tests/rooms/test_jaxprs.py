"""Evaluation of jaxprs, and the programs that they share; what JAX promises is in test_jaxpr_contracts.py."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv_fc.functions.jaxprs import PROGRAMS, _compiled, compiled, eval_eqn, evaluate, inner_jaxprs

V = jnp.arange(3.0)


def _plain(eqn, values, used):
    return eval_eqn(eqn, values)


def _noting(names):
    def rule(eqn, values, used):
        names.append(eqn.primitive.name)
        return eval_eqn(eqn, values)

    return rule


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x, x, 2.0, jnp.sin(x) * x),  # an argument twice, a literal, an equation
        lambda x: jax.lax.top_k(x * 2, 2),  # several results
        lambda x: [jnp.sin(jnp.cos(x))] * 2,
        lambda x: (),
    ],
)
def test_results_are_those_of_the_function(fn):
    got = evaluate(jax.make_jaxpr(lambda x: jax.tree.leaves(fn(x)))(V), [V], _plain)
    want = jax.tree.leaves(fn(V))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-15)


def test_only_what_a_wanted_result_depends_on_is_evaluated():
    jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(jnp.exp(x)), jnp.cos(x)))(V)
    names = []
    got = evaluate(jaxpr, [V], _noting(names), finish=[None, lambda v: v + 1])
    assert got[0] is None
    np.testing.assert_allclose(got[1], np.cos(V) + 1)
    assert names == ["cos"]


def test_what_has_effects_is_evaluated_unless_keep_says_otherwise():
    def fn(x):
        jax.debug.callback(lambda v: None, jnp.exp(x))
        return jnp.sin(x)

    jaxpr = jax.make_jaxpr(fn)(V)
    for options, found in (({}, True), ({"keep": lambda eqn: False}, False)):
        names = []
        evaluate(jaxpr, [V], _noting(names), **options)
        assert ("exp" in names) == found
        assert any("callback" in name or "debug" in name for name in names) == found


def test_a_rule_knows_which_results_are_used():
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.top_k(x, 2)[1])(V)
    seen = {}

    def rule(eqn, values, used):
        seen[eqn.primitive.name] = list(used)
        return eval_eqn(eqn, values)

    evaluate(jaxpr, [V], rule)
    assert seen["top_k"][:2] == [False, True]


def test_a_value_is_dropped_after_its_last_use_and_a_result_as_soon_as_it_is_finished():
    class Held:
        """A value that can be asked whether it is still there."""

    jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(x), jnp.cos(jnp.exp(jnp.tan(x)))))(V)
    alive, references = [], []

    def rule(eqn, values, used):
        del values[:]
        alive.append(sum(reference() is not None for reference in references))
        made = Held()
        references.append(weakref.ref(made))
        return [made]

    results = evaluate(jaxpr, [Held()], rule, finish=[lambda v: "done", lambda v: v])
    assert results[0] == "done"
    assert isinstance(results[1], Held)
    assert alive == [0, 0, 0, 0]


def test_a_jaxpr_with_a_function_among_its_parameters_is_not_compiled():
    """It cannot be compared with others: it is evaluated as it is."""
    jaxpr = jax.make_jaxpr(lambda x: (jax.debug.callback(print, x), x * 2)[1])(V)
    assert compiled(lambda jaxpr, y: jaxpr.out_avals[0].shape + y.shape, jaxpr, V) == (3, 3)
    plain = jax.make_jaxpr(lambda x: x * 2)(V)
    assert isinstance(compiled(lambda jaxpr, y: y.shape[0], plain, V), jax.Array)


def test_numbers_and_constants_are_operands_with_the_types_that_they_have():
    """Weak types too. Inside of an equation only where it is said to be opened."""
    runs = []

    def of(jaxpr, x):
        runs.append(jaxpr)
        return evaluate(jaxpr, [x], _plain)

    for n in (2.5, 3.5):
        array = jnp.full(3, n)
        fn = lambda x, n=n, array=array: (x * n + array, n, jnp.float32(n), jnp.sin(n), n > 3)  # noqa: E731
        got = compiled(of, jax.make_jaxpr(fn)(V), V)
        for a, b in zip(got, jax.jit(fn)(V), strict=True):
            assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
            np.testing.assert_allclose(a, b, rtol=1e-15)
    assert len(runs) == 1
    for n in (2.5, 3.5):
        inner = jax.make_jaxpr(jax.jit(lambda x, n=n: x * n))(V)
        for of_the_call in (_of_the_call, _opening):
            np.testing.assert_allclose(compiled(of_the_call, inner, V)[0], V * n, rtol=1e-15)


def _of_the_call(jaxpr, x):
    (eqn,) = jaxpr.jaxpr.eqns
    return evaluate(inner_jaxprs(eqn)[0], [x], _plain)


def _opening(jaxpr, x):
    return _of_the_call(jaxpr, x)


_opening.opens = lambda eqn: True


def test_programs_are_dropped_when_there_are_many():
    """No cache of JAX holds what ours has dropped."""

    def of(jaxpr, x):
        return evaluate(jaxpr, [x], _plain)

    compiled(of, jax.make_jaxpr(jnp.sin)(V), V)
    reference = weakref.ref(of)
    del of
    assert _compiled.cache_info().maxsize == PROGRAMS
    _compiled.cache_clear()
    gc.collect()
    assert reference() is None
