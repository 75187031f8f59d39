"""SimHash: near-equal captions have near hashes."""

import hashlib

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


def by_hand(text: str) -> int:
    """Charikar's hash, bit by bit: each gram votes for the bits of its digest, ties say no."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
    grams = [words[at : at + 3] for at in range(len(words) - 2)] or [words] * bool(words)
    found = 0
    for bit in range(64):
        votes = 0
        for gram in grams:
            digest = hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest()
            votes += 1 if int.from_bytes(digest, "big") >> bit & 1 else -1
        found |= (votes > 0) << bit
    return found


WORDS = st.lists(st.sampled_from(["a", "dog", "Über", "runs", "3", "東京", "it's"]), max_size=12)


@given(WORDS.map(" ".join))
def test_it_is_the_majority_of_the_digests_of_all_3_grams(text):
    assert simhash(text) == by_hand(text) < 1 << 64


def test_a_literal_text_has_always_had_this_hash():
    """Hashes are kept with records: another version of this function would be another dedup."""
    assert f"{simhash('What is the cat on the left doing?'):016x}" == "065b408301109011"


@given(st.text(), st.text(alphabet=" \t\n.,;!?", max_size=5))
def test_what_stands_around_the_words_does_not_matter(text, around):
    assert simhash(f"{around} {text} {around}") == simhash(text)
