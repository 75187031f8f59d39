"""Heads by model, as their source lists them."""

import pytest

from infra.attention_heads import heads_of, sink_dims

# As the sources print them: model, mode, grounding, sink source; no sinks where there is none.
TABLE = """
llava-1.5-7b   natural 14:13,24,26             2:
llava-1.5-7b   textual 14:13,24,26             2:
llava-1.5-13b  natural 13:21,23,26/15:2/16:2,21,30 16:17,22
llava-1.5-13b  textual 13:21,23,26/15:2/16:2,21,30 16:17,22
Qwen2.5-VL-3B  textual 20:1,4/22:14            -
Qwen2.5-VL-3B  natural 21:9,11/22:0,7          8:1,13
Qwen2.5-VL-7B  textual 22:1,4/23:6,11          -
Qwen2.5-VL-7B  natural 16:1,7,17/19:17,20      9:4,22
Qwen3-VL-4B    textual 19:24,27/24:21,23       24:6,10
Qwen3-VL-4B    natural 20:15,21,23/21:8,10,11  20:1,24
Qwen3-VL-8B    textual 19:24,26,27/24:21,22,23 24:1,2
Qwen3-VL-8B    natural 20:15,21,23/21:8,10,11  21:7
"""


def heads(text: str) -> dict[int, tuple[int, ...]]:
    parts = (part.split(":") for part in text.split("/")) if text != "-" else ()
    return {int(layer): tuple(map(int, some.split(","))) if some else () for layer, some in parts}


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_listed_heads(row):
    model, mode, grounding, sink = row.split()
    threshold = 1e-3 if model.startswith("llava") else 1e-2
    listed = (heads(grounding), heads(sink), threshold, True)
    assert heads_of(f"hub/{model}-instruct", mode, 28) == listed
    assert heads_of(f"s3://bucket/models/{model}-hf/", mode, 28) == listed


def test_another_model_has_one_middle_layer_and_says_that_it_is_not_listed():
    assert heads_of("models/qwen", "natural", 28) == ({13: ()}, {}, 1e-2, False)
    assert heads_of("Qwen/Qwen2.5-VL-72B-Instruct", "natural", 80).grounding == {36: ()}


def test_dimensions_of_sinks_are_listed_for_llama_2_alone():
    assert sink_dims("llava-hf/llava-1.5-7b-hf") == (2533, 1415)
    assert sink_dims("llava-hf/llava-1.5-13b-hf") == (2100, 4743)
    assert sink_dims("Qwen/Qwen2.5-VL-7B-Instruct") == ()
