"""Every public function in every mode of JAX: the result is that of the plain call."""

import functions


def test_the_table_has_every_public_function():
    assert functions.PUBLIC == functions.CLASSES | set(functions.TABLE)
