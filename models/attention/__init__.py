"""Softmax attention inside any module: recognised while it is computed (`forms`, `products`), by
a forward without weights or arithmetic (`shadow`), listed with its shapes (`calls`), changed or
watched from outside (`intercept`, `observe`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
