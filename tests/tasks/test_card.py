"""The dataset card: its YAML as the Hub reads it, and nothing in it that text could turn into."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from infra.hugging_face import card_metadata, licence
from infra.text import markdown, plain
from tasks.publish import PublishParams, _card

MANIFEST: dict[str, Any] = {
    "dataset": "leaves", "version": 3, "digest": "d" * 64, "created": "2026-11-20T22:34:28+00:00",
    "code": {"pairmill": "0.1.0"},
    "counts": {
        "objects": 1233, "images": 1162, "eligible": 989, "pairs": 2907, "records": 1500,
        "splits": {"train": 1400, "validation": 100}, "licences": {"CC0-1.0": 1500},
        "fates": {
            "object": {"metadata": 1, "near_duplicate": 65, "paired": 73},
            "pair": {"published": 1500, "captions_say_nothing": 1407},
        },
    },
    "config": {
        "spaces": {"clip_image": {"model": "clip", "of": "image"}},
        "models": {"clip": {"library": "open_clip", "name": "ViT-L-14"}},
        "labels": {"labeller": "captions"}, "dedup": {"near": "hash"},
        "clip_score": {"keep": "neg_clip_loss"}, "publish": {"images": False},
    },
    "bands": [{"space": "clip_image", "low": 859193, "high": 999273, "truncated": 2}],
    "mining": {"pairs_with_too_few_negatives": 166},
}  # fmt: skip


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card."""
    empty, metadata, text = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(metadata), text


def changed(**counts: Any) -> dict[str, Any]:
    return {**MANIFEST, "counts": {**MANIFEST["counts"], **counts}}


def test_the_hub_finds_splits_size_and_licence() -> None:
    metadata, _ = parts(_card(MANIFEST, PublishParams(title="Leaves: all of them")))
    assert metadata["pretty_name"] == "Leaves: all of them"
    assert metadata["license"] == "cc0-1.0"
    assert metadata["size_categories"] == ["1K<n<10K"]
    assert metadata["configs"][0] == {
        "config_name": "default",
        "data_files": [
            {"split": "train", "path": "records/train.parquet"},
            {"split": "validation", "path": "records/validation.parquet"},
        ],
    }


def test_a_split_without_records_is_not_listed() -> None:
    metadata, text = parts(_card(changed(splits={"train": 1500}), PublishParams()))
    assert [f["split"] for f in metadata["configs"][0]["data_files"]] == ["train"]
    assert "validation.parquet" not in text
    metadata, text = parts(_card(changed(splits={}, records=0, licences={}), PublishParams()))
    assert [c["config_name"] for c in metadata["configs"]] == ["images", "fates"]
    assert "There are no records." in text


def test_the_text_tells_counts_spaces_and_limits() -> None:
    _, text = parts(_card(MANIFEST, PublishParams()))
    for told in (
        "# leaves pairs\n",
        "| deduplicated, captions compared | 989 images | 65 near duplicate |",
        "| labelled | 1,500 records | 1,407 captions say nothing |",
        r"| clip\_image | open\_clip ViT-L-14 | image | 859193 to 999273 |",
        "and 1,407 of 2,907 pairs got none.",
        "- 166 of 2,907 mined pairs have fewer hard negatives than asked for.",
        r"- In clip\_image, 2 lists of neighbours end inside the band",
        "| CC0-1.0 | 1,500 |",
        "pairmill why ID --store URI --dataset leaves --version 3",
    ):
        assert told in text


def test_attacks_in_title_and_licence_are_only_text() -> None:
    attack = "a | b <script>x</script> `c` [d](http://e) \n# f\x1b[31m\u202e ![g](h) https://i"
    card = _card(changed(licences={attack: 1500}), PublishParams(title=attack))
    metadata, text = parts(card)
    shown = "a | b <script>x</script> `c` [d](http://e)  # f ![g](h) https://i"
    assert metadata["pretty_name"] == shown
    assert metadata["license"] == "other"
    escaped = markdown(attack)
    assert f"\n# {escaped}\n" in text
    assert f"\n| {escaped} | 1,500 |\n" in text
    assert escaped == (
        r"a \| b \<script\>x\</script\> \`c\` \[d\](http\://e)  \# f \!\[g\](h) https\://i"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["CC0-1.0"], {"license": "cc0-1.0"}),
        (["CC BY-SA 4.0"], {"license": "cc-by-sa-4.0"}),
        (["Unsplash Lite"], {"license": "other", "license_name": "unsplash-lite"}),
        (["CC0-1.0", "MIT"], {"license": "other", "license_name": "several-see-below"}),
        (["日本"], {"license": "other", "license_name": "unnamed"}),
        ([], {"license": "unknown"}),
    ],
)
def test_licences_by_the_names_of_the_hub(names: list[str], expected: dict[str, str]) -> None:
    assert licence(names) == expected


@given(st.text())
def test_any_title_gives_metadata_that_parses(title: str) -> None:
    block = card_metadata(MANIFEST, title)
    assert "\n---" not in f"\n{block}"
    assert yaml.safe_load(block)["pretty_name"] == plain(title, 200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\r\nc", "a b  c"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]never ends", "never ends"),
        ("wrongly decoded \x9d text", "wrongly decoded  text"),
        ("file\u202egpj.exe", "filegpj.exe"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("\u0646\u0645\u06cc\u200c\u062f\u0627", "\u0646\u0645\u06cc\u200c\u062f\u0627"),
        ("a lone \udcff surrogate", "a lone \ufffd surrogate"),
        ("x" * 30, "x" * 19 + "…"),
    ],
)  # fmt: skip
def test_plain(text: str, expected: str) -> None:
    assert plain(text, 20 if len(text) == 30 else 100) == expected


@given(st.text(), st.integers(1, 50))
def test_plain_is_short_and_shows_all_it_has(text: str, limit: int) -> None:
    shown = plain(text, limit)
    assert len(shown) <= limit
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert shown.encode().decode() == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("1.5 items", "1.5 items"),
        ("www.example.org", r"www\.example.org"),
        ("&lt; a_b*c", r"\&lt; a\_b\*c"),
    ],
)
def test_markdown(text: str, expected: str) -> None:
    assert markdown(text) == expected
