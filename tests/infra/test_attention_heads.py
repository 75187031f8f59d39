"""Heads by model, as their source lists them."""

import pytest

from infra.attention_heads import heads_of, sink_dims


@pytest.mark.parametrize(
    ("model", "mode", "grounding", "sink", "threshold"),
    [
        ("llava-hf/llava-1.5-7b-hf", "natural", {14: (13, 24, 26)}, {2: ()}, 1e-3),
        ("llava-hf/llava-1.5-7b-hf", "textual", {14: (13, 24, 26)}, {2: ()}, 1e-3),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "textual", {22: (1, 4), 23: (6, 11)}, {}, 1e-2),
        (
            *("s3://bucket/models/Qwen2.5-VL-7B-Instruct/", "natural"),
            *({16: (1, 7, 17), 19: (17, 20)}, {9: (4, 22)}, 1e-2),
        ),
    ],
)
def test_listed_heads(model, mode, grounding, sink, threshold):
    assert heads_of(model, mode, 28) == (grounding, sink, threshold, True)


def test_another_model_has_one_middle_layer_and_says_that_it_is_not_listed():
    assert heads_of("models/qwen", "natural", 28) == ({13: ()}, {}, 1e-2, False)
    assert heads_of("Qwen/Qwen2.5-VL-72B-Instruct", "natural", 80).grounding == {36: ()}


def test_dimensions_of_sinks_are_listed_for_llama_2_alone():
    assert sink_dims("llava-hf/llava-1.5-7b-hf") == (2533, 1415)
    assert sink_dims("llava-hf/llava-1.5-13b-hf") == (2100, 4743)
    assert sink_dims("Qwen/Qwen2.5-VL-7B-Instruct") == ()
