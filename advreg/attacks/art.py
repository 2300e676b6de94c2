"""The bridge to the attacks of the Adversarial Robustness Toolbox (ART).

ART was written for NumPy and for classifiers of its own. Here is what it takes to run
its attacks on a Keras 3 model: a classifier that it understands, labels in the form
that each attack means, examples in batches, and silence.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg._extras import import_extra
from advreg.attacks.art_bridge import (
    EXTRA,
    Bridge,
    estimator_class,
    evasion,
    geoda_mended,
)
from advreg.attacks.base import check_range, check_width
from advreg.attacks.engine import Scene, Threat, size
from advreg.attacks.victim import OutputForm, Victim
from advreg.checks import (
    Constraint,
    check_order,
    constraint,
    count,
    flag,
    is_number,
    length,
    show,
)
from advreg.config import NormType
from advreg.packing import Features, describe
from advreg.perturbation import differentiable

_ORDERS = {NormType.L1: 1, NormType.L2: 2, NormType.INFINITY: np.inf}

# What ART takes to be `y` where the attack has no argument `targeted`, or ignores it.
_Y_IS_TARGET = (
    "LowProFool",
    "SaliencyMapMethod",
    "ShadowAttack",
    "TargetedUniversalPerturbation",
)
_Y_IS_TRUE = ("AutoAttack",)  # Its `targeted` adds targets to the untargeted attacks.
_Y_IS_IMAGE = (
    "FeatureAdversariesNumpy",
    "FeatureAdversariesPyTorch",
    "FeatureAdversariesTensorFlowV2",
)
# The others take logits, as their authors do.
_WANT_PROBABILITIES = (
    "LowProFool",
    "NewtonFool",
    "PixelAttack",
    "SimBA",
    "ThresholdAttack",
    "VirtualAdversarialMethod",
)
_NEED_RANGE = (
    "AutoAttack",
    "PixelAttack",
    "ShadowAttack",
    "SignOPTAttack",
    "SquareAttack",
    "ThresholdAttack",
)
# One perturbation or transformation for all examples: these see all of them at once.
_SEE_ALL = (
    "SpatialTransformation",
    "TargetedUniversalPerturbation",
    "UniversalPerturbation",
)
_SEE_ONE = ("ShadowAttack",)
# Their `batch_size` counts noise, or must be 1.
_OWN_BATCH_SIZE = ("ShadowAttack", "SimBA", "ZooAttack")
_NORMS = {  # Of those that have a radius, and no argument `norm` that tells its norm.
    "BasicIterativeMethod": NormType.INFINITY,
    "VirtualAdversarialMethod": NormType.L2,
    "Wasserstein": None,
}


class _RefusedError(ValueError):
    """An error found here, which is not to be taken for one of ART's."""


class ART:
    """An evasion attack of the Adversarial Robustness Toolbox, on any Keras 3 model.

    It is called like every other attack: `attack(model, x, y)`. Around ART's own code,
    this is done:

    - Examples that the model already misclassifies stay what they are, and the others
      go to ART. So an attack that takes the predictions for the labels, as DeepFool
      does, has the true labels, and moves nothing back into its class.
    - ART gets logits, also of a model that gives probabilities, or a single score.
      NewtonFool, SimBA, VirtualAdversarialMethod, LowProFool, PixelAttack and
      ThresholdAttack get probabilities, which their arithmetic is about.
    - `targeted` is `False` unless you say otherwise, for BoundaryAttack and
      SignOPTAttack too, whose default it is not in ART. `y` is the target where it is
      `True`. For SaliencyMapMethod (JSMA), ShadowAttack, LowProFool and
      TargetedUniversalPerturbation ART's `y` is always a target: untargeted, they get
      the second most likely class. They also take `targeted=True` here. AutoAttack's
      `targeted=True` adds targeted attacks, and `y` remains the true class.
    - `batch_size` goes to every attack that takes one, unless you give another. Not to
      SimBA and ZooAttack, which need 1, nor to ShadowAttack, where it is the number of
      noisy copies.
    - An attack is run batch by batch, in memory that does not grow with the data.
      UniversalPerturbation, TargetedUniversalPerturbation and SpatialTransformation
      look for one change for all examples, and so see them all at once.
    - What ART has switched off or left behind runs: momentum (MomentumIterativeMethod,
      and `decay` of ProjectedGradientDescent) in ART's NumPy code, GeoDA with NumPy 2
      and without files in the working directory. Gradients that are missing, as behind
      a layer that rounds, are zero.
    - Progress bars appear only with `verbose=True`, where ART has it.
    - What leaves the clip range is brought back into it. What is not finite, and what
      is padding to a `Masking` layer, stays what it was.

    Tried on a network for scikit-learn's digits, and at work: FastGradientMethod,
    BasicIterativeMethod, ProjectedGradientDescent (and its variants for NumPy and
    TensorFlow), MomentumIterativeMethod, AutoProjectedGradientDescent,
    AutoConjugateGradient, RescalingAutoConjugateGradient, AutoAttack, CarliniL0Method,
    CarliniL2Method, CarliniLInfMethod, ElasticNet, DeepFool, NewtonFool,
    SaliencyMapMethod, VirtualAdversarialMethod, Wasserstein, ShadowAttack,
    UniversalPerturbation, TargetedUniversalPerturbation, SpatialTransformation,
    SquareAttack, SimBA, ZooAttack, HopSkipJump, BoundaryAttack, SignOPTAttack, GeoDA,
    PixelAttack, ThresholdAttack, FrameSaliencyAttack and LowProFool (on rows, with
    `importance` an array). BrendelBethgeAttack needs the package numba. Wasserstein
    wants a `regularization` that fits the scale of the gradient. CarliniLInfMethod and
    ZooAttack find little with ART's defaults. LaserAttack, GRAPHITEBlackbox,
    MalwareGDTensorFlow and SNAL have not been tried.

    Refused with the reason: attacks on models of other libraries (those for PyTorch,
    DecisionTreeAttack, HighConfidenceLowUncertainty) or for other tasks than
    classification, patches, and FeatureAdversaries, which need images to imitate.

    Args:
        attack: A class from `art.attacks.evasion`, or its name.
        clip_value_min: Smallest value of a perturbed feature, a number or an array.
        clip_value_max: Largest value. Give both or none, as ART wants them.
        from_logits: Whether the model's outputs are logits. If `None`, the outputs
            tell, as for `advreg.attacks.Attack`.
        **kwargs: Arguments of the class, the classifier left out. `norm` may also be
            given as a `NormType` or its name. Where ART wants another attack, as
            `attacks` of AutoAttack, give an `ART`.

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
        self._class = _attack_class(attack)
        self._defaults = _parameters(self._class)
        self.clip_value_min = constraint("clip_value_min", clip_value_min)
        self.clip_value_max = constraint("clip_value_max", clip_value_max)
        check_order(self.clip_value_min, self.clip_value_max)
        if (clip_value_min is None) != (clip_value_max is None):
            raise ValueError(
                "`clip_value_min` and `clip_value_max` must be given together: ART "
                "knows no range that is open at one end. Received: "
                f"{clip_value_min!r} and {clip_value_max!r}"
            )
        self.from_logits = (
            None if from_logits is None else flag("from_logits", from_logits)
        )
        self._kwargs = {name: _plain(value) for name, value in kwargs.items()}
        self._check_class()
        self._check_kwargs()

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"ART {self._class.__name__}"

    @property
    def epsilon(self) -> float | None:
        """ART's `eps`, or `None` where the attack has no radius that is a number."""
        value = self._value("eps")
        return float(value) if is_number(value) else None

    @property
    def norm(self) -> NormType | None:
        """The norm of the radius, or of what the attack makes small, if it has one."""
        if self._class.__name__ in _NORMS:
            return _NORMS[self._class.__name__]
        try:
            return NormType(self._value("norm"))
        except ValueError:
            return None

    @property
    def targeted(self) -> bool:
        """Whether `y` is the class to reach."""
        if self._class.__name__ in _Y_IS_TRUE:
            return False
        return bool(self._kwargs.get("targeted", False))

    @property
    def iterations_per_round(self) -> int | None:
        """ART's `max_iter`, or `None` where the attack has none."""
        value = self._value("max_iter")
        return int(value) if is_number(value) else None

    def with_epsilon(self, epsilon: float) -> ART:
        """Returns the same attack at another radius.

        Args:
            epsilon: The radius, ART's `eps`. An `eps_step` grows and shrinks along:
                yours, or ART's default, which is an absolute length.

        Raises:
            ValueError: The attack has no radius, or `eps_step` belongs to a radius of
                0.
        """
        epsilon = length("epsilon", epsilon)
        if self.epsilon is None:
            raise ValueError(
                f"{self.name} has no radius `eps` that is a number, and so none that "
                f"could be replaced. Received: epsilon={epsilon!r}"
            )
        changes = {"eps": epsilon}
        step = self._value("eps_step")
        if is_number(step) and epsilon:  # A radius of 0 takes no steps.
            if not self.epsilon:
                raise ValueError(
                    "An `eps_step` cannot be scaled to another radius from `eps=0`. "
                    f"Received: {self!r}"
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
        """Returns the adversarial neighbours of examples.

        Examples that are fooled already stay what they are.

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
            (images of type uint8 as float32), labels left out.

        Raises:
            TypeError: `model` is not a Keras 3 model.
            ValueError: It is no classifier, has several inputs, or labels or features
                do not fit it; features lie outside the clip range; or ART refuses.
        """
        victim = Victim(model, self.from_logits)
        count("batch_size", batch_size)
        if victim.fits_values:
            raise ValueError(
                "`model` must be a classifier: ART's evasion attacks know no "
                "regression. Use `FGSM` or `PGD`. Received: a model compiled with "
                f"loss={model.loss!r}"
            )
        features, y = victim.unpack((x, y))
        total = size(features) if tree.flatten(features) else 0
        if total == 0:
            raise ValueError(f"`x` must hold examples. Received: {describe(x)}")
        _check_input(victim, features)
        clip_values = self._clip_values(victim, features)
        form = victim.output_form(features)
        self._check_form(form)
        classes = victim.classes(y, form).numpy()
        bridge = Bridge(victim, features, form, batch_size)
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
        """Attacks what stands, batch by batch."""
        x, adversarial = bridge.x, bridge.x.copy()
        if self.epsilon == 0:  # Which ART refuses, and nothing can move.
            return adversarial
        standing = np.flatnonzero(
            (bridge.predicted() != classes)
            if self.targeted
            else (bridge.predicted() == classes)
        )
        if not len(standing):
            return adversarial
        name = self._class.__name__
        step = bridge.batch_size
        step = {True: len(standing)}.get(name in _SEE_ALL, step)
        step = 1 if name in _SEE_ONE else step
        with self._ready(bridge):
            attack = self._make(bridge, clip_values)
            for start in range(0, len(standing), step):
                rows = standing[start : start + step]
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
        """What ART is to take for `y`: the classes, or targets where it wants those."""
        name = self._class.__name__
        if name not in _Y_IS_TARGET or self.targeted:
            return classes[rows]
        scores = bridge.scores(bridge.x[rows])
        scores[np.arange(len(rows)), classes[rows]] = -np.inf
        return np.argmax(scores, axis=1)

    def _make(self, bridge: Bridge, clip_values: Any) -> Any:
        """Makes ART's attack on a model, and the attacks that it is made of."""
        name = self._class.__name__
        classifier = bridge.classifier(name in _WANT_PROBABILITIES, clip_values)
        if self._value("decay") is not None:
            # ART's variant for TensorFlow has no momentum; the one for NumPy has. This
            # is what ART chooses by.
            classifier.all_framework_preprocessing = False

        def made(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(made, value))
            return value._make(bridge, clip_values) if isinstance(value, ART) else value

        kwargs = {key: made(value) for key, value in self._kwargs.items()}
        if "targeted" in self._defaults:
            kwargs.setdefault("targeted", False)
        else:
            kwargs.pop("targeted", None)
        if "verbose" in self._defaults:
            kwargs.setdefault("verbose", False)
        if "batch_size" in self._defaults and name not in _OWN_BATCH_SIZE:
            kwargs.setdefault("batch_size", bridge.batch_size)
        return self._class(classifier, **kwargs)

    @contextlib.contextmanager
    def _ready(self, bridge: Bridge) -> Iterator[None]:
        """Keeps ART quiet, mends what does not run, and says who it was that failed."""
        logger = logging.getLogger("art")
        level = logger.level
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"(art|cma)\b")
                if not self._kwargs.get("verbose"):
                    # Attacks inside of attacks have progress bars of their own.
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    logger.setLevel(logging.ERROR)
                self._import_missing()
                if self._class.__name__ == "GeoDA":
                    stack.enter_context(geoda_mended())
                yield
        except (ImportError, MemoryError, tf.errors.OpError, _RefusedError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self.name} does not run on this model and data. ART says: "
                f"{type(error).__name__}: {str(error).rstrip('. ')}. Received: "
                f"{self!r}, and inputs of shape {bridge.x.shape} for {bridge.classes} "
                "classes"
            ) from error
        finally:
            logger.setLevel(level)

    def _import_missing(self) -> None:
        """Imports what ART needs and does not bring along, to say what brings it."""
        name = self._class.__name__
        if name == "AutoAttack":
            import_extra("multiprocess", EXTRA)
        if name in ("PixelAttack", "ThresholdAttack") and self._value("es") == 0:
            warnings.filterwarnings("ignore", "Could not import matplotlib")
            import_extra("cma", EXTRA)

    def _checked(self, moved: Any, x: np.ndarray) -> np.ndarray:
        """Checks that ART gave a neighbour for each example."""
        if not isinstance(moved, np.ndarray) or moved.shape != x.shape:
            raise _RefusedError(
                f"{self.name} must give a perturbed input for each example, of shape "
                f"{x.shape}. Received: {describe(moved)}"
            )
        return moved.astype(x.dtype)

    def _clip_values(self, victim: Victim, features: Features) -> Any:
        """Checks the range against the data, and gives it ART's form."""
        if self.clip_value_min is None:
            return None
        # Of a radius in a measure without a norm, nothing is known here.
        radius = self.epsilon or 0.0 if self.norm is not None else 0.0
        low, high = self.clip_value_min, self.clip_value_max
        norm = self.norm or NormType.INFINITY
        check_range(
            Scene(victim, Threat(radius, norm, None, low, high), True),
            features,
        )
        return _one_for_all("clip_value_min", low, features), _one_for_all(
            "clip_value_max", high, features
        )

    def _check_class(self) -> None:
        """Checks that the attack is one on classifiers like this one."""
        name = self._class.__name__
        if "tuple" in str(inspect.signature(self._class.generate).return_annotation):
            raise ValueError(
                "`attack` must perturb each example. A patch is one for all, and comes "
                f"with a mask; use it with ART itself. Received: {name}"
            )
        if name in _Y_IS_IMAGE:
            raise ValueError(
                "`attack` must work on labels, and this one imitates other images. "
                f"Received: {name}"
            )
        if name.endswith("PyTorch"):
            raise ValueError(
                f"`attack` must work on Keras models. Received: {name}, for PyTorch"
            )
        have = estimator_class().__mro__
        for needed in self._class._estimator_requirements or ():
            one_of = needed if isinstance(needed, tuple) else (needed,)
            if not any(cls in have for cls in one_of):
                raise ValueError(
                    "`attack` must work on classifiers of any kind. Received: "
                    f"{name}, which needs a "
                    f"{' or a '.join(cls.__name__ for cls in one_of)}"
                )
        needs_range = name in _NEED_RANGE and not self._kwargs.get("attacks")
        if needs_range and self.clip_value_min is None:
            raise ValueError(
                f"{self.name} needs the range of the data: set `clip_value_min` and "
                "`clip_value_max`. Received: None and None"
            )

    def _check_kwargs(self) -> None:
        """Checks what is known of the arguments before there is a model."""
        name, known = self._class.__name__, dict(self._defaults)
        if name in _Y_IS_TARGET:
            known["targeted"] = False
        unknown = sorted(set(self._kwargs) - set(known))
        if unknown:
            raise TypeError(
                f"`{unknown[0]}` must be an argument of ART's {name}, which are: "
                f"{', '.join(known)}.{_close(unknown[0], known)} Received: {unknown}"
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
            flag("targeted", self._kwargs["targeted"])
        if is_number(self._kwargs.get("eps")):
            length("eps", self._kwargs["eps"])
        if "norm" in self._kwargs and name != "Wasserstein":
            with contextlib.suppress(ValueError):  # ART knows norms that are not here.
                self._kwargs["norm"] = _ORDERS[NormType(self._kwargs["norm"])]
        if self._kwargs.get("parallel_pool_size"):
            raise ValueError(
                "`parallel_pool_size` must be 0: a Keras model cannot be sent to other "
                f"processes. Received: {self._kwargs['parallel_pool_size']!r}"
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
        """What an argument of ART's class is: given, or its default."""
        return self._kwargs.get(name, self._defaults.get(name))


def _attack_class(attack: Any) -> Any:
    """Finds a class of ART's evasion attacks.

    Raises:
        TypeError: It is no such class.
        ValueError: There is none of that name.
    """
    module = evasion()
    base = import_extra("art.attacks", EXTRA).EvasionAttack
    if isinstance(attack, str):
        names = [
            name
            for name, cls in vars(module).items()
            if inspect.isclass(cls) and issubclass(cls, base)
        ]
        if attack not in names:
            numba = " It needs the package numba." if "Brendel" in attack else ""
            raise ValueError(
                "`attack` must be the name of a class in `art.attacks.evasion`."
                f"{_close(attack, names)}{numba} Received: {attack!r}"
            )
        return getattr(module, attack)
    if not inspect.isclass(attack) or not issubclass(attack, base):
        raise TypeError(
            "`attack` must be a class from `art.attacks.evasion`, or its name; other "
            f"attacks of ART give no adversarial examples. Received: {show(attack)}"
        )
    return attack


def _parameters(attack: Any) -> dict[str, Any]:
    """The arguments of an attack after the classifier, and their defaults."""
    parameters = list(inspect.signature(attack).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def _plain(value: Any) -> Any:
    """Makes a Python number of NumPy's, which ART's checks refuse."""
    return value.item() if isinstance(value, np.generic) else value


def _close(name: str, names: Any) -> str:
    found = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _check_input(victim: Victim, features: Features) -> None:
    """Checks that there is one input, of floats, for batches of any size."""
    count_ = len(tree.flatten(features))
    if count_ != 1:
        raise ValueError(
            "`model` must have one input, for ART knows no more. Use the attacks of "
            f"`advreg.attacks`, or a model of one input. Received {count_} inputs: "
            f"{describe(features)}"
        )
    if not all(differentiable(features, victim.form.fixed_keys)):
        raise ValueError(
            "`x` must be floats, or images of type uint8, in a dense array: nothing "
            f"else can be perturbed. Received: {describe(features)}"
        )
    if victim.fixed_batch is not None:
        raise ValueError(
            "`model` must take batches of any size, for ART does as it likes. "
            f"Received: a model for batches of {victim.fixed_batch}"
        )


def _one_for_all(name: str, bound: Constraint, features: Features) -> Any:
    """Gives an end of the range ART's form: a number, or an array like an example."""
    (x,) = tree.flatten(features)
    (value,) = tree.flatten(bound)
    if value is None or is_number(value):
        return value
    if np.ndim(value) == x.shape.rank and value.shape[0] != 1:
        raise ValueError(
            f"`{name}` must be the same for all examples. Received shape: {value.shape}"
        )
    like = (1, *x.shape[1:])
    return np.array(np.broadcast_to(value, like)[0], "float32")
