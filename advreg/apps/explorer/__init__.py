"""The explorer: a page to attack pictures on, and to watch the predictions.

Models and pictures come in. A page in the browser comes out, and nothing is kept.
Read in this order:

- `side_by_side`: `SideBySide` attacks each model with a picture, and returns a `Side`
  for each: both pictures and their predictions. It knows nothing of the page.
- `pictures`: reads uploads, fits them to the models, and draws them.
- `examples`: the pictures that the page offers.
- `view`: turns a picture and its sides into HTML.
- `page`: `serve` builds the page with Gradio, connects all of these, and listens.
"""

from advreg.apps.explorer.examples import Examples, load_examples
from advreg.apps.explorer.page import check_installed, serve
from advreg.apps.explorer.pictures import Picture, PictureError, Shape, read_picture
from advreg.apps.explorer.side_by_side import ATTACKS, Side, SideBySide, picture_shape

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
