"""What an instruction must not tell, and when two instructions are one, at their edges."""

import pytest

from infra.instructions import distinct, leak

CAPTION = "A red fox sleeps in deep snow under a birch tree"


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        # Word for word, whatever the case, punctuation, width and script.
        ("A RED FOX sleeps in deep snow, under a birch tree!", "quotes_caption"),
        ("Show me: a red fox sleeps in deep snow under a birch tree.", "quotes_caption"),
        ("A \uff52\uff45\uff44 fox sleeps in deep snow under a birch tree", "quotes_caption"),
        ("a\u200b red\u00ad fox sleeps in deep snow under a birch tree", "quotes_caption"),
        # All of its words in another order, or with one in six of them changed.
        ("Under a birch tree, in deep snow, sleeps a red fox", "rewords_caption"),
        ("deep snow, birch trees, a red fox that sleeps", "rewords_caption"),
        ("A red fox sleeping in deep snow under the birch tree", "rewords_caption"),
        # Less of it is what a person would say.
        ("The same animal, but asleep in snow", None),
        ("Make it a red fox in deep snow", None),
        ("Now with snow under a birch tree", None),
        # What a person who searches doesn't know.
        ("Like fox_012.JPG but asleep", "names_file"),
        ("the one in IMG_2041", "names_file"),
        ("as in fox.final.png, asleep", "names_file"),
        ("Unlike the source image, it sleeps", "names_pictures"),
        ("The target image shows it asleep", "names_pictures"),
        ("Version 2.0 of it, photo from 2004", None),
        ("an image of 30 foxes", None),
        ("with the target in the middle", None),
    ],
)
def test_what_gives_the_target_away(instruction, why):
    assert leak(instruction, CAPTION) == why


@pytest.mark.parametrize(
    ("instruction", "caption", "why"),
    [
        # Four words and fewer are those that a sentence about the difference needs.
        ("Show me the maple leaf in green", "green maple leaf", None),
        ("a big old house by the sea, at night", "big old house, sea, night", "rewords_caption"),
        ("a big old house by the sea", "big old house sea", None),
        ("a big old house sea", "big old house sea", "quotes_caption"),
        # Six words: one may be another one; two may not.
        ("one small white dog runs over grass", "small white dog runs over wet grass",
         "rewords_caption"),
        ("one small dog runs over grass", "small white dog runs over wet grass", None),
        # Boilerplate of a caption is no part of it.
        ("big blue whale dives under ship",
         "Clipart by Ann Lee - ship, under it big blue whale dives", "rewords_caption"),
        # Repeated words count as often as they stand there.
        ("a red cube and a ball on a table", "red cube, red ball, red table, red red", None),
        ("在雪地里睡觉的红狐狸", "红狐狸在雪地里睡觉", "rewords_caption"),
        ("下雪天的狐狸", "红狐狸在雪地里睡觉", None),
        ("anything", None, None),
        ("anything", "", None),
        ("", CAPTION, None),
    ],
)  # fmt: skip
def test_short_and_other_captions(instruction, caption, why):
    assert leak(instruction, caption) == why


def test_a_caption_without_end_costs_no_time():
    assert leak("red leaf " * 30, "red leaf " * 100_000) is None
    assert leak("a" * 300, "(1 " * 50_000) is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["Make it red", "make it, red.", "MAKE IT RED?"], 1),
        (["Make it red", "Make it redder", "Make that red"], 3),
        (["\uff2dake it red", "Make it red"], 1),
        (["Make  it\u200b red", "Make it red"], 1),
        (["cafe\u0301 in green", "café in green"], 1),
        (["don't stop", "don\u2019t stop", "dont stop"], 2),
        (["re\u200dd", "red", "r\u200ced"], 1),
        (["!!!", "...", "\u200d"], 0),
        (["1 red", "2 red"], 2),
    ],
)
def test_distinct_means_other_words(given, kept):
    assert len(distinct(given)) == kept
