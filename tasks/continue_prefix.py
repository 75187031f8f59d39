"""Continue a prefix: a model goes on right after the picture, where a user's own words would begin.

Oasis (ICCV 2025, arXiv 2503.08741): whoever is shown a picture and nothing else tends to write what
a user would ask about it. What was written for a picture is not written twice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.canonical import digest, settings
from infra.cluster import Crash, halves
from infra.ledger import Ledger, stage, unless_dropped_by
from infra.local_mllm import LocalModel, Prompt, Sampling, Shown
from infra.local_passes import continue_from
from infra.mllm import Response
from infra.pictures import Prepared
from infra.store import Store
from infra.tables import Table

VERSION = 3  # of results, and of receipts
SHARD = 64  # pictures to a worker, and to a receipt


class ContinueParams(BaseModel):
    """The model that goes on after a picture, and how its tokens are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    local: LocalModel = Field(
        LocalModel(name="Qwen/Qwen2.5-VL-72B-Instruct"),
        description="The model, in process: no chat endpoint goes on from the middle of a user's"
        " turn. The default is that of Oasis; its code has Qwen2-VL-72B.",
    )
    temperature: float = Field(1.0, ge=0, le=2, description="As the code of Oasis.")
    top_k: int = Field(
        20, ge=0, description="A token is drawn of so many; 0: of all. As the code of Oasis."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Probability of those drawn from. As the code of Oasis."
    )
    least_tokens: int = Field(50, ge=0, description="The text has at least so many. As the code.")
    most_tokens: int = Field(512, ge=1, description="The text has at most so many. As the code.")
    seed: int = Field(
        0, description="Another seed is another draw. Not given in the source; our own default."
    )

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn, whatever the model's own defaults."""
        return Sampling(self.top_k, self.top_p, self.least_tokens)


class Continued(NamedTuple):
    """Samples with `continuation` and `ended` (false where the limit on its tokens ended it),
    those without one, and every text that was written, by image.
    """

    samples: Table
    drops: Table
    written: Table


class Item(NamedTuple):
    """A picture that a text is wanted for, by image_id."""

    image_id: str
    shown: Shown


def meaning(params: ContinueParams) -> Any:
    """What decides the texts: not where the model runs, but `batch_size`, which bounds the shape of
    a pass, and so the last bits of what is drawn from.
    """
    drawn = params.model_dump(exclude={"local"})
    model = {"model": params.local.model, "batch_size": params.local.batch_size}
    return settings({**drawn, **model})


@stage(
    version=VERSION,
    reads={"given": tables.ALL},
    meaning=meaning,
    is_final=unless_dropped_by("crashed_model"),
    starts_from=("given", "sample_id"),
)
def continue_prefix(
    build: Build,
    given: Table,
    objects: Table,
    params: ContinueParams,
    before: Continued | None = None,
) -> Continued:
    """Write a text for the picture of every sample; samples of one picture share it.

    A text hangs on picture, model and seed alone. One that the limit on its tokens cut is kept.
    """
    rows = tables.frame(build.store, given)
    wanted = rows["image_id"].unique().sort().to_list()
    known = _known(build, before, wanted)
    todo = [image for image in wanted if image not in known]
    texts, crashed = _run(build, todo, objects, params)
    found = known | texts
    written = pl.DataFrame(
        [[image, *found[image]] for image in sorted(found)], _TEXTS, orient="row"
    )
    named = written.rename({"sample_id": "image_id"})
    told = rows.join(named, on="image_id", how="left", maintain_order="left")
    kept = pl.col("status").is_in(["answered", "truncated"]).fill_null(False)
    ended = (pl.col("status") == "answered").alias("ended")
    drops = [
        {
            "id": row["sample_id"],
            "rule": row["status"] or "crashed_model",
            "detail": row["continuation"] or crashed.get(row["image_id"]),
        }
        for row in told.filter(~kept).iter_rows(named=True)
    ]
    return Continued(
        samples.write(build.store, told.filter(kept).with_columns(ended).drop("status")),
        samples.write_drops(build.store, samples.drops(drops, "continue_prefix")),
        samples.write(build.store, written, "written"),
    )


_TEXTS = {"sample_id": pl.String, "status": pl.String, "continuation": pl.String}
Text = tuple[str, str]  # status and text


def _known(build: Build, before: Continued | None, wanted: Sequence[str]) -> dict[str, Text]:
    if before is None:
        return {}
    rows = tables.frame(build.store, before.written)
    rows = rows.filter(pl.col("sample_id").is_in(list(wanted)))
    return {image: (status, text) for image, status, text in rows.select(*_TEXTS).iter_rows()}


def _run(
    build: Build, wanted: Sequence[str], objects: Table, params: ContinueParams
) -> tuple[dict[str, Text], dict[str, str]]:
    """Texts by image, and what ended the worker for those that have none."""
    pictures = Prepared(build, wanted, objects, params.local.max_pixels)
    parts = (wanted[at : at + SHARD] for at in range(0, len(wanted), SHARD))
    shards = (tuple(Item(i, Shown("", pictures.lying(i))) for i in part) for part in parts)
    texts: dict[str, Text] = {}
    crashed: dict[str, str] = {}
    work = partial(go_on, build.store, params)
    for shard, result in build.pool.map(
        work, shards, split=halves, resources=params.local.resources
    ):
        if isinstance(result, Crash):
            crashed |= {item.image_id: result.reason[:200] for item in shard}
        else:
            texts |= {image: (status, text) for image, status, text in result["rows"]}
            build.work["texts_written"] += len(shard) if result["fresh"] else 0
        build.progress("continue_prefix", len(texts) + len(crashed), len(wanted))
    return texts, crashed


# On a worker ---------------------------------------------------------------------------------


def go_on(store: Store, params: ContinueParams, shard: Sequence[Item]) -> dict[str, Any]:
    """Write the texts of a shard, or find those of a build that did not come to its end."""
    ledger, folder = Ledger(store), f"{digest([VERSION, meaning(params)])[:20]}/receipts"
    key = digest([item.image_id for item in shard])
    record = ledger.find("continue_prefix", folder, key)
    if record is not None:
        return {**record, "fresh": False}
    prompts = [_prompt(params, item) for item in shard]
    texts = [_text(answer) for answer in continue_from(params.local, prompts, params.sampling)]
    rows = [[item.image_id, *text] for item, text in zip(shard, texts, strict=True)]
    ledger.write("continue_prefix", folder, key, {"rows": rows})
    return {"rows": rows, "fresh": True}


def _prompt(params: ContinueParams, item: Item) -> Prompt:
    key = digest([item.image_id, params.seed])
    return Prompt(key, "", (item.shown,), "", (), params.most_tokens, params.temperature)


def _text(answer: Response) -> Text:
    text = answer.text.strip()
    return ("empty" if answer.status == "truncated" and not text else answer.status, text)
