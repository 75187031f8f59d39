"""Vision-language models in process: loaded from a hub, a folder or `s3://`, run on workers.

Weights load from safetensors only; remote code never runs. What a sampled answer says hangs on
its request alone, never on the requests that happened to share its batch.
"""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from infra import images, model_files
from infra.build import Build
from infra.canonical import digest
from infra.cluster import Crash, Pool
from infra.errors import ConfigError, PairmillError
from infra.mllm import Request, Response, Status, Unanswered, request_key, with_schema
from infra.models import DTYPES, choose_device
from infra.pictures import Lying

# Raise it when the same request reaches a model in another way than before.
VERSION = 1
FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
EDGE = "\u2063\u2062\u2063"  # marks a place in a rendered prompt; no template and no text holds it

Item = TypeVar("Item")
Found = TypeVar("Found")


class LocalModel(BaseModel):
    """A vision-language model of the `transformers` library, run by the workers of the build."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        min_length=1,
        description="`owner/repository` of the Hugging Face hub, a folder, or `s3://bucket/folder`;"
        " with safetensors and a chat template.",
    )
    revision: str | None = Field(
        None, description="Commit, tag or branch, where the name is that of a hub."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="`auto` is bfloat16 on a GPU and float32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="`auto` is cuda where the machine that runs the build has an NVIDIA device.",
    )
    gpus: float = Field(
        1.0,
        gt=0,
        le=16,
        description="The Dask resource `GPU` that a batch takes of its worker, on cuda.",
    )
    batch_size: int = Field(8, ge=1, le=512, description="Requests in one batch, at most.")
    batches: int = Field(
        2, ge=1, le=256, description="Batches under way; two to a worker keep it busy."
    )
    max_new_tokens: int = Field(
        1_024, ge=1, description="Tokens an answer may have, whatever a request asks for."
    )
    max_pixels: int = Field(
        1_003_520,
        ge=784,
        description="Larger pictures are made smaller before the model's own processor sees them."
        " It bounds memory; 1003520 is 1280 patches of 28 x 28.",
    )
    numerics: str | None = Field(
        None,
        pattern="^[0-9a-f]{20}$",
        description="Digest of weights, processor and settings. The build fills it in; set it to"
        " refuse any other.",
    )

    def pinned(self, build: Build) -> "LocalModel":
        """`pin`, for the ledger: the numerics are part of what the parameters of a stage mean."""
        return pin(build, self)

    @property
    def model(self) -> str:
        """The model as requests name it."""
        name = Path(self.name).name
        return f"{name}@{self.numerics}" if self.numerics else name

    @property
    def in_flight(self) -> int:
        """Requests that keep it busy."""
        return self.batch_size * self.batches

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture has at most: no model has more than one to 14 x 14 pixels."""
        return max(3_000, self.max_pixels // 196)

    @property
    def resources(self) -> dict[str, float] | None:
        """What a worker must have to run it."""
        return {"GPU": self.gpus} if choose_device(self.device) == "cuda" else None


class Shown(NamedTuple):
    """A picture of a prompt: what it is called there (perhaps nothing), and its encoded bytes."""

    name: str
    data: bytes | Lying


class Prompt(NamedTuple):
    """One request as a worker takes it. `key` seeds what is sampled; `turns` are (role, text)."""

    key: str
    system: str
    pictures: tuple[Shown, ...]
    text: str
    turns: tuple[tuple[str, str], ...] = ()
    max_tokens: int = 512
    temperature: float | None = None


class Sampling(NamedTuple):
    """How tokens are drawn, in place of a model's own generation defaults: of the `top_k` likeliest
    (0: of all), of the likeliest that reach `top_p` together, at least `least_tokens` of them.
    """

    top_k: int = 0
    top_p: float = 1.0
    least_tokens: int = 0
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Loaded:
    """A model on its device. One caller at a time: networks keep state between their steps."""

    local: LocalModel
    network: Any
    processor: Any
    tokenizer: Any
    device: str
    sees: bool
    busy: Any = field(default_factory=threading.RLock)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return int(limit or 1 << 30)


# Loading -------------------------------------------------------------------------------------

_loading = threading.Lock()
_loaded: dict[str, Loaded] = {}  # one at a time: two may not fit on a GPU
_read: dict[LocalModel, tuple[str, str]] = {}  # numerics, and the key of what is loaded


def numerics(local: LocalModel) -> str:
    """Digest of a model's files and of the settings that decide what it answers.

    Its files hold weights, architecture, processor, tokenizer, chat template, and generation
    defaults. Raises ConfigError, in one line.
    """
    return _numerics(local, _digests_of(find(local)))


def _digests_of(folder: Path) -> list[list[str]]:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(FILES))
    return [[path.name, _sha256(path, path.stat().st_mtime_ns)] for path in files]


def _numerics(local: LocalModel, files: list[list[str]]) -> str:
    shared = {
        "version": VERSION,
        "files": files,
        "dtype": _dtype(local),
        "max_new_tokens": local.max_new_tokens,
        "max_pixels": local.max_pixels,
    }
    return digest(shared)[:20]


_digests: dict[tuple[Path, int], str] = {}


def _sha256(path: Path, stamp: int) -> str:
    key = (path.resolve(), stamp)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def find(local: LocalModel) -> Path:
    """The local folder of a model, fetched where it lies elsewhere. Raises ConfigError."""
    if local.name.startswith("s3://"):
        folder = model_files.download(local.name, suffixes=FILES)
    elif Path(local.name).is_dir():
        folder = Path(local.name)
    elif local.name.startswith(("/", ".", "~")):
        raise ConfigError(f"models: there is no folder {local.name!r}; a model's files lie in one")
    else:
        folder = _from_hub(local)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"models: {local.name!r} holds no safetensors; convert its weights, since no other"
            " format is loaded"
        )
    return folder


def _from_hub(local: LocalModel) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in FILES]
    try:
        return Path(snapshot_download(local.name, revision=local.revision, allow_patterns=patterns))
    except Exception as error:
        # The hub's client raises whatever HTTP, the file system and its checks raise.
        raise _refused(local, error) from error


def _refused(local: LocalModel, error: Exception) -> ConfigError:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    where = f" at {local.revision!r}" if local.revision else ""
    return ConfigError(f"models: transformers can't load {local.name!r}{where}: {cause}")


def load(local: LocalModel) -> Loaded:
    """The model, loaded once per process and again when its files change.

    Raises ConfigError where it can't be loaded, PairmillError where it is not the model that
    `local.numerics` names.
    """
    with _loading:
        if local.name.startswith("s3://") or Path(local.name).is_dir() or local not in _read:
            files = _digests_of(find(local))
            key = digest([files, _dtype(local), choose_device(local.device)])
            _read[local] = _same(local, _numerics(local, files)), key
        found, key = _read[local]
        if key not in _loaded:
            _loaded.clear()
            _loaded[key] = _load(local)
        return replace(_loaded[key], local=local.model_copy(update={"numerics": found}))


def _load(local: LocalModel) -> Loaded:
    import torch
    import transformers

    folder, device = find(local), choose_device(local.device)
    # It warns of settings that are meant, amid the progress bars.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        network, about = _class(sees).from_pretrained(
            folder,
            dtype=getattr(torch, _dtype(local)),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
        processor = reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        network = network.eval().requires_grad_(False).to(device)
    except Exception as error:
        # The library raises whatever it meets, down to bare KeyErrors.
        raise _refused(local, error) from error
    if missing := sorted({*about["missing_keys"], *map(str, about["mismatched_keys"])}):
        raise ConfigError(
            f"models: the weights of {local.name!r} are not complete: {len(missing)} are missing"
            f" or of another shape, such as {missing[0]}"
        )
    tokenizer = processor.tokenizer if sees else processor
    _check_tokenizer(local, processor, tokenizer)
    return Loaded(local, network, processor, tokenizer, device, sees)


def _class(sees: bool) -> Any:
    import transformers

    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def _check_tokenizer(local: LocalModel, processor: Any, tokenizer: Any) -> None:
    if not processor.chat_template:
        raise ConfigError(
            f"models: {local.name!r} has no chat template; use the instruction-tuned model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _dtype(local: LocalModel) -> str:
    return DTYPES[choose_device(local.device)] if local.dtype == "auto" else local.dtype


# Prompts -------------------------------------------------------------------------------------

Encoder = Callable[[Loaded, Sequence[Prompt]], dict[str, Any]]


def encode(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Model inputs of a batch, padded on the left, up to where the answer begins."""
    return encode_talks(loaded, [_talk(loaded, prompt) for prompt in prompts])


def encode_talks(loaded: Loaded, talks: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """`encode` for messages as chat templates take them, pictures decoded.

    Special tokens that a text spells out reach the model as plain text.
    """
    inputs = loaded.processor.apply_chat_template(
        talks,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        **({"processor_kwargs": {"padding": True}} if loaded.sees else {"padding": True}),
    )
    return _placed(loaded, inputs)


def encode_prefix(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Model inputs that end right after the pictures, where a user's own words would begin.

    Of the prompts only pictures are used (Oasis, ICCV 2025: the chat prefix is cut there).
    """
    talks = []
    for prompt in prompts:
        unnamed = tuple(Shown("", data) for _, data in prompt.pictures)
        talks.append(_talk(loaded, Prompt(prompt.key, "", unnamed, EDGE)))
    shown = [[part["image"] for part in talk[-1]["content"] if "image" in part] for talk in talks]
    texts = [text.partition(EDGE)[0] for text in loaded.processor.apply_chat_template(talks)]
    bos = loaded.tokenizer.bos_token
    inputs = loaded.processor(
        text=texts,
        images=shown,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
    )
    return _placed(loaded, inputs)


def _placed(loaded: Loaded, inputs: Any) -> dict[str, Any]:
    dtype = loaded.network.dtype
    moved = {name: value.to(loaded.device) for name, value in inputs.items()}
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in moved.items()}


def _talk(loaded: Loaded, prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as the messages that chat templates take; all shared text comes first."""
    if prompt.pictures and not loaded.sees:
        raise PairmillError(f"models: {loaded.local.name!r} takes no pictures; use one that does")
    shown: list[dict[str, Any]] = []
    for name, data in prompt.pictures:
        shown += said(f"{name}:", True) if name else []
        shown.append({"type": "image", "image": _picture(data, loaded.local.max_pixels)})
    text = said(prompt.text, loaded.sees)
    turns = (
        ("user", [*shown, *text] if loaded.sees else text),
        *((role, said(words, loaded.sees)) for role, words in prompt.turns),
    )
    first = [("system", said(prompt.system, loaded.sees))] if prompt.system else []
    return [{"role": role, "content": content} for role, content in (*first, *turns)]


def said(text: str, sees: bool) -> Any:
    """A text as the content of a message: in parts where a model also takes pictures."""
    return [{"type": "text", "text": text}] if sees else text


def _picture(data: bytes | Lying, max_pixels: int) -> Any:
    data = data.read() if isinstance(data, Lying) else data
    header = images.read_header(data, images.MOST_PIXELS)
    scale = min(1.0, (max_pixels / (header.width * header.height)) ** 0.5)
    size = max(1, int(header.width * scale)), max(1, int(header.height * scale))
    picture = images.decode(data, min(size), images.MOST_PIXELS)
    return picture.resize(size, images.Resampling.BICUBIC) if scale < 1 else picture


# Answers -------------------------------------------------------------------------------------


def generate(local: LocalModel, prompts: Sequence[Prompt]) -> list[Response]:
    """What the model answers to each prompt, in their order, with true counts of tokens.

    Greedy where the temperature is 0; null takes the model's own generation defaults. Status
    `truncated` means that no end came within the limit, `refused` that the prompt does not fit
    the model's context.
    """
    loaded = load(local)
    return in_batches(loaded, prompts, lambda some: _answers(loaded, some))


def in_batches(
    loaded: Loaded, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Found]]
) -> list[Found]:
    """`work` over batches of at most `batch_size`, smaller ones where a GPU's memory ends.

    Raises PairmillError where one item alone is too much for it.
    """
    import torch

    found: list[Found] = []
    waiting = _cut(items, loaded.local.batch_size)
    with loaded.busy, torch.inference_mode():
        while waiting:
            batch = waiting.pop(0)
            try:
                found += work(batch)
                continue
            except torch.cuda.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise PairmillError(
                        f"models: a single request to {loaded.local.name!r} does not fit the GPU's"
                        " memory; lower max_pixels or max_new_tokens, or use a smaller model"
                    ) from error
            torch.cuda.empty_cache()
            waiting = [*_cut(batch, (len(batch) + 1) // 2), *waiting]
    return found


def _cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _answers(loaded: Loaded, prompts: Sequence[Prompt]) -> list[Response]:
    inputs = encode(loaded, prompts)
    refused = misfits(loaded, prompts, inputs)
    if any(refused):
        short = [p for p, answer in zip(prompts, refused, strict=True) if answer is None]
        rest = iter(_answers(loaded, short) if short else [])
        return [answer or next(rest) for answer in refused]
    return responses(loaded, prompts, inputs)


def responses(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    inputs: dict[str, Any],
    sampling: Sampling | None = None,
) -> list[Response]:
    """Answers to prompts that have room, from their inputs as one batch."""
    whole = write(loaded, prompts, inputs, sampling).sequences
    written = whole[:, inputs["input_ids"].shape[1] :]
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = zip(prompts, written.tolist(), lengths, strict=True)
    return [response(loaded, row, n, limit(loaded, prompt)) for prompt, row, n in rows]


def limit(loaded: Loaded, prompt: Prompt) -> int:
    """Tokens that the answer to a prompt may have."""
    return min(prompt.max_tokens, loaded.local.max_new_tokens)


def misfits(
    loaded: Loaded, prompts: Sequence[Prompt], inputs: dict[str, Any]
) -> list[Response | None]:
    """A refusal for each prompt for which, with its answer, the model's context is too small."""
    found: list[Response | None] = []
    for prompt, length in zip(prompts, inputs["attention_mask"].sum(1).tolist(), strict=True):
        fits = length + limit(loaded, prompt) <= loaded.context
        why = f"{length} tokens, and the model takes {loaded.context} with the answer"
        usage = {"input": length, "output": 0, "cached": 0}
        model = loaded.local.model
        found.append(None if fits else Response("refused", why, "context", model, usage))
    return found


def write(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    inputs: dict[str, Any],
    sampling: Sampling | None = None,
    **more: Any,
) -> Any:
    """What `generate` of transformers gives: `sequences` (prompt and answer), and `more`."""
    limits = [limit(loaded, prompt) for prompt in prompts]
    own = loaded.network.generation_config
    defaults = sampling or own
    start = inputs["input_ids"].shape[1]
    warm = (own.temperature or 1.0) if own.do_sample else 0.0
    heat = [warm if p.temperature is None else p.temperature for p in prompts]
    choose: list[Any] = []
    if defaults.repetition_penalty not in (None, 1.0):
        choose.append(_Penalty(inputs["attention_mask"], defaults.repetition_penalty))
    if any(heat):
        seeds = [prompt.key for prompt in prompts]
        choose.append(_Draw(loaded.device, start, seeds, heat, max(limits), defaults))
    return loaded.network.generate(
        **inputs,
        max_new_tokens=max(limits),
        min_new_tokens=sampling.least_tokens if sampling else None,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        logits_processor=choose,
        stopping_criteria=[_Limits(loaded.device, start, limits)],
        return_dict_in_generate=True,
        pad_token_id=loaded.tokenizer.pad_token_id,
        **more,
    )


class _Draw:
    """Draws each row's next token by one number that belongs to its request and step alone.

    The token is the first at which the cumulated probability passes the number; where the
    temperature is 0 the scores stay as they are, and the likeliest token is taken.
    """

    def __init__(
        self,
        device: str,
        start: int,
        seeds: Sequence[str],
        heat: Sequence[float],
        steps: int,
        defaults: Any,
    ) -> None:
        import torch
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._start = start
        self._numbers = torch.tensor(np.stack([_numbers(seed, steps) for seed in seeds])).to(device)
        self._heat = torch.tensor(heat, dtype=torch.float32, device=device)[:, None]
        self._cuts: list[Any] = []
        if defaults.top_k:
            self._cuts.append(TopKLogitsWarper(defaults.top_k))
        if defaults.top_p is not None and defaults.top_p < 1:
            self._cuts.append(TopPLogitsWarper(defaults.top_p))
        if defaults.min_p is not None:
            self._cuts.append(MinPLogitsWarper(defaults.min_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        # On a GPU a step or two may be computed beyond the last; they are thrown away.
        step = min(input_ids.shape[1] - self._start, self._numbers.shape[1] - 1)
        warm = scores.float() / self._heat.clamp_min(1e-6)
        for cut in self._cuts:
            warm = cut(input_ids, warm)
        mass = warm.double().softmax(-1).cumsum(-1)
        token = (mass <= self._numbers[:, step, None] * mass[:, -1:]).sum(-1, keepdim=True)
        drawn = torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
        return torch.where(self._heat > 0, drawn, scores)


def _numbers(seed: str, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64[steps], that belong to a seed."""
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(steps)


class _Penalty:
    """Makes tokens that were there before less likely, as the library does (arXiv 1909.05858).

    Here padding is not there: it hangs on the companions of a request.
    """

    def __init__(self, mask: Any, penalty: float) -> None:
        self._mask, self._penalty = mask, penalty

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        written = input_ids.shape[1] - self._mask.shape[1]
        there = torch.nn.functional.pad(self._mask, (0, written), value=1)
        counts = torch.zeros_like(scores, dtype=there.dtype).scatter_add_(1, input_ids, there)
        lower = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(counts > 0, lower, scores)


class _Limits:
    """Ends each row at its own limit."""

    def __init__(self, device: str, start: int, limits: Sequence[int]) -> None:
        import torch

        self._ends = torch.tensor(limits, device=device) + start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] >= self._ends


def response(loaded: Loaded, tokens: Sequence[int], length: int, most: int) -> Response:
    """A row of generated tokens as an answer; `length` is that of its prompt."""
    ends = loaded.network.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or [loaded.tokenizer.eos_token_id]
    kept = list(tokens[:most])
    end = next((at for at, token in enumerate(kept) if token in ends), None)
    text = loaded.tokenizer.decode(kept[:end], skip_special_tokens=True)
    status: Status = "answered"
    if end is None:
        status = "truncated"
    elif not text.strip():
        status = "empty"
    count = len(kept) if end is None else end + 1
    usage = {"input": length, "output": count, "cached": 0}
    reason = "length" if end is None else "stop"
    return Response(status, text, reason, loaded.local.model, usage)


# The backend of asking -----------------------------------------------------------------------


def pin(build: Build, local: LocalModel) -> LocalModel:
    """The model with its numerics filled in, asked of a worker the first time a store meets it.

    Raises ConfigError where it can't be read, PairmillError where it is not what it should be.
    """
    device = choose_device(local.device)
    there = local.model_copy(update={"device": device})
    meant = local.model_dump(include={"name", "revision", "dtype", "max_new_tokens", "max_pixels"})
    spec = digest([VERSION, meant, [list(stamp) for stamp in model_files.stamps(local.name)]])
    record = build.ledger.find("models", f"mllm-{device}", spec)
    if record is None:
        build.begin("load models", {"model": local.name})
        ask = partial(numerics_of, there)
        (_, found), *_ = build.pool.map(ask, [0], resources=local.resources)
        if isinstance(found, Crash):
            raise PairmillError(f"reading {local.name} ended its worker: {found.reason}; run again")
        record = {"numerics": found}
        build.ledger.write("models", f"mllm-{device}", spec, record)
    return there.model_copy(update={"numerics": _same(local, record["numerics"])})


def numerics_of(local: LocalModel, _: Any) -> str:
    """`numerics` as a function of a shard."""
    return numerics(local)


def _same(local: LocalModel, found: str) -> str:
    if local.numerics in (None, found):
        return found
    raise PairmillError(
        f"models: {local.name!r} is {found}, not {local.numerics}: its files or settings were"
        " changed, or differ between machines; put them back, name a revision, or correct numerics"
    )


class InProcess:
    """Answers requests with a model on the workers of a pool, many to a batch. See asking.Backend.

    `pictures` gives the JPEG of an image_id. Where it has a method `lying`, workers read pictures
    from the store by themselves, and none travels through a scheduler. A batch goes when it is
    full, or when nothing more came for `linger_s`.
    """

    def __init__(
        self,
        local: LocalModel,
        pool: Pool,
        pictures: Callable[[str], bytes],
        linger_s: float = 0.05,
    ) -> None:
        self._local, self._pool, self._pictures = local, pool, pictures
        self._linger_s = linger_s
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[Response]]] = asyncio.Queue()
        self._free = asyncio.Semaphore(local.batches)
        self._threads = ThreadPoolExecutor(local.batches, "mllm")
        self._tasks: set[asyncio.Task[None]] = set()

    async def send(self, request: Request) -> Response:
        """The answer to a request. Raises Unanswered where the model ended its worker."""
        if not self._tasks:
            self._start(self._collect())
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((request, answer))
        return await answer

    async def close(self) -> None:
        """Take no more, and wait for the batches that are under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _collect(self) -> None:
        while True:
            first = await self._waiting.get()
            await self._free.acquire()
            batch = [first]
            while len(batch) < self._local.batch_size:
                if self._waiting.empty():
                    await asyncio.sleep(self._linger_s)
                if self._waiting.empty():
                    break
                batch.append(self._waiting.get_nowait())
            self._start(self._answer(batch))

    async def _answer(self, batch: list[tuple[Request, asyncio.Future[Response]]]) -> None:
        loop = asyncio.get_running_loop()
        wanted = [(request, answer) for request, answer in batch if not answer.done()]
        try:
            found = await loop.run_in_executor(
                self._threads, self._run, [request for request, _ in wanted]
            )
        except Exception as error:
            # Whoever asked is told; a build ends by it, in one line where it is an expected error.
            for _, answer in wanted:
                if not answer.done():
                    answer.set_exception(error)
            return
        finally:
            self._free.release()
        for (_, answer), result in zip(wanted, found, strict=True):
            if answer.done():
                continue
            if isinstance(result, Crash):
                said = f"the model ended its worker: {result.reason}"
                answer.set_exception(Unanswered("endpoint_error", said))
            else:
                answer.set_result(result)

    def _run(self, requests: Sequence[Request]) -> list[Response | Crash]:
        prompts = tuple(self._prompt(request) for request in requests)
        found: dict[str, Response | Crash] = {}
        work = partial(generate, self._local)
        for part, result in self._pool.map(
            work, [prompts] if prompts else [], split=_halves, resources=self._local.resources
        ):
            results = [result] * len(part) if isinstance(result, Crash) else result
            found |= zip((prompt.key for prompt in part), results, strict=True)
        return [found[prompt.key] for prompt in prompts]

    def _prompt(self, request: Request) -> Prompt:
        look = getattr(self._pictures, "lying", None) or self._pictures
        system, text = with_schema(request)
        return Prompt(
            request_key(request),
            system,
            tuple(Shown(name, look(image_id)) for name, image_id in request.pictures),
            text,
            request.turns,
            request.max_tokens,
            request.temperature,
        )


def _halves(prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
    return _cut(prompts, max(1, (len(prompts) + 1) // 2))
