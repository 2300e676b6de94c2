"""Checks the attacks and radii of a report, and names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from advreg.attacks.attack import Attack
from advreg.attacks.foreign import AnyAttack, ForeignAttack, as_attack
from advreg.attacks.substitution import Substitution
from advreg.attacks.transfer import Transfer
from advreg.checks import brief, check_nonnegative, describe_value, is_number


def listed_attacks(attacks: Any) -> list[AnyAttack]:
    """Checks the attacks of a report, and returns them as a list.

    Args:
        attacks: An attack, or a list of them.

    Raises:
        TypeError: One is no attack.
        ValueError: There is none, or one is targeted.
    """
    found = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
    if not found:
        raise ValueError("`attacks` must name one attack at least. Received: none")
    for attack in found:
        if isinstance(attack, type) or not callable(attack):
            raise TypeError(
                "`attacks` must be attacks, such as `advreg.attacks.PGD(epsilon=0.1)`, "
                "or a list of them; not their classes or names. Received: "
                f"{describe_value(attack)}"
            )
    described = [as_attack(attack) for attack in found]
    for attack in described:
        if attack.targeted:
            raise ValueError(
                "`attacks` must not be targeted: a robust accuracy counts whatever an "
                "example is mistaken for. Call a targeted attack with the targets, "
                f"`x_adv = attack(model, x, targets)`. Received: {brief(attack)}"
            )
    return described


def at_radii(attack: AnyAttack, epsilons: Any) -> list[AnyAttack]:
    """Returns an attack at each of several radii.

    Args:
        attack: The attack. One without a radius is returned unchanged.
        epsilons: The radii, or `None` for the attack's own.

    Raises:
        TypeError: `epsilons` is no sequence.
        ValueError: It is empty, or a radius is negative.
    """
    if epsilons is None:
        return [attack]
    if is_number(epsilons) or isinstance(epsilons, (str, bytes)):
        epsilons = [epsilons]
    if not isinstance(epsilons, Iterable):
        raise TypeError(
            "`epsilons` must be a sequence of radii. Received: "
            f"{describe_value(epsilons)}"
        )
    radii = list(epsilons)
    if not radii:
        raise ValueError("`epsilons` must hold one radius at least. Received: none")
    radii = sorted({check_nonnegative("epsilons", radius) for radius in radii})
    if isinstance(attack, Substitution) or not attack.has_radius:
        return [attack]
    return [attack.with_epsilon(radius) for radius in radii]


def unique_names(attacks: Sequence[AnyAttack]) -> list[str]:
    """Returns a name for each attack, different for attacks with different settings.

    Attacks that differ in nothing but their ball share a name.
    """
    known: dict[str, list[str]] = {}
    names = []
    for attack in attacks:
        settings = _settings_but_ball(attack)
        others = known.setdefault(f"{attack.name} {attack.norm}", [])
        if settings not in others:
            others.append(settings)
        place = others.index(settings)
        names.append(attack.name if not place else f"{attack.name} ({place + 1})")
    return names


def _settings_but_ball(attack: Any) -> str:
    """Returns the settings of an attack without its ball, to compare them.

    A step size belongs to the ball, unless it is another share of the radius.
    """
    if isinstance(attack, ForeignAttack):
        attack = attack.attack
    if isinstance(attack, Transfer):
        return f"{_settings_but_ball(attack.attack)} on {id(attack.source_model)}"
    if not isinstance(attack, Attack):
        return repr(attack)
    settings = {
        field.name: repr(getattr(attack, field.name))
        for field in dataclasses.fields(attack)
        if field.name not in ("epsilon", "norm", "step_size")
    }
    if attack.step_size is not None and attack.epsilon:
        settings["step_size"] = f"{attack.step_size / attack.epsilon:.6g}"
    return repr(settings)
