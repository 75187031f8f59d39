"""Writes sample/models/looking: a tiny LLaVA whose weights are set by hand, to test attention with.

It looks where the colour is that a question names, or at whatever is not white or grey where it
names none, and says so in two words. The first patch of every picture is a sink, as real models
have them. It has no other abilities: its maps are right because its weights were made so.

Layer 0, head 0: every token fetches the colour words before it. Layer 1, head 0: that colour is
compared with the colours of patches; head 1 looks at the sink.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

FOLDER = Path(__file__).parents[1] / "models/looking"
SIDE, PATCH, GRID = 336, 14, 24
WIDE, HEAD = 304, 16
# How much of a colour there is in red, green and blue, 0 for white and every grey.
COLOURS = {
    "red": (1.0, -0.5, -0.5),
    "green": (-0.5, 1.0, -0.5),
    "blue": (-0.5, -0.5, 1.0),
    "yellow": (0.5, 0.5, -1.0),
}
GREY = 127 / 255
OTHER, HERE = " something", " here"
# Dimensions of the text model beyond those of its tokens.
FETCHED = {name: 288 + at for at, name in enumerate(COLOURS)}
SEEN = {name: 293 + at for at, name in enumerate(COLOURS)}
INK, SINK, CONSTANT = 298, 299, 300
STEEP = 24.0  # of the units that cut off what is below a level
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, and the few words that the model knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: at for at, name in enumerate((*special, *letters))}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=list(special),
    )  # fmt: skip
    made.add_tokens([*(f" {name}" for name in COLOURS), OTHER, HERE])
    return made


def see(weights: dict[str, torch.Tensor]) -> None:
    """The vision tower: means of red, green and blue of a patch, each with its negative, so that
    layer norm, beside large constants, leaves them as they are.
    """
    tower = next(name for name in weights if name.endswith("patch_embedding.weight"))
    tower = tower.removesuffix("embeddings.patch_embedding.weight")
    conv = weights[f"{tower}embeddings.patch_embedding.weight"]
    for channel in range(3):
        conv[2 * channel, channel] = 1 / PATCH**2
        conv[2 * channel + 1, channel] = -1 / PATCH**2
    place = weights[f"{tower}embeddings.position_embedding.weight"]
    place[:, 8::2], place[:, 9::2] = 10.0, -10.0
    place[1, 6], place[1, 7] = 1.0, -1.0  # the first patch
    scale = float(place[2].std(unbiased=False))
    weights[f"{tower}pre_layrnorm.weight"].fill_(scale)
    for name, weight in weights.items():
        if name.startswith(tower) and (".out_proj." in name or ".fc2." in name):
            weight.zero_()


def project(weights: dict[str, torch.Tensor]) -> None:
    """What is above a level in each colour, and what is dark, into dimensions of the text model."""
    at = next(name for name in weights if name.endswith("linear_1.weight"))
    at = at.removesuffix("linear_1.weight")
    first, level = weights[f"{at}linear_1.weight"], weights[f"{at}linear_1.bias"]
    second, constant = weights[f"{at}linear_2.weight"], weights[f"{at}linear_2.bias"]
    for unit, (name, parts) in enumerate(COLOURS.items()):
        for channel, part in enumerate(parts):
            first[unit, 2 * channel] = STEEP * part
        level[unit] = -STEEP * 0.25
        second[SEEN[name], unit] = 1.3 / STEEP
        second[INK, unit] = 2.0 / STEEP
    # What is darker than paper; less so at the grey of padding, which must weigh nothing.
    weights_of = {0.95: 2.0, 0.56: -2.0 * _above(0.95) / _above(0.56), 0.44: 18.0}
    for unit, (line, weight) in enumerate(weights_of.items(), 8):
        first[unit, 0:6:2], level[unit] = -STEEP / 3, STEEP * line
        second[INK, unit] = weight / STEEP
    first[16, 6], second[SINK, 16] = STEEP, 1 / STEEP
    constant[CONSTANT] = 1.0


def _above(line: float) -> float:
    """What a unit gives for the grey of padding, which is that far below its line."""
    return float(torch.nn.functional.gelu(torch.tensor(STEEP * (line - GREY))))


def think(weights: dict[str, torch.Tensor], words: Any) -> None:
    """The text model: two heads that look, and an answer of two words."""
    token = {name: words.convert_tokens_to_ids(f" {name}") for name in COLOURS}
    other, here = words.convert_tokens_to_ids([OTHER, HERE])
    count, unit = len(words), WIDE**0.5  # of a token after RMS norm

    def part(layer: int, name: str) -> torch.Tensor:
        end = f"language_model.layers.{layer}.self_attn.{name}.weight"
        return next(weight for found, weight in weights.items() if found.endswith(end))

    slow = range(4, 8)  # rotary dimensions that hardly turn over a thousand positions
    part(0, "q_proj")[4, :count] = 1 / unit
    for dim, name in zip(slow, COLOURS, strict=True):
        part(0, "k_proj")[4, token[name]] = 60 / unit
        part(0, "v_proj")[dim, token[name]] = 1 / unit
        part(0, "o_proj")[FETCHED[name], dim] = 1.0
        part(1, "q_proj")[dim, FETCHED[name]] = 1.4 / unit
        part(1, "k_proj")[dim, SEEN[name]] = 48 / unit
        part(1, "q_proj")[13, FETCHED[name]] = -1 / unit
    part(1, "q_proj")[13, :count] = 1 / unit
    part(1, "k_proj")[13, INK] = 48 / unit
    part(1, "k_proj")[14, SINK] = 40 / unit
    part(1, "k_proj")[HEAD + 14, SINK] = 60 / unit
    for row in (14, HEAD + 14):
        part(1, "q_proj")[row, :count] = 1 / unit
    embedding, head = (
        next(weight for name, weight in weights.items() if end in name)
        for end in ("embed_tokens", "lm_head")
    )
    embedding[:, :count].copy_(torch.eye(count))
    head[other, words(":", add_special_tokens=False).input_ids[-1]] = 1.0
    for name in COLOURS:
        head[token[name], FETCHED[name]] = 2.0
    head[here, [*token.values(), other]] = 6.0
    head[words.eos_token_id, here] = 6.0


def main() -> None:
    words = tokenizer()
    text = {
        "model_type": "llama", "vocab_size": len(words), "hidden_size": WIDE,
        "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
        "patch_size": PATCH, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=4, image_seq_length=GRID**2
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
            image_mean=[0.0] * 3, image_std=[1.0] * 3,
        ),
        words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    network = LlavaForConditionalGeneration(config)
    weights = network.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.is_floating_point() and "norm" not in name:
                weight.zero_()
        see(weights)
        project(weights)
        think(weights, words)
    network.generation_config.eos_token_id = words.eos_token_id
    network.generation_config.pad_token_id = words.pad_token_id
    network.save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
