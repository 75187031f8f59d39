"""The trail of a recipe: what every stage gave, in order, by which a sample's way is told later."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flows.step import tables_in
from infra.tables import Table

SAMPLES = ("samples", "others")  # results of a stage that hold samples
KEPT = ("drops", "asked", "origins")  # what stays as long as a version


class Stop(NamedTuple):
    """A stage that a recipe ran: what reports call it, the stage, and its result."""

    name: str
    stage: str
    result: Any


class Trail:
    """Wraps `step` for one build, and notes the result of every stage that makes samples."""

    def __init__(self, step: Callable[..., Any]):
        self._step, self._found = step, list[Stop]()

    def step(self, stage: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """In place of `flows.step.step`."""
        call = self._step(stage, **options)

        def noted(*given: Any, **named: Any) -> Any:
            result = call(*given, **named)
            if any(hasattr(result, field) for field in (*SAMPLES, "views")):
                self._found.append(Stop(_called(stage, given), stage.__name__, result))
            return result

        return noted

    def stops(self, ran: Mapping[str, Any]) -> Iterator[Stop]:
        """The stages in order, under the names of `ran` where they have one; each name is used
        once.
        """
        names = {id(result): name for name, result in ran.items()}
        used: set[str] = set()
        for stop in self._found:
            name = first = names.get(id(stop.result), stop.name)
            count = 1
            while name in used:
                count += 1
                name = f"{first} {count}"
            used.add(name)
            yield stop._replace(name=name)


def _called(stage: Callable[..., Any], given: tuple[Any, ...]) -> str:
    """The stage, with the question where it asks one."""
    asked = [value.question.name for value in given if hasattr(value, "question")]
    return " ".join((stage.__name__, *asked))


def samples_in(stops: list[Stop]) -> dict[str, Table]:
    """Every table of samples, each once, by stage and field."""
    found: dict[Table, str] = {}
    for stop in stops:
        for field in SAMPLES:
            if hasattr(stop.result, field):
                found.setdefault(getattr(stop.result, field), f"{stop.name}: {field}")
    return {name: table for table, name in found.items()}


def named_tables(stops: list[Stop], is_kept: bool) -> dict[str, dict[str, Any]]:
    """For a manifest, tables of each stage as JSON: those that are kept, or the others."""
    return {
        stop.name: {
            field: table.to_json()
            for field, table in tables_in(stop.result)
            if (field in KEPT) == is_kept
        }
        for stop in stops
    }
