"""Gradients of single examples of a whole model: norms, inner products, Kronecker factors, layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.curvature.factors import APPROXIMATIONS, kfac_factors
from jaxconv_fc.curvature.independence import check_independent, resized
from jaxconv_fc.curvature.norms import gradient_gram, gradient_norms
from jaxconv_fc.curvature.uses import Each, Evaluation, Layer, Meter, Parameter, find_uses
from jaxconv_fc.functions.jaxprs import is_array, open_jaxpr, trace
from jaxconv_fc.geometry.arguments import brief
from jaxconv_fc.geometry.memory import beyond_memory, check_array, fits_in_memory, readable
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import inexact, lengths
from jaxconv_fc.sharding import on_one_device

Loss = Callable[[Any, Any], Any]


class ModelLayer(NamedTuple):
    """A layer of a model in one backward pass: ``jax.vmap(kernel_vjp)(xs, y_bars)`` are its gradients.

    Attributes:
      name: the path of the parameter in params.
      spec: the geometry; of a dense layer one without spatial axes, or with one of as many positions as it
        is applied to.
      kernel: the kernel, as the spec has it.
      xs: array of shape ``(n, *spec.in_shape)``, the inputs.
      y_bars: array of shape ``(n, *spec.out_shape)``, the cotangents of the outputs.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> loss = lambda w, x: (x @ w).sum()
    >>> (layer,) = fc.curvature.model_layers(loss, jnp.ones((3, 2)), jnp.ones((5, 3)))
    >>> layer.spec.shape, layer.xs.shape, layer.y_bars.shape
    ((2, 3), (5, 3), (5, 2))
    """

    name: str
    spec: ConvSpec
    kernel: Any
    xs: Any
    y_bars: Any


def model_gradient_norms(loss: Loss, params: Any, batch: Any) -> jax.Array:
    """``norms[n] = ||grad(loss)(params, example n)||``, where an example is a batch of one.

    One backward pass of all examples together. Kernels of convolutions and dense layers are never given a
    gradient of their own for each example (:func:`gradient_norms`). Parameters that are used in another way
    are: biases, scales, embeddings, and kernels that are used more than once, whose gradients add up before
    the norm is taken. So the result is that of ``jax.vmap(jax.grad(loss))``, in a fraction of its memory
    (docs/maths.md, section 16). For a loss that averages it is the norm of an example's own gradient.

    Args:
      loss: ``loss(params, batch)``, a sum over the examples of a batch of any size; any JAX function.
      params: any pytree, such as that of flax, equinox, haiku or keras. What is not a floating array is held
        fixed.
      batch: any pytree of arrays with the examples as their first axis. Random keys belong here, one for each
        example.

    Returns:
      Real array of shape ``(n,)``.

    Raises:
      TypeError: loss returns something else than a scalar, or params or batch hold no array to use.
      ValueError: loss mixes examples, as batch normalisation does in training; or the copies of a parameter
        are beyond the memory limit. The message names the operation, or the parameter.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> def loss(params, batch):
    ...     return ((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2).sum() / 2
    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros((1, 1))}
    >>> batch = {"x": jnp.array([[1., 2.], [2., 0.]]), "y": jnp.array([[1.], [2.]])}
    >>> print(fc.curvature.model_gradient_norms(loss, params, batch).round(2))  # 2 * |(1, 2, 1)| and 0
    [4.9 0. ]
    """
    model = _Model("model_gradient_norms", loss, params, batch)
    read, copies = model.backward(_norms, model.uses.metered(), model.uses.copied())
    flat = [gradient.reshape(model.count, -1) for gradient in copies]
    found = [*read, *(lengths(gradient) for gradient in flat if gradient.size)]
    if not found or not model.count:
        return jnp.zeros(model.count)
    dtype = np.result_type(*(norms.dtype for norms in found))
    return lengths(jnp.stack([norms.astype(dtype) for norms in found], 1))


def model_gram(loss: Loss, params: Any, batch: Any) -> jax.Array:
    """``K[n, m] = <grad(loss)(params, example n), grad(loss)(params, example m)>``, over all of ``params``.

    Of a loss that is a sum of outputs, the empirical neural tangent kernel. For some parameters alone, let
    ``loss`` take these and hold the others: then ``params`` are those. Computed in one backward pass, as
    :func:`model_gradient_norms`; its squares are on the diagonal.

    Args:
      loss: as in :func:`model_gradient_norms`.
      params: as in :func:`model_gradient_norms`, real.
      batch: as in :func:`model_gradient_norms`.

    Returns:
      Array of shape ``(n, n)``.

    Raises:
      TypeError: as in :func:`model_gradient_norms`.
      ValueError: as in :func:`model_gradient_norms`, or the result is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> def outputs(params, x):
    ...     return (x @ params["w"] + params["b"]).sum()
    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros((1, 1))}
    >>> print(fc.curvature.model_gram(outputs, params, jnp.array([[1., 2.], [2., 0.]])))
    [[6. 3.]
     [3. 5.]]
    """
    model = _Model("model_gram", loss, params, batch)
    check_array("model_gram", (model.count, model.count), jnp.float32, "fewer examples")
    read, copies = model.backward(_gram, model.uses.metered(), model.uses.copied())
    flat = [gradient.reshape(model.count, -1) for gradient in copies]
    found = [*read, *(jnp.matmul(g, g.T, precision=lax.Precision.HIGHEST) for g in flat)]
    dtype = np.result_type(*(gram.dtype for gram in found)) if found else jnp.result_type(float)
    return sum((gram.astype(dtype) for gram in found), jnp.zeros((model.count,) * 2, dtype))


def model_kfac(
    loss: Loss, params: Any, batch: Any, *, approx: str = "expand"
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """``factors[name] = (A, G)``: :func:`kfac_factors` of every kernel, of all layers in one backward pass.

    A kernel is a parameter of a convolution or dense layer, by its path in ``params``. The factors of several
    uses are added. Parameters that are not used so (biases, scales, embeddings) have none.

    Args:
      loss: as in :func:`model_gradient_norms`.
      params: as in :func:`model_gradient_norms`, real.
      batch: as in :func:`model_gradient_norms`.
      approx: ``"expand"`` or ``"reduce"``.

    Returns:
      A dict of pairs, in the order of the layers.

    Raises:
      TypeError: as in :func:`model_gradient_norms`.
      ValueError: as there; approx is another word; or a kernel is used where its layer cannot be seen, as in
        a loop. The message names it.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> loss = lambda params, x: (x @ params["w"]).sum()
    >>> A, G = fc.curvature.model_kfac(loss, {"w": jnp.ones((2, 1))}, jnp.array([[1., 2.], [2., 0.]]))["w"]
    >>> print(A, G)
    [[5. 2.]
     [2. 4.]] [[2.]]
    """
    model = _Model("model_kfac", loss, params, batch)
    model.check_seen()
    if approx not in APPROXIMATIONS:
        raise ValueError(f"approx must be one of {APPROXIMATIONS}, got {brief(approx)}.")
    read, _ = model.backward(partial(_factors, approx), {leaf for leaf, *_ in model.uses.layers}, [])
    factors: dict[str, Any] = {}
    for (leaf, *_), found in zip(model.uses.layers, read, strict=True):
        name = model.names[leaf]
        factors[name] = jax.tree.map(jnp.add, factors[name], found) if name in factors else found
    return factors


def model_layers(loss: Loss, params: Any, batch: Any) -> list[ModelLayer]:
    """Of every layer what makes its gradient, ``sum over n of kernel_vjp(spec, xs[n], y_bars[n])``.

    In one backward pass: name, geometry, kernel, inputs and output cotangents. A kernel that is used twice is
    listed twice. Dense layers are convolutions without spatial axes.

    Args:
      loss: as in :func:`model_gradient_norms`.
      params: as in :func:`model_gradient_norms`.
      batch: as in :func:`model_gradient_norms`.

    Returns:
      A list of :class:`ModelLayer`, in the order of execution.

    Raises:
      TypeError: as in :func:`model_gradient_norms`.
      ValueError: as in :func:`model_kfac`.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> loss = lambda params, x: ((x @ params["w"]) ** 2).sum()
    >>> layers = fc.curvature.model_layers(loss, {"w": jnp.ones((2, 1))}, jnp.array([[1., 2.], [2., 0.]]))
    >>> print(layers[0].name, layers[0].y_bars)
    w [[6.]
     [4.]]
    """
    model = _Model("model_layers", loss, params, batch)
    model.check_seen()
    read, _ = model.backward(_stacks, {leaf for leaf, *_ in model.uses.layers}, [])
    return [
        ModelLayer(model.names[leaf], layer.spec, *stacks)
        for (leaf, layer, _), stacks in zip(model.uses.layers, read, strict=True)
    ]


def _norms(layer: Layer, kernel: Any, xs: Any, ys: Any) -> Any:
    return gradient_norms(layer.spec, xs, ys)


def _gram(layer: Layer, kernel: Any, xs: Any, ys: Any) -> Any:
    return gradient_gram(layer.spec, xs, ys)


def _factors(approx: str, layer: Layer, kernel: Any, xs: Any, ys: Any) -> Any:
    return kfac_factors(layer.spec, xs, ys, approx=approx)


def _stacks(layer: Layer, kernel: Any, xs: Any, ys: Any) -> Any:
    return layer.kernel(kernel), xs, ys


# -- one backward pass --------------------------------------------------------------------------------


class _Model:
    """A loss, traced for one example, with its parameters and examples."""

    def __init__(self, function: str, loss: Loss, params: Any, batch: Any):
        self.function, self.count = function, _count(function, batch)
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        paths = [(path, leaf) for path, leaf in paths if is_array(leaf)]
        self.names = [_name(path) for path, _ in paths]
        self.params = [leaf for _, leaf in paths]
        floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in self.params]
        if not any(floats):
            raise TypeError(f"{function}: params must hold a real floating array, got {brief(params)}.")
        for name, leaf in zip(self.names, self.params, strict=True):
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(f"{function}: {name} is {leaf.dtype}. Give loss real and imaginary parts.")
        traced = trace(loss, (params, resized(batch, 1)), {})
        results = open_jaxpr(traced.jaxpr)[0].outvars
        if len(results) != 1 or traced.others or results[0].aval.shape != ():
            raise TypeError(
                f"{function}: loss must return one scalar, the sum over the examples of the batch. Leave "
                "other results out: lambda params, batch: loss(params, batch)[0]."
            )
        if not jnp.issubdtype(results[0].aval.dtype, jnp.floating):
            raise TypeError(f"{function}: loss must return a real number, got {results[0].aval.dtype}.")
        check_independent(function, loss, params, batch)
        self.jaxpr = traced.jaxpr
        self.examples = [jnp.asarray(leaf)[:, None] for leaf in jax.tree.leaves(batch)]
        self.uses = find_uses(traced.jaxpr, floats, len(self.examples))

    def check_seen(self) -> None:
        """ValueError for a kernel whose layer is inside of an equation that is not opened."""
        for leaf, where in self.uses.hidden.items():
            raise ValueError(
                f"{self.function}: cannot see the layer that uses {self.names[leaf]}: {where}. A kernel must "
                "be the parameter itself, moved and cast at most, and its layer outside of loops and custom "
                "derivatives. Let params be the others."
            )

    def backward(
        self, meter: Meter, metered: set[int], copied: list[int]
    ) -> tuple[list[Any], list[jax.Array]]:
        """What the meters of the layers of ``metered`` parameters read, and the gradients of the copied ones.

        The latter have the shapes ``(n, *shape)``, and a dtype of at least 32 bits.
        """
        for leaf in copied:
            nbytes = self.count * self.params[leaf].size * self.params[leaf].dtype.itemsize
            if not fits_in_memory(nbytes):
                use = self.uses.others.get(leaf, "several layers")
                need = (
                    f"{self.function}: {self.names[leaf]} is used by {use}, which needs its gradient for "
                    f"each of {self.count} examples, {readable(nbytes)}"
                )
                advice = "smaller batches, or let params be the other parameters"
                raise beyond_memory(need, nbytes, advice)
        backward = partial(self._backward, meter, metered, copied)
        read, copies = on_one_device(backward, [jnp.asarray(leaf) for leaf in self.params], self.examples)
        return [found for found in read if found is not None], [inexact(copy) for copy in copies]

    def _backward(
        self, meter: Meter, metered: set[int], copied: list[int], params: list[Any], stacks: list[Any]
    ) -> Any:
        def total(readings: list[Any], changes: list[Any]) -> jax.Array:
            of_leaf = dict(zip(copied, changes, strict=True))
            arguments = [Parameter(leaf, i, of_leaf.get(i)) for i, leaf in enumerate(params)]
            (value,) = Evaluation(meter, readings)(self.jaxpr, [*arguments, *map(Each, stacks)])
            return value.stack.sum() if isinstance(value, Each) else value

        readings = [
            layer.blank(meter, self.count) if leaf in metered else None for leaf, layer, _ in self.uses.layers
        ]
        changes = [jnp.zeros((self.count, *params[i].shape), params[i].dtype) for i in copied]
        return jax.grad(total, (0, 1))(readings, changes)


def _name(path: Any) -> str:
    """The path of a parameter, without the name that flax.nnx gives to the array in a variable."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "params"


def _count(function: str, batch: Any) -> int:
    """How many examples a batch has."""
    leaves = jax.tree.leaves(batch)
    if not leaves or not all(is_array(leaf) and len(leaf.shape) > 0 for leaf in leaves):
        raise TypeError(
            f"{function}: batch must hold arrays with the examples as their first axis, got {brief(batch)}. "
            "Bind everything else: functools.partial or a closure."
        )
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(
            f"{function}: all arrays of batch must have as many examples, got {sorted(sizes)} on their first "
            "axes."
        )
    return sizes.pop()
