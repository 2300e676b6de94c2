"""Functions that TensorFlow has compiled for a model: see `backend.cache`.

A key says what a function does. For each key there may be several tracings, for batches
of several forms: first one for any batch size, then, if images or sequences come in
other sizes, one for any size. Without this, images of all sizes would mean a new
tracing for each batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from advreg.backend.cache import Caches, ModelCache, alike
from advreg.backend.parts import Parts, attributes_written
from advreg.backend.tensorflow.operations import signature_of


class _Traced(NamedTuple):
    """A function that was traced for arguments of these types."""

    specs: Any
    function: Callable[..., Any]
    keep: Any


class CompiledFunctions(ModelCache):
    """The compiled functions of one model, and facts that were found out about it.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(model)
        # For each key and form of arguments, tracings for several sizes.
        self._functions: dict[tuple[Hashable, str], list[_Traced]] = {}

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the compiled functions, one for each tracing."""
        return [key for (key, _), traced in self._functions.items() for _ in traced]

    def forget(self) -> None:
        """Drops all functions and facts."""
        super().forget()
        self._functions.clear()

    def compiled(
        self,
        key: Hashable,
        function: Callable[..., Any],
        examples: Any,
        *,
        constants: Any = (),
        takes: Callable[[Any], bool] | None = None,
        keep: Any = None,
        jit_compile: bool | None = None,
        pads: bool = True,
    ) -> Callable[..., Any]:
        """Compiles a function for batches of any length, once.

        If the arguments later have another size, of images or sequences, one more
        tracing is made for any size. Where the model does not allow that, one is made
        for each size.

        Args:
            key: What the function depends on, beside its arguments and the model.
            function: A function of structures of tensors with the batch axis first,
                or of scalars.
            examples: A tuple of arguments like those that it will be called with.
            constants: A tuple of further arguments, tensors that have no batch axis.
            takes: Function of the types of the first argument, with sizes left open,
                that returns whether the model can be traced for them. By default it
                can.
            keep: An object whose `id` is in the key. It is kept alive, so that no other
                object gets this `id`.
            jit_compile: The argument of `tf.function`.
            pads: Has no effect. It is for JAX, which compiles for each batch size.

        Returns:
            The compiled function, of `examples` and `constants`.
        """
        fixed = tree.map_structure(tf.type_spec_from_value, constants)
        specs = (*signature_of(examples), *fixed)
        traced = self._functions.setdefault((key, _form(specs)), [])
        exact = (*tree.map_structure(tf.type_spec_from_value, examples), *fixed)
        for one in traced:
            if _fits(one.specs, exact):
                # A tracing for any size serves only if the model allows that.
                is_open = not _fits(specs, one.specs)
                if not is_open or takes is None or takes(one.specs[0]):
                    return one.function
        began = time.perf_counter()
        # From general to special: the first that can be traced is used. Some models
        # need to know sizes, and a constant may fit one batch length only.
        wanted = [specs, exact]
        if traced:
            opened = _opened(traced[-1].specs, specs)
            if takes is None or takes(opened[0]):
                wanted.insert(0, opened)
        whole = tf.function(function, autograph=False, jit_compile=jit_compile)
        with attributes_written(self.model, self._written):
            compiled = self._trace(traced, wanted, whole, keep)
        # Tracing may have built the model, or changed what calls write.
        self._parts = Parts(self.model, self._written)
        self.seconds += time.perf_counter() - began
        return compiled

    def _trace(
        self, traced: list[_Traced], wanted: list[Any], whole: Any, keep: Any
    ) -> Callable[..., Any]:
        """Traces a function for the first of several signatures that can be traced."""
        for spec in wanted:
            try:
                # A concrete function, because TensorFlow warns of a `tf.function` that
                # is traced often, as it is when many models are attacked in a row.
                compiled = whole.get_concrete_function(*spec)
            except Exception:
                if spec is wanted[-1]:
                    raise
                continue
            traced.append(_Traced(spec, compiled, keep))
            return compiled
        raise AssertionError("There is one type at least.")

    def takes_sizes(self, run: Callable[[Any], Any], specs: Any, features: Any) -> bool:
        """Returns whether a model gives the same outputs if it is traced for any size.

        It may not: `x[:, : y.shape[1]]` takes all of `x` where that size is unknown. So
        the model is run in both ways, and the outputs are compared.

        Args:
            run: Function that runs the model on features.
            specs: The types of the features, with sizes left open.
            features: Features, of which two examples are used.
        """

        def find() -> bool:
            few = tree.map_structure(
                lambda leaf: leaf[:2] if isinstance(leaf, tf.Tensor) else leaf, features
            )
            try:
                traced = self.fact(
                    ("traced for any size", repr(specs)),
                    lambda: tf.function(run, autograph=False).get_concrete_function(
                        specs
                    ),
                )
                return alike(traced(few), run(few), 1e-3)
            except Exception:
                return False

        sizes = repr(signature_of(features))
        return self.fact(("takes sizes", repr(specs), sizes), find)


functions_of = Caches(CompiledFunctions)


def _form(specs: Any) -> str:
    """Returns a string that is the same for signatures that differ only in sizes."""

    def form(spec: Any) -> Any:
        if isinstance(spec, tf.TensorSpec):
            return spec.dtype.name, spec.shape.rank
        return repr(spec)

    return repr(tree.map_structure(form, specs))


def _fits(known: Any, specs: Any) -> bool:
    """Returns whether a function traced for the signature `known` accepts `specs`."""

    def fits(a: Any, b: Any) -> bool:
        if not isinstance(a, tf.TensorSpec) or a.shape.rank is None:
            return a == b
        sizes = zip(a.shape.as_list(), b.shape.as_list(), strict=True)
        return all(size is None or size == given for size, given in sizes)

    return all(
        fits(a, b)
        for a, b in zip(tree.flatten(known), tree.flatten(specs), strict=True)
    )


def _opened(known: Any, specs: Any) -> Any:
    """Returns a signature whose sizes are open where two signatures differ."""

    def opened(a: Any, b: Any) -> Any:
        if not isinstance(a, tf.TensorSpec) or a.shape.rank is None:
            return b
        sizes = [
            s if s == t else None
            for s, t in zip(a.shape.as_list(), b.shape.as_list(), strict=True)
        ]
        return tf.TensorSpec(sizes, a.dtype)

    return tree.map_structure(opened, known, specs)
