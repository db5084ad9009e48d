"""A short run of tests/fuzz_overrides.py, and what its long runs (`make fuzz`) found."""

import os

import fuzz_overrides
import pytest
from children import call, command, warm_up
from running import SMALL

from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.arguments import check_value
from ctrl_rl.runs.compose import compose

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_random_overrides_are_had_or_refused():
    warm_up()
    faults = [(words, fault) for words, _, fault in fuzz_overrides.trials(25, 7) if fault]
    assert faults == []


@needs_fork
def test_what_the_fuzzer_would_find():
    def warns() -> int:
        import warnings

        warnings.warn("odd", UserWarning, stacklevel=1)
        return 0

    assert "warning" in call(warns).fault()
    assert "exit code 70" in call(lambda: 1 // 0).fault()
    assert "hangs" in call(lambda: __import__("time").sleep(60), most_s=0.2).fault()
    assert call(lambda: 0).fault() is None


def refused(words, capsys):
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and told.startswith("ctrl-rl: ")
    return told


@pytest.mark.parametrize("group", ["guidance", "experiment"])
def test_a_group_may_be_set_to_nothing(group):
    config = compose("train", ["env=gaussian", f"{group}=null"])
    assert config.get(group) is None and config.choices[group] is None
    assert config == compose("train", ["env=gaussian"])
    assert compose("train", ["guidance=reward", "guidance=null"]).get("guidance") is None
    assert compose("train", ["guidance=null", "guidance=reward"]).choices.guidance == "reward"


def test_a_key_beside_the_groups_is_not_added():
    with pytest.raises(ConfigError, match="unknown key 'tranier'; did you mean 'trainer'"):
        compose("train", ["env=gaussian", "+tranier.updates=3"])
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        compose("train", ["+sed=3"])
    assert compose("train", ["env=gaussian", "+trainer.own=3"]).trainer.own == 3


def test_a_value_from_a_key_that_is_not_there_names_both():
    told = r"group.means is taken from prior.means, which is no key of prior=gaussian"
    with pytest.raises(ConfigError, match=told):
        compose("train", ["env=mixture1d", "prior=gaussian"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2**63, 10**400])
def test_numbers_are_finite_and_fit_into_64_bits(value):
    for hint in (int, float, float | None, list[float], dict[str, float]):
        given = {list[float]: [value], dict[str, float]: {"a": value}}.get(hint, value)
        with pytest.raises(ConfigError, match=r"x.*=.* must be .*, finite and below 2\^63"):
            check_value(given, hint, "x")
    check_value(2**63 - 1, int, "x")
    check_value(-(2**63), int, "x")
    check_value(1e300, float, "x")


@needs_fork
@pytest.mark.parametrize("word", ["trainer.batch_size=1000000000000", "policy.width=10000000000"])
def test_what_does_not_fit_into_memory_is_one_line(tmp_path, word):
    warm_up()
    called = command(["train", *SMALL, word, f"run.root={tmp_path}"])
    assert called.fault() is None and called.code == 2
    assert "does not fit into memory" in called.last and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["-10", "9223372036854775808", "null", "true"])
def test_a_device_is_named_by_text(tmp_path, capsys, device):
    words = ["train", *SMALL, f"device={device}", f"run.root={tmp_path}"]
    assert "device=" in refused(words, capsys) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["trainer.batch_size=abc", "trainer.ema_decay=3", "+trainer.x=1"])
@pytest.mark.parametrize("command", [["evaluate", "method=prior"], ["dataset"]])
def test_settings_that_play_no_part_are_checked(tmp_path, capsys, command, word):
    out = "out" if command == ["dataset"] else "run.root"
    words = [*command, "env=digits", word, f"{out}={tmp_path / 'made'}"]
    assert "trainer." in refused(words, capsys) and list(tmp_path.iterdir()) == []
