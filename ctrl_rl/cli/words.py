"""The words that commands about a run take, and what `--help` says of each.

Nothing heavy is imported: help gets an answer at once.
"""

_CHECKPOINT = "the update whose checkpoint to load, such as 50; the newest where it is left out"
_TRUST = (
    "modules of your own that the run's config names, such as my_rewards or "
    "[my_rewards,my_agents]; they are imported, so they run"
)

WORDS: dict[str, dict[str, str]] = {
    "resume": {
        "resume": "the run's folder; training goes on as it was set up, then it is evaluated",
        "checkpoint": "the update to go on from; what was trained after it is dropped",
        "trust": _TRUST,
    },
    "evaluate": {
        "run": "the run's folder",
        "checkpoint": f"{_CHECKPOINT}. An earlier one's figures go to RUN/evaluations",
        "trust": _TRUST,
        "evaluation.KEY": "settings of the evaluation, such as evaluation.policy_samples=1024; the "
        "others are the run's",
    },
    "sample": {
        "run": "the run's folder",
        "control": "what to ask for, where the run has one control: a label by its name or number, "
        "a number, or any for nothing",
        "control.NAME": "the same for the control NAME, one word for each; a control that is left "
        "out asks for nothing. control.prompt=… is a prompt of the prior",
        "n": "samples, 16 where it is left out",
        "seed": "of the noise, which is the same for every control and strength; 0 where it is "
        "left out",
        "strength": "how far to steer, a number: 0 is the prior, 1 (where it is left out) as "
        "trained, more goes further",
        "strengths": "several at once, such as [0,0.5,1], with the same noise, row by row",
        "out": "the folder of the picture, the film and the array; the run's own where left out",
        "checkpoint": _CHECKPOINT,
        "trust": _TRUST,
    },
    "export": {
        "run": "the run's folder; its prior is a text-to-image pipeline",
        "out": "the folder to write",
        "checkpoint": _CHECKPOINT,
        "base": "the id by which others find the base model, where it is a folder here",
        "hub": "upload the folder to this name on the Hugging Face hub",
        "private": "true: nobody else sees the upload",
        "trust": _TRUST,
    },
}
