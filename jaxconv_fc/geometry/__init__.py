"""The geometry of a convolution: the relation of one axis, and the axes together."""
