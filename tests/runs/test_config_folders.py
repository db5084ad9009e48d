"""Environments of one's own config folders, and configs inside an app of Hydra."""

from pathlib import Path

import pytest

import ctrl_rl
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.compose import compose


def test_environments_see_config_folders(tmp_path: Path) -> None:
    import gymnasium

    (tmp_path / "env").mkdir()
    text = (Path(ctrl_rl.__file__).parent / "configs" / "env" / "gaussian.yaml").read_text()
    (tmp_path / "env" / "mine.yaml").write_text(text.replace("num_steps: 8", "num_steps: 3"))
    folders = {"config_dirs": [tmp_path]}
    assert ctrl_rl.make_env("mine", num_envs=2, **folders).process.num_steps == 3
    env = gymnasium.make("ctrl_rl.envs:ctrl_rl/Gaussian-v0", task="mine", **folders)
    assert env.unwrapped.process.num_steps == 3
    name = "ctrl_rl.envs:ctrl_rl/Gaussian-v0"
    envs = gymnasium.make_vec(
        name,
        num_envs=2,
        vectorization_mode="vector_entry_point",
        vector_kwargs={},
        task="mine",
        **folders,
    )
    assert envs.process.num_steps == 3


def test_composing_inside_an_app_of_hydra(tmp_path: Path) -> None:
    import hydra

    (tmp_path / "main.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("train", ["env=gaussian"]).env.name == "gaussian"
        with pytest.raises(ConfigError):
            compose("train", ["trainer.udpates=1"])
        assert hydra.compose("main") == {"a": 1}
