"""Likelihoods and attention, each against a computation of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import local_passes
from infra.errors import ConfigError
from infra.local_mllm import Loaded, LocalModel, Prompt, encode, generate, load
from infra.local_probes import (
    Hidden,
    Likelihood,
    Looks,
    Supplied,
    TooLong,
    attention,
    heads_apart,
    log_probs,
)
from tests import tiny_mllms as tiny_mllms_file
from tests.infra.test_local_mllm import KINDS, prompt

ANSWERS = ("A red leaf.", "No.", "The same, but larger, and on a green table at night.")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=KINDS)
def local(request, tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms[request.param]), batch_size=4, device="cpu")


@pytest.fixture
def blind(tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms["blind"]), batch_size=4, device="cpu")


# Likelihood ----------------------------------------------------------------------------------


@contextmanager
def counted_passes(loaded: Loaded, rows: list[int]) -> Iterator[None]:
    """Notes how many rows every forward pass of a model has."""
    hook = loaded.network.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def by_hand(state: dict[str, np.ndarray], ids: list[int], heads: int = 4) -> np.ndarray:
    """Log-probabilities [n, vocabulary] of a Llama, written out in numpy, float64."""
    state = {name.removeprefix("model."): value.astype(np.float64) for name, value in state.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * state[name]

    def turned(x):  # rotary positions: the first half of a head against the second
        width = x.shape[-1]
        speeds = 10_000.0 ** (-np.arange(0, width, 2) / width)
        angles = np.arange(len(ids))[:, None] * speeds
        cos, sin = np.cos(angles), np.sin(angles)
        one, two = x[..., : width // 2], x[..., width // 2 :]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    x = state["embed_tokens.weight"][ids]
    past = np.tril(np.ones((len(ids), len(ids)), bool))
    for layer in ("layers.0.", "layers.1."):
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            (h @ state[f"{layer}self_attn.{name}_proj.weight"].T)
            .reshape(len(ids), heads, -1)
            .transpose(1, 0, 2)
            for name in "qkv"
        )
        scores = turned(q) @ turned(k).transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        mixed = softmax(np.where(past, scores, -np.inf)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
        x = x + mixed @ state[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (h @ state[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ state[layer + "mlp.down_proj.weight"].T
    logits = norm(x, "norm.weight") @ state["lm_head.weight"].T
    return np.log(softmax(logits))


# How the models of the tests talk, and a template that puts a blank before an answer.
PLAIN = ("[user] What is it?\n[assistant] ", "")
VICUNA = ("<s>USER: What is it? ASSISTANT:", " ")


@pytest.fixture(params=[PLAIN, VICUNA], ids=["plain", "vicuna"])
def talk(request, blind, tiny_mllms, tmp_path) -> tuple[LocalModel, str, str]:
    """A model of text, its prompt as the template writes it, and what it puts before answers."""
    if request.param == PLAIN:
        return blind, *PLAIN
    folder = shutil.copytree(tiny_mllms["blind"], tmp_path / "vicuna")
    (folder / "chat_template.jinja").write_text(tiny_mllms_file.VICUNA)
    return blind.model_copy(update={"name": str(folder)}), *VICUNA


def test_a_likelihood_is_that_of_a_forward_pass_written_by_hand(talk):
    local, written, lead = talk
    loaded = load(local)
    state = {name: value.numpy() for name, value in loaded.network.state_dict().items()}
    asked = Prompt("k", "", (), "What is it?")
    found = log_probs(local, [Supplied(asked, answer) for answer in ANSWERS])
    start = loaded.tokenizer(written, add_special_tokens=False).input_ids
    for answer, likelihood in zip(ANSWERS, found, strict=True):
        ids = loaded.tokenizer(lead + answer, add_special_tokens=False).input_ids
        assert likelihood.tokens.tolist() == ids
        expected = by_hand(state, [*start, *ids])
        nll = [-expected[len(start) + at - 1, token] for at, token in enumerate(ids)]
        assert (likelihood.nll.dtype, likelihood.nll.shape) == (np.float32, (len(ids),))
        assert np.allclose(likelihood.nll, nll, atol=1e-4)
        assert likelihood.mean == pytest.approx(np.mean(nll), abs=1e-4)


def test_a_text_by_itself_begins_with_the_token_for_that(blind):
    loaded = load(blind)
    state = {name: value.numpy() for name, value in loaded.network.state_dict().items()}
    found = log_probs(blind, [Supplied(None, answer) for answer in ANSWERS])
    for answer, likelihood in zip(ANSWERS, found, strict=True):
        ids = loaded.tokenizer(answer).input_ids
        expected = by_hand(state, [1, *ids])
        nll = [-expected[at, token] for at, token in enumerate(ids)]
        assert np.allclose(likelihood.nll, nll, atol=1e-4)


def test_without_such_a_token_the_first_one_has_no_score(tiny_mllms):
    qwen = LocalModel(name=str(tiny_mllms["qwen"]), device="cpu")
    loaded = load(qwen)
    assert loaded.tokenizer.bos_token_id is None
    found = log_probs(qwen, [Supplied(None, answer) for answer in (*ANSWERS, "A", "")])
    for answer, likelihood in zip(ANSWERS, found, strict=False):
        ids = loaded.tokenizer(answer).input_ids
        with torch.inference_mode():
            logits = loaded.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll = [-logits[at - 1, ids[at]].item() for at in range(1, len(ids))]
        assert likelihood.tokens.tolist() == ids[1:]
        assert np.allclose(likelihood.nll, nll, atol=1e-4)
    for nothing in found[-2:]:
        assert nothing.nll.shape == (0,) and np.isnan(nothing.mean)


def test_a_likelihood_with_pictures_is_that_of_a_plain_pass_over_the_whole_talk(local):
    """LLaVA's template puts a blank before an answer, Qwen's does not; both end the turn."""
    loaded = load(local)
    supplied = [Supplied(prompt(n), answer) for n, answer in enumerate(ANSWERS)]
    end = loaded.tokenizer.eos_token_id
    for item, likelihood in zip(supplied, log_probs(local, supplied), strict=True):
        inputs = encode(loaded, [item.prompt._replace(turns=(("assistant", item.answer),))])
        tokens = inputs["input_ids"][0].tolist()
        stop = len(tokens) - 1 - tokens[::-1].index(end)
        start = stop - len(likelihood.tokens)
        assert tokens[start:stop] == likelihood.tokens.tolist()
        blank = " " if loaded.network.config.model_type == "llava" else ""
        assert loaded.tokenizer.decode(likelihood.tokens) == blank + item.answer
        with torch.inference_mode():
            logits = loaded.network(**inputs).logits[0].log_softmax(-1)
        nll = [-logits[at - 1, tokens[at]].item() for at in range(start, stop)]
        assert np.allclose(likelihood.nll, nll, atol=1e-4)


@pytest.mark.parametrize("answer", ["<|im_end|> <image></s>", "  A leaf.\n", "日本語", "\n\n2"])
def test_the_tokens_scored_are_those_of_the_answer(local, answer):
    (found,) = log_probs(local, [Supplied(prompt(0), answer)])
    assert load(local).tokenizer.decode(found.tokens).strip() == answer.strip()
    assert len(found.nll) == len(found.tokens) > 0


# Of few kinds, so that several share a pass, and of many lengths.
SIZES = st.tuples(st.integers(0, 2), st.sampled_from([1, 30]), st.integers(0, 12))


def supplied_of(size: tuple[int, int, int]) -> Supplied:
    """An answer by itself, after a question, or after a question about a picture."""
    kind, words, letters = size
    shown = prompt(2).pictures if kind == 2 else ()
    asked = Prompt("", "", shown, "What is it?") if kind else None
    return Supplied(asked, "leaf " * words + "z" * letters)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(SIZES, min_size=2, max_size=16), at=st.integers(0, 15))
def test_no_bit_of_a_likelihood_hangs_on_its_companions(local, sizes, at):
    at %= len(sizes)
    (alone,) = log_probs(local, [supplied_of(sizes[at])])
    together = log_probs(local, [supplied_of(size) for size in sizes])[at]
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.nll.tobytes() == alone.nll.tobytes()


def test_on_a_cpu_each_has_a_pass_of_its_own(local):
    loaded, passes = load(local), []
    asked = prompt(0, pictures=(), system="")
    with counted_passes(loaded, passes):
        log_probs(local, [Supplied(asked, answer) for answer in ("Yes", "No.", "Blue!")])
    assert passes == [1, 1, 1]


@pytest.fixture
def wide(monkeypatch):
    """Passes of several rows, as a GPU has them."""
    for tokens in (local_passes.SCORED, local_passes.WRITTEN):
        monkeypatch.setitem(tokens, "cpu", 256)


def near(some, other) -> bool:
    """The same but for the last bits."""
    return np.allclose(some, other, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("wide")
def test_one_of_a_full_pass_is_as_alone_wherever_it_stands(local):
    loaded, passes = load(local), []
    asked = prompt(0, pictures=(), system="")
    one = [Supplied(asked, answer) for answer in ("Yes", "No.", "A leaf", "Blue!", "9")]
    with counted_passes(loaded, passes):
        together = log_probs(local, one)
        backwards = log_probs(local, one[::-1])[::-1]
        assert passes == [4, 4, 4, 4]  # four rows, and four copies of one
        alone = [log_probs(local, [item])[0] for item in one]
    for one, other, lonely in zip(together, backwards, alone, strict=True):
        assert near(one.nll, lonely.nll) and near(other.nll, lonely.nll)


@pytest.mark.usefixtures("wide")
def test_one_without_padding_shares_no_pass_with_those_that_have_it(blind):
    """Kernels that need no mask are chosen where nothing is padding."""
    items = [Supplied(Prompt("", "", (), "What is it?"), "z" * n) for n in range(1, 17)]
    loaded, passes = load(blind), []
    hook = loaded.network.register_forward_pre_hook(
        lambda _, args, inputs: passes.append(inputs["attention_mask"].all(1).tolist()),
        with_kwargs=True,
    )
    log_probs(blind, items)
    hook.remove()
    assert [True] * 4 in passes
    assert all(len(set(rows)) == 1 for rows in passes)


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 32.0,
}  # fmt: skip


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", [{"experts": 4}, {"rope": LONG_ROPE}], ids=["experts", "rope"])
def test_a_model_that_mixes_rows_sees_one_a_pass(tmp_path, kind):
    folder = tiny_mllms_file.write_llama(tmp_path / "mixing", **kind)
    local, passes = LocalModel(name=str(folder), batch_size=4, device="cpu"), []
    items = [Supplied(Prompt("", "", (), "What is it?"), "z" * n) for n in (3, 4, 5, 40)]
    with counted_passes(load(local), passes):
        together = log_probs(local, items)
    assert passes == [1, 1, 1, 1]
    for item, found in zip(items, together, strict=True):
        assert log_probs(local, [item])[0].nll.tobytes() == found.nll.tobytes()


@pytest.mark.usefixtures("wide")
def test_a_long_one_has_a_pass_of_its_own(local):
    loaded, passes = load(local), []
    long = Supplied(prompt(0), "A red leaf, and a green table. " * 80)
    with counted_passes(loaded, passes):
        log_probs(local, [long, long])
    assert passes == [1, 1]


def test_the_model_s_own_greedy_answer_is_likelier_than_another(local):
    asked = prompt(3)
    (own,) = generate(local, [asked])
    mine, other = log_probs(local, [Supplied(asked, own.text), Supplied(asked, ANSWERS[2])])
    assert mine.mean < other.mean


def test_the_picture_counts(local):
    same = [Supplied(prompt(1, pictures=prompt(n).pictures), ANSWERS[2]) for n in (1, 3)]
    one, other = log_probs(local, same)
    assert np.abs(one.nll - other.nll).max() > 1e-3


def test_an_answer_may_fill_the_context_and_no_more(blind):
    loaded = load(blind)
    start = len(loaded.tokenizer("[user] Why?\n[assistant] ").input_ids)
    # Byte by byte, letters of no word of the corpus are a token each.
    letters = "ж" * ((loaded.context - start) // 2)
    count = len(loaded.tokenizer(letters).input_ids)
    for more in (
        "",
        "z" * (loaded.context - start - count),
        "z" * (loaded.context - start - count + 1),
    ):
        (found,) = log_probs(blind, [Supplied(Prompt("k", "", (), "Why?"), letters + more)])
        length = start + len(loaded.tokenizer(letters + more).input_ids)
        assert length <= loaded.context + 1
        if length <= loaded.context:
            assert isinstance(found, Likelihood) and len(found.nll) == length - start
        else:
            assert found == TooLong(loaded.context + 1)
    assert length == loaded.context + 1


# Attention -----------------------------------------------------------------------------------

HEADS = {"grounding": {0: [1, 3], 1: [2]}, "sink": {1: []}}


def test_attention_is_that_of_the_library_s_plain_one(local):
    """Each prompt alone, with all weights of all layers kept, which real ones can't afford."""
    loaded = load(local)
    prompts = [prompt(n) for n in range(3)]
    found = attention(local, HEADS, prompts)
    loaded.network.set_attn_implementation("eager")
    for asked, looks in zip(prompts, found, strict=True):
        inputs = encode(loaded, [asked])
        with torch.inference_mode():
            plain = loaded.network.generate(
                **inputs,
                max_new_tokens=24,
                do_sample=False,
                return_dict_in_generate=True,
                output_attentions=True,
            )
        visual = (inputs["input_ids"][0] == loaded.network.config.image_token_id).numpy()
        steps = []
        for layers in plain.attentions[1:]:  # the first is the prompt's own pass
            kept = torch.stack([layers[0][0, 1, 0], layers[0][0, 3, 0], layers[1][0, 2, 0]])
            steps.append(kept.mean(0).numpy()[: len(visual)][visual])
        sink = [
            layers[1][0, :, 0].mean(0).numpy()[: len(visual)][visual]
            for layers in plain.attentions[1:]
        ]
        assert looks.rows["grounding"].dtype == np.float32
        assert np.allclose(looks.rows["grounding"], steps, atol=1e-5)
        assert np.allclose(looks.rows["sink"], sink, atol=1e-5)
    loaded.network.set_attn_implementation("sdpa")


def test_steps_are_the_generated_tokens_but_one_and_the_grid_is_that_of_the_pictures(local):
    prompts = [prompt(n) for n in range(4)]
    for asked, looks in zip(prompts, attention(local, HEADS, prompts), strict=True):
        cells = sum(height * width for height, width in looks.grids)
        assert looks.rows["sink"].shape == (looks.response.usage["output"] - 1, cells)
        assert len(looks.grids) == len(asked.pictures)
        assert (looks.rows["sink"] > 0).all() and (looks.rows["sink"].sum(1) < 1).all()
    if load(local).network.config.model_type == "qwen2_5_vl":
        # 120 x 80 and 60 x 90 pixels, in places of 28 x 28.
        assert looks.grids == ((3, 4), (3, 2))
    else:
        assert looks.grids == ((4, 4), (4, 4))


def test_over_the_whole_sequence_a_row_sums_to_one(local):
    from infra import local_probes

    loaded, prompts = load(local), [prompt(n) for n in range(3)]
    with loaded.busy, local_probes._watching(loaded), torch.inference_mode():
        inputs = encode(loaded, prompts)
        _, steps = local_probes.watched(loaded, HEADS, prompts, inputs)
    start = inputs["input_ids"].shape[1]
    for rows in steps.values():
        assert [row.shape[1] for row in rows] == [start + 1 + at for at in range(len(rows))]
        assert all(torch.allclose(row.sum(1), torch.ones(3), atol=1e-5) for row in rows)
        padding = inputs["attention_mask"] == 0
        assert all(row[:, :start][padding].abs().sum() == 0 for row in rows)


def test_watching_changes_no_answer_and_ends(local):
    prompts = [prompt(n) for n in range(4)]
    before = generate(local, prompts)
    assert [looks.response for looks in attention(local, HEADS, prompts)] == before
    assert load(local).network.config.get_text_config()._attn_implementation == "sdpa"
    assert generate(local, prompts) == before


# Pictures of two shapes, questions of many lengths, answers that may have more or fewer tokens.
ASKED = st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 20), st.sampled_from([6, 24]))


def asked_of(drawn: tuple[int, bool, int, int]) -> Prompt:
    seed, is_tall, letters, most = drawn
    shown = (prompt(2 * seed + 1).pictures[is_tall],)
    return Prompt("k", "", shown, "What is it" + "z" * letters, (), most, 0.0)


def bits(looks: Looks) -> tuple[object, ...]:
    rows = {name: (row.shape, row.tobytes()) for name, row in looks.rows.items()}
    return looks.response, rows, looks.grids, looks.strength.tobytes()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(ASKED, min_size=2, max_size=12), at=st.integers(0, 11))
def test_no_bit_of_a_look_hangs_on_its_companions(local, drawn, at):
    at %= len(drawn)
    (alone,) = attention(local, HEADS, [asked_of(drawn[at])], Hidden(1))
    together = attention(local, HEADS, map(asked_of, drawn), Hidden(1))
    assert bits(together[at]) == bits(alone)


@pytest.mark.usefixtures("wide")
def test_a_look_of_a_full_pass_is_as_alone_wherever_it_stands_and_whoever_ends_first(local):
    loaded, passes = load(local), []
    prompts = [asked_of((seed, False, 3, 24)) for seed in range(4)]
    with counted_passes(loaded, passes):
        together = attention(local, HEADS, prompts, Hidden(1))
        backwards = attention(local, HEADS, prompts[::-1], Hidden(1))[::-1]
        alone = [attention(local, HEADS, [one], Hidden(1))[0] for one in prompts]
    assert {*passes} == {4}  # four prompts, and four copies of one
    assert len({looks.response.usage["output"] for looks in alone}) > 1
    assert len({looks.rows["sink"].tobytes() for looks in alone}) == 4
    for one, other, lonely in zip(together, backwards, alone, strict=True):
        assert one.response == other.response == lonely.response
        for looks in (one, other):
            assert near(looks.strength, lonely.strength)
            assert all(near(looks.rows[name], rows) for name, rows in lonely.rows.items())


def test_a_prompt_without_room_has_no_rows_and_the_others_have(local):
    long = prompt(0, text="What is it? " * 2000)
    refused, looks = attention(local, HEADS, [long, prompt(1)])
    assert refused.response.status == "refused" and refused.rows["sink"].shape == (0, 0)
    assert looks.rows["sink"].shape[0] == looks.response.usage["output"] - 1


@pytest.mark.parametrize("heads", [{"a": {2: []}}, {"a": {0: [4]}}, {"a": {}}])
def test_heads_that_a_model_does_not_have_are_refused(local, heads):
    with pytest.raises(ConfigError, match="layers 0 to 1 with heads 0 to 3"):
        attention(local, heads, [prompt(0)])


# Hidden states, and every head by itself -----------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_strengths_are_those_of_the_library_s_own_hidden_states(local, layer):
    """The norm, and the largest of some dimensions after RMS normalisation, written out."""
    loaded, prompts = load(local), [prompt(n) for n in range(3)]
    norms = attention(local, HEADS, prompts, Hidden(layer))
    peaks = attention(local, HEADS, prompts, Hidden(layer, (3, 17)))
    for asked, norm, peak in zip(prompts, norms, peaks, strict=True):
        inputs = encode(loaded, [asked])
        with torch.inference_mode():
            plain = loaded.network(**inputs, output_hidden_states=True)
        visual = (inputs["input_ids"][0] == loaded.network.config.image_token_id).numpy()
        states = plain.hidden_states[layer][0].double().numpy()[visual]
        assert norm.strength.dtype == np.float32
        assert np.allclose(norm.strength, np.sqrt((states**2).sum(1)), rtol=1e-5)
        normal = states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-6)
        assert np.allclose(peak.strength, abs(normal[:, [3, 17]]).max(1), rtol=1e-5)


def test_strengths_are_of_what_was_asked_for_alone_and_change_nothing(local):
    prompts = [prompt(n) for n in range(2)]
    plain, read = (attention(local, HEADS, prompts, hidden) for hidden in (None, Hidden(1)))
    assert [looks.strength for looks in plain] == [None, None]
    assert [looks.response for looks in plain] == [looks.response for looks in read]
    assert attention(local, HEADS, prompts)[0].strength is None


@pytest.mark.parametrize("hidden", [Hidden(2), Hidden(-1), Hidden(0, (32,))])
def test_hidden_states_that_a_model_does_not_have_are_refused(local, hidden):
    with pytest.raises(ConfigError, match="layers 0 to 1 with dimensions 0 to 31"):
        attention(local, HEADS, [prompt(0)], hidden)


def test_heads_apart_are_those_of_attention_to_each_head(local):
    prompts = [prompt(n) for n in range(3)]
    named = {f"{layer} {head}": {layer: [head]} for layer in range(2) for head in range(4)}
    for looks, apart in zip(attention(local, named, prompts), heads_apart(local, prompts),
                            strict=True):  # fmt: skip
        assert apart.grids == looks.grids
        if not len(looks.rows["0 0"]):
            assert apart.rows is None
            continue
        rows = [looks.rows[name].mean(0) for name in named]
        assert np.allclose(apart.rows.reshape(8, -1), rows, atol=1e-5)


def test_no_bit_of_heads_apart_hangs_on_companions(local):
    prompts = [asked_of((n, n > 1, 5 * n, 24)) for n in range(4)]
    compared = 0
    for asked, together in zip(prompts, heads_apart(local, prompts), strict=True):
        (alone,) = heads_apart(local, [asked])
        assert alone.grids == together.grids
        if together.rows is None:
            assert alone.rows is None
            continue
        compared += 1
        assert alone.rows.tobytes() == together.rows.tobytes()
    assert compared >= 2


def test_a_prompt_without_room_has_no_heads_apart(local):
    assert heads_apart(local, [prompt(0, text="What is it? " * 2000)]) == [(None, ())]
