"""SimHash: near-equal captions have near hashes."""

from hypothesis import given
from hypothesis import strategies as st

from infra.simhash import simhash

LONG = (
    "a large brown dog runs across a green field beside a small white house with a red roof "
    "while two children watch from the garden gate and the sun goes down behind the hills"
)


def distance(a: str, b: str) -> int:
    return (simhash(a) ^ simhash(b)).bit_count()


def test_case_and_punctuation_do_not_matter():
    assert simhash("A cat, on a mat!") == simhash("a cat on a MAT") != simhash("a mat on a cat")


def test_a_changed_word_moves_a_long_text_a_little_and_other_text_far():
    near = distance(LONG, LONG.replace("brown", "black"))
    far = distance(LONG, "stock certificate of the railway company, engraved, with a vignette of a")
    assert near <= 16 < 20 <= far


def test_short_texts_are_one_gram_and_no_text_is_zero():
    assert simhash("cat") != simhash("dog") != simhash("cat dog")
    assert simhash("") == simhash("?! …") == 0


def test_words_of_any_script_count():
    assert len({simhash(text) for text in ("東京の猫", "кот", "ねこ", "بيت", "γάτα")}) == 5


@given(st.text())
def test_it_has_64_bits_and_depends_on_the_text_alone(text):
    assert 0 <= simhash(text) < 1 << 64
    assert simhash(text) == simhash(str(text))


@given(st.text(), st.text(alphabet=" \t\n.,;!?", max_size=5))
def test_what_stands_around_the_words_does_not_matter(text, around):
    assert simhash(f"{around} {text} {around}") == simhash(text)
