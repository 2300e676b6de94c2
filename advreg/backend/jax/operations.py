"""The operations that advreg needs from JAX itself.

They have the names and arguments of `backend.tensorflow.operations`. Operations that
`keras.ops` has are not here.

How gradients are taken: `jax.vjp` runs a function with tracers in place of tensors, and
of the values of variables. So the function runs in a `StatelessScope` that gives the
variables these tracers. What the function assigns to variables leaves it as a result,
and is assigned afterwards. A tracer that stayed in a variable would be an error later.

JAX has no `None` for the gradient of a tensor that the value does not depend on: it
returns zeros. `_watched` finds out which tensors a gradient flows back to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.sparse
import jax.extend.core
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from advreg._types import Tensor, Watch
from advreg.backend.jax.scopes import ConstantScope, StatelessScope

ERRORS = (jax.errors.JAXTypeError, jax.errors.JaxRuntimeError)
NUM_SEEDS = 2**32  # The seeds that a `SeedGenerator` of Keras takes.


def is_tensor(leaf: Any) -> bool:
    """Returns whether a value is a dense tensor."""
    return isinstance(leaf, jax.Array)


def is_sparse(leaf: Any) -> bool:
    """Returns whether a value is a sparse tensor."""
    return isinstance(leaf, jax.experimental.sparse.JAXSparse)


def is_eager() -> bool:
    """Returns whether operations run at once, rather than become part of a graph."""
    return not is_symbolic(jnp.zeros(()))


def current_trace() -> Any:
    """Returns what equals itself only while the same function is traced.

    See `backend.tensorflow.operations.current_trace`.
    """
    return jax.extend.core.get_opaque_trace_state()


def is_symbolic(tensor: Tensor) -> bool:
    """Returns whether a tensor has no value yet."""
    return isinstance(tensor, jax.core.Tracer)


def widest_float() -> str:
    """Returns the widest float type: "float32", unless JAX was told to use 64 bits."""
    return str(jax.dtypes.canonicalize_dtype("float64").name)


def to_tensor(leaf: Any) -> Any:
    """Converts an array or variable to a tensor, and returns tensors and `None`."""
    if leaf is None or is_tensor(leaf):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        return jax.device_put(leaf)  # Other ways compile a copy for each shape.
    return ops.convert_to_tensor(leaf)


def copy(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same values. JAX never changes one in place."""
    return tensor


def argmax(scores: Tensor) -> Tensor:
    """Returns the place of the largest score of each row, int32 `[batch]`."""
    return jnp.argmax(scores, axis=1).astype("int32")


maximum, minimum, cumsum = ops.maximum, ops.minimum, ops.cumsum


def own_copy(data: Any) -> Any:
    """Returns the data, because JAX writes into no array of the user's."""
    return data


def gather(tensor: Tensor, places: Any) -> Tensor:
    """Returns some of the rows of a tensor. `places` are not negative."""
    if is_symbolic(tensor) or is_symbolic(places):
        return jnp.take(tensor, jnp.asarray(places), axis=0)
    # By NumPy, because JAX would compile this for each number of rows.
    return jax.device_put(np.take(np.asarray(tensor), np.asarray(places), axis=0))


def padding(rows: int, batch_size: int) -> np.ndarray | None:
    """Returns the rows of a batch that is filled up with copies of its last one.

    Args:
        rows: Number of rows that there are.
        batch_size: Number of rows of a full batch.

    Returns:
        The numbers of the rows, or `None` if the batch is full.
    """
    if rows >= batch_size:
        return None
    return np.minimum(np.arange(batch_size), rows - 1)


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """Joins tensors along their first axis."""
    if any(map(is_symbolic, tensors)):
        return jnp.concatenate(tensors)
    return jax.device_put(np.concatenate([np.asarray(tensor) for tensor in tensors]))


def uniform(shape: Any, seed: Tensor, dtype: Any) -> Tensor:
    """Draws uniformly from [0, 1). The same seed, `[2]`, gives the same numbers."""
    return jax.random.uniform(_key(seed), tuple(map(int, shape)), dtype=dtype)


def random_integers(shape: Any, seed: Tensor) -> Tensor:
    """Draws int32 from [0, 2**31 - 1). The same seed, `[2]`, gives the same numbers."""
    return jax.random.randint(_key(seed), tuple(shape), 0, 2**31 - 1, "int32")


def _key(seed: Tensor) -> Any:
    return jax.random.wrap_key_data(
        jnp.asarray(seed).astype("uint32"), impl="threefry2x32"
    )


def choose(condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """Runs one of two functions. In a graph both are traced, but only one runs."""
    if not is_symbolic(condition) and is_eager():
        return one() if condition else other()
    return jax.lax.cond(condition, one, other)


def differentiate(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]],
    tensors: Sequence[Tensor],
    scale: Tensor | float | None = None,
    zeros: bool = False,
) -> tuple[Tensor, Any, list[Any]]:
    """Runs a function, and takes the gradient of the value that it returns.

    See `backend.tensorflow.operations.differentiate`.
    """
    tensors = list(tensors)
    flows: set[int] = set()

    def run(leaves: list[Tensor]) -> tuple[Tensor, Any]:
        return function(_watched(leaves, flows))

    value, backward, others = jax.vjp(run, tensors, has_aux=True)
    (gradients,) = backward(_upstream(value, scale))
    if zeros:
        return value, others, gradients
    return value, others, _where_it_flows(gradients, flows)


def differentiate_step(
    function: Callable[[list[Tensor], Watch], tuple[Tensor, Tensor | None, Any]],
    variables: Callable[[], Sequence[keras.Variable]],
    tensors: Sequence[Tensor] = (),
    watches: bool = False,
) -> tuple[Any, list[Any], list[Any]]:
    """Runs a function, and takes two gradients of the values that it returns.

    See `backend.tensorflow.operations.differentiate_step`. The variables must exist
    before. JAX differentiates with respect to arguments alone. So a watched tensor is
    the sum of itself and of an argument that is 0, and a pass that computes nothing
    finds out the shapes of these arguments.
    """
    tensors, weights = list(tensors), list(variables())
    given, shapes = len(tensors), []
    flows: set[int] = set()
    updated: list[keras.Variable] = []
    apart = False

    def run(values: list[Tensor], leaves: list[Tensor]) -> tuple[Any, Any]:
        nonlocal apart
        mapping = zip(weights, values, strict=True)
        with StatelessScope(list(mapping), collect_losses=True) as scope:
            leaves = _watched(leaves, flows)
            zeros = iter(leaves[given:])

            def watch(tensor: Tensor) -> Tensor:
                if len(leaves) > given:
                    return tensor + next(zeros)
                shapes.append(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
                return tensor

            total, attacked, others = function(leaves[:given], watch)
        updated[:] = scope.updated
        changes = [scope.get_current_value(variable) for variable in updated]
        apart = bool(leaves) and attacked is not total
        return ((total, attacked) if apart else (total,)), (others, changes)

    values = [weight.value for weight in weights]
    if watches:
        jax.eval_shape(lambda values, leaves: run(values, leaves)[0], values, tensors)
        tensors += [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    results, backward, (others, changes) = jax.vjp(run, values, tensors, has_aux=True)
    ones = [jnp.ones_like(result) for result in results]
    if apart:
        of_weights, _ = backward((ones[0], jnp.zeros_like(ones[1])))
        _, of_tensors = backward((jnp.zeros_like(ones[0]), ones[1]))
        # Zeros for the other result count as a gradient, too. So which tensors the
        # attacked one depends on is found out apart, by a pass that computes nothing.
        flows.clear()
        _flow(lambda leaves: run(values, leaves)[0][1], tensors, flows)
    else:
        of_weights, of_tensors = backward((ones[0],))
    for variable, change in zip(updated, changes, strict=True):
        variable.assign(change)
    return others, of_weights, _where_it_flows(of_tensors, flows)


def weight_gradients(
    function: Callable[[], Tensor],
    variables: Sequence[keras.Variable],
    scale: Tensor | float | None,
) -> list[Tensor]:
    """Takes the gradient of a loss with respect to variables, times a scale.

    See `backend.tensorflow.operations.weight_gradients`.
    """
    variables = list(variables)

    def run(values: list[Tensor]) -> Tensor:
        mapping = zip(variables, values, strict=True)
        with StatelessScope(list(mapping), collect_losses=True):
            return function()

    loss, backward = jax.vjp(run, [variable.value for variable in variables])
    (found,) = backward(_upstream(loss, scale))
    return found


def _watched(leaves: Sequence[Tensor], flows: set[int]) -> list[Tensor]:
    """Returns tensors, and adds the number of each that a gradient comes back to.

    The set is filled during the backward pass, when JAX asks for the gradient of the
    identity that each tensor goes through. It does not ask where there is none.
    """
    return [_identity(index, flows)(leaf) for index, leaf in enumerate(leaves)]


def _identity(index: int, flows: set[int]) -> Callable[[Tensor], Tensor]:
    @jax.custom_vjp
    def identity(tensor: Tensor) -> Tensor:
        return tensor

    def forward(tensor: Any) -> tuple[Tensor, None]:
        return tensor.value, None

    def backward(_: None, gradient: Any) -> tuple[Tensor]:
        if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
            return (jnp.zeros(gradient.shape, gradient.dtype),)
        flows.add(index)
        return (gradient,)

    identity.defvjp(forward, backward, symbolic_zeros=True)
    return identity


def _flow(
    function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], flows: set[int]
) -> None:
    """Fills `flows` by the gradient of a function that watches its tensors."""

    def gradient(leaves: list[Tensor]) -> Any:
        value, backward = jax.vjp(function, leaves)
        return backward(jnp.ones_like(value))

    jax.eval_shape(gradient, tensors)


def _where_it_flows(gradients: Sequence[Tensor], flows: set[int]) -> list[Any]:
    return [
        gradient if index in flows else None for index, gradient in enumerate(gradients)
    ]


def _upstream(value: Tensor, scale: Tensor | float | None) -> Tensor:
    return jnp.full_like(value, 1.0 if scale is None else scale)


def constants() -> contextlib.AbstractContextManager[Any]:
    """Makes variables constants to the gradients around it, as a context manager.

    An attack within a step uses this: without it JAX would differentiate all its
    iterations.
    """
    return ConstantScope()


def add_gradients(a: Any, b: Any) -> Any:
    """Adds two gradients, each of which may be `None`."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def dense(gradient: Any) -> Tensor:
    """Returns a gradient, which is always dense on JAX."""
    return gradient


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    weights: Sequence[keras.Variable],
) -> None:
    """Updates weights by an optimizer."""
    if not optimizer.built:
        optimizer.build(weights)
    state = optimizer.variables
    values, new_state = optimizer.stateless_apply(
        [variable.value for variable in state],
        list(gradients),
        [weight.value for weight in weights],
    )
    pairs = [*zip(weights, values, strict=True), *zip(state, new_state, strict=True)]
    for variable, value in pairs:
        variable.assign(value)


def repeat(
    function: Callable[[Tensor], Tensor], times: int, value: Tensor, unroll: bool
) -> Tensor:
    """Applies a function repeatedly, each time to its last result.

    See `backend.tensorflow.operations.repeat`.
    """
    if unroll or times <= 1 or is_eager():
        for _ in range(times):
            value = function(value)
        return value
    return jax.lax.fori_loop(0, times, lambda _, last: function(last), value)
