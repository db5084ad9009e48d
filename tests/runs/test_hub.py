"""An exported run on the hub: what is asked of its client, and what people read where it fails."""

from types import SimpleNamespace

import pytest
import torch
from exports import as_images, drawn, export

from ctrl_rl import ControlledPipeline
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError

pytest.importorskip("transformers")


class Hub:
    """What is asked of the hub's client."""

    def __init__(self):
        self.calls = []

    def create_repo(self, name, **more):
        if name == "denied/name":
            raise PermissionError("no token")
        self.calls.append((name, more))

    def model_info(self, name):
        return SimpleNamespace(private=name != "public/name")

    def upload_folder(self, **given):
        self.calls.append(given)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def test_export_to_the_hub_and_back(hub, tmp_path, monkeypatch, capsys):
    run, _, base = export(tmp_path, "sd", "ddim", "")
    out = tmp_path / "another"
    words = ["export", f"run={run.run.path}", f"out={out}", "trust=my_redness"]
    capsys.readouterr()
    assert main([*words, "hub=me/mine"]) == 2
    assert "is a folder of this machine; give base=ID" in capsys.readouterr().err
    assert main([*words, "private=true"]) == 2
    assert "add hub=NAME" in capsys.readouterr().err
    assert main([*words, "hub=me/mine", "private=maybe"]) == 2
    assert "private=maybe must be true or false" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "hub=denied/name", "base=an/id"]) == 2
    says = capsys.readouterr().err
    assert "PermissionError: no token" in says and "hf auth login" in says and str(out) in says
    hub.calls.clear()
    assert main([*words, "hub=public/name", "base=an/id", "private=true"]) == 2
    assert "it is there already, and everyone sees it" in capsys.readouterr().err
    assert len(hub.calls) == 1  # nothing was uploaded
    hub.calls.clear()
    assert main([*words, "hub=me/mine", "base=an/id", "private=true"]) == 0
    made, uploaded = hub.calls
    card = (out / "README.md").read_text()
    assert 'from_pretrained("me/mine")' in card and "base_model: an/id" in card
    assert made == ("me/mine", {"private": True, "exist_ok": True})
    assert uploaded["repo_id"] == "me/mine" and uploaded["folder_path"] == out
    assert {file.name for file in out.iterdir()} == set(uploaded["allow_patterns"])

    def download(name, **given):
        if name != "me/mine":
            raise OSError("offline")
        return str(out)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline = ControlledPipeline.from_pretrained("me/mine", base=str(base))
    pipeline.pipeline.set_progress_bar_config(disable=True)
    found = drawn(pipeline, "a cat", {"level": 1})
    expected = as_images(run.sample({"prompt": "a cat", "level": 1}, 1, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="folder=me/other is neither .* licence"):
        ControlledPipeline.from_pretrained("me/other")
    with pytest.raises(ConfigError, match="base=.*nowhere is neither a .*Pipeline here"):
        ControlledPipeline.from_pretrained(out, base=str(tmp_path / "nowhere"))
