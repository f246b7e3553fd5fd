"""Whole networks, forward and as a training step: lax, the same with `with_products`, and torch.

A network is written once, with the operations of :class:`_Jax` or :class:`_Torch`. Its kernels are drawn as
(taps..., in, out) and laid out as each wants them.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc
from benchmarks.rows import Cannot, Row, Table, text

LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
FIRST = {1: ("NCW", "OIW", "NCW"), 2: ("NCHW", "OIHW", "NCHW"), 3: ("NCDHW", "OIDHW", "NCDHW")}


class _Jax:
    relu, tanh, silu = staticmethod(jax.nn.relu), staticmethod(jnp.tanh), staticmethod(jax.nn.silu)
    gelu = staticmethod(partial(jax.nn.gelu, approximate=False))

    def __init__(self, channels_last):
        self.layouts = LAST if channels_last else FIRST

    def conv(self, x, k, stride=1, pad=None, groups=1, dilation=1):
        dims = x.ndim - 2
        taps = k.shape[self.layouts[dims][1].index("W")]
        pads = [((taps - 1) // 2,) * 2 if pad is None else (pad, 0)] * dims
        return lax.conv_general_dilated(
            x, k, (stride,) * dims, pads, None, (dilation,) * dims, self.layouts[dims], groups
        )

    def up(self, x, k, pad):
        """Stride 2, transposed: a convolution of the dilated input."""
        dims = x.ndim - 2
        pads = [(pad, pad)] * dims
        return lax.conv_general_dilated(x, k, (1,) * dims, pads, (2,) * dims, None, self.layouts[dims])

    def kernel(self, k):
        return jnp.asarray(k if self.layouts is LAST else np.moveaxis(k, (-1, -2), (0, 1)))

    def image(self, x):
        return jnp.asarray(x if self.layouts is LAST else np.moveaxis(x, -1, 1))


class _Torch:
    def __init__(self, channels_last):
        import torch
        from torch.nn import functional

        self.torch, self.functional, self.channels_last = torch, functional, channels_last
        self.relu, self.tanh = torch.relu, torch.tanh
        self.gelu, self.silu = functional.gelu, functional.silu

    def conv(self, x, k, stride=1, pad=None, groups=1, dilation=1):
        dims = x.ndim - 2
        if pad:
            x = self.functional.pad(x, (pad, 0) * dims)
        padding = (k.shape[-1] - 1) // 2 if pad is None else 0
        convolve = getattr(self.functional, f"conv{dims}d")
        return convolve(x, k, None, stride, padding, dilation, groups)

    def up(self, x, k, pad):
        convolve = getattr(self.functional, f"conv_transpose{x.ndim - 2}d")
        return convolve(x, k, None, 2, k.shape[-1] - 1 - pad)

    def kernel(self, k, transposed):
        if transposed:  # torch takes the kernel of the convolution that it transposes
            k = np.flip(np.moveaxis(k, (-2, -1), (0, 1)), range(2, k.ndim))
        else:
            k = np.moveaxis(k, (-1, -2), (0, 1))
        return self._laid_out(k).requires_grad_()

    def image(self, x):
        return self._laid_out(np.moveaxis(x, -1, 1))

    def _laid_out(self, array):
        tensor = self.torch.from_numpy(np.ascontiguousarray(array))
        formats = {4: self.torch.channels_last, 5: self.torch.channels_last_3d}
        if self.channels_last and array.ndim in formats:
            return tensor.to(memory_format=formats[array.ndim])
        return tensor


# -- networks ---------------------------------------------------------------------------------------------


class Network(NamedTuple):
    fn: Callable  # (operations, kernels, x) -> features
    kernels: list[np.ndarray]
    image: tuple[int, ...]  # of one example, channels last
    transposed: tuple[int, ...] = ()  # the numbers of the kernels of transposed convolutions


_RNG = np.random.default_rng(0)


def _k(*shape):
    return (_RNG.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def _mobilenet(size):
    plan = [(24, 2), (32, 1), (48, 2), (64, 1), (96, 2), (128, 1)]
    kernels, channels = [_k(3, 3, 3, 16)], 16
    for out, _ in plan:
        wide = 3 * channels
        kernels += [_k(1, 1, channels, wide), 3 * _k(3, 3, 1, wide), _k(1, 1, wide, out)]
        channels = out

    def fn(ops, kernels, x):
        first, *rest = kernels
        x = ops.relu(ops.conv(x, first, 2))
        for (_, stride), i in zip(plan, range(0, len(rest), 3), strict=True):
            widen, depthwise, narrow = rest[i : i + 3]
            x = ops.relu(ops.conv(x, widen))
            x = ops.relu(ops.conv(x, depthwise, stride, groups=max(depthwise.shape[0], depthwise.shape[-1])))
            x = ops.conv(x, narrow)
        return x

    return Network(fn, kernels, (size, size, 3))


def _chain(kernels, image, groups=1, act="relu", stride=1):
    """Convolutions and activations; those with several taps have the groups and the stride."""

    def fn(ops, kernels, x):
        for k, (taps, *_) in zip(kernels, shapes, strict=True):
            many = taps > 1
            x = getattr(ops, act)(ops.conv(x, k, stride if many else 1, groups=groups if many else 1))
        return x

    shapes = [k.shape for k in kernels]
    return Network(fn, kernels, image)


def _resnext():
    kernels = [k for _ in range(3) for k in (_k(1, 1, 64, 64), _k(3, 3, 4, 64), _k(1, 1, 64, 64))]
    return _chain(kernels, (28, 28, 64), groups=16)


def _convnext():
    kernels = [k for _ in range(3) for k in (_k(7, 7, 1, 48), _k(1, 1, 48, 192), _k(1, 1, 192, 48))]
    return _chain(kernels, (28, 28, 48), groups=48, act="gelu")


def _lenet():
    return _chain([_k(5, 5, 1, 6), _k(5, 5, 6, 16), _k(5, 5, 16, 32)], (28, 28, 1), stride=2)


def _residual(kernels, per_block, image):
    """Blocks of convolutions, each added to its input."""

    def fn(ops, kernels, x):
        for i in range(0, len(kernels), per_block):
            y = x
            for j, k in enumerate(kernels[i : i + per_block]):
                y = ops.conv(y if j == 0 else ops.relu(y), k)
            x = ops.relu(x + y)
        return x

    return Network(fn, kernels, image)


def _resnet18():
    return _residual([_k(3, 3, 32, 32) for _ in range(6)], 2, (32, 32, 32))


def _resnet50():
    kernels = [k for _ in range(4) for k in (_k(1, 1, 128, 32), _k(3, 3, 32, 32), _k(1, 1, 32, 128))]
    return _residual(kernels, 3, (28, 28, 128))


def _dcgan():
    kernels = [_k(4, 4, 128, 64), _k(4, 4, 64, 32), _k(4, 4, 32, 16), _k(4, 4, 16, 3)]

    def fn(ops, kernels, x):
        for k in kernels:
            x = ops.relu(ops.up(x, k, 2))
        return x

    return Network(fn, kernels, (4, 4, 128), transposed=(0, 1, 2, 3))


def _unet(dims):
    size, width = (64, 16) if dims == 2 else (24, 8)
    three, two = (3,) * dims, (2,) * dims
    kernels = [_k(*three, 1, width), _k(*three, width, 2 * width)]
    kernels += [_k(*two, 2 * width, width), _k(*three, width, 1)]

    def fn(ops, kernels, x):
        first, down, up, last = kernels
        a = ops.relu(ops.conv(x, first))
        b = ops.relu(ops.conv(a, down, 2))
        return ops.conv(ops.relu(a + ops.up(b, up, 1)), last)

    return Network(fn, kernels, (*(size,) * dims, 1), transposed=(2,))


def _wavenet():
    kernels = [_k(2, 32, 32) for _ in range(8)]

    def fn(ops, kernels, x):
        for i, k in enumerate(kernels):
            x = x + ops.tanh(ops.conv(x, k, pad=2**i, dilation=2**i))
        return x

    return Network(fn, kernels, (2048, 32))


NETWORKS = {
    "MobileNetV2": partial(_mobilenet, 32),
    "MobileNetV2, 96x96": partial(_mobilenet, 96),
    "ResNeXt": _resnext,
    "ConvNeXt": _convnext,
    "DCGAN generator": _dcgan,
    "U-Net": partial(_unet, 2),
    "U-Net 3-D": partial(_unet, 3),
    "ResNet-18 blocks": _resnet18,
    "ResNet-50 blocks": _resnet50,
    "WaveNet": _wavenet,
    "LeNet": _lenet,
}
# (batch, channels last, dtype): every network at the batches, and at the middle one in the other ways
WAYS = [(8, True, "float32"), (1, True, "float32"), (32, True, "float32"), (8, False, "float32"),
        (8, True, "bfloat16"), (8, True, "float64")]  # fmt: skip
FORWARD_WAYS = WAYS[:1]


# -- rows ---------------------------------------------------------------------------------------------------


def _rows(training, quick):
    for name, make in NETWORKS.items():
        network = make()
        for batch, last, dtype in [(1, True, "float32")] if quick else WAYS if training else FORWARD_WAYS:
            with jax.enable_x64(dtype == "float64"):
                x = np.random.default_rng(1).standard_normal((batch, *network.image)).astype(np.float32)
                ops = _Jax(last)
                kernels = [ops.kernel(k).astype(dtype) for k in network.kernels]
                loss = partial(_loss, network, ops)
                image = ops.image(x).astype(dtype)
                ours = partial(_compiled, fc.with_products(loss), training, kernels, image)
                peers = {"lax": partial(_compiled, loss, training, kernels, image)}
                for how in (True, False):
                    peers["torch, channels last" if how else "torch"] = partial(
                        _torch, network, training, how, dtype, x
                    )
                layout = ("NHWC" if last else "NCHW") if len(network.image) > 2 else "NWC" if last else "NCW"
                yield Row(f"{name}, batch {batch}, {layout}, {dtype}", ours, peers, value=_value)


def _loss(network, ops, kernels, x):
    return (network.fn(ops, kernels, x) ** 2).mean()


def _compiled(loss, training, kernels, x):
    fn = jax.value_and_grad(loss) if training else loss
    start = time.perf_counter()
    program = jax.jit(fn).lower(kernels, x).compile()
    seconds = time.perf_counter() - start

    def call():
        return program(kernels, x)

    memory = program.memory_analysis().temp_size_in_bytes
    call.about = f"{seconds:.1f} s, {text(memory)}"
    return call


def _torch(network, training, channels_last, dtype, x):
    ops = _Torch(channels_last)
    if dtype == "bfloat16" or (channels_last and len(network.image) < 3):
        raise Cannot("float32 and float64 alone, and no such layout in 1-D")
    kind = getattr(ops.torch, dtype)
    kernels = [
        ops.kernel(k, i in network.transposed).detach().to(kind).requires_grad_()
        for i, k in enumerate(network.kernels)
    ]
    image = ops.image(x).to(kind)

    def forward():
        with ops.torch.no_grad():
            return [_loss(network, ops, kernels, image)]

    def step():
        loss = _loss(network, ops, kernels, image)
        return [loss, ops.torch.autograd.grad(loss, kernels)]

    return step if training else forward


def _value(result):
    loss = result[0] if isinstance(result, tuple | list) else result
    return np.asarray(loss.detach() if hasattr(loss, "detach") else loss, np.float64).reshape(1)


ABOUT = "In brackets how long the program took to compile, and its temporary memory."
TABLES = (
    Table("models_forward", "Whole networks, forward: `with_products`", "", partial(_rows, False), ABOUT),
    Table("models", "Whole networks, a training step: `with_products`", "", partial(_rows, True), ABOUT),
)
