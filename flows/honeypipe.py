"""HoneyPipe: records cleaned, then given reasons that lead to their answers (arXiv 2510.13795)."""

from typing import Any

from prefect import flow
from pydantic import Field

from flows.reasons import UNTOUCHED, Models, ReasonParams, Thinker, reasons
from flows.recipe import Made, Recipe, RecipeConfig, imported, known, run_recipe
from infra.build import Build
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.clean_prompts import PromptCleaning, clean_prompts
from tasks.compose_texts import compose_texts
from tasks.deduplicate_samples import SampleDedupParams, deduplicate_samples
from tasks.filter_by_form import Filtering, FormFilter, filter_by_form
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.import_records import ImportParams
from tasks.join_samples import join_samples
from tasks.map_values import ValueMap, map_values
from tasks.measure_images import measure_images
from tasks.measure_texts import TextMeasures, measure_texts
from tasks.report import Story
from tasks.route_samples import Route, route_samples


class Screened(Answer):
    logical: bool
    answerable: bool
    related: bool
    reason: str


SCREEN = Question("honeypipe/screen", Screened, {"image_id": "Picture"}, ("instruction",))
SOUND = tuple(Rule(f"not_{is_}", is_, "is", True) for is_ in ("logical", "answerable", "related"))


class HoneypipeConfig(RecipeConfig):
    """Bee's HoneyPipe."""

    name = "honeypipe"
    needs = ("instruction", "response")
    records: ImportParams = Field(description="Questions and answers about the images.")
    domains: dict[str, str] = Field(
        {},
        description="Domain of each source, `*` and `?` allowed: a person looks at a few samples of"
        " a source and names it, as the notes on the paper say. The paper's: General, Chart,"
        " Caption, STEM, Document, Grounding & Counting, OCR.",
    )
    domain: str | None = Field(
        "General", description="Domain of other sources; null drops them. Our own default."
    )
    dedup: SampleDedupParams = SampleDedupParams()
    filter: FormFilter = FormFilter()
    bypass: tuple[str, ...] = Field(
        ("OCR", "Detection"),
        description="Domains that keep their responses, as the paper's triage.",
    )
    cleaning: PromptCleaning = PromptCleaning()
    reasons: ReasonParams = ReasonParams()
    long: Thinker | None = Field(
        None, description="Model of the long loop, a stronger one in the paper; null: `model`."
    )
    judge: ModelParams | None = Field(
        None, description="Model that compares answers, as `model` in the paper; null: `model`."
    )


def stages(run: Build, config: HoneypipeConfig, step: Any) -> Made:
    """The paper's pipeline: clean, filter, triage; reasons, a verdict, and again for failures."""
    listed, seen = known(run, config, step)
    files, told = imported(run, config.records, seen, step)
    domains = ValueMap("source", "domain", tuple(config.domains.items()), config.domain)
    placed = step(map_values)(run, told.samples, domains)
    unique = step(deduplicate_samples)(run, placed.samples, seen.images, seen.looks, config.dedup)
    sized = step(measure_images)(run, unique.samples, seen.images)
    measured = step(measure_texts)(run, sized.samples, TextMeasures(("instruction",)))
    fit = step(filter_by_form)(run, measured.samples, Filtering(config.filter, "instruction"))
    screened = step(ask_model)(run, fit.samples, seen.objects, Asking(SCREEN, config.model))
    sound = step(filter_samples)(run, screened.samples, Rules(SOUND))
    bypass = step(route_samples)(run, sound.samples, Route("domain", config.bypass))
    clean = step(clean_prompts)(run, bypass.others, config.cleaning)
    long = config.long or config.model.model_copy(update={"max_tokens": Thinker().max_tokens})
    models = Models(config.model, long, config.judge or config.model)
    found = reasons(run, clean.samples, seen, models, config.reasons, step)
    untouched = step(compose_texts)(run, bypass.samples, UNTOUCHED)
    ways = {"bypass": untouched.samples, "_short": found.short, "_long": found.long}
    return Made(
        listed, seen, files, step(join_samples)(run, ways).samples,
        {"import": told, "domain": placed, "near-duplicates": unique, "rules": fit,
         "screen": screened, "sound": sound, "to the bypass": bypass, **found.ran},
        "llava", STORY,
    )  # fmt: skip


STORY = Story(
    "Questions with reasons that lead to the answers on record; of some only the answer.",
    {"image_id": ""},
    [("question", "instruction"), ("answer", "response"),
     ("question on record", "instruction_original"), ("answer on record", "response_original")],
    [("reasons", "cot_level"), ("domain", "domain"), ("source", "source"),
     ("kind of answer", "answer_type")],
    by="cot_level",
)  # fmt: skip
RECIPE = Recipe(
    "honeypipe",
    "questions with reasons that lead to the answers on record",
    "images, questions and answers",
    "LLaVA conversations, Parquet",
    "a vision-language model; a stronger one if wanted",
    HoneypipeConfig,
    stages,
)


@flow(name="honeypipe", flow_run_name="{config.dataset}")
def honeypipe(config: HoneypipeConfig) -> dict[str, Any]:
    """Clean records and give them reasons, redoing only what changed."""
    return run_recipe(RECIPE, config)
