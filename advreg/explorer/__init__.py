"""The explorer: a page on which pictures are perturbed, and networks watched.

`SideBySide` attacks models with a picture and knows no page; `serve` opens the page.
"""

from advreg.explorer.examples import Examples, load_examples
from advreg.explorer.page import check_installed, serve
from advreg.explorer.pictures import Picture, PictureError, Shape, read_picture
from advreg.explorer.side_by_side import ATTACKS, Side, SideBySide, picture_shape

__all__ = [
    "ATTACKS",
    "Examples",
    "Picture",
    "PictureError",
    "Shape",
    "Side",
    "SideBySide",
    "check_installed",
    "load_examples",
    "picture_shape",
    "read_picture",
    "serve",
]
