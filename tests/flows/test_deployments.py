"""Prefect ignores keys and parameters it does not know; here each must be known and fit."""

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal
from zoneinfo import available_timezones

import pytest
import yaml
from prefect.exceptions import MissingFlowError, ParameterTypeError, SignatureMismatchError
from prefect.flows import load_flow_from_entrypoint
from prefect.schedules import Cron
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flows.config import _resolve_paths, load_config, parse_config
from flows.recipe import discover

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deployments.yaml").read_text()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Schedule(Strict):
    slug: str
    cron: str
    timezone: str
    active: bool = True
    parameters: dict[str, Any] = {}

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in available_timezones():
            raise ValueError(f"unknown time zone {name}")
        return name

    @field_validator("cron")
    @classmethod
    def _parsed(cls, cron: str) -> str:
        return Cron(cron).cron


class ConcurrencyLimit(Strict):
    limit: Literal[1]
    collision_strategy: Literal["CANCEL_NEW"]
    grace_period_seconds: int = Field(ge=60)


class JobVariables(Strict):
    working_dir: Literal["."]
    env: dict[str, str]


class WorkPool(Strict):
    name: Literal["pairmill"]
    work_queue_name: str | None = None
    job_variables: JobVariables


class Directory(Strict):
    directory: Literal["."]


class PullStep(Strict):
    set_working_directory: Directory = Field(
        alias="prefect.deployments.steps.set_working_directory"
    )


class Deployment(Strict):
    name: str
    description: str
    entrypoint: str
    parameters: dict[str, Any]
    schedules: list[Schedule] = []
    concurrency_limit: ConcurrencyLimit | None = None
    work_pool: WorkPool
    tags: list[str] = []


class Definitions(Strict):
    """Blocks that deployments refer to; Prefect does not look at them."""

    work_pool: WorkPool
    one_at_a_time: ConcurrencyLimit
    sample: dict[str, Any]


class DeploymentsFile(Strict):
    pull: list[PullStep] = Field(min_length=1)
    definitions: Definitions
    deployments: list[Deployment]


def check(data: dict[str, Any]) -> dict[str, Deployment]:
    """Deployments by name. Raises for a key, an entrypoint or a parameter that does not fit."""
    deployments = {d.name: d for d in DeploymentsFile.model_validate(data).deployments}
    for deployment in deployments.values():
        flow = load_flow_from_entrypoint(
            str(ROOT / deployment.entrypoint), use_placeholder_flow=False
        )
        for parameters in [{}, *(schedule.parameters for schedule in deployment.schedules)]:
            flow.validate_parameters(deployment.parameters | parameters)
    return deployments


def test_what_is_deployed():
    deployments = check(yaml.safe_load(TEXT))
    recipes = {recipe.name for recipe in discover()}
    assert {"nightly", "sample", "guard"} == deployments.keys() - recipes
    assert recipes <= deployments.keys()
    unlimited = [name for name, d in deployments.items() if d.concurrency_limit is None]
    assert unlimited == ["guard"]
    [night] = deployments["nightly"].schedules
    assert (night.slug, night.active) == ("nightly", True)
    assert deployments["sample"].schedules == []


def test_the_sample_deployment_is_the_sample_config():
    deployed = yaml.safe_load(TEXT.replace("sample/", ""))["definitions"]["sample"]
    assert deployed == yaml.safe_load((ROOT / "sample" / "config.yaml").read_text())


@pytest.mark.parametrize("recipe", [recipe.name for recipe in discover()])
def test_a_deployed_recipe_is_its_sample_config(recipe):
    deployed = check(yaml.safe_load(TEXT))[recipe]
    assert deployed.entrypoint == f"flows/{recipe}.py:{recipe}"
    places = deepcopy(deployed.parameters["config"])
    _resolve_paths(places, ROOT)
    assert parse_config(places) == load_config(ROOT / "sample/recipes" / f"{recipe}.yaml")


def at(data: Any, *path: Any) -> Any:
    for key in path:
        data = data[key]
    return data


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "deployment", []),
        (("deployments", 0), "parametres", {}),
        (("deployments", 0, "schedules", 0), "time_zone", "UTC"),
        (("deployments", 0, "schedules", 0), "timezone", "Mars/Olympus"),
        (("deployments", 0, "schedules", 0), "cron", "every night"),
        (("deployments", 0, "concurrency_limit"), "collision", "ENQUEUE"),
        (("deployments", 0, "concurrency_limit"), "collision_strategy", "ENQUEUE"),
        (("deployments", 1, "work_pool"), "pool", "default"),
        (("deployments", 1, "work_pool", "job_variables"), "working_directory", "."),
        (("deployments", 1, "parameters", "config"), "datset", "sample"),
        (("deployments", 1, "parameters", "config", "corpus"), "ur", "s3://bucket"),
        (("deployments", 1, "parameters", "config", "models", "clip"), "library", "keras"),
    ],
)
def test_a_misspelled_key_or_parameter_is_found(path, key, value):
    data = deepcopy(yaml.safe_load(TEXT))
    at(data, *path)[key] = value
    with pytest.raises((ValidationError, ParameterTypeError)):
        check(data)


def test_an_unknown_flow_parameter_is_found():
    data = yaml.safe_load(TEXT)
    data["deployments"][1]["parameters"]["bucket"] = "s3://bucket"
    with pytest.raises(SignatureMismatchError, match="bucket"):
        check(data)


def test_an_entrypoint_that_is_not_there_is_found():
    data = yaml.safe_load(TEXT)
    data["deployments"][0]["entrypoint"] = "flows/build.py:biuld"
    with pytest.raises(MissingFlowError, match="biuld"):
        check(data)
