"""`ctrl-rl certify`: a LoRA has the figures of the policy that it came from, or is refused."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import FILE, prior_of, trained_by_diffusers
from running import own_reward, summary
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.methods import lora
from ctrl_rl.policies.stock_lora import StockLoraPolicy
from ctrl_rl.runs.loaded import make_process

REDNESS = """
def flat_redness(sample, control):
    return -50 * (sample[:, 0].mean((1, 2)) - 1).square()
"""
TASK = [
    *("env=gaussian", "prior=diffusers", "prior.guidance_scale=3.0", "prior.prompts=[cat,dog]"),
    *("kernel.num_steps=3", "evaluation.prior_samples=16", "evaluation.policy_samples=8"),
    *("evaluation.exact_samples=8", "evaluation.batch_size=8"),
]
TRAINED = ["policy=low_rank", "policy.alpha=8", "trainer.updates=2", "trainer.batch_size=4"]
TRAINED += ["trainer.learning_rate.network=0.02"]
FIGURES = ["kl_nats", "gap_nats", "gap_nats_certified", "soft_return", "reward", "log_z_policy"]


@pytest.fixture
def task(tmp_path: Path, lora_bases: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of a task without controls on a small Stable Diffusion."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CTRL_RL_TRUST", "my_flat_redness")
    words = [*TASK, f"prior.path={lora_bases('sd')}", f"run.root={tmp_path}"]
    return [*words, *own_reward(tmp_path, REDNESS, name="flat_redness")]


def test_an_exported_policy_has_its_runs_own_figures(task: list[str], tmp_path: Path) -> None:
    assert main(["train", *task, *TRAINED, "run.name=run"]) == 0
    # The quote and the spaces are what a word of a config could not have without more of them.
    out = tmp_path / "it's exported, = well"
    assert main(["export", f"run={tmp_path / 'run'}", f"out={out}"]) == 0
    assert main(["certify", f"policy={out}", *task, "run.name=certified"]) == 0
    ours, found = summary(tmp_path / "run"), summary(tmp_path / "certified")
    assert ours["kl_nats"] > 0.01
    for figure in FIGURES:
        assert found[figure] == pytest.approx(ours[figure], rel=1e-3, abs=1e-4), figure
    assert (found["agent"], found["steps"]) == ("lora", 0)
    assert (tmp_path / "certified" / "samples.png").is_file()
    assert main(["evaluate", f"run={tmp_path / 'certified'}"]) == 0
    assert summary(tmp_path / "certified") == found
    run = load_run(tmp_path / "certified")
    torch.testing.assert_close(
        run.sample({"prompt": "dog"}, n=2),
        load_run(tmp_path / "run").sample({"prompt": "dog"}, n=2),
    )


def test_a_lora_of_zeros_is_the_prior_exactly(
    task: list[str], tmp_path: Path, lora_bases: Any
) -> None:
    folder = trained_by_diffusers(lora_bases("sd"), tmp_path / "zero")
    weights = load_file(folder / FILE)
    save_file({k: v * ("lora_A" in k) for k, v in weights.items()}, folder / FILE)
    file = f"method.path={folder / FILE}"
    assert main(["evaluate", "method=lora", file, *task, "run.name=zero-run"]) == 0
    assert main(["evaluate", "method=prior", *task, "run.name=prior"]) == 0
    found, prior = summary(tmp_path / "zero-run"), summary(tmp_path / "prior")
    assert found["kl_nats"] == 0
    assert {k: found[k] for k in FIGURES} == {k: prior[k] for k in FIGURES}


def test_without_a_policy_or_a_file_nothing_is_done(capsys: Any, tmp_path: Path) -> None:
    assert main(["certify", "env=sd_aesthetic"]) == 2
    assert "which policy? for example: ctrl-rl certify policy=" in capsys.readouterr().err
    words = ["env=digits", f"run.root={tmp_path / 'runs'}"]
    assert main(["certify", f"policy={tmp_path / 'nowhere'}", *words]) == 2
    assert "there is no LoRA at" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_lora_weights.bin").touch()
    assert main(["certify", f"policy={tmp_path / 'bin'}", *words]) == 2
    error = capsys.readouterr().err
    assert f"has no {FILE}" in error and "pytorch_lora_weights.bin" in error
    assert not (tmp_path / "runs").exists()


class Harmful:
    """What runs code when a pickle is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, lora_bases: Any) -> None:
    for name in (FILE, "adapters.bin"):
        with (tmp_path / name).open("wb") as file:
            pickle.dump(Harmful(tmp_path / "harm"), file)
        with pytest.raises(ConfigError, match="is no safetensors file .* as they can run code"):
            policy(tmp_path / name, lora_bases("sd"))
    assert not (tmp_path / "harm").exists()


def policy(path: Path, base: Path) -> StockLoraPolicy:
    kernel = make_process("gaussian").kernel  # any
    return StockLoraPolicy(prior=prior_of("sd", base), kernel=kernel, path=str(path))


KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def without_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if k != f"{KEY}.lora_A.weight"}


def with_dora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, f"{KEY}.lora_magnitude_vector.weight": torch.ones(16)}


def of_a_wider_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, f"{KEY}.lora_A.weight": torch.ones(2, 17)}


def of_no_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("attn1", "attn7"): v for k, v in weights.items()}


def of_the_texts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 16)}


def without_a_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("unet."): v for k, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_half, f"1 of its N keys, the first {KEY}.lora_B.weight: the other matrix"),
        (with_dora, f"1 of its N keys, the first {KEY}.lora_magnitude_vector.weight: it is no"),
        (of_a_wider_layer, r"2 of its N keys, .*\(16, 2\) x \(2, 17\) is no update of \(16, 16\)"),
        (of_no_layer, r"16 of its N keys, the first unet\..*attn7\.to_.*: there is no such layer"),
        (of_the_texts, r"1 of its N keys cannot be used: the first text_encoder\..*encoded by"),
        (without_a_prefix, r"N of its N keys cannot be used: the first .*begin with unet\."),
        (lambda weights: {}, "it is empty"),
    ],
)
def test_keys_that_do_not_fit_are_named_and_counted(
    change: Any, words: str, tmp_path: Path, lora_bases: Any
) -> None:
    folder = trained_by_diffusers(lora_bases("sd"), tmp_path, target_modules=["to_q", "to_v"])
    weights = change(load_file(folder / FILE))
    save_file(weights, folder / FILE)
    with pytest.raises(ConfigError, match=words.replace("N", str(len(weights)))) as caught:
        policy(folder, lora_bases("sd"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("megatron_core", "os"),  # peft would import it
        ("init_lora_weights", "olora"),  # peft would change the base model
        ("use_dora", True),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_metadata_that_would_do_more_is_refused(
    setting: str, value: Any, tmp_path: Path, lora_bases: Any
) -> None:
    folder = trained_by_diffusers(lora_bases("sd"), tmp_path)
    header = {"unet.r": 2, "unet.lora_alpha": 6, f"unet.{setting}": value}
    weights = load_file(folder / FILE)
    save_file(weights, folder / FILE, metadata={"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ConfigError, match=re.escape(f"has {setting}={value} in its metadata")):
        policy(folder, lora_bases("sd"))
    save_file(weights, folder / FILE, metadata={"lora_adapter_metadata": '{"unet.r": "two"}'})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        policy(folder, lora_bases("sd"))


def test_the_prior_must_be_a_text_to_image_pipeline(tmp_path: Path, lora_bases: Any) -> None:
    folder = trained_by_diffusers(lora_bases("sd"), tmp_path)
    for task, network in (("digits", "UNetWithEmbedding"), ("gaussian", "NoneType")):
        with pytest.raises(ConfigError, match=f"text-to-image pipeline .* has a {network}; give"):
            lora(process=make_process(task), path=str(folder))
