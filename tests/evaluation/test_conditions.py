"""Evaluations of conditions that the caller names, with controls left out."""

import itertools

import pytest
import torch

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs.loaded import make_process

PLAN = EvaluationPlan(prior_samples=32, policy_samples=16, exact_samples=8)


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make_process("faces", ["kernel.num_steps=3"])


def test_a_control_that_is_left_out_is_asked_for_nothing(process: DenoisingProcess) -> None:
    asked = [{"hat": "yes"}, {"hat": 1, "glasses": "any"}, {}]
    evaluation = evaluate(
        PolicySampler(process, PriorPolicy(process.kernel)), PLAN, conditions=asked
    )
    assert evaluation.conditions == ["glasses=any, hat=yes"] * 2 + ["glasses=any, hat=any"]
    hat, same, nothing = (evaluation.samples["prior"][place] for place in range(3))
    assert (hat == same).all() and (hat == nothing).all()  # one set of prior samples serves all
    figures = evaluation.summary["per_label"]["glasses=any, hat=yes"]
    assert figures["accuracy_per_control"]["glasses"] is None
    assert 0 <= figures["accuracy_per_control"]["hat"] <= 1


def test_the_prior_has_gap_0_where_nothing_is_asked(process: DenoisingProcess) -> None:
    evaluation = evaluate(
        PolicySampler(process, PriorPolicy(process.kernel)), PLAN, conditions=[{}]
    )
    figures = evaluation.summary["per_label"]["glasses=any, hat=any"]
    assert figures["log_z"] == figures["gap_nats"] == figures["kl_nats"] == 0


def test_a_wrong_label_gets_the_nearest_one(process: DenoisingProcess) -> None:
    with pytest.raises(ConfigError, match="yes"):
        evaluate(
            PolicySampler(process, PriorPolicy(process.kernel)), PLAN, conditions=[{"hat": "yess"}]
        )


def test_every_condition_has_draws_of_its_own(process: DenoisingProcess) -> None:
    """Independent of each other and of the prior's, whose seed differs too."""
    plan = EvaluationPlan(prior_samples=64, policy_samples=64, exact_samples=0)
    evaluation = evaluate(PolicySampler(process, PriorPolicy(process.kernel)), plan)
    drawn = [*evaluation.samples["policy"], evaluation.samples["prior"][0]]
    assert len(drawn) == 5
    mean = torch.stack([each.flatten(1) for each in drawn]).mean((0, 1))
    for one, other in itertools.combinations(drawn, 2):
        first, second = ((each.flatten(1) - mean).double() for each in (one, other))
        apart = (first - second).norm(dim=1)
        assert apart.min() > 0, "no sample is drawn twice"
        cosine = torch.nn.functional.cosine_similarity(first, second)
        assert cosine.mean().abs() < 5 * cosine.std() / len(cosine) ** 0.5
