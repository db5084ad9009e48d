"""The pretrained model and a sampler, side by side under every condition."""

from collections.abc import Mapping, Sequence

from ctrl_rl import keys
from ctrl_rl.evaluation.samplers import Sampler
from ctrl_rl.evaluation.side_by_side import BEFORE, Comparison, Strip, draw_strip
from ctrl_rl.policies import PriorPolicy

_SAMPLES = 8


def compare(
    sampler: Sampler, conditions: Sequence[Mapping[str, float]], *, n: int = _SAMPLES, seed: int
) -> list[Comparison]:
    """Draw the pretrained model and a sampler under every condition, policies from the same noise.

    Args:
        sampler: to compare with the pretrained model.
        conditions: values by name; those that share a prompt are adjacent.
        n: episodes per condition.
        seed: of the noise, which all conditions share.

    Returns:
        One comparison per prompt; one in all if the prior has none.
    """
    process, drawn = sampler.process, list[tuple[Strip, list[Strip]]]()
    prompt = None
    for index, condition in enumerate(conditions):
        if index == 0 or condition.get(keys.PROMPT) != prompt:
            prompt = condition.get(keys.PROMPT)
            title = BEFORE
            if prompt is not None:
                title = f"before: {process.conditions.title({keys.PROMPT: prompt})}"
            prior = PriorPolicy(process.kernel)  # sees only the condition's prompt
            drawn.append((draw_strip(process, prior, condition, title=title, n=n, seed=seed), []))
        named = process.conditions.title(condition)
        drawn[-1][1].append(sampler.strip(condition, title=named, n=n, seed=seed))
    return [Comparison(before, tuple(after)) for before, after in drawn]
