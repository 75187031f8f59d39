"""Labels over a picture, told by the colours of a few pixels."""

import numpy as np
from PIL import Image

from infra.attention_maps import Square
from infra.attention_pictures import AROUND, GAP, REGION, draw_labels

LABELS = np.zeros((4, 4), np.int8)
LABELS[1, 1], LABELS[1, 2] = 1, -1


def drawn(size, box=(0, 0, 1, 1), boxes=(), side=80, labels=LABELS):
    picture = Image.new("RGB", size, "white")
    return draw_labels(picture, Square(*size), labels, box, boxes, side)


def pixels(picture):
    return np.asarray(picture, int)


def test_two_panels_keep_the_shape_of_the_picture():
    assert drawn((400, 200)).size == (2 * 80 + GAP, 40)
    assert drawn((200, 400)).size == (2 * 40 + GAP, 80)
    assert drawn((4000, 1)).size == (2 * 80 + GAP, 1)


def test_cells_are_coloured_on_the_right_by_their_label():
    right = pixels(drawn((80, 80)))[:, 80 + GAP :]
    foreground, ignored, background = right[30, 30], right[30, 50], right[50, 30]
    assert foreground[0] > foreground[1] + 80  # red
    assert ignored[0] > ignored[2] + 40 and ignored[1] > ignored[2] + 40  # yellow
    assert (background == 255).all()
    assert (right[21, 21] == foreground).all() and (right[38, 38] == foreground).all()
    assert (right[30, 41] == ignored).all() and (right[41, 30] == 255).all()


def test_what_lies_in_the_padding_is_not_shown():
    """80 x 40 in a square of 4 x 4 cells of 20 pixels: the first and last rows are padding."""
    labels = np.array([[1] * 4, [0] * 4, [-1] * 4, [1] * 4], np.int8)
    right = pixels(drawn((80, 40), labels=labels))[1:-1, 80 + GAP + 1 : -1]
    assert (right[:19] == 255).all()
    assert (right[20:] == right[20, 0]).all() and right[20, 0, 2] < 200


def test_boxes_are_framed_on_the_left_in_pixels_of_the_original():
    left = pixels(drawn((160, 160), box=(40, 40, 120, 120), boxes=[(44, 44, 100, 100)]))[:, :80]
    red, blue = ((left == colour).all(-1) for colour in (REGION, AROUND))
    ys, xs = np.nonzero(red)
    assert (ys.min(), xs.min(), ys.max(), xs.max()) == (23, 23, 48, 48)
    ys, xs = np.nonzero(blue)  # three pixels outside, so that equal boxes are both seen
    assert (ys.min(), xs.min(), ys.max(), xs.max()) == (18, 18, 61, 61)


def test_a_box_without_room_is_no_error():
    drawn((1, 300), box=(0, 0, 1, 300), boxes=[(0, 0, 1, 1)])
