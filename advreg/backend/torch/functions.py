"""Functions of a model on PyTorch, which runs them as they are: see `backend.cache`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from advreg.backend.cache import Caches, ModelCache


class CompiledFunctions(ModelCache):
    """Facts that were found out about a model. Nothing is compiled."""

    keys: tuple[Hashable, ...] = ()

    def compiled(
        self,
        key: Hashable,
        function: Callable[..., Any],
        examples: Any,
        **_: Any,
    ) -> Callable[..., Any]:
        """Returns a function that runs without recording for gradients.

        The function may take gradients inside itself.

        Args:
            key: Has no effect, as all arguments but the next.
            function: The function.
            examples: A tuple of arguments like those that it will be called with.
        """
        return torch.no_grad()(function)


functions_of = Caches(CompiledFunctions)
