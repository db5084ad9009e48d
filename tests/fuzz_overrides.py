"""Random overrides: a refusal in one line that names them, or a run that has them.

    python tests/fuzz_overrides.py 500 [seed]

Every trial is a command of one to five words over a tiny base, in a child with limits of time and
memory. The words are choices of groups and values of keys that the composed config has: ordinary
ones, at the border, out of range, of another type, not finite, huge, and misspelt keys.
"""

import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from children import Called, command, warm_up
from omegaconf import DictConfig, OmegaConf
from running import SMALL

from ctrl_rl.runs.compose import compose, files

ENVS = ("gaussian", "gaussian_mean", "mixture1d", "mixture2d", "digits")
_GROUPS = ("agent", "policy", "guidance", "kernel", "control_law", "logger", "reward", "prior")
_TINY = [
    *(word for word in SMALL if word.partition("=")[0] not in ("env", "trainer.batch_size")),
    *("trainer.updates=2", "kernel.num_steps=3", "trainer.checkpoint_every=1"),
]
_PRETRAIN = ["prior=digits", "recipe.updates=2", "recipe.batch_size=4"]
_CLASSIFIER = ["classifier=digits", "classifier.epochs=1", "classifier.batch_size=512"]
_DATASET = ["n=4", "batch_size=2", "kernel.num_steps=3"]

# A large number there is much work, as asked: it is neither refused nor done in time.
_WORK = (
    *("updates", "num_steps", "prior_samples", "policy_samples", "exact_samples", "epochs"),
    *("log_z_samples", "denoiser_calls", "n", "trials", "depth", "blocks", "num_critics"),
    *("layers_per_block", "threads", "renoise", "value_minibatches", "most_conditions"),
)
# They decide where something is written, or what is imported.
_SPARED = ("run", "choices", "out", "hydra")
_PATHS = ("path", "folder")
_MISSPELT = "=1.25"  # the value of keys that there are not
_CHOOSING = ("env", "agent", "method", "prior", "classifier")
_ODD = [
    *("null", "nan", ".inf", "-.inf", "inf", "''", "' '", "true", "[]", "{}", "[1]", "[[1]]"),
    *("abc", "ü", "'日本'", "'a b'", "1e999", "-0.0", "0x10", "{a: 1}", "[null]", "'\\n'", "???"),
]
_NUMBERS = ["0", "1", "-1", "2", "0.5", "-0.5", "1e-30", "1e30", "-1e30", "0.999999", "3", "7"]
_HUGE = ["1000000000000", "9223372036854775807", "9223372036854775808", f"1{'0' * 40}"]
_STYLES = ("near", "near", "one odd", "odd")
_SAYS = ("must", "use ", "add ", "give ", "accepted", "did you mean", "lower", "set ", "choose")


class Generator:
    """Commands from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def words(self, root: Path) -> tuple[list[str], list[str]]:
        """A whole command, and those of its words that were drawn."""
        pick = self._random.random()
        if pick < 0.72:
            return self._run("train", [], root)
        if pick < 0.86:
            # A LoRA needs a file, which tests/methods/test_certify.py gives it.
            method = self._random.choice([name for name in files("method") if name != "lora"])
            return self._run("evaluate", [f"method={method}"], root)
        name, base = self._random.choice(
            [("pretrain", _PRETRAIN), ("classifier", _CLASSIFIER), ("dataset", _DATASET)]
        )
        env = [f"env={self._random.choice(['digits', 'mixture1d'])}"] if name == "dataset" else []
        drawn = self._drawn(name, [*env, *base])
        return [name, *env, *base, *drawn, f"out={root / 'run'}"], drawn

    def _run(self, name: str, first: list[str], root: Path) -> tuple[list[str], list[str]]:
        env = self._random.choice(ENVS)
        size = self._random.choice([4, 8, 16])
        base = [*first, f"env={env}", *_TINY, f"trainer.batch_size={size}"]
        if self._random.random() < 0.7:
            base.append(f"agent={self._random.choice(list(files('agent')))}")
        drawn = self._drawn(name, base)
        return [name, *base, *drawn, f"run.root={root}", "run.name=run"], drawn

    def _drawn(self, name: str, base: list[str]) -> list[str]:
        chosen = tuple(word for word in base if _group(word) in _CHOOSING)
        known, drawn = dict(_known(name, chosen)), []
        number, style = self._random.randint(1, 5), self._random.choice(_STYLES)
        for place in range(number):
            is_odd = style == "odd" or (style == "one odd" and place == number - 1)
            if self._random.random() < 0.25 and name in ("train", "evaluate"):
                group = self._random.choice(_GROUPS)
                yamls = files(group)
                choice = self._random.choice(sorted({*yamls, "null"} - {"animals"}))  # of the hub
                drawn.append(f"{group}={choice}")
                known = {key: each for key, each in known.items() if key.split(".")[0] != group}
                if choice in yamls:
                    known |= dict(_leaves(_plain(yamls[choice]), f"{group}."))
            else:
                drawn.append(self._setting(known, is_odd))
        return drawn

    def _setting(self, known: dict[str, Any], is_odd: bool) -> str:
        key, value = self._random.choice(list(known.items()))
        if not is_odd:
            return f"{key}={self._near(value)}"
        pick = self._random.random()
        if pick < 0.1:
            return self._misspelt(key)
        return f"~{key}" if pick < 0.15 else f"{key}={self._odd(key)}"

    def _misspelt(self, key: str) -> str:
        place = self._random.randrange(len(key))
        changed = key[:place] + self._random.choice(["", "x", key[place] * 2]) + key[place + 1 :]
        return f"{self._random.choice(['', '+'])}{changed}{_MISSPELT}"

    def _odd(self, key: str) -> str:
        huge = [] if key.rpartition(".")[2] in _WORK else [*_HUGE, *(f"-{each}" for each in _HUGE)]
        return self._random.choice(self._random.choice([_ODD, _NUMBERS, huge or _ODD]))

    def _near(self, value: Any) -> str:
        """A value that may well be accepted in place of another one."""
        if isinstance(value, bool):
            return self._random.choice(["true", "false"])
        if isinstance(value, int):
            return str(
                self._random.choice([1, 2, 3, 4, 5, 8, max(value - 1, 0), min(value, 8) + 1])
            )
        if isinstance(value, float):
            return str(value * self._random.choice([0.0, 0.5, 0.7, 0.9, 1.1, 1.5, 2.0]))
        if isinstance(value, list) and value:
            return self._random.choice([str(value[::-1]), str(value[:-1]), "[0.5,0.9]", "[0,1]"])
        if isinstance(value, str):
            return self._random.choice(["constant", "linear", "cosine", "soft", "uniform", value])
        return self._random.choice(["null", "1", "2", "0.5", "uniform", "true"])


@cache
def _known(name: str, base: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(_leaves(OmegaConf.to_container(compose(name, base))))


def _plain(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys whose value is no mapping, or an empty one."""
    for key, value in config.items():
        if (not prefix and key in _SPARED) or str(key).startswith("_") or key in _PATHS:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def trial(generator: Generator) -> tuple[str, Called, str | None]:
    """One command: its words, how it ended and what is wrong with that."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        words, drawn = generator.words(root)
        called = command(words)
        fault = called.fault() or (
            _silent(root / "run", words, drawn, called)
            if called.code == 0
            else _unhelpful(root / "run", words, drawn, called)
        )
        shown = " ".join(words[: -1 if words[0] not in ("train", "evaluate") else -2])
        return shown, called, fault


def _unhelpful(run: Path, words: list[str], drawn: list[str], called: Called) -> str | None:
    """What is wrong with a refusal."""
    told = called.last
    started = "the last good checkpoint is" in told and "update " in told
    if run.exists() and not started:
        return f"refused and left a folder: {sorted(run.rglob('*'))[:5]}: {told}"
    if not run.exists() and root_left(run):
        return f"refused and left files: {told}"
    parts = {part for word in words for part in word.lstrip("+~").split("=", 1)}
    parts |= {part.rpartition(".")[2] for part in parts}
    named = any(part and part in told for part in parts)
    if not named and not any(say in told for say in _SAYS):
        return f"names neither a word nor a way out: {told}"
    if len(told) > 2000:
        return f"longer than anybody reads: {told}"
    return None


def root_left(run: Path) -> bool:
    """Whether something lies where a run would have been."""
    return run.parent.exists() and any(run.parent.iterdir())


def _silent(run: Path, words: list[str], drawn: list[str], called: Called) -> str | None:
    """What is wrong with a success."""
    asked = _asked(drawn)
    known = dict(_known(words[0], tuple(each for each in words[1:] if _group(each) in _CHOOSING)))
    for word in drawn:
        key, _, value = word.lstrip("+~").partition("=")
        of_number = isinstance(known.get(key), bool | int | float) and key in asked
        if word.endswith(_MISSPELT) or (of_number and _is_no_number(asked[key])):
            return f"took {word}"
    if words[0] not in ("train", "evaluate"):
        return None if run.is_dir() else "wrote nothing"
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    for key, value in asked.items():
        found = OmegaConf.select(config, key)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        if not _same(found, value) and not (key == "trainer.microbatch" and value == "auto"):
            return f"{key}={value} was asked for, and config.yaml has {found}"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("gap_nats", "soft_return", "log_z", "kl_nats", "reward"):
        if not isinstance(summary[key], float) or not math.isfinite(summary[key]):
            return f"summary.json has {key}={summary[key]}: {called.told[-500:]}"
    certified = summary["gap_nats_certified"]
    if certified is not None and certified < 0:
        return f"certified {certified} nats below nothing"
    _, high = summary["gap_nats_ci"]
    if high is not None and high < -1e-3 and not summary["contradictions"]:
        return f"a gap of {summary['gap_nats']} nats, {summary['gap_nats_ci']}"
    metrics = run / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        figures = json.loads(line)
        wrong = [figure for figure, value in figures.items() if not isinstance(value, int | float)]
        if wrong:
            return f"metrics.jsonl has {wrong[0]}={figures[wrong[0]]}"
    return None


def _asked(drawn: list[str]) -> dict[str, Any]:
    """The last value of every key, as Hydra's grammar reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    asked: dict[str, Any] = {}
    for word in drawn:
        parsed = OverridesParser.create().parse_override(word)
        key = parsed.key_or_group
        deleted = [other for other in asked if other == key or other.startswith(f"{key}.")]
        for other in deleted:
            asked.pop(other)
        if parsed.is_delete() or key in _GROUPS:
            continue
        asked[key] = parsed.value()
    nodes = {key: OmegaConf.create({"value": value}).value for key, value in asked.items()}
    return {
        key: OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        for key, node in nodes.items()
    }


def _is_no_number(value: Any) -> bool:
    """Whether no number is set to it; null may be accepted."""
    if isinstance(value, int | float):
        return not math.isfinite(value) or abs(value) > 10**39
    return value is not None


def _group(word: str) -> str:
    return word.partition("=")[0]


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, dict) and isinstance(found, dict):  # Hydra merges
        return all(_same(found.get(key), entry) for key, entry in value.items())
    if isinstance(value, float) and isinstance(found, float) and math.isnan(value):
        return math.isnan(found)
    return bool(found == value)


def trials(number: int, seed: int) -> Iterator[tuple[str, Called, str | None]]:
    """Many of them, each from a seed of its own, so that one can be had again."""
    for place in range(number):
        yield trial(Generator(seed * 1_000_003 + place))


def _report() -> None:
    warm_up()
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ended: Counter[str] = Counter()
    longest = 0.0
    for place, (words, called, fault) in enumerate(trials(number, seed)):
        ended["fault" if fault else {0: "ran", 2: "refused"}[called.code or 0]] += 1
        longest = max(longest, called.seconds)
        if fault:
            print(f"FAULT {place}: {words}\n    {fault}", flush=True)
        elif "-v" in sys.argv:
            print(
                f"{place}: {called.code} {called.seconds:.1f} s {words}\n    {called.last[:300]}",
                flush=True,
            )
    shown = ", ".join(f"{name} {count}" for name, count in sorted(ended.items()))
    print(f"{number} combinations of seed {seed}: {shown}; the longest took {longest:.0f} s")
    sys.exit(1 if ended["fault"] else 0)


if __name__ == "__main__":
    _report()
