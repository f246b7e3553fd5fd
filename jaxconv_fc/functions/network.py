"""Affine layers joined by activations, in NumPy and SciPy: their values, intervals, and a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from jaxconv_fc.functions.activations import ACTIVATIONS
from jaxconv_fc.functions.milp import write
from jaxconv_fc.show.html import table


class AffineLayer(NamedTuple):
    """``z = sum_i matrices[i] @ h[inputs[i]] + offset``, ``h = activation(z)``: see :func:`affine_layers`.

    All are vectors: arrays ravelled. An activation that acts on an axis takes z as an array ``(*shape, k)``
    and its last axis to one number.

    Attributes:
      inputs: numbers of earlier layers, whose h are read; -1 is x.
      matrices: a ``scipy.sparse.csr_array`` of ``(size of z, size of its input)`` for each input.
      offset: a vector, the z of inputs that are 0.
      activation: its name; None in the last layer.
      shape: of h, as an array in the network.
      name: where the activation stands: its name stack, else the line of the source.
      parameters: of the activation, such as ``slope``, ``low`` and ``high``, ``exponent``.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> layer = fc.affine_layers(lambda x: jnp.clip(2 * x + 1, 0, 6), jnp.zeros(3))[0]
    >>> print(layer.inputs, layer.activation, layer.parameters, layer.offset)
    (-1,) clip {'low': 0.0, 'high': 6.0} [1. 1. 1.]
    """

    inputs: tuple[int, ...]
    matrices: tuple[Any, ...]
    offset: np.ndarray
    activation: str | None
    shape: tuple[int, ...]
    name: str = ""
    parameters: dict[str, Any] = {}  # noqa: RUF012

    @property
    def stored(self) -> int:
        """The entries of all matrices."""
        return sum(matrix.nnz for matrix in self.matrices)

    def grouped(self, z: np.ndarray) -> np.ndarray:
        """z as its activation takes it."""
        takes_axis = self.activation is not None and ACTIVATIONS[self.activation].takes_axis
        return z.reshape(math.prod(self.shape), -1) if takes_axis and z.size else z


@dataclass(frozen=True, repr=False)
class AffineLayers(Sequence[AffineLayer]):
    """A network as layers ``h = activation(sum_i M_i @ h[inputs[i]] + offset)``: see :func:`affine_layers`.

    A sequence of :class:`AffineLayer`, in an order in which each reads earlier ones. It prints as a table.

    Attributes:
      layers: all layers.
      in_shapes, out_shapes: shape and dtype of every array of the input and of the result.
      in_tree, out_tree: the pytrees that these are the leaves of.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> layers = fc.affine_layers(lambda x: jax.nn.relu(x - 1).sum(), jnp.zeros(2))
    >>> print(len(layers), layers[0].activation, layers.evaluate(jnp.array([3., 0.])))
    2 relu 2.0
    """

    layers: tuple[AffineLayer, ...]
    in_shapes: tuple[tuple[tuple[int, ...], np.dtype], ...] = field(compare=False)
    out_shapes: tuple[tuple[tuple[int, ...], np.dtype], ...] = field(compare=False)
    in_tree: Any = field(compare=False)
    out_tree: Any = field(compare=False)

    @overload
    def __getitem__(self, index: int) -> AffineLayer: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AffineLayer, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[AffineLayer]:
        return iter(self.layers)

    def evaluate(self, x: Any) -> Any:
        """``fn(x)``, in NumPy and SciPy.

        Args:
          x: an input, of the shapes that the layers were made for.

        Returns:
          The result: NumPy arrays in the pytree that ``fn`` returns.
        """
        outputs = {-1: self._vector("x", x)}
        z = np.zeros(0)
        for number, layer in enumerate(self.layers):
            z = layer.offset + sum(m @ outputs[n] for n, m in zip(layer.inputs, layer.matrices, strict=True))
            if layer.activation is not None:
                values = ACTIVATIONS[layer.activation].values(layer.grouped(z), **layer.parameters)
                outputs[number] = values.astype(z.dtype, copy=False)
        cuts = np.cumsum([math.prod(shape) for shape, _ in self.out_shapes])
        results = [
            part.reshape(shape).astype(dtype, copy=False)
            for part, (shape, dtype) in zip(np.split(z, cuts[:-1]), self.out_shapes, strict=True)
        ]
        return jax.tree.unflatten(self.out_tree, results)

    def bounds(self, low: Any, high: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """Intervals of every z, for all inputs between ``low`` and ``high``.

        ``|z - M c - b| <= |M| r`` for the middle c and the radius r of the interval of the input; then the
        activation's own interval (interval bound propagation, Gowal et al. 2018). The bounds are in float64,
        and widened by what a network in its own dtype may round: they hold for what ``fn`` computes.

        Args:
          low, high: inputs, or numbers for all entries of the input.

        Returns:
          A list of ``(low, high)``, two float64 vectors for the z of each layer.

        Raises:
          ValueError: low is above high somewhere, or a shape is another.
        """
        inputs = [self._vector(name, v, np.float64) for name, v in (("low", low), ("high", high))]
        if not (inputs[0] <= inputs[1]).all():
            raise ValueError("low must be at most high, everywhere: swap them, or look for NaN.")
        outputs = {-1: (inputs[0], inputs[1])}
        results = []
        for number, layer in enumerate(self.layers):
            z = _interval(layer, outputs)
            results.append(z)
            if layer.activation is not None:
                activation = ACTIVATIONS[layer.activation]
                with np.errstate(over="ignore", invalid="ignore"):
                    ends = activation.interval(*map(layer.grouped, z), **layer.parameters)
                size = _magnitude(*ends)
                if activation.cancels:
                    size = size + _magnitude(*z)
                outputs[number] = _widened(*ends, activation.rounding, size, layer.offset.dtype)
        return results

    def to_lp(
        self,
        path: str | os.PathLike[str],
        low: Any,
        high: Any,
        *,
        objective: Any = None,
        maximize: bool = False,
    ) -> None:
        """Writes the network, for inputs between ``low`` and ``high``, as a mixed-integer linear program.

        Variables ``x0, x1, ...`` are the input, ``y0, y1, ...`` the result. A relu with :meth:`bounds`
        ``l < 0 < u`` is ``h >= 0``, ``h >= z``, ``h <= u a``, ``h <= z - l (1 - a)`` with a binary a (Tjeng,
        Xiao and Tedrake 2019). Other bounds settle its sign. ``leaky_relu``, ``abs``, ``clip``, ``max`` are
        alike. The file is written by HiGHS (``pip install jaxconv_fc[verify]``), and every solver reads it.

        Args:
          path: a file that ends in ``.lp`` or ``.mps``.
          low, high: as for :meth:`bounds`. Finite.
          objective: a vector c, so that ``c @ y`` is minimised. By default nothing is: any feasible point.
          maximize: whether it is maximised instead.

        Raises:
          ValueError: the network has an activation without such constraints (it is named, with its layer), a
            bound is not finite, the objective has another length, or the path another ending.
          ImportError: highspy is not installed.
        """
        ends = [self._vector(name, v, np.float64) for name, v in (("low", low), ("high", high))]
        write(self.layers, path, ends, self.bounds(low, high), objective, maximize)

    def _vector(self, name: str, x: Any, dtype: Any = None) -> np.ndarray:
        """An input as one vector. A number stands for all entries."""
        leaves, tree = jax.tree.flatten(x)
        scalar = len(leaves) == 1 and np.ndim(leaves[0]) == 0
        shapes = [shape for shape, _ in self.in_shapes]
        if scalar and dtype is not None:
            return np.full(sum(map(math.prod, shapes)), leaves[0], dtype)
        got = [np.shape(leaf) for leaf in leaves]
        if tree != self.in_tree or got != shapes:
            raise ValueError(
                f"{name} must have the shape that the layers were made for, {shapes}, got {got}."
            )
        parts = [np.empty(0, dtype or np.float32), *(np.ravel(np.asarray(leaf)) for leaf in leaves)][
            bool(leaves) :
        ]
        return np.concatenate(parts).astype(dtype or np.result_type(*parts), copy=False)

    # -- a table ---------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        columns = [
            [cell.ljust(max(map(len, column))) for cell in column]
            for column in zip(*self._cells(), strict=True)
        ]
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))

    def _repr_html_(self) -> str:
        return table(self._cells(), words=(1, 4, 5, 6))

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("", "inputs", "z", "stored", "activation", "h", "name")
        rows = [head, *(_row(i, layer) for i, layer in enumerate(self.layers))]
        return rows if any(layer.name for layer in self.layers) else [row[:-1] for row in rows]


def _row(number: int, layer: AffineLayer) -> tuple[str, ...]:
    inputs = ", ".join("x" if n < 0 else str(n) for n in layer.inputs)
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in layer.parameters.items())
    activation = (layer.activation or "") + (f" ({numbers})" if numbers else "")
    shape = "x".join(map(str, layer.shape)) or "1"
    return str(number), inputs, f"{len(layer.offset):,}", f"{layer.stored:,}", activation, shape, layer.name


def _interval(
    layer: AffineLayer, outputs: dict[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of ``z = M h + offset``: a positive entry of M takes the low end of h to the low end of z,
    a negative one the high end."""
    low, high = (layer.offset.astype(np.float64) for _ in range(2))
    size, terms = np.abs(low), 2
    for n, matrix in zip(layer.inputs, layer.matrices, strict=True):
        before = outputs[n]
        whole = matrix.astype(np.float64)
        positive, negative = whole.maximum(0), whole.minimum(0)  # without their zeros
        with np.errstate(invalid="ignore", over="ignore"):
            low = low + positive @ before[0] + negative @ before[1]
            high = high + positive @ before[1] + negative @ before[0]
            size = size + abs(whole) @ _magnitude(*before)
        terms += int(np.diff(matrix.indptr).max(initial=0))
    # A sum of n products in the layer's dtype is off by gamma_n |M| |h| at most (Higham, section 3.1), by any
    # order of summation. Twice, for a network that composes its layers in another way.
    return _widened(low, high, 2 * terms, size, layer.offset.dtype)


def _magnitude(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(low), np.abs(high))


def _widened(
    low: np.ndarray, high: np.ndarray, units: int, size: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The interval, wider by so many rounding units of numbers of this size. An unknown end is infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        by = units * np.finfo(dtype).eps * size if units else 0.0
        low, high = low - by, high + by
    return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
