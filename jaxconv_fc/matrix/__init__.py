"""The matrix of a convolution: dense, sparse, by rows, over devices; and from a matrix to its kernel."""
