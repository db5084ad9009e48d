"""Ids are known where Gymnasium looks for them, at no cost for those who do not ask."""

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_id_with_its_module_needs_no_import() -> None:
    # Gymnasium 1.0 removed its plug-ins: an id is known after its module is imported.
    code = """
import gymnasium
env = gymnasium.make("ctrl_rl.envs:ctrl_rl/Mixture1d-v0")
envs = gymnasium.make_vec("ctrl_rl.envs:ctrl_rl/Mixture1d-v0", num_envs=2)
print(env.unwrapped, envs.unwrapped, env.reset(seed=0)[0]["x"].shape)
"""
    assert run(code).endswith("num_envs=2) (1,)")


def test_registration_imports_nothing_heavy() -> None:
    code = """
import sys, gymnasium
heavy = {"torch", "diffusers", "torchrl", "tensordict", "hydra"}
print(sorted(heavy & set(sys.modules)), "ctrl_rl/Digits-v0" in gymnasium.registry)
import ctrl_rl.envs
print(sorted(heavy & set(sys.modules)), "ctrl_rl/Digits-v0" in gymnasium.registry)
ctrl_rl.envs.register_envs()  # a second call warns of nothing
"""
    plain, ours = run(code).splitlines()
    assert plain.startswith("[]")
    assert ours == "[] True"
