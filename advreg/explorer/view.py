"""What the page shows of a picture and of the models: HTML that needs no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from advreg.explorer.pictures import Picture, as_png, magnified
from advreg.explorer.side_by_side import Side

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
    """Shows why something was refused; nothing for an empty text."""
    return f'<div class="adv-message" role="alert">{escape(text)}</div>' if text else ""


def show_sides(
    picture: Picture, sides: Mapping[str, Side], class_names: Sequence[str]
) -> str:
    """Shows what the models make of a picture.

    Perturbations are magnified alike on all sides, so that they compare.

    Args:
        picture: The picture.
        sides: What each model makes of it, by the name of the model.
        class_names: Name of each class.

    Returns:
        HTML, with the images in it.
    """
    largest = max(float(np.abs(side.change).max()) for side in sides.values())
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
        f'<figure><img class="{"adv-small" if small else ""}" src="{as_png(pixels)}" '
        f'alt="{what}"><figcaption><span class="adv-quiet">{what}</span><br>{says}'
        "</figcaption></figure>"
        for what, says, pixels in (
            ("clean", _seen(side.on_clean, side, class_names), side.clean),
            (
                f"perturbation{times}",
                f"up to ±{_short(float(np.abs(side.change).max()))}",
                magnified(side.change, largest),
            ),
            ("perturbed", _seen(side.on_perturbed, side, class_names), side.perturbed),
        )
    )
    short = " adv-short" if max(map(len, class_names)) <= 3 else ""
    tables = "".join(
        f'<div class="adv-{what}"><h4>{what}</h4>'
        f"{_table(shares, side.attacked, class_names)}</div>"
        for what, shares in (
            ("clean", side.on_clean),
            ("perturbed", side.on_perturbed),
        )
    )
    return (
        f'<section class="adv-side" data-model="{escape(name)}"><header>'
        f'<h3>{escape(name)}</h3><span class="adv-verdict adv-{mark}">{verdict}</span>'
        f'</header><div class="adv-panels">{panels}</div>'
        f'<div class="adv-tables{short}">{tables}</div>'
        f'<p class="adv-note">{_length(side)}</p></section>'
    )


def _verdict(side: Side, picture: Picture) -> tuple[str, str]:
    before, after = int(side.on_clean.argmax()), int(side.on_perturbed.argmax())
    if picture.label is not None and before != picture.label:
        return "wrong", "✗ wrong already"
    return ("holds", "✓ holds") if after == side.attacked else ("fooled", "✗ fooled")


def _seen(shares: np.ndarray, side: Side, class_names: Sequence[str]) -> str:
    """What a model takes a picture for, and how sure it is."""
    index = int(shares.argmax())
    mark = "✓" if index == side.attacked else "✗"
    return f"<b>{escape(class_names[index])}</b>, {_percent(shares[index])} {mark}"


def _table(shares: np.ndarray, attacked: int, class_names: Sequence[str]) -> str:
    """The likeliest classes, and the attacked one if it is none of them."""
    order = [int(index) for index in np.argsort(-shares, kind="stable")]
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
            f'style="width: {100 * shares[index]:.1f}%"></span></span>'
            f'<span class="adv-share">{_percent(shares[index])}</span></div>'
        )
    return "".join(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _length(side: Side) -> str:
    """How far the picture has moved, in each norm."""
    change = np.abs(side.change)
    lengths = change.max(), np.sqrt((change**2).sum()), change.sum()
    return "Length of the perturbation, white being 1: " + ", ".join(
        f"{norm}&nbsp;{_short(float(length))}"
        for norm, length in zip(("L∞", "L2", "L1"), lengths, strict=True)
    )


def _short(number: float) -> str:
    """A number in two digits, or more before the point, and without an exponent."""
    if number >= 10:
        return f"{number:,.0f}"
    return (
        f"{number:.1f}"
        if number >= 1
        else f"{float(f'{number:.2g}'):.4f}".rstrip("0").rstrip(".")
    )
