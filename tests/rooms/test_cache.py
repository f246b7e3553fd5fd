"""A cache that is bounded by the bytes that it holds."""

import numpy as np

from jaxconv_fc.geometry import cache


def test_every_cache_is_bounded_by_bytes(monkeypatch):
    calls = []

    @cache.bounded_cache
    def table(size):
        calls.append(size)
        return (np.zeros(size, np.uint8),)

    monkeypatch.setattr(cache, "LIMIT", 1000)
    assert table(400) is table(400)
    for size in (300, 500, 400):
        table(size)
    assert calls == [400, 300, 500, 400]
    assert table.held() <= 1000
    table(5000)
    assert table.held() <= 1000
