"""What stages with work to do would ask, as far as it can be known before they run."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from flows.step import tables_in
from flows.trail import SAMPLES
from infra.asking import AskParams
from infra.foreseeing import TRIES, Calls, WouldAsk

# Stages that make more samples of those that they are given.
GROWING = ("split_answers", "ladder_views", "crop_views")
RENAMING = ("branch_samples",)  # gives every sample another name


class Size(NamedTuple):
    """How many rows a table that stands in can have: by the tables whose rows, fewer or more of
    them, can be in it. `sure` where these are bounds; None where nobody knows.
    """

    roots: Mapping[int, int] | None
    sure: bool

    @property
    def rows(self) -> int | None:
        """How many in all."""
        return None if self.roots is None else sum(self.roots.values())


class Forecast:
    """Counts calls, and keeps how many rows the tables can have that stand in for others."""

    def __init__(self, last: Mapping[str, Any] | None):
        self._last, self._sizes = last or {}, dict[int, Size]()
        self.asked: list[AskParams] = []  # models that would be asked

    def note(self, result: Any, size: Size | None) -> None:
        """Tables that stand in, as large as before or, where they hold samples, as `size` says."""
        for field, table in tables_in(result):
            as_before = Size({id(table): table.rows}, False)
            self._sizes[id(table)] = size if size and field in SAMPLES else as_before

    def calls(
        self, stage: Any, bound: inspect.BoundArguments, before: Any, moved: Mapping[str, set[str]]
    ) -> Calls | None:
        """What a stage would ask: counted where its input is known, else by how many rows it has
        at most.
        """
        inputs = bound.arguments
        model = asks(inputs["params"])
        if model is None:
            return None
        self.asked.append(model)
        if not moved:
            if "before" in inputs:
                inputs["before"] = before
            try:
                inspect.unwrap(stage)(*bound.args, **bound.kwargs)
            except WouldAsk as would:
                return would.calls
            return Calls()
        given = self.given(inputs)
        if given.rows is None:
            return Calls(0, None, None, None, "unknown")
        plain = given.rows * questions(inputs["params"])
        most = TRIES * (model.attempt + 1) * plain
        each = self._price(stage, inputs["params"])
        money = None if each is None else round(each * plain)
        return Calls(0, plain, most, money, "bounded" if given.sure else "expected")

    def _price(self, stage: Any, params: Any) -> float | None:
        """What a call of a stage cost in the last version, in 10^-9 of the currency."""
        name = params.question.name if hasattr(params, "question") else stage.stage
        bill = self._last.get("cost", {}).get(name, {})
        return bill["money"] / bill["calls"] if bill.get("money") and bill.get("calls") else None

    def given(self, inputs: Mapping[str, Any]) -> Size:
        """Rows of what a stage is given, the first of its arguments. Of several tables no row is
        in two: those that come from one are together no more than it has.
        """
        first = next(value for arg, value in inputs.items() if arg != "build")
        found = [
            self._sizes.get(id(t), Size({id(t): t.rows}, True)) for _, t in tables_in((first,))
        ]
        if any(size.roots is None for size in found):
            return Size(None, False)
        roots = {root: rows for size in found for root, rows in (size.roots or {}).items()}
        return Size(roots, all(size.sure for size in found))

    def size(self, stage: Any, inputs: Mapping[str, Any], result: Any, known: bool) -> Size:
        """How many samples a stage gives: no more than it was given, where it makes none; else as
        many as before.
        """
        given = self.given(inputs)
        if "given" in inputs and stage.stage not in (*GROWING, *RENAMING):
            return given
        if stage.stage in RENAMING and given.rows is not None:
            return Size({id(result): given.rows}, given.sure)
        rows = max((table.rows for _, table in tables_in(result)), default=0)
        return Size({id(result): rows} if known else None, False)


def asks(params: Any) -> AskParams | None:
    """The model that a stage with these parameters asks, wherever in them it stands."""
    if isinstance(params, AskParams):
        by_captions = getattr(params, "labeller", "mllm") == "captions"
        return None if by_captions or not (params.endpoint or params.local) else params
    fields = type(params).model_fields if isinstance(params, BaseModel) else ()
    values = params if isinstance(params, tuple) else [getattr(params, field) for field in fields]
    return next((found for value in values if (found := asks(value))), None)


def questions(params: Any) -> int:
    """How many questions a stage has about each row, one after the other."""
    question = getattr(params, "question", None)
    return question.calls if question else 2 if getattr(params, "calls", "one") == "two" else 1
