"""Numbers that are not a source's are told by what their descriptions say."""

from pydantic import BaseModel, Field

from infra.provenance import own


class Model(BaseModel):
    seed: int = Field(0, description="Not given\n  in the source.")
    tokens: int = Field(128, description="As the paper.")


class Inner(BaseModel):
    share: float = Field(0.5, description="A share. Our own default.")
    model: Model = Field(Model(), description="The paper's is not given in the source.")


class Config(BaseModel):
    inner: Inner = Inner()
    judge: Model | None = Field(None, description="null: none; our own default.")
    budget: int = Field(9, description="Our own.")
    owner: str = Field("us", description="Your own name.")


SHOWN = {
    "inner": {"share": 0.25, "model": {"model": "tiny", "seed": 0, "tokens": 128}},
    "judge": None,
    "owner": "us",
}


def test_what_stands_under_names_of_the_config_s_own_is_told_with_them():
    class Modes(BaseModel):
        modes: dict[str, Inner] = Field({}, description="By mode.")
        counts: dict[str, int] = Field({}, description="By name.")

    modes = Modes(modes={"scenes": Inner(share=0.25)}, counts={"a": 1})
    shown = {"modes": {"scenes": {"share": 0.25}}, "counts": {"a": 1}}
    assert list(own(modes, shown)) == [("modes.scenes.share", 0.25, False)]


def test_what_the_source_gives_and_what_is_not_published_is_left_out():
    config = Config(inner=Inner(share=0.25))
    assert [tuple(row) for row in own(config, SHOWN)] == [
        ("inner.share", 0.25, False),
        ("inner.model", "tiny", True),
        ("inner.model.seed", 0, True),
        ("judge", None, True),
    ]
