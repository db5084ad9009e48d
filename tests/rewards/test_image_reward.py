"""ImageReward against its formula in plain torch, what scores depend on, refusals."""

import math
from pathlib import Path

import pytest
import torch
from contract_tasks import Made
from judges import SIDE
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import ImageReward

pytest.importorskip("transformers")
# One of the prompts is longer than what the encoder reads, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the prompt .* tokens, and the text encoder")
PROMPTS = ("a cat", "the dog 7", "", "abc " * 40)
# Their words by the made tokenizer: [CLS] 2, [SEP] 3, [UNK] 1, "a" 5, "##a" 31; 35 at most.
TOKENS = (
    [2, 5, 7, 31, 50, 3],
    [2, 24, 38, 35, 8, 45, 37, 1, 3],
    [2, 3],
    [2, *[5, 32, 33] * 11, 3],
)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def weights(made: Made) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(made("image_reward") / "ImageReward.pt")
    return found


@pytest.fixture
def score(made: Made) -> ImageReward:
    return made_score(made)


def made_score(made: Made, prompts: tuple[str, ...] = PROMPTS, **more: str) -> ImageReward:
    folder = str(made("image_reward"))
    score = ImageReward(**{"weights": folder, "tokenizer": folder, **more})
    score.read_prompts(prompts)
    return score


class Formula:
    """The score of one image for one prompt, token by token, without padding."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    @staticmethod
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = []
        for at in range(0, query.shape[1], 64):
            q, k, v = (each[:, at : at + 64] for each in (query, key, value))
            heads.append(torch.softmax(q @ k.T / 8, 1) @ v)
        return torch.cat(heads, 1)

    def vision(self, image: Tensor) -> Tensor:
        at = "blip.visual_encoder"
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        pixels = ((image + 1) / 2 - mean) / std
        patches = [
            pixels[:, row : row + 4, column : column + 4].flatten()
            for row in range(0, SIDE, 4)
            for column in range(0, SIDE, 4)
        ]
        projection = self.weights[f"{at}.patch_embed.proj.weight"].flatten(1)
        x = torch.stack(patches) @ projection.T + self.weights[f"{at}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{at}.cls_token"][0], x])
        x = x + self.weights[f"{at}.pos_embed"][0]
        for layer in range(3):
            of = f"{at}.blocks.{layer}"
            three = self.linear(self.norm(x, f"{of}.norm1", 1e-6), f"{of}.attn.qkv").chunk(3, 1)
            x = x + self.linear(self.attention(*three), f"{of}.attn.proj")
            wide = self.linear(self.norm(x, f"{of}.norm2", 1e-6), f"{of}.mlp.fc1")
            x = x + self.linear(self.gelu(wide), f"{of}.mlp.fc2")
        return self.norm(x, f"{at}.norm", 1e-6)

    def text(self, tokens: list[int], image: Tensor) -> Tensor:
        at = "blip.text_encoder"
        x = self.weights[f"{at}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights[f"{at}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(x, f"{at}.embeddings.LayerNorm", 1e-12)
        for layer in range(2):
            of = f"{at}.encoder.layer.{layer}"
            for kind in ("attention", "crossattention"):
                seen = x if kind == "attention" else image
                query = self.linear(x, f"{of}.{kind}.self.query")
                key, value = (self.linear(seen, f"{of}.{kind}.self.{n}") for n in ("key", "value"))
                added = self.linear(self.attention(query, key, value), f"{of}.{kind}.output.dense")
                x = self.norm(x + added, f"{of}.{kind}.output.LayerNorm", 1e-12)
            wide = self.gelu(self.linear(x, f"{of}.intermediate.dense"))
            x = self.norm(
                x + self.linear(wide, f"{of}.output.dense"), f"{of}.output.LayerNorm", 1e-12
            )
        return x

    def __call__(self, image: Tensor, tokens: list[int]) -> Tensor:
        x = self.text(tokens, self.vision(image))[:1]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{number}")
        return (x[0, 0] - 0.16717362830052426) / 1.0333394966054072


def test_score_is_the_formula(
    score: ImageReward, weights: dict[str, Tensor], images: Tensor
) -> None:
    formula = Formula(weights)
    expected = torch.stack(
        [torch.stack([formula(image, tokens) for tokens in TOKENS]) for image in images]
    )
    # Other eps of layer norms would change 3e-4, and GELU by its tanh formula 5e-5.
    for shift in range(4):
        place = (torch.arange(4) + shift) % 4
        found = score(images, place)
        torch.testing.assert_close(
            found, expected.gather(1, place[:, None])[:, 0], rtol=0, atol=1e-5
        )
    assert expected.std(0).min() > 0.01 and expected.std(1).min() > 0.01  # by image, by prompt


def test_other_prompts_change_nothing(made: Made, score: ImageReward, images: Tensor) -> None:
    alone = made_score(made, PROMPTS[:1])
    first = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(alone(images, first), score(images, first))
    score.read_prompts(PROMPTS[::-1])
    assert torch.equal(alone(images, first), score(images, first + 3))


def test_images_of_other_sizes(score: ImageReward, images: Tensor) -> None:
    """Only the square in the middle is looked at, as large as it may be."""
    place = torch.arange(4)
    wide = functional.interpolate(images, (SIDE * 3, SIDE * 6), mode="bilinear")
    small = functional.interpolate(wide, (SIDE, SIDE * 2), mode="bicubic", antialias=True)
    middle = small[..., SIDE // 2 : -SIDE // 2]
    torch.testing.assert_close(score(wide, place), score(middle, place), rtol=0, atol=1e-5)
    grey = images.mean(1, keepdim=True)
    assert torch.equal(score(grey, place), score(grey.expand(-1, 3, -1, -1), place))


def test_gradient_of_a_frozen_network(score: ImageReward, images: Tensor) -> None:
    assert score.differentiable and score.upper_bound is None
    assert not any(module.training for module in score.modules())
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in score.parameters())
    assert not any(tensor.is_meta for tensor in [*score.parameters(), *score.buffers()])
    image = images[:1].double().requires_grad_()
    (gradient,) = torch.autograd.grad(score(image, torch.tensor([0])).sum(), image)
    direction = gradient / gradient.norm()
    step = 1e-2 * direction
    with torch.no_grad():
        ends = [score(image + sign * step, torch.tensor([0])) for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_files_and_the_hub(
    made: Made, weights: dict[str, Tensor], images: Tensor, tmp_path: Path, monkeypatch
) -> None:
    place = torch.arange(4)
    expected = made_score(made)(images, place)
    file = tmp_path / "other.safetensors"
    save_file(weights, file)
    assert torch.equal(made_score(made, weights=str(file))(images, place), expected)
    half = {
        name: each.half() if each.is_floating_point() else each for name, each in weights.items()
    }
    torch.save(half, tmp_path / "half.pt")
    found = made_score(made, weights=str(tmp_path / "half.pt"))(images, place)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)

    def download(name: str, file: str) -> str:
        if name != "someone/model":
            raise OSError("offline")
        return str(made("image_reward") / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert torch.equal(made_score(made, weights="someone/model")(images, place), expected)
    with pytest.raises(ConfigError, match="weights=an/other is neither a file.*offline"):
        made_score(made, weights="an/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="tokenizer=an/other is neither BERT's tokenizer"):
        made_score(made, tokenizer="an/other")


CLASS, MLP = "blip.visual_encoder.cls_token", "mlp.layers"
POSITIONS = "blip.visual_encoder.pos_embed"
WORDS = "blip.text_encoder.embeddings.word_embeddings.weight"
TEXT_POSITIONS = "blip.text_encoder.embeddings.position_embeddings.weight"
FEED_FORWARD = "blip.visual_encoder.blocks.1.mlp.fc2.weight"
LAST = "blip.text_encoder.encoder.layer.1.output.LayerNorm.bias"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({CLASS: None}, f"it lacks {CLASS}; give ImageReward"),
        ({LAST: None}, f"it lacks {LAST}"),
        ({WORDS: None}, f"it lacks {WORDS}"),
        ({f"{MLP}.0.weight": None}, f"it lacks {MLP}.0.weight"),
        ({f"{MLP}.7.weight": None}, "mlp, does not end in one score"),
        ({f"{MLP}.4.bias": None}, "mlp, is no head for features of 128 numbers"),
        ({POSITIONS: torch.zeros(1, 16, 192)}, "is for 15 patches, which is no square"),
        ({POSITIONS: torch.zeros(17, 192)}, r"has shape \(17, 192\), not 3 dimensions"),
        ({FEED_FORWARD: torch.zeros(192, 5)}, r"fc2.weight has shape \(192, 5\), where the others"),
        ({TEXT_POSITIONS: torch.zeros(34, 128)}, "positions for 34 tokens, not for 35"),
        ({WORDS: torch.zeros(60, 200)}, "width of 200 is no multiple of 64"),
        ({WORDS: torch.zeros(60, 128)}, "has 57 words, and the weights are for 58"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    changed: dict[str, Tensor | None],
    says: str,
    made: Made,
    weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    file = tmp_path / "changed.pt"
    merged = {**weights, **changed}
    torch.save({name: each for name, each in merged.items() if each is not None}, file)
    with pytest.raises(ConfigError, match=says) as raised:
        made_score(made, weights=str(file))
    assert "\n" not in str(raised.value)
    assert "words" in says or f"weights={file}" in str(raised.value)


def test_files_that_are_no_weights_are_refused(made: Made, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="weights=.*broken.pt cannot be read as weights"):
        made_score(made, weights=str(broken))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds one list, not named tensors"):
        made_score(made, weights=str(tmp_path / "list.pt"))
    torch.save({"model": Path("pickled")}, tmp_path / "pickled.pt")
    with pytest.raises(ConfigError, match="pickled.pt cannot be read as weights"):
        made_score(made, weights=str(tmp_path / "pickled.pt"))
    with pytest.raises(ConfigError, match="has 514 words, and the weights are for 57"):
        made_score(made, tokenizer=str(made("clip")))
