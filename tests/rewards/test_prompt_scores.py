"""Scores of images for their prompts: transformers' own numbers, sums, whole runs, refusals."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from contract_tasks import Made
from PIL import Image
from running import own_reward, summary, train
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.cli.main import main
from ctrl_rl.conditions import label_counts
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import (
    ClassifierReward,
    ClipScore,
    Compressibility,
    FunctionReward,
    Graded,
    PackagedScore,
    PromptReward,
    WeightedSum,
)

# One of the prompts is longer than what the encoder reads, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the prompt .* tokens, and the text encoder")
PROMPTS = ("a photo of a cat", "ein Hund 🐕", "", "word " * 500)


def brightness(sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
    return sample.mean((1, 2, 3)) * (control["level"] < 1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(4, 3, 16, 16, generator=generator) * 255).round() / 127.5 - 1


def test_clip_score_is_the_logit_of_transformers(made: Made, images: Tensor) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = str(made("clip"))
    pictures = [
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        for image in images
    ]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder).eval()(**pixels, **tokens).logits_per_image
    score = ClipScore(path=folder)
    score.read_prompts(PROMPTS)
    for shift in range(4):
        place = (torch.arange(4) + shift) % 4
        torch.testing.assert_close(
            score(images, place), theirs.gather(1, place[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
    assert (theirs <= score.upper_bound).all()


def test_processor_of_another_folder(made: Made, images: Tensor, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    clip, other = made("clip"), tmp_path / "other"
    shutil.copytree(clip, other)
    CLIPImageProcessor.from_pretrained(clip, image_mean=[0.1, 0.2, 0.3]).save_pretrained(other)
    (other / "model.safetensors").unlink()  # it gives no weights
    own, another = ClipScore(path=str(clip)), ClipScore(path=str(clip), processor=str(other))
    for score in (own, another):
        score.read_prompts(PROMPTS)
    place = torch.arange(4)
    assert not torch.allclose(another(images, place), own(images, place), atol=1e-3)
    another.pixels.mean, another.pixels.std = own.pixels.mean, own.pixels.std
    torch.testing.assert_close(another(images, place), own(images, place))
    for file in ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json"):
        (other / file).unlink(missing_ok=True)
    (other / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="processor=.*other cannot be read as a model with a tok"):
        ClipScore(path=str(clip), processor=str(other))


def test_long_prompts_are_named(made: Made) -> None:
    score = ClipScore(path=str(made("clip")))
    with pytest.warns(UserWarning, match="'word word .* reads the first 77"):
        score.read_prompts(PROMPTS)


def test_a_reward_that_is_not_finite_names_the_prompt(made: Made, tmp_path: Path, capsys) -> None:
    code = "def broken(sample, control):\n    return sample.sum((1, 2, 3)) + float('nan')\n"
    words = [
        *("prior=diffusers", f"prior.path={made('sd')}", "prior.prompts=[a cat]", "kernel=ddim"),
        *("policy=low_rank", f"run.root={tmp_path / 'runs'}", "agent=ppo"),
        *own_reward(tmp_path, code, name="broken", differentiable=False),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert main(["train", "env=gaussian", *words]) == 2
    assert "the reward is nan for prompt=a cat" in capsys.readouterr().err


def test_weight_and_no_prompt(made: Made, images: Tensor) -> None:
    score = ClipScore(path=str(made("clip")))
    reward = PromptReward(score=score, weight=0.25)
    reward.read_prompts(PROMPTS)
    reward.read_prompts(PROMPTS)  # of another process on the same prior
    place = torch.tensor([0, 4, 2, 4])
    found = reward(images, {keys.PROMPT: place})
    assert found[1] == found[3] == 0
    torch.testing.assert_close(found[[0, 2]], 0.25 * score(images, place.clamp(max=3))[[0, 2]])
    assert reward.upper_bound == pytest.approx(0.25 * score.upper_bound)
    with pytest.raises(ConfigError, match="another prior's prompts"):
        reward.read_prompts(["a cat"])


def test_packaged_score_is_given_pixels_and_texts(images: Tensor) -> None:
    score = PackagedScore(target="judges.Scorer", path="anywhere")
    score.read_prompts(["", "a", "ab"])
    overshooting = (images * 1.5).requires_grad_()
    found = score(overshooting, torch.tensor([0, 1, 2, 1]))
    pixels = (overshooting / 2 + 0.5).clamp(0, 1).mean((2, 3))
    torch.testing.assert_close(found, pixels[torch.arange(4), torch.tensor([0, 1, 2, 1])])
    assert found.requires_grad
    without = PackagedScore(target="judges.Scorer", path="anywhere", differentiable=False)
    without.read_prompts(["a"])
    assert not without(overshooting, torch.zeros(4, dtype=torch.int64)).requires_grad


def test_sum_of_a_classifier_and_a_score(made: Made, images: Tensor) -> None:
    fit = PromptReward(score=ClipScore(path=str(made("clip"))))
    measure = Compressibility()
    size = ClassifierReward(classifiers={"size": Graded(measure=measure, edges=[-0.8], std=0.1)})
    total = WeightedSum(rewards={"fit": fit, "size": size}, weights={"fit": 0.1})
    assert (
        total.reads_prompts
        and not total.differentiable
        and label_counts(total.controls) == {"size": 2}
    )
    assert total.upper_bound == pytest.approx(0.1 * fit.upper_bound)
    total.read_prompts(PROMPTS)
    control = {keys.PROMPT: torch.arange(4), "size": torch.tensor([0, 1, 1, 2])}
    expected = 0.1 * fit(images, control) + size(images, control)
    torch.testing.assert_close(total(images, control), expected)
    assert not total(images.clone().requires_grad_(), control).requires_grad
    predicted = total.predict(images)
    assert predicted is not None and torch.equal(predicted["size"], size.predict(images)["size"])
    level = FunctionReward(function=brightness, controls={"level": 2}, differentiable=True)
    assert WeightedSum(rewards={"size": size, "level": level}).predict(images) is None
    unbounded = PromptReward(score=PackagedScore(target="judges.Scorer", path="anywhere"))
    assert WeightedSum(rewards={"a": unbounded, "b": size}).upper_bound is None


@pytest.mark.parametrize("agent", ["ctrl", "ppo"])
def test_a_score_alone_trains_a_policy_without_controls(
    agent: str, made: Made, tmp_path: Path
) -> None:
    words = [
        *("prior=diffusers", f"prior.path={made('sd')}", "prior.prompts=[a cat,a dog]"),
        *("kernel=ddim", "kernel.num_steps=2", "policy=low_rank", f"agent={agent}"),
        *("reward=pick_score", f"reward.score.path={made('clip')}"),
        *(f"reward.score.processor={made('clip')}", "trainer.updates=4"),
    ]
    found = summary(train(tmp_path, "run", *words))
    assert found["kl_nats"] > 0 and math.isfinite(found["gap_nats"])
    assert found["gap_nats_certified"] >= found["gap_nats"] and found["accuracy"] is None
    assert set(found["per_label"]) == {"prompt=a cat", "prompt=a dog"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reward=pick_score"], "and this prior has none"),
        (["reward=packaged_score", "reward.score.target=judges.Scorers"], "cannot be imported"),
        (
            ["reward=packaged_score", "reward.score.target=pathlib.Path"],
            "no method from_pretrained",
        ),
        (
            [
                "reward=packaged_score",
                "reward.score.target=judges.Scorer",
                "reward.score.path=nowhere",
            ],
            "reward.score: path=nowhere is neither",
        ),
        (["reward=clip_score", "reward.weight=0"], "reward: weight=0 must be > 0"),
        (["reward=clip_score", "reward.weight=inf"], "reward.weight=inf must be a number, finite"),
    ],
)
def test_refusals(words: list[str], says: str, made: Made, tmp_path: Path, capsys) -> None:
    of_score = [f"reward.score.path={made('clip')}"] if "score" in words[0] else []
    of_score += [f"reward.score.processor={made('clip')}"] if "pick" in words[0] else []
    assert main(["train", "env=gaussian", f"run.root={tmp_path}", *of_score, *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sums_refuse_what_does_not_fit() -> None:
    size = ClassifierReward(
        classifiers={"size": Graded(measure=Compressibility(), edges=[-0.8], std=0.1)}
    )
    with pytest.raises(ConfigError, match="rewards is empty"):
        WeightedSum(rewards={})
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        WeightedSum(rewards={"size": size}, weights={"sice": 1.0})
    with pytest.raises(ConfigError, match="must be > 0"):
        WeightedSum(rewards={"size": size}, weights={"size": math.inf})
    with pytest.raises(ConfigError, match="has the control 'size', as another"):
        WeightedSum(rewards={"one": size, "two": size})
