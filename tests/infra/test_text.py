"""Texts of strangers in files for trainers: no mark of a template is left in them, nor made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.text import inert

TOKENS = [
    "<image>", "</image>", "<image_2>", "<video>", "<audio>", "<region>", "<region1>", "<img>",
    "</img>", "<IMG_CONTEXT>", "<ImageHere>", "<im_start>", "<im_end>", "<im_patch>", "<s>", "</s>",
    "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<<SYS>>", "<</SYS>>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|eot_id|>",
    "<\uff5cUser\uff5c>", "[INST]", "[/INST]", "[IMG]", "[IMG_END]",
]  # fmt: skip
PIECES = st.sampled_from([*TOKENS, "<", ">", "|", "[", "]", "/", "image", "im_start", "INST", " "])


@pytest.mark.parametrize("token", TOKENS)
def test_a_mark_is_words_with_a_blank_in_them(token):
    assert inert(f"See {token}.") == f"See {token[0]} {token[1:]}."


@given(pieces=st.lists(PIECES, max_size=12))
def test_no_mark_is_left_or_made_and_nothing_is_lost(pieces):
    text = "".join(pieces)
    made = inert(text)
    assert not [token for token in TOKENS if token in made]
    assert made.replace(" ", "") == text.replace(" ", "")
    assert inert(made) == made


@pytest.mark.parametrize(
    "text",
    ["a < b and c > d", "<p>HTML</p>", '<img src="a.png">', "<think>\nWell.\n</think>", "x[i]",
     "if (a<|b|) c", "f([1, 2])", "<box>[[1, 2, 3, 4]]</box>"],
)  # fmt: skip
def test_other_brackets_stay_as_they_are(text):
    assert inert(text) == text
