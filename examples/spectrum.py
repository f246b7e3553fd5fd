"""How much a trained layer can amplify: the true norm of each layer against what is usually quoted.

The network of examples/digits.py is trained, and the spectrum of each of its convolutions is computed

- as it is: with its zeros padding, stride and dilation;
- with circular padding instead, which the Fourier transform makes easy;
- as the kernel reshaped to a matrix (out channels x the rest), as spectral normalisation does it.

The true norm is checked to lie within its certificate, and the spectra are drawn.

    python examples/spectrum.py [spectrum.png]
"""

import sys

import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

try:
    import matfree  # noqa: F401 (the largest singular values need it)
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples,spectrum]'")

from digits import all_specs, train


def circular(spec):
    """The same kernel and stride on an image that wraps around, as large an output as that has."""
    return fc.conv_spec(
        spec.lhs_shape,
        spec.rhs_shape,
        spec.window_strides,
        "SAME",
        rhs_dilation=spec.rhs_dilation,
        feature_group_count=spec.feature_group_count,
        padding_mode="circular",
    )


def reshaped_norm(kernel):
    return jnp.linalg.norm(kernel.reshape(kernel.shape[0], -1), 2)


def measure(spec, kernel):
    lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
    return {
        "true": spectrum.spectral_norm(spec, kernel),
        "at least": lower,
        "at most": upper,
        "circular": spectrum.spectral_norm(circular(spec), kernel),
        "reshaped": reshaped_norm(kernel),
    }


def draw(specs, params, measured, path):
    """Per layer all singular values of both matrices, and the norm of the reshaped kernel."""
    fig, axes = plt.subplots(1, len(specs), figsize=(4 * len(specs), 3.6), layout="constrained")
    for (name, spec), ax in zip(specs.items(), axes, strict=True):
        kernel = params[name][0]
        for label, geometry, style in (("true", spec, "-"), ("circular", circular(spec), "--")):
            values = np.asarray(spectrum.singular_values(geometry, kernel))
            ax.plot(np.linspace(0, 1, len(values)), values, style, label=label)
        ax.axhline(measured[name]["reshaped"], color="gray", linestyle=":", label="reshaped kernel's norm")
        ax.set(title=f"{name}, M {spec.out_size}x{spec.in_size}", xlabel="rank (fraction)", ylim=(0, None))
    axes[0].set_ylabel("singular values")
    axes[0].legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(picture_path="spectrum.png"):
    data = load_digits()
    images = jnp.asarray(data.images[:, None] / 16, jnp.float32)
    print("training")
    params = train(images, jnp.asarray(data.target))
    specs = all_specs(images.shape[1:])

    measured = {name: measure(spec, params[name][0]) for name, spec in specs.items()}
    columns = list(next(iter(measured.values())))
    print(f"\n{'layer':10}" + "".join(f"{column:>10}" for column in columns))
    for name, row in measured.items():
        print(f"{name:10}" + "".join(f"{float(value):10.4f}" for value in row.values()))
    product = {c: float(np.prod([row[c] for row in measured.values()])) for c in columns}
    print(f"{'product':10}" + "".join(f"{product[c]:10.1f}" for c in columns))
    print("\nThe product of the first column bounds the Lipschitz constant of the network.")

    draw(specs, params, measured, picture_path)
    print(f"wrote {picture_path}")
    # A float32 norm may be off by a few units in the last place, its bounds may not.
    slack = 1 + 1e-5
    inside = all(r["at least"] <= r["true"] * slack <= r["at most"] * slack**2 for r in measured.values())
    print(f"every norm within its bounds: {'yes' if inside else 'NO'}")
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
