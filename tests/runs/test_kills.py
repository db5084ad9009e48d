"""A short run of tests/kills.py; `make kills` is the long one."""

import pytest
import torch
from kills import trials


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_killed_commands_lose_nothing(tmp_path):
    torch.set_num_threads(1)
    lines = list(trials(8, 3, tmp_path, ["train reinforce", "evaluate", "dataset"]))
    assert lines and all(line.endswith("as uninterrupted") for line in lines)
