"""Prompts as text encoders read them."""

import warnings
from collections.abc import Sequence
from typing import Any


def warn_of_long(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> None:
    """Warn of texts that an encoder does not read to the end.

    Args:
        tokenizer: the encoder's.
        texts: prompts.
        limit: tokens that it reads; None for the tokenizer's own number.
    """
    limit = limit or tokenizer.model_max_length
    for text in texts:
        tokens = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        if tokens > limit:
            warnings.warn(
                f"the prompt '{text[:40]}…' has {tokens} tokens, and the text encoder reads the "
                f"first {limit} of them",
                stacklevel=4,
            )
