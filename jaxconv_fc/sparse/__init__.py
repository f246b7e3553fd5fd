"""The matrix of a convolution without its zeros."""
