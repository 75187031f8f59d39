"""MegaPairs (Zhou et al. 2024, arXiv 2412.14475): the main flow, by the name of its recipe."""

from flows.build import build
from flows.config import BuildConfig
from flows.recipe import Recipe

RECIPE = Recipe(
    "megapairs",
    "query, target and the instructions that lead from one to the other, with hard negatives",
    "images, captions where there are any",
    "MegaPairs' JSON lines, Parquet, WebDataset",
    "embedding models; for instructions worth training on, a vision-language model",
    BuildConfig,
    None,
)
megapairs = build
