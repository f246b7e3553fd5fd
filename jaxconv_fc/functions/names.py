"""Names for convolutions: the place where one is performed, as a user knows it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxconv_fc.functions.jaxprs import JaxprEqn


class ArrayPaths:
    """The path of the layer that an array belongs to, such as ``blocks/0/conv1``, by the array itself.

    Arrays are those that a function is given, and those that it holds: as a module, a method of one, or in
    its closure.
    """

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]):
        self._paths: dict[int, tuple[str, Any]] = {}  # id -> (path, the array, which keeps the id its own)
        for tree in (*_held(fn), *args, *kwargs.values()):
            with contextlib.suppress(Exception):  # a closure may hold what is no pytree: it has no names then
                for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                    if path:
                        self._paths.setdefault(id(leaf), (_layer(path), leaf))

    def __getitem__(self, array: Any) -> str:
        """The path, empty where none is known."""
        return self._paths.get(id(array), ("", None))[0]

    def hand_on(self, before: Any, after: Any) -> None:
        """``after`` belongs to the layer that ``before`` belongs to."""
        if self[before]:
            self._paths[id(after)] = self[before], after


def _held(fn: Any) -> list[Any]:
    """The pytrees that a callable carries along: itself if it is a module, else its closure."""
    fn = inspect.unwrap(fn)
    if isinstance(fn, functools.partial):
        return [*_held(fn.func), *fn.args, *fn.keywords.values()]
    if inspect.ismethod(fn):
        return [fn.__self__]
    if not inspect.isfunction(fn):
        return [fn]
    with contextlib.suppress(ValueError):  # a variable of the closure that has no value yet
        names = inspect.getclosurevars(fn)
        return [*names.nonlocals.values(), *names.globals.values()]
    return []


def _layer(path: Sequence[Any]) -> str:
    """The path of an array without the name of the array itself (and of the flax variable that holds it)."""
    *layer, name = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    if name == "value" and layer:
        *layer, name = layer
    return "/".join(layer) or name


def place_of(eqn: JaxprEqn, outer: str = "", path: str = "") -> str:
    """Where an equation comes from: its name stack, with the path of its layer if the stack lacks that.

    A stack of transformations alone, ``transpose(jvp())``, gets the path put inside, or the line of the
    source where no path is known.
    """
    stack = nested(outer, eqn)
    if re.sub(r"\w+\(|[()/]", "", stack):
        named = not path or path.rsplit("/")[-1] in stack
        return stack if named else f"{stack}/{path}"
    place = path or _source_line(eqn)
    return stack.replace("()", f"({place})") if stack and place else place


def nested(outer: str, eqn: JaxprEqn) -> str:
    """The whole name stack of an equation inside of a call: that of the call, then its own, which begins anew
    there."""
    return "/".join(filter(None, (outer, str(eqn.source_info.name_stack))))


def _source_line(eqn: JaxprEqn) -> str:
    """``file.py:line`` of the user's call: the innermost one outside of JAX and of installed libraries.

    Empty where JAX has kept none (the jaxpr of a jitted library function was traced for another call).
    """
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    ours = tuple(os.path.dirname(str(file)) for file in (jax.__file__, os.path.dirname(__file__)))
    frames = [f for f in frames if not f.file_name.startswith(ours)]
    frame = next((f for f in frames if "site-packages" not in f.file_name), next(iter(frames), None))
    return f"{os.path.basename(frame.file_name)}:{frame.line_num}" if frame else ""
