"""Vision-language models of real architectures, tiny and with random weights, made on the spot.

What they say is noise, but every shape, mask, position and cache is that of the real ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORPUS = (
    "A photo of a red leaf on a green table, next to a blue card and a yellow moon.",
    "Describe the picture. What is different between the source and the target image?",
    'Answer with one JSON object: {"common": "", "differences": {"query": "", "target": ""}}',
    '{"instructions": ["Make it red", "The same, but larger", "Show it at night"]}',
    "You are a helpful assistant. user assistant system Source image: Target image:",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def write_qwen(folder: Path, seed: int = 0, **generation: Any) -> Path:
    """A tiny Qwen2.5-VL: two text layers of four heads, two vision layers, 28-pixel tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *WINDOWS)
    tokenizer = _tokenizer(special, eos_token="<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    places = {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **places)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=CHATML,
    )
    return _write(folder, seed, Qwen2_5_VLForConditionalGeneration, config, processor, generation)


def write_llava(
    folder: Path, seed: int = 0, wide: int = 32, pieces: Sequence[str] = (), **generation: Any
) -> Path:
    """A tiny LLaVA-1.5: a CLIP vision tower at 56 pixels, 16 tokens a picture, and a Llama."""
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    special = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
    tokenizer = _tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens(list(pieces))
    text = {"model_type": "llama", **LLAMA, "vocab_size": len(tokenizer), "hidden_size": wide}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return _write(folder, seed, LlavaForConditionalGeneration, config, processor, generation)


def write_llama(
    folder: Path, seed: int = 0, experts: int = 0, rope: Any = None, **generation: Any
) -> Path:
    """A tiny Llama, which takes text alone; with experts a Mixtral."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    tokenizer = _tokenizer(("<unk>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    if experts:
        mixed = MixtralConfig(**LLAMA, vocab_size=len(tokenizer), num_local_experts=experts)
        return _write(folder, seed, MixtralForCausalLM, mixed, tokenizer, generation)
    config = LlamaConfig(**LLAMA, vocab_size=len(tokenizer), rope_parameters=rope)
    return _write(folder, seed, LlamaForCausalLM, config, tokenizer, generation)


def write_parrot(folder: Path, says: str) -> Path:
    """A LLaVA whose weights are set by hand to say one thing, whatever it is asked.

    Attention and feed-forward layers add nothing, a token's embedding is a direction of its own,
    and the head leads from each token of the saying to the next one.
    """
    import torch
    from safetensors.torch import load_file, save_file

    pieces = [says[at : at + 7] for at in range(0, len(says), 7)]
    assert len(set(pieces)) == len(pieces), "each piece of the saying is followed by one other"
    write_llava(folder, wide=448, pieces=pieces, eos_token_id=2)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "language_model" in name and weight.ndim > 1:
            weight.zero_()
    embedding, head = (
        next(weight for name, weight in weights.items() if part in name)
        for part in ("embed_tokens", "lm_head")
    )
    embedding.copy_(torch.eye(*embedding.shape))
    for token, following in _chain(folder, pieces):
        head[following, token] = 1.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _chain(folder: Path, pieces: list[str]) -> Any:
    """(token, next token) from the last token of a prompt to the end of the answer."""
    from itertools import pairwise

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer("USER: x ASSISTANT:", add_special_tokens=False).input_ids[-1]
    said = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    return pairwise([start, *said, tokenizer.eos_token_id])


KINDS = {"qwen": write_qwen, "llava": write_llava, "blind": write_llama}


def _tokenizer(special: tuple[str, ...], **names: str) -> Any:
    """Byte-level BPE over the little corpus, so that any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=list(special),
        **{"pad_token": special[0], **names},
    )


def _write(
    folder: Path, seed: int, kind: Any, config: Any, processor: Any, generation: dict[str, Any]
) -> Path:
    import torch

    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # As they are made, logits would be so alike that every prompt had one answer.
            if weight.ndim > 1:
                weight.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.2)
    tokenizer = getattr(processor, "tokenizer", processor)
    # One token in twelve ends an answer, or noise would never end.
    ends = [tokenizer.eos_token_id, *range(28, len(tokenizer), 12)]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import sys

    # The sample's recipes score with two of them: `python -m tests.tiny_mllms sample/models`.
    for kind in ("llava", "blind"):
        KINDS[kind](Path(sys.argv[1]) / f"noise_{kind}")
