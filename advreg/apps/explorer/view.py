"""The HTML that shows a picture and the predictions. It needs no other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from advreg.apps.explorer.pictures import Picture, magnify, png_url
from advreg.apps.explorer.side_by_side import Side

_CLASSES_SHOWN = 3

STYLE = """
.adv-label {font-size: .9rem; font-weight: 600; color: var(--body-text-color)}
.adv-bare, .adv-bare .html-container {padding: 0 !important}
#examples {border-width: 0 !important; background: none; box-shadow: none}
#examples .grid-wrap {min-height: 0; max-height: none; padding: 0; overflow: visible}
#examples .grid-container {padding: 3px 0; gap: .5rem; grid-template-rows: none;
  grid-auto-rows: auto; height: auto;
  grid-template-columns: repeat(12, minmax(2.5rem, 5rem))}
#examples .thumbnail-item {width: 100%; height: auto; aspect-ratio: 1; cursor: pointer}
@media (max-width: 60rem) {
  #examples .grid-container {grid-template-columns: repeat(6, minmax(2rem, 5rem))}
}
#upload .upload-container > div {padding-top: 1.2rem}
.adv-picture {margin: .25rem 0 .75rem; color: var(--body-text-color)}
.adv-picture b {font-weight: 600}
.adv-sides {display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr))}
.adv-side {border: 1px solid var(--border-color-primary); border-radius: 10px;
  padding: 1rem; background: var(--background-fill-primary);
  color: var(--body-text-color); max-width: 44rem}
.adv-side header {display: flex; gap: .75rem; align-items: center;
  justify-content: space-between; flex-wrap: wrap; margin-bottom: .75rem}
.adv-side h3 {margin: 0; font-size: 1.15rem; font-weight: 600;
  color: var(--body-text-color); overflow-wrap: anywhere}
.adv-verdict {border-radius: 999px; padding: .1rem .7rem; font-size: .9rem;
  font-weight: 600; white-space: nowrap}
.adv-holds {background: #dcfce7; color: #14532d}
.adv-fooled {background: #fee2e2; color: #7f1d1d}
.adv-wrong {background: #fef3c7; color: #78350f}
.adv-panels {display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem}
.adv-panels figure {margin: 0; min-width: 0}
.adv-panels img {width: 100%; display: block; border-radius: 4px; margin: 0;
  border: 1px solid var(--border-color-primary)}
.adv-small {image-rendering: pixelated}
.adv-panels figcaption {font-size: .85rem; line-height: 1.35; text-align: center;
  padding-top: .35rem; overflow-wrap: anywhere}
.adv-quiet {opacity: .72}
.adv-tables {display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem;
  margin-top: .9rem}
.adv-tables h4 {margin: 0 0 .35rem; font-size: .85rem; font-weight: 600;
  color: var(--body-text-color)}
.adv-row {display: grid; grid-template-columns: minmax(0, 1fr) 3rem 3.2rem;
  gap: .5rem; align-items: center; margin-bottom: .3rem; font-size: .9rem}
.adv-short .adv-row {grid-template-columns: 2rem minmax(0, 1fr) 3.2rem}
.adv-name {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.adv-bar {height: .7rem; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary)}
.adv-bar span {display: block; height: 100%; background: #64748b}
.adv-bar .adv-right {background: #16a34a}
.adv-bar .adv-other {background: #dc2626}
.adv-share {text-align: right; font-variant-numeric: tabular-nums}
.adv-note {margin: .9rem 0 0; font-size: .85rem; opacity: .72}
.adv-message {border-radius: 8px; padding: .6rem .8rem; background: #fee2e2;
  color: #7f1d1d; overflow-wrap: anywhere}
"""


def show_message(text: str) -> str:
    """Returns HTML that shows an error, or nothing for an empty text."""
    return f'<div class="adv-message" role="alert">{escape(text)}</div>' if text else ""


def show_sides(
    picture: Picture, sides: Mapping[str, Side], class_names: Sequence[str]
) -> str:
    """Returns HTML that shows the models' predictions side by side.

    All perturbations are magnified by the same factor, so that they can be compared.

    Args:
        picture: The picture.
        sides: Predictions of each model, by the name of the model.
        class_names: Name of each class.

    Returns:
        HTML that contains the images.
    """
    largest = max(float(np.abs(side.perturbation).max()) for side in sides.values())
    shown = "".join(
        _side(name, side, picture, largest, class_names) for name, side in sides.items()
    )
    return f'{_heading(picture, class_names)}<div class="adv-sides">{shown}</div>'


def _heading(picture: Picture, class_names: Sequence[str]) -> str:
    label = picture.label
    true = "" if label is None else f" True class: <b>{escape(class_names[label])}</b>."
    return (
        f'<p class="adv-picture"><b>{escape(picture.name)}</b>.{true} '
        f"{escape(picture.note)}</p>"
    )


def _side(
    name: str,
    side: Side,
    picture: Picture,
    largest: float,
    class_names: Sequence[str],
) -> str:
    mark, verdict = _verdict(side, picture)
    small = min(side.clean.shape[:2]) < 128
    times = f" ×&nbsp;{_short(1 / largest)}" if largest else ""
    panels = "".join(
        f'<figure><img class="{"adv-small" if small else ""}" src="{png_url(pixels)}" '
        f'alt="{what}"><figcaption><span class="adv-quiet">{what}</span><br>{says}'
        "</figcaption></figure>"
        for what, says, pixels in (
            (
                "clean",
                _prediction(side.clean_probabilities, side, class_names),
                side.clean,
            ),
            (
                f"perturbation{times}",
                f"up to ±{_short(float(np.abs(side.perturbation).max()))}",
                magnify(side.perturbation, largest),
            ),
            (
                "perturbed",
                _prediction(side.perturbed_probabilities, side, class_names),
                side.perturbed,
            ),
        )
    )
    short = " adv-short" if max(map(len, class_names)) <= 3 else ""
    tables = "".join(
        f'<div class="adv-{what}"><h4>{what}</h4>'
        f"{_table(probabilities, side.attacked_class, class_names)}</div>"
        for what, probabilities in (
            ("clean", side.clean_probabilities),
            ("perturbed", side.perturbed_probabilities),
        )
    )
    return (
        f'<section class="adv-side" data-model="{escape(name)}"><header>'
        f'<h3>{escape(name)}</h3><span class="adv-verdict adv-{mark}">{verdict}</span>'
        f'</header><div class="adv-panels">{panels}</div>'
        f'<div class="adv-tables{short}">{tables}</div>'
        f'<p class="adv-note">{_lengths(side)}</p></section>'
    )


def _verdict(side: Side, picture: Picture) -> tuple[str, str]:
    before = int(side.clean_probabilities.argmax())
    after = int(side.perturbed_probabilities.argmax())
    if picture.label is not None and before != picture.label:
        return "wrong", "✗ wrong already"
    if after == side.attacked_class:
        return "holds", "✓ holds"
    return "fooled", "✗ fooled"


def _prediction(
    probabilities: np.ndarray, side: Side, class_names: Sequence[str]
) -> str:
    """Formats the predicted class and its probability."""
    index = int(probabilities.argmax())
    name, probability = escape(class_names[index]), _percent(probabilities[index])
    return (
        f"<b>{name}</b>, {probability} {'✓' if index == side.attacked_class else '✗'}"
    )


def _table(probabilities: np.ndarray, attacked: int, class_names: Sequence[str]) -> str:
    """Formats the likeliest classes. The attacked class is always among them."""
    order = [int(index) for index in np.argsort(-probabilities, kind="stable")]
    shown = order[:_CLASSES_SHOWN]
    if attacked not in shown:
        shown[-1] = attacked
    rows = []
    for place, index in enumerate(shown):
        kind = "right" if index == attacked else ("other" if place == 0 else "")
        name = escape(class_names[index])
        rows.append(
            f'<div class="adv-row" data-class="{name}">'
            f'<span class="adv-name" title="{name}">{name}</span>'
            f'<span class="adv-bar"><span class="{f"adv-{kind}" if kind else ""}" '
            f'style="width: {100 * probabilities[index]:.1f}%"></span></span>'
            f'<span class="adv-share">{_percent(probabilities[index])}</span></div>'
        )
    return "".join(rows)


def _percent(probability: float) -> str:
    digits = 0 if probability >= 0.095 else 1
    return f"{100 * probability:.{digits}f} %"


def _lengths(side: Side) -> str:
    """Formats the length of the perturbation in each norm."""
    perturbation = np.abs(side.perturbation)
    lengths = perturbation.max(), np.sqrt((perturbation**2).sum()), perturbation.sum()
    return "Length of the perturbation, with pixels in [0, 1]: " + ", ".join(
        f"{norm}&nbsp;{_short(float(length))}"
        for norm, length in zip(("L∞", "L2", "L1"), lengths, strict=True)
    )


def _short(number: float) -> str:
    """Formats a number with two digits, or all of its integer part."""
    if number >= 10:
        return f"{number:,.0f}"
    return (
        f"{number:.1f}"
        if number >= 1
        else f"{float(f'{number:.2g}'):.4f}".rstrip("0").rstrip(".")
    )
