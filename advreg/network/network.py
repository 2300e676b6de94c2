"""The base model as training and attacks run it: one forward pass for both.

Three things may differ from a plain call of the model. Labels that a dictionary may
hold have been taken out, and the rest must be put into the structure that the model
declares. Images may have become floats, which an input declared as uint8 would
truncate. And on a CPU the gradient with respect to the input may come from a faster
convolution.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from advreg import backend
from advreg._types import Features
from advreg.network.convolution import cheap_input_gradients
from advreg.network.images import as_float_input_model, unperturbed_integers
from advreg.network.inputs import BatchForm
from advreg.network.last_activation import recorded


class Network:
    """The forward pass of the base model, which training and attacks share.

    Args:
        form: The `BatchForm`, which takes batches apart and holds the base model.
    """

    def __init__(self, form: BatchForm) -> None:
        self.form = form
        self._float_input_model: keras.Model | None = None
        # The layers of the base when that model was made, to notice if they change.
        self._layers: Any = None

    @property
    def base(self) -> keras.Model:
        """The base model itself."""
        return self.form.base_model

    def forward(
        self,
        features: Features,
        training: bool | None,
        *,
        floats: bool = False,
        for_input_gradient: bool = False,
    ) -> Any:
        """Runs the base model on features from which the labels have been taken.

        Args:
            features: The inputs of the base model, without labels and weights.
            training: Whether layers behave as in training.
            floats: Whether uint8 images have been cast to floats, which the model must
                not cast back.
            for_input_gradient: Whether the gradient with respect to the features is
                wanted. Some convolutions are then computed so that it is cheaper.

        Returns:
            The outputs of the base model, in its structure.
        """
        model = self._with_float_inputs() if floats else self.base
        inputs = self.form.base_inputs(features)
        with contextlib.ExitStack() as stack:
            stack.enter_context(recorded(model))
            if for_input_gradient:
                stack.enter_context(cheap_input_gradients(model))
            return model(inputs, training=training)

    def predict(self, features: Features) -> Any:
        """Runs the base model in inference mode, and discards changes of its state."""
        with backend.StatelessScope():
            return self.forward(features, training=False)

    def unperturbed_integers(self, features: Features) -> list[str]:
        """Names the integers that stay unperturbed, and have a gradient as floats."""
        if not self.base.built:
            return []
        return unperturbed_integers(
            features, self.form.fixed_keys, self.base, self.predict
        )

    def _with_float_inputs(self) -> keras.Model:
        """Returns the base, or a model of its layers that does not cast to uint8."""
        layers = getattr(self.base, "layers", None)
        if self._float_input_model is None or self._layers != layers:
            self._float_input_model = as_float_input_model(
                self.base, self.form.fixed_keys
            )
            self._layers = layers
        return self._float_input_model
