"""Models in process on a CUDA device, against the CPU."""

import numpy as np
import pytest
import torch

from infra import local_mllm
from infra.errors import PairmillError
from infra.local_mllm import LocalModel, encode, generate, in_batches, load
from infra.local_probes import Supplied, attention, log_probs
from tests.infra.test_local_mllm import prompt
from tests.infra.test_local_probes import ANSWERS, HEADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["qwen", "llava"])
def cpu(request, tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms[request.param]), batch_size=4, device="cpu")


@pytest.fixture
def gpu(cpu) -> LocalModel:
    """The same model in the same precision."""
    return cpu.model_copy(update={"device": "cuda", "dtype": "float32"})


def test_a_gpu_needs_a_worker_that_has_one_and_computes_in_bfloat16(cpu):
    gpu = cpu.model_copy(update={"device": "cuda", "gpus": 2.0})
    assert (gpu.resources, cpu.resources) == ({"GPU": 2.0}, None)
    assert load(gpu).network.dtype == torch.bfloat16
    assert load(gpu).local.numerics != load(cpu).local.numerics


@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_answers_in_float32_are_those_of_the_cpu(cpu, gpu, heat):
    prompts = [prompt(n, temperature=heat, max_tokens=12 + n) for n in range(6)]
    there, here = generate(gpu, prompts), generate(cpu, prompts)
    same = [a.text == b.text and a.usage == b.usage for a, b in zip(there, here, strict=True)]
    assert sum(same) >= 5  # two tokens may be as good as equally likely


def test_answers_in_bfloat16_have_their_true_counts_whatever_their_companions(cpu):
    gpu = cpu.model_copy(update={"device": "cuda"})
    prompts = [prompt(n, temperature=0.8, max_tokens=6 + n) for n in range(8)]
    for asked, answer in zip(prompts, generate(gpu, prompts), strict=True):
        assert answer.usage["input"] == encode(load(gpu), [asked])["input_ids"].shape[1]
        assert answer.usage["output"] <= asked.max_tokens
        assert (answer.status == "truncated") == (answer.finish_reason == "length")


def test_likelihoods_are_those_of_the_cpu(cpu, gpu):
    supplied = [Supplied(prompt(n), answer) for n, answer in enumerate(ANSWERS)]
    supplied.append(Supplied(None, ANSWERS[0]))
    for there, here in zip(log_probs(gpu, supplied), log_probs(cpu, supplied), strict=True):
        assert np.allclose(there.nll, here.nll, atol=1e-3)
    coarse = log_probs(cpu.model_copy(update={"device": "cuda"}), supplied)
    for there, here in zip(coarse, log_probs(cpu, supplied), strict=True):
        assert there.mean == pytest.approx(here.mean, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_of_a_likelihood_hangs_on_its_companions(gpu, dtype):
    local = gpu.model_copy(update={"dtype": dtype})
    items = [Supplied(prompt(n, pictures=()), ANSWERS[n % 3] * (1 + n % 2)) for n in range(12)]
    together = log_probs(local, items)
    for item, found in zip(items, together, strict=True):
        (alone,) = log_probs(local, [item])
        assert alone.nll.tobytes() == found.nll.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_of_a_look_hangs_on_its_companions(gpu, dtype):
    local = gpu.model_copy(update={"dtype": dtype})
    prompts = [prompt(n) for n in range(8)]
    for asked, together in zip(prompts, attention(local, HEADS, prompts), strict=True):
        (alone,) = attention(local, HEADS, [asked])
        assert alone.response == together.response
        assert alone.rows["sink"].tobytes() == together.rows["sink"].tobytes()


def test_attention_is_that_of_the_cpu(cpu, gpu):
    prompts = [prompt(n) for n in range(4)]
    there, here = attention(gpu, HEADS, prompts), attention(cpu, HEADS, prompts)
    compared = 0
    for one, other in zip(there, here, strict=True):
        assert one.rows["sink"].shape[0] == one.response.usage["output"] - 1
        if one.response.text == other.response.text:
            compared += 1
            assert np.allclose(one.rows["grounding"], other.rows["grounding"], atol=1e-4)
    assert compared >= 3


def test_a_batch_that_does_not_fit_is_cut_until_it_does(gpu):
    """The real allocator refuses: the process may use little of the device."""
    loaded = load(gpu)
    prompts = [prompt(n, max_tokens=4) for n in range(8)]
    expected = generate(gpu, prompts)
    sizes: list[int] = []

    def hungry(some):
        sizes.append(len(some))
        kept = torch.empty(len(some) << 28, dtype=torch.uint8, device="cuda")
        del kept
        return local_mllm._answers(loaded, some)

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((700 << 20) / total)
    try:
        assert in_batches(loaded, prompts, hungry) == expected
        assert sizes[:3] == [4, 2, 2]
        torch.cuda.set_per_process_memory_fraction((200 << 20) / total)
        torch.cuda.empty_cache()
        with pytest.raises(PairmillError, match="a single request"):
            in_batches(loaded, prompts[:2], hungry)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
