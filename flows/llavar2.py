"""LLaVAR-2: captions and question pairs for text-rich images, by difficulty (arXiv 2412.16364)."""

from typing import Any

from prefect import flow
from pydantic import Field

from flows.recipe import Made, Recipe, RecipeConfig, imported, known, run_recipe
from infra.build import Build
from tasks.ask_model import Answer, Asking, Question, ask_model, several
from tasks.branch_samples import Branch, branch_samples
from tasks.check_spans import Spans, check_spans
from tasks.filter_by_difficulty import DifficultyFilter, filter_by_difficulty
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.import_records import ImportParams
from tasks.join_samples import join_samples
from tasks.name_origins import Origins, name_origins
from tasks.report import Story
from tasks.score_difficulty import DifficultyParams, Scoring, score_difficulty
from tasks.split_answers import Splitting, split_answers


class Read(Answer):
    ocr: str


class Captioned(Answer):
    caption_enriched: str = Field(min_length=1)


class Pair(Answer):  # e: extractive; s: self-explained, the turn that follows
    q_e: str = Field(min_length=1)
    a_e: str = Field(min_length=1, description="Quoted from the texts, word for word.")
    q_s: str = Field(min_length=1)
    a_s: str = Field(min_length=1)


class Llavar2Config(RecipeConfig):
    """LLaVAR-2."""

    name = "llavar2"
    records: ImportParams = Field(
        description="Rows of `image`, and if there are any `caption`, a person's, and `ocr`, the"
        " text lines of an OCR program. Without a column `ocr`, the model is asked for them."
    )
    least_text: int = Field(
        16, ge=1, description="Characters of text that a text-rich image has. Not given in the"
        " source; our own default, because fewer give no two questions.",
    )  # fmt: skip
    pairs: int = Field(
        5, ge=1, le=20, description="Question pairs for an image, at most. Not given in the source;"
        " our own default, from its 382k questions and answers on 42k images: 4.5 pairs each.",
    )  # fmt: skip
    difficulty: DifficultyParams = DifficultyParams()
    filter: DifficultyFilter = DifficultyFilter()


PICTURE = {"image_id": ""}
READ = Question("llavar2/read", Read, PICTURE)
CAPTION = Question("llavar2/caption", Captioned, PICTURE, texts=("caption", "ocr"))
QUOTED = ("ocr", "caption", "caption_enriched")
ORIGINS = Origins({"caption": ("human", "model"), "ocr": ("imported", "model")})


def pairs_of(most: int) -> Question:
    """The question for pairs of turns."""
    pairs = several("pairs", Pair, most)
    return Question("llavar2/pairs", pairs, PICTURE, texts=("caption_enriched", "ocr"))


def stages(run: Build, config: Llavar2Config, step: Any) -> Made:
    """Captions with more detail; pairs of turns; their difficulty, and who is kept by it."""
    listed, seen = known(run, config, step)
    files, rows = imported(run, config.records, seen, step)
    read: Any = step(name_origins)(run, rows.samples, ORIGINS)
    if "ocr" not in config.records.columns:
        read = step(ask_model)(run, read.samples, seen.objects, Asking(READ, config.model))
    text = Rule("little_text", "ocr", "longer", config.least_text)
    rich = step(filter_samples)(run, read.samples, Rules((text,)))
    told = step(ask_model)(run, rich.samples, seen.objects, Asking(CAPTION, config.model))
    branched = step(branch_samples)(run, told.samples, Branch("pairs"))
    asking = Asking(pairs_of(config.pairs), config.model)
    asked = step(ask_model)(run, branched.samples, seen.objects, asking)
    split = step(split_answers)(run, asked.samples, Splitting("pairs", Pair))
    quoted = step(check_spans)(run, split.samples, Spans("a_e", QUOTED))
    scored = step(score_difficulty)(run, quoted.samples, seen.objects, Scoring(config.difficulty))
    kept = step(filter_by_difficulty)(run, scored.samples, config.filter)
    joined = step(join_samples)(run, {"caption": told.samples, "pair": kept.samples})
    ran = {"import": rows, "read": read, "text": rich, "caption": told, "ask_pairs": asked,
           "split": split, "quoted": quoted, "scores": scored, "difficulty": kept}  # fmt: skip
    return Made(listed, seen, files, joined.samples, ran, "captions_and_pairs", STORY)


STORY = Story(
    "Text-rich pictures: a caption with more detail, or a question on what is written there and"
    " one on how that is known.",
    PICTURE,
    [("caption", "caption"), ("with detail", "caption_enriched"),
     ("asks", "q_e"), ("quotes", "a_e"), ("asks on", "q_s"), ("explains", "a_s")],
    [("caption by", "caption_origin"), ("text by", "ocr_origin"),
     ("mIFD", "mifd"), ("FFD", "ffd"), ("quoted from", "span_of")],
    by="part",
    millionths=("mifd", "ffd"),
)  # fmt: skip
RECIPE = Recipe(
    "llavar2",
    "detailed captions and question pairs for text-rich images, filtered by difficulty",
    "images with text, captions by people and OCR text where there are any",
    "LLaVA conversations, JSON lines, Parquet",
    "a vision-language model; two models in process, one of text and one that sees",
    Llavar2Config,
    stages,
)


@flow(name="llavar2", flow_run_name="{config.dataset}")
def llavar2(config: Llavar2Config) -> dict[str, Any]:
    """Write captions and question pairs for text-rich images, redoing only what changed."""
    return run_recipe(RECIPE, config)
