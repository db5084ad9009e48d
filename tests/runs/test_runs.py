"""The run folder: layout, summary, checkpoints, loading."""

import pytest
import torch
from running import SMALL, summary, train
from safetensors.torch import load_file

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.evaluation.noise import generators
from ctrl_rl.learning.checkpoint import Checkpoint
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs.folder import Run, RunPlan, write_summary

FIGURES = """task agent seed steps denoiser_calls reward_calls wall_s reward kl_nats log_z log_z_ci
gap_nats gap_nats_ci gap_nats_certified eubo_gap_nats ess accuracy macro_f1 heldout_accuracy
diversity per_label prior exact""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "mix", "env=mixture1d", "trainer.updates=7")


def test_layout(run):
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    kept = ["000000", "000005", "000007"]
    files = ["policy.safetensors", "state.json", "training.safetensors"]
    expected = {f"checkpoints/{folder}/{file}" for folder in kept for file in files}
    expected |= {".ctrl_rl/run.json", ".ctrl_rl/lock"}
    assert names == expected | {"config.yaml", "metrics.jsonl", "summary.json", "samples.png"}
    assert "${" not in (run / "config.yaml").read_text()


def test_summary(run):
    written = summary(run)
    assert [name for name in FIGURES if name not in written] == []
    assert written["task"] == "mixture1d" and written["agent"] == "ctrl" and written["steps"] == 7
    assert written["accuracy"] is not None and written["exact"]["reward"] is not None
    assert set(written["per_label"]) == {"group=0", "group=1"}
    for row in written["per_label"].values():
        assert {"reward", "gap_nats", "prior", "exact"} <= set(row)


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers_write_and_pickle_nothing(tmp_path, logger):
    folder = train(tmp_path, "run", f"logger={logger}", "trainer.updates=2")
    written = [file for file in (folder / "log").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in written) > 0
    forbidden = (".pt", ".pth", ".pkl", ".ckpt", ".bin")
    assert not [file for file in folder.rglob("*") if file.suffix in forbidden]


def test_load_run(run):
    loaded = load_run(run)
    assert loaded.config.trainer.updates == 7
    assert loaded.prior is loaded.env.process.prior
    newest = load_file(run / "checkpoints" / "000007" / "policy.safetensors")
    assert all(
        torch.equal(value, newest[name]) for name, value in loaded.policy.state_dict().items()
    )
    assert load_run(run, checkpoint=5).cost["steps"] == 5
    evaluated = loaded.evaluate().summary
    assert evaluated["gap_nats"] == summary(run)["gap_nats"]


def test_samples(run):
    loaded = load_run(str(run))
    first = loaded.sample(1, n=5, seed=3)
    assert first.shape == (5, 1) and first.dtype == torch.float32
    assert torch.equal(first, loaded.sample({"group": 1}, n=5, seed=3))
    assert not torch.equal(first, loaded.sample(1, n=5, seed=4))
    assert not torch.equal(first, loaded.sample(1, n=5, seed=3, strength=2.0))


def test_a_sample_depends_on_its_place_and_not_on_how_many_there_are(run):
    """Sample i is the episode of an env whose generator is the seed's i-th."""
    loaded = load_run(run)
    few, many = (loaded.strip(1, n=n, seed=3) for n in (4, 8))
    torch.testing.assert_close(many.samples[:4], few.samples)
    torch.testing.assert_close(many.latents[:4], few.latents)
    for strength, policy in ((1.0, loaded.policy), (0.0, PriorPolicy(loaded.policy.kernel))):
        samples = loaded.sample(1, n=8, seed=3, strength=strength)
        for place, generator in enumerate(generators(3, 8)):
            env = LatentEnv(loaded.env.process, num_envs=1)
            env.generator = generator
            episode = rollout(env, policy, control={"group": 1})
            torch.testing.assert_close(episode["sample"][:, -1], samples[place : place + 1])
    starts = torch.cat([loaded.strip(1, n=8, seed=seed).latents[:, 0] for seed in range(8)])
    assert len(starts.unique(dim=0)) == 64  # no two seeds share a sample


@pytest.mark.parametrize(
    ("control", "named"),
    [
        (1, {"strength": -0.1}),
        (1, {"strength": float("nan")}),
        (1, {"n": 0}),
        (1, {"seed": -1}),
        (9, {}),
        ({"grup": 1}, {}),
    ],
)
def test_bad_samples(run, control, named):
    with pytest.raises(ConfigError):
        load_run(run).sample(control, **named)


def damage(run, kind):
    folder = run / "checkpoints" / "000012"
    if kind == "weights":
        content = bytearray((folder / "policy.safetensors").read_bytes())
        content[-3] ^= 0xFF
        (folder / "policy.safetensors").write_bytes(content)
    elif kind == "state":
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text[: len(text) // 2])
    elif kind == "emptied":
        (folder / "state.json").write_text("[]")
    else:
        (folder / "training.safetensors").unlink()


@pytest.mark.parametrize("kind", ["weights", "state", "emptied", "missing"])
def test_damaged_checkpoint(tmp_path, capsys, kind):
    run = train(tmp_path)
    damage(run, kind)
    with pytest.raises(RunError, match="checkpoint=10"):
        load_run(run)
    for words in (
        ["sample", f"run={run}", "control=1"],
        ["evaluate", f"run={run}"],
        ["train", f"resume={run}"],
    ):
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err.strip()
        assert told.count("\n") == 0 and "checkpoint=10" in told and "damaged" in told
        assert main([*words, "checkpoint=10"]) == 0
    assert load_run(run).cost["steps"] == 12  # resuming mended it


def test_nothing_good_left(tmp_path):
    run = Run.create(RunPlan(root=str(tmp_path), name="r"), "seed: 0\n")
    with pytest.raises(RunError, match="no checkpoint"):
        run.load()
    counters = {"prior": 0, "policy": 0, "reward": 0, "wall_s": 0.0}
    run.save(Checkpoint(3, {"w": torch.ones(2)}, {"o": torch.ones(1)}, counters), keep=2)
    with pytest.raises(RunError, match="it has \\[3\\]"):
        run.load(4)
    (run.path / "checkpoints" / "000003" / "state.json").write_text("")
    with pytest.raises(RunError, match="no good one"):
        run.load()


def test_checkpoints_are_pruned_and_round_trip(tmp_path):
    run = Run.create(RunPlan(root=str(tmp_path), name=7), "seed: 0\n")
    counters = {"prior": 1, "policy": 2, "reward": 3, "wall_s": 0.5}
    for update in range(5):
        policy = {"w": torch.full((2,), update / 3), "tied": torch.full((2,), update / 3)}
        run.save(Checkpoint(update, policy, {"o": torch.zeros(())}, counters), keep=2)
    assert run.checkpoints() == [3, 4]
    loaded = run.load()
    assert torch.equal(loaded.policy["w"], policy["w"]) and loaded.counters == counters
    assert loaded.cost == {"steps": 4, "denoiser_calls": 3, "reward_calls": 3, "wall_s": 0.5}


def test_existing_folders(tmp_path, capsys):
    run = train(tmp_path)
    words = ["train", *SMALL, f"run.root={tmp_path}", "run.name=run"]
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"resume={run}" in told and "run.overwrite=true" in told
    assert main([*words, "run.overwrite=true", "trainer.updates=2"]) == 0
    assert summary(run)["steps"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert main([*words[:-1], "run.name=other", "run.overwrite=true"]) == 2
    assert (tmp_path / "other" / "thesis.tex").is_file()


def test_damaged_config(tmp_path, capsys):
    run = train(tmp_path)
    for text in ("a: [", "just words", ""):
        (run / "config.yaml").write_text(text)
        capsys.readouterr()
        assert main(["sample", f"run={run}", "control=1"]) == 2
        assert capsys.readouterr().err.strip().count("\n") == 0


def test_strict_json_for_figures_that_are_not_finite(tmp_path):
    run = Run.create(RunPlan(root=str(tmp_path), name="r"), "")
    run.log({"update": 1, "kl": float("nan")})
    write_summary(run.path, {"a": float("inf"), "b": [float("nan"), {"c": 1.0}]})
    assert list(run.metrics()) == [{"update": 1, "kl": None}]
    assert summary(run.path) == {"a": None, "b": [None, {"c": 1.0}]}


def test_runs_that_name_classes_where_they_were_are_resumed(tmp_path):
    folder = train(tmp_path, "old", "agent=db", "trainer.updates=2")
    config = folder / "config.yaml"
    now = config.read_text()
    old = now.replace("ctrl_rl.agents.parts.critics.", "ctrl_rl.critics.")
    assert old.count("ctrl_rl.critics.") == 1
    logger = "_target_: ctrl_rl.runs.loggers.NoLog"
    for before in ("ctrl_rl.runs.no_logger", "ctrl_rl.runs.folder.no_logger"):
        assert logger in old
        config.write_text(old.replace(logger, f"_target_: {before}\n  _partial_: true"))
        assert main(["train", f"resume={folder}", "checkpoint=0"]) == 0
