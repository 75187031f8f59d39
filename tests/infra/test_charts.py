"""Maps over pictures, cell by cell."""

import base64
import io

import numpy as np
from PIL import Image

from infra.charts import heat


def alpha(uri):
    data = base64.b64decode(str(uri).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))[..., 3]


def test_a_map_is_clear_where_it_is_least_and_full_where_it_is_most():
    assert alpha(heat([0, 5, 10, 10], 2, 2)).tolist() == [[0, 127], [255, 255]]


def test_of_a_map_over_a_square_only_what_lies_on_the_picture_is_drawn():
    """Of a picture twice as wide as high a quarter above it is padding, and one below."""
    cells = np.zeros((4, 4), int)
    cells[0], cells[1, 0], cells[2, 3] = 9, 9, 9
    shown = alpha(heat(cells.ravel().tolist(), 4, 4, (200, 100)))
    assert shown.shape == (120, 240)
    assert (shown[:60, :60] == 255).all() and (shown[60:, 180:] == 255).all()
    assert (shown[:60, 60:] == 0).all() and (shown[60:, :180] == 0).all()


def test_an_edge_of_the_picture_may_cut_through_cells():
    """Three cells high, of which the picture has the middle half of the square."""
    shown = alpha(heat([0, 0, 0, 9, 9, 9, 0, 0, 0], 3, 3, (200, 100)))
    rows = (shown == 255).all(1)
    assert rows.sum() == 80 and rows[20:100].all()  # 60 px of the square are a quarter of it


def test_a_flat_map_shows_nothing():
    assert (alpha(heat([7] * 4, 2, 2)) == 0).all()
