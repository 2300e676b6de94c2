"""Seeds for generators of the wrapper's own, which change no other random number."""

from __future__ import annotations

import random


def seed_from_name(name: str | None) -> int:
    """Derives a seed from a name and from Python's random state.

    That state is left unchanged, so that wrapping a model does not change how it would
    train.

    Args:
        name: Name of the generator.
    """
    state = random.getstate()
    # Not the number itself, because the next layer that is made will draw the same
    # number as its seed.
    derived = random.Random(f"{name} {random.random()}")
    random.setstate(state)
    return derived.randint(1, 10**9)
