"""Slips of the pen in what users read: yaml comments, help, messages, docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("agents", "configs", "ctrl_rl", "docs", "envs")
FILES = [*ROOT.glob("*.md"), *(file for name in PLACES for file in (ROOT / name).rglob("*.*"))]
ARTICLE = re.compile(r"\b([Aa]n?)[\s#]+[`'\"*(]*([a-z]{3,})")
# Written with a vowel and spoken without one, and the reverse; "a" as a name, not an article.
CONSONANT = re.compile(r"one|uni|us[eu]|utili")
VOWEL = re.compile(r"hour|honest")
NAMES = {"and", "are", "alone", "excludes", "in", "is"}


def slips(text: str) -> list[str]:
    """Every "a" before a vowel and "an" before a consonant."""
    found = []
    for match in ARTICLE.finditer(text):
        article, word = match[1].lower(), match[2]
        vowel = bool(VOWEL.match(word)) or (word[0] in "aeiou" and not CONSONANT.match(word))
        if word not in NAMES and vowel != (article == "an"):
            found.append(match[0])
    return found


def test_the_rule_itself():
    assert slips("An diffusers pipeline, a `image` and a\n# error") == [
        "An diffusers",
        "a `image",
        "a\n# error",
    ]
    assert slips("a user, an hour, a one-step unit; a UNet, an MDP; A alone, an image") == []


def test_articles():
    kinds = {".md", ".py", ".yaml"}
    texts = [file for file in FILES if file.suffix in kinds and "node_modules" not in file.parts]
    assert len(texts) > 250
    found = {str(file.relative_to(ROOT)): slips(file.read_text()) for file in texts}
    assert {file: wrong for file, wrong in found.items() if wrong} == {}
