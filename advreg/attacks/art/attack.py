"""The class that runs attacks of the Adversarial Robustness Toolbox (ART).

ART was written for NumPy, and for classifiers of its own. To run its attacks on a Keras
3 model, this is needed: a classifier of ART's kind (`bridge`), labels in the form that
each attack expects (`quirks`), examples in batches, and no output of ART's own to the
terminal.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._extras import import_extra
from advreg._types import Constraint, Features
from advreg.attacks.arguments import check_range, check_runs_eagerly
from advreg.attacks.art.bridge import Bridge
from advreg.attacks.art.classes import (
    attack_class,
    parameters_of,
    plain,
    similar,
)
from advreg.attacks.art.estimators import (
    EXTRA,
    estimator_class,
    may_be_art_s,
)
from advreg.attacks.art.quirks import quirk_of
from advreg.attacks.engine.problem import Problem, ThreatModel
from advreg.attacks.engine.rows import num_rows
from advreg.attacks.engine.target import TargetModel
from advreg.backend import keras_private
from advreg.checks import (
    brief,
    check_bool,
    check_constraint,
    check_count,
    check_nonnegative,
    check_order,
    check_width,
    describe,
    is_number,
)
from advreg.config.norms import NormType
from advreg.network.output_form import OutputForm


class _RefusedError(ValueError):
    """An error of this module, which must not be reported as one of ART's."""


class ART:
    """An evasion attack of the Adversarial Robustness Toolbox, on any Keras 3 model.

    It is called like every other attack: `attack(model, x, y)`. The differences to a
    direct use of ART are:

    - Examples that the model already misclassifies are returned unchanged, and only the
      others are attacked. Some attacks, such as DeepFool, use the predictions as
      labels. For correctly classified examples these are the true labels.
    - ART gets logits, also from a model with probabilities, or with a single score.
      NewtonFool, SimBA, VirtualAdversarialMethod, LowProFool, PixelAttack and
      ThresholdAttack get probabilities, because their formulas need them.
    - `targeted` is `False` by default, also for BoundaryAttack and SignOPTAttack, whose
      default in ART is `True`. With `True`, `y` is the target. For SaliencyMapMethod
      (JSMA), ShadowAttack, LowProFool and TargetedUniversalPerturbation ART's `y` is
      always a target: untargeted, they get the second most likely class. They also
      accept `targeted=True` here. AutoAttack's `targeted=True` adds targeted attacks,
      and `y` is still the true class.
    - Every attack with a `batch_size` gets that of the call, unless you give another.
      Exceptions are SimBA and ZooAttack, which need 1, and ShadowAttack, where it is
      the number of noisy copies.
    - An attack is run batch by batch, so that memory does not grow with the data.
      UniversalPerturbation, TargetedUniversalPerturbation and SpatialTransformation
      search one change for all examples, so they get all at once.
    - On TensorFlow ART gets a classifier for TensorFlow. On JAX and PyTorch it gets one
      of no framework, with gradients by advreg, and runs its code for NumPy. What
      random numbers do not change is the same there up to rounding.
    - Momentum works, which ART has switched off for TensorFlow
      (MomentumIterativeMethod, and `decay` of ProjectedGradientDescent), by ART's NumPy
      code. Missing gradients, as behind a layer that rounds, are zero.
    - Progress bars appear only with `verbose=True`, where ART has this argument.
    - Results are clipped to the range. Values that are not finite, and padding of a
      `Masking` layer, are not changed.

    These work, tried on a network for scikit-learn's digits: FastGradientMethod,
    BasicIterativeMethod, ProjectedGradientDescent (and its variant for NumPy),
    MomentumIterativeMethod, AutoProjectedGradientDescent, AutoConjugateGradient,
    RescalingAutoConjugateGradient, AutoAttack, CarliniL0Method, CarliniL2Method,
    CarliniLInfMethod, ElasticNet, DeepFool, NewtonFool, SaliencyMapMethod,
    VirtualAdversarialMethod, Wasserstein, UniversalPerturbation,
    TargetedUniversalPerturbation, SpatialTransformation, SquareAttack, SimBA,
    ZooAttack, HopSkipJump, BoundaryAttack, SignOPTAttack, PixelAttack, ThresholdAttack,
    FrameSaliencyAttack and LowProFool (on rows, with `importance` an array). On
    TensorFlow these work besides: ShadowAttack, and the variant of
    ProjectedGradientDescent for TensorFlow.

    BrendelBethgeAttack needs the package numba. Wasserstein needs a `regularization`
    that fits the scale of the gradient. CarliniLInfMethod and ZooAttack fool few
    examples with ART's defaults. LaserAttack, GRAPHITEBlackbox, MalwareGDTensorFlow and
    SNAL have not been tried.

    These are refused with an error that says why: attacks on models of other libraries
    (those for PyTorch modules, DecisionTreeAttack, HighConfidenceLowUncertainty) or for
    other tasks than classification, patches, FeatureAdversaries, which need images to
    imitate, GeoDA, which does not run with NumPy 2, and on JAX and PyTorch what ART
    computes by TensorFlow alone.

    Args:
        attack: A class from `art.attacks.evasion`, or its name.
        clip_value_min: Smallest value of a perturbed feature, a number or an array.
        clip_value_max: Largest value. Give both or none, because ART needs both.
        from_logits: Whether the model's outputs are logits. If `None`, it is guessed
            from the first batch. See `FGSM`.
        **kwargs: Arguments of the class, without the classifier. `norm` may also be a
            `NormType` or its name. Where ART expects another attack, as in `attacks` of
            AutoAttack, give an `ART`.

    Raises:
        ImportError: The extra `attacks` is not installed.
        TypeError: `attack` is not a class of an evasion attack, or it has no such
            argument.
        ValueError: The attack cannot be used here, or a value is out of its range.

    Example:
    >>> attack = ART("CarliniL2Method", clip_value_min=0.0, clip_value_max=1.0)
    >>> attack.name
    'ART CarliniL2Method'
    """

    def __init__(
        self,
        attack: Any,
        /,
        *,
        clip_value_min: Constraint = None,
        clip_value_max: Constraint = None,
        from_logits: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._class = attack_class(attack)
        self._defaults = parameters_of(self._class)
        self.clip_value_min = check_constraint("clip_value_min", clip_value_min)
        self.clip_value_max = check_constraint("clip_value_max", clip_value_max)
        check_order(self.clip_value_min, self.clip_value_max)
        if (clip_value_min is None) != (clip_value_max is None):
            raise ValueError(
                "`clip_value_min` and `clip_value_max` must be given together: ART "
                "knows no range that is open at one end. Received: "
                f"{brief(clip_value_min)} and {brief(clip_value_max)}"
            )
        self.from_logits = (
            None if from_logits is None else check_bool("from_logits", from_logits)
        )
        self._kwargs = {name: plain(value) for name, value in kwargs.items()}
        self._check_class()
        self._check_kwargs()

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"ART {self._class.__name__}"

    @property
    def epsilon(self) -> float | None:
        """ART's `eps`, or `None` where the attack has no radius that is a number."""
        value = self._value("eps")
        return float(value) if is_number(value) else None

    @property
    def norm(self) -> NormType | None:
        """The norm of the radius, or the norm that the attack minimises, if any."""
        quirk = quirk_of(self._class)
        if quirk.norm is not None or not quirk.has_norm:
            return quirk.norm
        try:
            return NormType(self._value("norm"))
        except ValueError:
            return None

    @property
    def targeted(self) -> bool:
        """Whether `y` is the class to reach."""
        if quirk_of(self._class).y == "true":
            return False
        return bool(self._kwargs.get("targeted", False))

    @property
    def iterations_per_start(self) -> int | None:
        """ART's `max_iter`, or `None` where the attack has none."""
        value = self._value("max_iter")
        return int(value) if is_number(value) else None

    def with_epsilon(self, epsilon: float) -> ART:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius, ART's `eps`. An `eps_step` is scaled by the same
                factor: yours, or ART's default, which is an absolute length.

        Raises:
            ValueError: The attack has no radius, or `eps_step` belongs to a radius of
                0.
        """
        epsilon = check_nonnegative("epsilon", epsilon)
        if self.epsilon is None:
            raise ValueError(
                f"{self.name} has no radius `eps` that is a number, and so none that "
                f"could be replaced. Received: epsilon={brief(epsilon)}"
            )
        changes = {"eps": epsilon}
        step = self._value("eps_step")
        if is_number(step) and epsilon:  # A radius of 0 takes no steps.
            if not self.epsilon:
                raise ValueError(
                    "An `eps_step` cannot be scaled to another radius from `eps=0`. "
                    f"Received: {brief(self)}"
                )
            changes["eps_step"] = step * epsilon / self.epsilon
        return ART(
            self._class,
            clip_value_min=self.clip_value_min,
            clip_value_max=self.clip_value_max,
            from_logits=self.from_logits,
            **{**self._kwargs, **changes},
        )

    def __call__(
        self, model: keras.Model, x: Any, y: Any = None, *, batch_size: int = 32
    ) -> Any:
        """Returns perturbed examples.

        Examples that the model already misclassifies are returned unchanged.

        Args:
            model: A Keras 3 classifier, wrapped or not. It runs in inference mode, and
                nothing of it changes.
            x: Features, one array or tensor, or a structure that holds one, the batch
                axis first. For a wrapped model labels may be in it if it is a
                dictionary.
            y: The true classes, or the classes to reach where `targeted`: numbers of
                shape `[n]` or `[n, 1]`, or one-hot rows.
            batch_size: Number of examples that go through the model at once.

        Returns:
            The perturbed features as NumPy arrays, in the structure and dtypes of `x`
            (images of type uint8 as float32), without labels.

        Raises:
            TypeError: `model` is not a Keras 3 model.
            ValueError: It is no classifier, has several inputs, or labels or features
                do not fit it; features lie outside the clip range; or ART raises an
                error.
        """
        check_runs_eagerly("`ART`")
        target = TargetModel(model, self.from_logits)
        check_count("batch_size", batch_size)
        if target.fits_values:
            raise ValueError(
                "`model` must be a classifier: ART's evasion attacks know no "
                "regression. Use `FGSM` or `PGD`. Received: a model compiled with "
                f"loss={brief(model.loss)}"
            )
        features, y = target.unpack((x, y))
        total = num_rows(features) if tree.flatten(features) else 0
        if total == 0:
            raise ValueError(f"`x` must hold examples. Received: {describe(x)}")
        _check_input(target, features)
        clip_values = self._clip_values(target, features)
        form = target.output_form(features)
        self._check_form(form)
        classes = ops.convert_to_numpy(target.classes(y, form))
        bridge = Bridge(target, features, form, batch_size)
        return bridge.pack(self._run(bridge, classes, clip_values))

    def __repr__(self) -> str:
        shown = [self._class.__name__]
        given = dict(self._kwargs)
        for name in ("clip_value_min", "clip_value_max", "from_logits"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        for name, value in given.items():
            array = isinstance(value, np.ndarray)
            shown.append(f"{name}={describe(value) if array else repr(value)}")
        return f"ART({', '.join(shown)})"

    def _run(self, bridge: Bridge, classes: np.ndarray, clip_values: Any) -> np.ndarray:
        """Attacks the examples that are not fooled yet, batch by batch."""
        x, adversarial = bridge.x, bridge.x.copy()
        if self.epsilon == 0:  # ART refuses 0, and it allows no perturbation.
            return adversarial
        remaining = np.flatnonzero(
            (bridge.predicted() != classes)
            if self.targeted
            else (bridge.predicted() == classes)
        )
        if not len(remaining):
            return adversarial
        steps = {"all": len(remaining), "one": 1, None: bridge.batch_size}
        step = steps[quirk_of(self._class).batch]
        with self._ready(bridge):
            attack = self.make(bridge, clip_values)
            for start in range(0, len(remaining), step):
                rows = remaining[start : start + step]
                labels = self._labels(bridge, rows, classes)
                moved = attack.generate(
                    x=np.array(x[rows], "float32"),
                    y=None
                    if labels is None
                    else np.eye(bridge.classes, dtype="float32")[labels],
                )
                adversarial[rows] = self._checked(moved, x[rows])
        kept = np.isfinite(adversarial) & bridge.movable
        adversarial = np.where(kept, adversarial, x)
        if clip_values is None:
            return adversarial
        return np.where(kept, np.clip(adversarial, *clip_values), x).astype(x.dtype)

    def _labels(
        self, bridge: Bridge, rows: np.ndarray, classes: np.ndarray
    ) -> np.ndarray | None:
        """Returns ART's `y`: the true classes, or targets if the attack needs those."""
        if quirk_of(self._class).y != "target" or self.targeted:
            return classes[rows]
        scores = bridge.scores(bridge.x[rows])
        scores[np.arange(len(rows)), classes[rows]] = -np.inf
        return np.argmax(scores, axis=1)

    def make(self, bridge: Bridge, clip_values: Any) -> Any:
        """Makes the object of ART's class, and of attacks among its arguments.

        Args:
            bridge: The model and the data.
            clip_values: Smallest and largest value of an input, or `None`.
        """
        quirk = quirk_of(self._class)
        kwargs = dict(self._kwargs)
        loss = None
        if backend.BACKEND != "tensorflow":
            # ART replaces the loss only of its own classifiers. Here ours has it.
            loss = kwargs.pop("loss_type", None)
            if self._class.__name__ == "AutoAttack" and not kwargs.get("attacks"):
                kwargs["attacks"] = self._standard_attacks()
        classifier = bridge.classifier(quirk.takes_probabilities, clip_values, loss)
        if self._value("decay") is not None:
            # ART's variant for TensorFlow has no momentum; the one for NumPy has. ART
            # chooses between them by this attribute.
            classifier.all_framework_preprocessing = False

        def made(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(made, value))
            return value.make(bridge, clip_values) if isinstance(value, ART) else value

        kwargs = {key: made(value) for key, value in kwargs.items()}
        if "targeted" in self._defaults:
            kwargs.setdefault("targeted", False)
        else:
            kwargs.pop("targeted", None)
        if "verbose" in self._defaults:
            kwargs.setdefault("verbose", False)
        if "batch_size" in self._defaults and quirk.sets_batch_size:
            kwargs.setdefault("batch_size", bridge.batch_size)
        return self._class(classifier, **kwargs)

    def _standard_attacks(self) -> list[ART]:
        """Returns the attacks of which ART's AutoAttack consists by default."""
        ball = {name: self._value(name) for name in ("norm", "eps")}
        sizes = {k: v for k, v in self._kwargs.items() if k == "batch_size"}
        apgd = {**ball, "eps_step": self._value("eps_step"), "nb_random_init": 5}
        attacks: list[tuple[str, dict[str, Any]]] = [
            ("AutoProjectedGradientDescent", {**apgd, "loss_type": "cross_entropy"}),
            (
                "AutoProjectedGradientDescent",
                {**apgd, "loss_type": "difference_logits_ratio"},
            ),
            ("DeepFool", {"epsilon": 1e-3}),
            ("SquareAttack", {**ball, "max_iter": 5000, "nb_restarts": 5}),
        ]
        return [
            ART(
                name,
                clip_value_min=self.clip_value_min,
                clip_value_max=self.clip_value_max,
                **kwargs,
                **sizes,
            )
            for name, kwargs in attacks
        ]

    @contextlib.contextmanager
    def _ready(self, bridge: Bridge) -> Iterator[None]:
        """Suppresses ART's output and explains its errors, as a context manager."""
        logger = logging.getLogger("art")
        level = logger.level
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"(art|cma)\b")
                if not self._kwargs.get("verbose"):
                    # Attacks inside attacks have progress bars that `verbose=False`
                    # does not switch off.
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    logger.setLevel(logging.ERROR)
                self._import_missing()
                yield
        except (ImportError, MemoryError, _RefusedError):
            raise
        except Exception as error:
            if isinstance(error, backend.ERRORS) and not may_be_art_s(error):
                raise
            raise ValueError(
                f"{self.name} does not run on this model and data. ART says: "
                f"{type(error).__name__}: {str(error).rstrip('. ')}. Received: "
                f"{brief(self)}, and inputs of shape {bridge.x.shape} for "
                f"{bridge.classes} classes"
            ) from error
        finally:
            logger.setLevel(level)

    def _import_missing(self) -> None:
        """Imports packages that ART needs but does not install, for a clear error."""
        name = self._class.__name__
        if name == "AutoAttack":
            import_extra("multiprocess", EXTRA)
        if name in ("PixelAttack", "ThresholdAttack") and self._value("es") == 0:
            warnings.filterwarnings("ignore", "Could not import matplotlib")
            import_extra("cma", EXTRA)

    def _checked(self, moved: Any, x: np.ndarray) -> np.ndarray:
        """Checks that ART returned a perturbed input for each example."""
        if not isinstance(moved, np.ndarray) or moved.shape != x.shape:
            raise _RefusedError(
                f"{self.name} must give a perturbed input for each example, of shape "
                f"{x.shape}. Received: {describe(moved)}"
            )
        return moved.astype(x.dtype)

    def _clip_values(self, target: TargetModel, features: Features) -> Any:
        """Checks the range against the data, and converts it to ART's form."""
        if self.clip_value_min is None:
            return None
        # A radius that is not measured in a norm cannot be compared with the range.
        radius = self.epsilon or 0.0 if self.norm is not None else 0.0
        low, high = self.clip_value_min, self.clip_value_max
        norm = self.norm or NormType.INFINITY
        check_range(
            Problem(target, ThreatModel(radius, norm, None, low, high), True),
            features,
        )
        return _one_for_all("clip_value_min", low, features), _one_for_all(
            "clip_value_max", high, features
        )

    def _check_class(self) -> None:
        """Checks that the attack works on classifiers like those of `bridge`."""
        name = self._class.__name__
        # Attacks that make patches return a tuple of a patch and a mask.
        if "tuple" in str(inspect.signature(self._class.generate).return_annotation):
            raise ValueError(
                "`attack` must perturb each example. A patch is one for all, and comes "
                f"with a mask; use it with ART itself. Received: {name}"
            )
        quirk = quirk_of(self._class)
        if quirk.refused is not None:
            raise ValueError(f"{quirk.refused} Received: {name}")
        if name.endswith("PyTorch"):
            raise ValueError(
                f"`attack` must work on Keras models. Received: {name}, for PyTorch"
            )
        if quirk.only_on_tensorflow and backend.BACKEND != "tensorflow":
            raise ValueError(
                f"`attack` must run on Keras's backend, which is {backend.BACKEND}, "
                f"and ART runs this one on TensorFlow alone. {quirk.only_on_tensorflow}"
                f" Received: {name}"
            )
        have = estimator_class().__mro__
        for needed in keras_private.estimator_requirements_of(self._class):
            one_of = needed if isinstance(needed, tuple) else (needed,)
            if not any(cls in have for cls in one_of):
                raise ValueError(
                    "`attack` must work on classifiers of any kind. Received: "
                    f"{name}, which needs a "
                    f"{' or a '.join(cls.__name__ for cls in one_of)}"
                )
        needs_range = quirk.needs_range and not self._kwargs.get("attacks")
        if needs_range and self.clip_value_min is None:
            raise ValueError(
                f"{self.name} needs the range of the data: set `clip_value_min` and "
                "`clip_value_max`. Received: None and None"
            )

    def _check_kwargs(self) -> None:
        """Checks the arguments, as far as that is possible without a model."""
        name, known = self._class.__name__, dict(self._defaults)
        if quirk_of(self._class).y == "target":
            known["targeted"] = False
        unknown = sorted(set(self._kwargs) - set(known))
        if unknown:
            raise TypeError(
                f"`{unknown[0]}` must be an argument of ART's {name}, which are: "
                f"{', '.join(known)}.{similar(unknown[0], known)} Received: {unknown}"
            )
        missing = [
            key
            for key, value in known.items()
            if value is inspect.Parameter.empty and key not in self._kwargs
        ]
        if missing:
            raise TypeError(
                f"ART's {name} must be given {', '.join(f'`{m}`' for m in missing)}. "
                f"Received: {sorted(self._kwargs)}"
            )
        if "targeted" in self._kwargs:
            check_bool("targeted", self._kwargs["targeted"])
        if is_number(self._kwargs.get("eps")):
            check_nonnegative("eps", self._kwargs["eps"])
        if "norm" in self._kwargs and name != "Wasserstein":
            with contextlib.suppress(ValueError):  # ART has norms that advreg has not.
                self._kwargs["norm"] = NormType(self._kwargs["norm"]).order
        if self._kwargs.get("parallel_pool_size"):
            raise ValueError(
                "`parallel_pool_size` must be 0: a Keras model cannot be sent to other "
                f"processes. Received: {brief(self._kwargs['parallel_pool_size'])}"
            )
        check_width(
            "eps", self.epsilon, self.norm, self.clip_value_min, self.clip_value_max
        )

    def _check_form(self, form: OutputForm) -> None:
        """Checks that there are enough classes."""
        needs_three = self._value("loss_type") == "difference_logits_ratio" or (
            self._class.__name__ == "AutoAttack" and not self._kwargs.get("attacks")
        )
        if needs_three and form.classes < 3:
            raise ValueError(
                f"{self.name} needs 3 classes at least, for the difference of logits "
                f"ratio. Received: a model of {form.classes} classes"
            )

    def _value(self, name: str) -> Any:
        """Returns the value of an argument of ART's class: as given, or its default."""
        return self._kwargs.get(name, self._defaults.get(name))


def _check_input(target: TargetModel, features: Features) -> None:
    """Checks that there is one input, of floats, for batches of any size."""
    count_ = len(tree.flatten(features))
    if count_ != 1:
        raise ValueError(
            "`model` must have one input, because ART knows no more. Use attacks of "
            f"`advreg.attacks`, or a model of one input. Received {count_} inputs: "
            f"{describe(features)}"
        )
    if not all(target.moving(features)):
        raise ValueError(
            "`x` must be floats, or images of type uint8, in a dense array: nothing "
            f"else can be perturbed. Received: {describe(features)}"
        )
    if target.fixed_batch is not None:
        raise ValueError(
            "`model` must take batches of any size, because ART chooses its own. "
            f"Received: a model for batches of {target.fixed_batch}"
        )


def _one_for_all(name: str, bound: Constraint, features: Features) -> Any:
    """Converts an end of the range to ART's form: a number, or an array of one example.

    Raises:
        ValueError: The range differs from example to example.
    """
    (x,) = tree.flatten(features)
    (value,) = tree.flatten(bound)
    if value is None or is_number(value):
        return value
    if np.ndim(value) == len(x.shape) and value.shape[0] != 1:
        raise ValueError(
            f"`{name}` must be the same for all examples. Received shape: {value.shape}"
        )
    like = (1, *x.shape[1:])
    return np.array(np.broadcast_to(value, like)[0], "float32")
