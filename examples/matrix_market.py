"""Write the matrix of a convolution as a Matrix Market file, which every solver and MATLAB can read.

python examples/matrix_market.py [FILE]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import scipy.io

import jaxconv_fc as fc


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "convolution.mtx")
    spec = fc.conv_spec((1, 3, 16, 16), (4, 3, 3, 3), (1, 1), "SAME")
    kernel = np.random.default_rng(0).standard_normal(spec.rhs_shape)
    matrix = fc.as_scipy(spec, kernel)
    comment = f"convolution {spec.in_shape} -> {spec.out_shape}, kernel {spec.rhs_shape}, row-major vectors"
    scipy.io.mmwrite(path, matrix, comment=comment, precision=17)
    again = scipy.io.mmread(path, spmatrix=False).tocsr()
    assert (again != matrix).nnz == 0
    print(f"{path}: {matrix.shape[0]} x {matrix.shape[1]}, {matrix.nnz:,} entries, read back equal")


if __name__ == "__main__":
    main()
