"""Prompts lose what tells a model not to think, and nothing else."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra import samples
from tasks.clean_prompts import PHRASES, PromptCleaning, clean_prompts, cleaned, patterns
from tests.tasks.examples import rows

ENDS = patterns(PHRASES)
Q = "What colour is the car?"
CHOICES = "Which is it?\nA. a cat\nB. a dog"


@pytest.mark.parametrize(
    "text",
    [
        f"{Q}\nAnswer the question using a single word or phrase.",
        f"{Q} Answer directly.",
        f"{Q} Please answer the question directly.",
        f"{Q} Please directly answer the question.",
        f"{Q} (Answer briefly.)",
        f"{Q}\nAnswer with a single word.",
        f"{Q} Provide a short answer.",
        f"{Q} Please provide a brief and direct answer to the question.",
        f"{Q} Give only the final answer.",
        f"{Q} Just give the answer",
        f"{Q} Do not explain.",
        f"{Q} Don't provide any explanation.",
        f"{Q} No explanation needed.",
        f"{Q} Do not show your reasoning!",
        f"{Q} Without any explanation.",
        f"{Q} Be concise.",
        f"{Q} Keep your answer short.",
        f"{Q}\nShort answer:",
        f"{Q} Answer:",
        f"Answer directly. {Q}",
        f"Answer the question using a single word or phrase.\n{Q}",
        f"Please answer briefly: {Q}",
        f"Short answer: {Q}",
        f"Answer directly. {Q} Be brief. Do not explain.",
        f"{Q} ANSWER DIRECTLY!!",
    ],
)
def test_heads_and_tails_go(text):
    assert cleaned(text, ENDS) == Q


@pytest.mark.parametrize(
    "tail",
    [
        "Answer with the option's letter from the given choices directly.",
        "Answer with the letter of the correct option.",
        "Respond with only the option letter.",
    ],
)
def test_options_stay_without_the_order_to_name_their_letter(tail):
    assert cleaned(f"{CHOICES}\n{tail}", ENDS) == CHOICES


@pytest.mark.parametrize(
    "text",
    [
        "Is it open? Answer yes or no.",
        "Is it open? Answer with yes or no only.",
    ],
)
def test_yes_or_no_goes(text):
    assert cleaned(text, ENDS) == "Is it open?"


@pytest.mark.parametrize(
    "text",
    [
        Q,
        "Describe the picture in one sentence.",
        "Write a short answer card for the quiz.",
        "Why did he answer directly when she asked?",
        "How would you answer the question on the sign?",
        "Which signs say: do not enter?",
        "The sign says answer directly, does it not?",
        "Explain in a short answer why it floats, and give an example.",
        "Answer directly.",  # nothing else is said
        "Be brief. Be concise.",
    ],
)
def test_the_rest_stays(text):
    assert cleaned(text, ENDS) == text


PARTS = st.sampled_from(
    ["Answer directly.", "Be brief.", " ", "\n", Q, "Short answer:", "(", ".", "Do not explain"]
)


@given(st.lists(PARTS, max_size=8).map("".join))
def test_twice_is_once(text):
    once = cleaned(text, ENDS)
    assert cleaned(once, ENDS) == once
    assert once in text


def test_long_texts_take_no_time():
    cleaned("answer the " * 9_000 + "please " * 9_000, ENDS)
    cleaned("\n" * 50_000 + "(" * 50_000, ENDS)


def test_both_texts_are_kept(build):
    frame = pl.DataFrame(
        {"sample_id": ["a", "b"], "image_id": ["i", "i"], "instruction": [f"{Q} Be brief.", Q]}
    )
    found = clean_prompts(build, samples.write(build.store, frame), PromptCleaning())
    assert [
        (r["instruction"], r["instruction_used"], r["prompt_cleaned"])
        for r in rows(build, found.samples)
    ] == [(f"{Q} Be brief.", Q, True), (Q, Q, False)]


def test_a_phrase_that_is_no_pattern_is_refused():
    with pytest.raises(ValidationError, match="no regular expression"):
        PromptCleaning(phrases=("(",))
