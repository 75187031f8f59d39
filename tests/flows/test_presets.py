"""Presets of the main flow: defaults under what the config says."""

from typing import Any

import pytest

from flows.config import parse_config
from flows.recipe import discover
from infra.errors import ConfigError


@pytest.fixture
def parsed(tmp_path):
    def parse(**sections: Any) -> Any:
        data = {
            "dataset": "d",
            "corpus": {"uri": str(tmp_path / "corpus")},
            "store": {"uri": str(tmp_path / "store")},
            "models": {"clip": {"library": "open_clip", "name": "ViT-B-32"}},
            "spaces": {"image": {"model": "clip"}, "text": {"model": "clip", "of": "caption"}},
        }
        return parse_config(data | sections)

    return parse


def test_the_papers_settings_are_one_window_and_no_filters(parsed):
    config = parsed(preset="paper")
    bands = {(s.band.unit, s.band.low, s.band.high) for s in config.spaces.values()}
    assert bands == {("cosine", 0.8, 0.96)}
    assert (config.dedup.near, config.clip_score.keep) == ("off", "all")
    assert (config.pairs.negatives, config.pairs.negatives_from) == (5, "retrieved")
    labels = config.labels
    assert (labels.calls, labels.instructions, labels.show_captions) == ("two", 3, False)


def test_what_the_config_says_holds(parsed):
    wide = {"model": "clip", "band": {"unit": "cosine", "low": 0.7, "high": 0.9}}
    config = parsed(
        preset="paper", spaces={"image": wide, "text": {"model": "clip"}}, dedup={"near": "hash"}
    )
    assert (config.spaces["image"].band.low, config.spaces["text"].band.low) == (0.7, 0.8)
    assert config.dedup.near == "hash"
    assert config.clip_score.keep == "all"


def test_without_a_preset_defaults_are_ours(parsed):
    assert parsed() == parsed(preset="ours") == parsed(recipe="megapairs")
    assert parsed().spaces["image"].band.unit == "quantile"
    assert parsed().pairs.negatives_from == "unrelated"


def test_mistakes_are_told_under_a_preset_as_well(parsed):
    with pytest.raises(ConfigError, match=r"spaces\.image\.band: band\.low 0\.97 must be below"):
        parsed(preset="paper", spaces={"image": {"model": "clip", "band": {"low": 0.97}}})


def test_the_main_flow_is_among_the_recipes():
    assert "megapairs" in [recipe.name for recipe in discover()]
