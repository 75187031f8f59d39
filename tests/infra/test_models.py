"""Models: whatever is given under that name loads safely, or is refused in one line."""

import json
import pickle
import shutil
from pathlib import Path

import boto3
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from infra import models
from infra.errors import ConfigError
from infra.models import ModelParams
from tests.conftest import write_clip, write_timm
from tests.pictures import scene

DECODE = (1, 32)
SMALL = "ViT-S-32-alt"  # the smallest that open_clip knows by name


def pixels(count: int, size: int = 32) -> np.ndarray:
    pictures = [scene(size, size, seed) for seed in range(count)]
    return np.stack([np.asarray(picture) for picture in pictures])


def clip(folder: Path, **fields) -> ModelParams:
    return ModelParams(library="open_clip", name=str(folder), batch=8, **fields)


def dino(folder: Path, **fields) -> ModelParams:
    return ModelParams(library="timm", name=str(folder), batch=8, **fields)


def refusal(params: ModelParams) -> str:
    with pytest.raises(ConfigError) as caught:
        models.load(params, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numerics(params: ModelParams, decode=DECODE) -> str:
    return models.load(params, "cpu").facts.numerics(params, "cpu", decode)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# Vectors -------------------------------------------------------------------------------------


def test_a_clip_model_has_facts_and_unit_vectors_of_images_and_texts(clip_folder):
    model = models.load(clip(clip_folder), "cpu")
    assert (model.facts.geometry.size, model.facts.geometry.mode) == (32, "squash")
    assert (model.facts.dim, model.facts.has_text) == (16, True)
    images = model.embed_images(pixels(3))
    texts = model.embed_texts(["a cat", "日本語 " * 500])
    assert (images.shape, images.dtype) == ((3, 16), np.float16)
    assert (texts.shape, texts.dtype) == ((2, 16), np.float16)
    for vectors in (images, texts):
        assert np.allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=2e-3)


def test_a_timm_model_has_no_text(timm_folder):
    model = models.load(dino(timm_folder), "cpu")
    assert (model.facts.dim, model.facts.has_text) == (32, False)
    assert model.embed_images(pixels(2)).shape == (2, 32)


def test_vectors_are_those_of_the_library(clip_folder, timm_folder):
    network = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0).eval()
    batch = torch.from_numpy(pixels(8)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(network(batch)).numpy()
    found = models.load(dino(timm_folder), "cpu").embed_images(pixels(8))
    assert np.allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_a_vector_does_not_depend_on_its_companions(library, clip_folder, timm_folder):
    params = clip(clip_folder) if library == "open_clip" else dino(timm_folder)
    model = models.load(params, "cpu")
    together = model.embed_images(pixels(8))
    alone = [model.embed_images(pixels(8)[i : i + 1])[0] for i in range(8)]
    backwards = model.embed_images(pixels(8)[::-1])[::-1]
    assert together.tobytes() == np.stack(alone).tobytes() == backwards.tobytes()


def test_a_text_vector_does_not_depend_on_its_companions(clip_folder):
    model = models.load(clip(clip_folder), "cpu")
    texts = [f"a photo of {n} cats" for n in range(8)]
    alone = [model.embed_texts([text])[0] for text in texts]
    assert model.embed_texts(texts).tobytes() == np.stack(alone).tobytes()


# Numerics ------------------------------------------------------------------------------------


def test_numerics_name_weights_size_batch_and_decoding(timm_folder, tmp_path):
    base = dino(timm_folder)
    other = write_timm(tmp_path / "other", seed=1)
    names = [
        numerics(base),
        numerics(dino(other)),
        numerics(dino(timm_folder, image_size=64)),
        numerics(base.model_copy(update={"batch": 4})),
        numerics(base, (2, 32)),
        numerics(base, (1, 64)),
        models.load(base, "cpu").facts.numerics(base, "cuda", DECODE),
    ]
    assert len(set(names)) == len(names)
    assert numerics(dino(copy(timm_folder, tmp_path / "moved"))) == names[0]


def test_numerics_name_what_the_weights_do_not_say(clip_folder, tmp_path):
    def changed(to: str, part: str, **values) -> ModelParams:
        folder = copy(clip_folder, tmp_path / to)
        path = folder / "open_clip_config.json"
        config = json.loads(path.read_text())
        config[part] |= values
        path.write_text(json.dumps(config))
        return clip(folder)

    names = [
        numerics(clip(clip_folder)),
        numerics(changed("activation", "model_cfg", quick_gelu=True)),
        numerics(changed("mean", "preprocess_cfg", mean=[0.4] * 3)),
        numerics(changed("resize", "preprocess_cfg", resize_mode="shortest")),
    ]
    assert len(set(names)) == len(names)


def test_a_replaced_file_is_loaded_again(timm_folder, tmp_path):
    params = dino(copy(timm_folder, tmp_path / "dino"))
    first = models.load(params, "cpu")
    assert models.load(params, "cpu") is first
    write_timm(tmp_path / "dino", seed=5)
    assert models.load(params, "cpu").facts.weights != first.facts.weights


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_image_size_is_given_to_transformers_and_convolutions(name, tmp_path):
    folder = write_timm(tmp_path / "model", name=name)
    model = models.load(dino(folder, image_size=64), "cpu")
    assert model.facts.geometry.size == 64
    assert len(model.embed_images(pixels(2, 64))) == 2


def test_an_image_size_is_given_to_a_clip_model(clip_folder):
    model = models.load(clip(clip_folder, image_size=48), "cpu")
    assert model.facts.geometry.size == 48
    assert len(model.embed_images(pixels(2, 48))) == 2


# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_an_unknown_name_is_refused(library):
    assert "no_such_model" in refusal(ModelParams(library=library, name="no_such_model"))


def test_a_known_name_without_weights_says_which_there_are():
    assert "openai" in refusal(ModelParams(library="open_clip", name="ViT-B-32"))


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_a_folder_without_a_config_is_refused(library, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(ModelParams(library=library, name=str(tmp_path / "empty")))
    assert "config" in said.lower()


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_a_folder_without_weights_is_refused(kind, clip_folder, timm_folder, tmp_path):
    folder = copy(clip_folder if kind == "clip" else timm_folder, tmp_path / "bare")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refusal(clip(folder) if kind == "clip" else dino(folder))


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000), b"PK\3\4" + bytes(50)])
@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_weights_that_are_no_model_are_refused(kind, content, clip_folder, timm_folder, tmp_path):
    folder = copy(clip_folder if kind == "clip" else timm_folder, tmp_path / "junk")
    next(folder.glob("*.safetensors")).write_bytes(content)
    assert str(folder) in refusal(clip(folder) if kind == "clip" else dino(folder))


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_weights_with_some_missing_are_refused(kind, clip_folder, timm_folder, tmp_path):
    folder = copy(clip_folder if kind == "clip" else timm_folder, tmp_path / "part")
    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    del state["visual.proj" if kind == "clip" else "norm.weight"]
    save_file(state, path)
    refusal(clip(folder) if kind == "clip" else dino(folder))


def test_weights_with_some_missing_are_refused_without_a_classifier_too(tmp_path):
    # A classifier that is left out makes timm lenient: it would leave the rest random.
    network = timm.create_model("test_resnet", pretrained=False)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("layer4")}
    save_file(state, tmp_path / "cut.safetensors")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(network.state_dict(), whole)
    params = ModelParams(library="timm", name="test_resnet", weights=str(whole), image_size=64)
    assert models.load(params, "cpu").facts.geometry.size == 64
    said = refusal(params.model_copy(update={"weights": str(cut)}))
    assert "not complete" in said and "layer4" in said


def test_a_missing_weights_file_is_refused(tmp_path):
    for library, name in (("timm", "test_vit"), ("open_clip", SMALL)):
        weights = str(tmp_path / "none.safetensors")
        assert weights in refusal(ModelParams(library=library, name=name, weights=weights))


def test_weights_beside_a_folder_are_refused_not_ignored(clip_folder, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"x")
    said = refusal(clip(clip_folder, weights=str(tmp_path / "w.safetensors")))
    assert "comes with its own weights" in said


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["clip", "timm", "timm file", "clip file"])
def test_a_pickle_that_would_run_code_is_refused(kind, clip_folder, timm_folder, tmp_path):
    marker = tmp_path / "executed"
    if "file" in kind:
        path = tmp_path / "weights.pth"
        library, name = ("timm", "test_vit") if "timm" in kind else ("open_clip", SMALL)
        params = ModelParams(library=library, name=name, weights=str(path))
    else:
        folder = copy(clip_folder if kind == "clip" else timm_folder, tmp_path / "evil")
        next(folder.glob("*.safetensors")).unlink()
        path = folder / ("open_clip_pytorch_model.bin" if kind == "clip" else "pytorch_model.bin")
        params = clip(folder) if kind == "clip" else dino(folder)
    torch.save({"state_dict": Evil(marker)}, path)
    refusal(params)
    assert not marker.exists()
    with path.open("wb") as file:  # and one of the days before torch.save wrote zips
        pickle.dump(Evil(marker), file)
    refusal(params)
    assert not marker.exists()


# Buckets -------------------------------------------------------------------------------------


@pytest.fixture
def model_bucket(moto_endpoint, timm_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = boto3.client("s3")
    for file in timm_folder.iterdir():
        client.upload_file(str(file), "corpus", f"models/dino/{file.name}")
    client.put_object(Bucket="corpus", Key="models/dino/deeper/x.json", Body=b"{}")
    client.put_object(Bucket="corpus", Key="models/dino/run_me.py", Body=b"raise SystemExit")
    return client


def test_a_model_in_a_bucket_is_the_same_model(model_bucket, timm_folder, tmp_path):
    params = ModelParams(library="timm", name="s3://corpus/models/dino", batch=8)
    assert numerics(params) == numerics(dino(timm_folder))
    cached = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(cached) == ["config.json", "model.safetensors"]


def test_a_weights_file_in_a_bucket_is_loaded(model_bucket, tmp_path):
    network = timm.create_model("test_resnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model_bucket.upload_file(str(tmp_path / "w.safetensors"), "corpus", "weights/w.safetensors")
    fields = {"library": "timm", "name": "test_resnet", "image_size": 64}
    bucket = ModelParams(**fields, weights="s3://corpus/weights/w.safetensors")
    local = ModelParams(**fields, weights=str(tmp_path / "w.safetensors"))
    assert numerics(bucket) == numerics(local)


def test_a_model_replaced_in_its_bucket_is_loaded_again(model_bucket, tmp_path):
    params = ModelParams(library="timm", name="s3://corpus/models/dino", batch=8)
    before = numerics(params)
    other = write_timm(tmp_path / "other", seed=9) / "model.safetensors"
    model_bucket.upload_file(str(other), "corpus", "models/dino/model.safetensors")
    assert numerics(params) != before


def test_a_bucket_folder_without_a_model_is_refused(model_bucket):
    said = refusal(ModelParams(library="timm", name="s3://corpus/nothing"))
    assert "s3://corpus/nothing holds no model files" in said


def test_a_missing_model_bucket_is_one_line(model_bucket):
    with pytest.raises(Exception) as caught:
        models.load(ModelParams(library="timm", name="s3://no-such-bucket/x"), "cpu")
    assert "no-such-bucket" in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_that_was_written_with_another_seed_differs(clip_folder, tmp_path):
    assert numerics(clip(write_clip(tmp_path / "c", seed=3))) != numerics(clip(clip_folder))


def test_the_files_of_a_model_are_its_own_and_not_the_working_directory_s(
    clip_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = models.files(clip(clip_folder))
    assert {name for name, *_ in before} == {"open_clip_config.json", "open_clip_model.safetensors"}
    (tmp_path / "notes.txt").write_text("another night")
    assert models.files(clip(clip_folder)) == before
    assert models.files(ModelParams(library="timm", name="vit_tiny_patch16_224")) == ()
