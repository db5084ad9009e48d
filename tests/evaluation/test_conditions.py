"""Evaluations of conditions that the caller names, with controls left out."""

import pytest

from ctrl_rl.api import make_process
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.policies import PriorPolicy

PLAN = EvaluationPlan(prior_samples=32, policy_samples=16, exact_samples=8)


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make_process("faces", ["kernel.num_steps=3"])


def test_a_control_that_is_left_out_is_asked_for_nothing(process: DenoisingProcess) -> None:
    asked = [{"hat": "yes"}, {"hat": 1, "glasses": "any"}, {}]
    evaluation = evaluate(process, PriorPolicy(process.kernel), PLAN, conditions=asked)
    assert evaluation.conditions == ["glasses=any, hat=yes"] * 2 + ["glasses=any, hat=any"]
    hat, same, nothing = (evaluation.samples["prior"][place] for place in range(3))
    assert (hat == same).all() and (hat == nothing).all()  # one set of prior samples serves all
    figures = evaluation.summary["per_label"]["glasses=any, hat=yes"]
    assert figures["accuracy_per_control"]["glasses"] is None
    assert 0 <= figures["accuracy_per_control"]["hat"] <= 1


def test_the_prior_has_gap_0_where_nothing_is_asked(process: DenoisingProcess) -> None:
    evaluation = evaluate(process, PriorPolicy(process.kernel), PLAN, conditions=[{}])
    figures = evaluation.summary["per_label"]["glasses=any, hat=any"]
    assert figures["log_z"] == figures["gap_nats"] == figures["kl_nats"] == 0


def test_a_wrong_label_gets_the_nearest_one(process: DenoisingProcess) -> None:
    with pytest.raises(ConfigError, match="yes"):
        evaluate(process, PriorPolicy(process.kernel), PLAN, conditions=[{"hat": "yess"}])
