"""Pretrained judges against transformers' own models and processors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from judges import SIDE, aesthetic_head, clip, image_classifier
from PIL import Image
from torch import Tensor

from ctrl_rl.conditions import label_counts
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import (
    AestheticScore,
    ClassifierReward,
    Graded,
    ImageClassifier,
    TextClassifier,
)
from ctrl_rl.rewards.models.pretrained import Pixels

pytest.importorskip("transformers")
TEXTS = ["a photo of a cat", "ein Hund 🐕", ""]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judges")
    made = {"vit": image_classifier(folder / "vit"), "clip": clip(folder / "clip")}
    made["head"] = aesthetic_head(folder / "head.safetensors")
    return {name: str(path) for name, path in made.items()}


def pictures(height: int = SIDE, width: int = SIDE, channels: int = 3) -> tuple[Tensor, list]:
    """Smooth images of whole pixels: as samples, and as Pillow has them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, channels, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels = (fine * 255).round()
    arrays = pixels.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    return pixels / 127.5 - 1, [Image.fromarray(array.squeeze()).convert("RGB") for array in arrays]


def processed(path: str, images: list) -> Tensor:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(path)
    values: Tensor = processor(images=images, return_tensors="pt").pixel_values
    return values


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "tolerance"), [(16, 16, 1e-5), (44, 44, 0.03), (24, 56, 0.03)]
)
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pixels_are_the_processors(
    name: str, height: int, width: int, tolerance: float, channels: int, judges: dict[str, str]
) -> None:
    samples, images = pictures(height, width, channels)
    make = ImageClassifier if name == "vit" else lambda path: TextClassifier(texts=TEXTS, path=path)
    found = make(path=judges[name]).pixels(samples)
    torch.testing.assert_close(found, processed(judges[name], images), rtol=0, atol=tolerance)


def test_image_classifier_is_the_models_own(judges: dict[str, str]) -> None:
    from transformers import AutoModelForImageClassification

    samples, images = pictures()
    model = AutoModelForImageClassification.from_pretrained(judges["vit"])
    with torch.no_grad():
        logits = model(pixel_values=processed(judges["vit"], images)).logits
    everything = ImageClassifier(path=judges["vit"], temperature=2.0)
    expected = torch.log_softmax(logits / 2, 1)
    torch.testing.assert_close(everything.log_probabilities(samples), expected, atol=1e-5, rtol=0)
    part = ImageClassifier(path=judges["vit"], labels=["fox", "cat"], temperature=2.0)
    assert part.num_labels == 2
    torch.testing.assert_close(
        part.log_probabilities(samples), expected[:, [2, 0]], atol=1e-5, rtol=0
    )


def test_texts_are_told_apart_as_clip_does(judges: dict[str, str]) -> None:
    from transformers import AutoTokenizer, CLIPModel

    samples, images = pictures()
    model = CLIPModel.from_pretrained(judges["clip"])
    tokens = AutoTokenizer.from_pretrained(judges["clip"])(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=processed(judges["clip"], images)).logits_per_image
    found = TextClassifier(texts=TEXTS, path=judges["clip"]).log_probabilities(samples)
    torch.testing.assert_close(found, torch.log_softmax(logits, 1), atol=1e-4, rtol=0)
    assert found.std(0).max() > 1e-3


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_aesthetic_score_is_linear_in_clips_features(
    suffix: str, judges: dict[str, str], tmp_path: Path
) -> None:
    from transformers import CLIPModel

    samples, images = pictures()
    head = aesthetic_head(tmp_path / f"head.{suffix}")
    model = CLIPModel.from_pretrained(judges["clip"])
    with torch.no_grad():
        vision = model.vision_model(pixel_values=processed(judges["clip"], images))
        features = model.visual_projection(vision.pooler_output)
        features = features / features.norm(dim=1, keepdim=True)
    weights = torch.load(aesthetic_head(tmp_path / "again.pth"), weights_only=True)
    for number in (0, 2, 4, 6, 7):
        weight, bias = (weights[f"layers.{number}.{kind}"] for kind in ("weight", "bias"))
        features = features @ weight.T + bias
    score = AestheticScore(head=str(head), path=judges["clip"])
    torch.testing.assert_close(score(samples), features[:, 0], atol=1e-5, rtol=0)


def test_all_have_a_gradient_to_the_sample(judges: dict[str, str]) -> None:
    score = AestheticScore(head=judges["head"], path=judges["clip"])
    classifiers = {
        "label": ImageClassifier(path=judges["vit"]),
        "text": TextClassifier(texts=TEXTS, path=judges["clip"]),
        "aesthetic": Graded(measure=score, edges=[0.0], std=0.5),
    }
    reward = ClassifierReward(classifiers=classifiers, weights={"text": 0.5})
    assert reward.differentiable and label_counts(reward.controls) == {
        "label": 3,
        "text": 3,
        "aesthetic": 2,
    }
    samples = pictures(24, 24)[0].requires_grad_()
    control = {k: torch.tensor([0, 1, 1, kind.null]) for k, kind in reward.controls.items()}
    value = reward(samples, control)
    assert (value <= 0).all() and value[3] == 0  # nothing asked
    (gradient,) = torch.autograd.grad(value.sum(), samples)
    assert (gradient[:3].flatten(1).norm(dim=1) > 0).all() and (gradient[3] == 0).all()


def test_a_side_that_floats_would_round_down_is_whole(judges: dict[str, str]) -> None:
    from transformers import CLIPImageProcessor

    pixels = Pixels(CLIPImageProcessor(), "clip")  # 224 pixels
    assert int(440 * (224 / 440)) == 223
    assert pixels(torch.zeros(1, 3, 440, 440)).shape == (1, 3, 224, 224)


def test_processors_that_do_more_are_refused() -> None:
    from transformers import ConvNextImageProcessor, ViTImageProcessor

    with pytest.raises(ConfigError, match="ConvNextImageProcessor.*does more than"):
        Pixels(ConvNextImageProcessor(size={"shortest_edge": 224}), "facebook/convnext")
    with pytest.raises(ConfigError, match="cannot be followed with a gradient"):
        Pixels(ViTImageProcessor(resample=1), "nearest")
    small = Pixels(ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size=64), "crop")
    with pytest.raises(ConfigError, match="are smaller than the 64 x 64"):
        small(torch.zeros(1, 3, 32, 80))


def test_models_that_are_no_judges_are_refused(judges: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTModel

    headless = tmp_path / "headless"
    shutil.copytree(judges["vit"], headless)
    ViTModel.from_pretrained(judges["vit"], add_pooling_layer=False).save_pretrained(headless)
    with pytest.raises(ConfigError, match="is not an image classifier.*would be random"):
        ImageClassifier(path=str(headless))
    model = AutoModelForImageClassification.from_pretrained(judges["vit"])
    model.config.id2label = {0: "crane", 1: "dog", 2: "crane"}
    twins = tmp_path / "twins"
    shutil.copytree(judges["vit"], twins)
    model.save_pretrained(twins)
    assert ImageClassifier(path=str(twins)).num_labels == 3
    with pytest.raises(ConfigError, match="2 labels that are called 'crane'"):
        ImageClassifier(path=str(twins), labels=["dog", "crane"])


def test_pickled_weights_and_code_are_refused(judges: dict[str, str], tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(judges["vit"], tmp_path / "pickled"))
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors beside pytorch_model.bin .*save_pretra"):
        ImageClassifier(path=str(pickled))
    mark = tmp_path / "run"
    for file, name in {
        "config.json": "AutoModelForImageClassification",
        "preprocessor_config.json": "AutoImageProcessor",
    }.items():
        coded = Path(shutil.copytree(judges["vit"], tmp_path / name))
        (coded / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
        content = json.loads((coded / file).read_text()) | {"auto_map": {name: "mine.Mine"}}
        content |= {"model_type": "mine", "image_processor_type": "Mine"}
        (coded / file).write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=f"path={coded} cannot be read as an image"):
            ImageClassifier(path=str(coded))
    assert not mark.exists()


def test_what_does_not_fit_is_refused(judges: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown label of .* 'dgo'; did you mean 'dog'"):
        ImageClassifier(path=judges["vit"], labels=["cat", "dgo"])
    with pytest.raises(ConfigError, match="must be > 0"):
        ImageClassifier(path=judges["vit"], temperature=0.0)
    with pytest.raises(ConfigError, match="list of two or more"):
        TextClassifier(texts=["cat"], path=judges["clip"])
    with pytest.raises(ConfigError, match="is no file; give the weights"):
        AestheticScore(head=str(tmp_path / "none.pth"), path=judges["clip"])
    other = aesthetic_head(tmp_path / "other.pth", features=9)
    with pytest.raises(ConfigError, match="no head for features of 8 numbers"):
        AestheticScore(head=str(other), path=judges["clip"])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="head=.*broken.safetensors cannot be read as weights"):
        AestheticScore(head=str(broken), path=judges["clip"])
    with pytest.raises(ConfigError, match="are no images"):
        ImageClassifier(path=judges["vit"]).log_probabilities(torch.zeros(4, 2))


def test_without_the_hub_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        ImageClassifier(path="someone/model")
    told = str(raised.value)
    assert "someone/model is neither an image classifier of transformers with config.json" in told
    assert "https://huggingface.co/someone/model" in told and "\n" not in told
