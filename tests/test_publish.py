"""Publishing a run: what would be pushed is listed, and only that is pushed, by --go."""

import re
from runpy import run_path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

PUBLISH = run_path("scripts/publish.py")["main"]


class Hub:
    """Keeps what it is asked for; refuses it where `error` is given."""

    def __init__(self, error=None):
        self.error, self.repositories, self.files = error, {}, {}

    def create_repo(self, repository, *, private, exist_ok):
        if self.error:
            raise self.error
        self.repositories[repository] = {"private": private, "exist_ok": exist_ok}

    def create_commit(self, repository, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repository}/commit/0")


@pytest.fixture
def finished(run, small_pairs):
    """Of a small run, stopped once and resumed, with adapters."""
    keys = ("model.trainable=lora", "model.lora_rank=2", "eval.every=1", f"eval.path={small_pairs}", "eval.pairs=2")
    keys += ("samples.every=1", "export.formats=[diffusers,diffusers_fp16]")
    run("mine", *keys, "train.max_steps=1")
    return run("mine", *keys, "train.max_steps=2")[1]


def test_a_run_is_listed_and_pushed_by_go_alone(finished, capsys):
    hub = Hub()
    assert PUBLISH([str(finished), "me/mine"], hub) == 0
    listed = capsys.readouterr().out
    assert hub.repositories == hub.files == {} and "Nothing was pushed" in listed
    assert PUBLISH([str(finished), "me/mine", "--go"], hub) == 0
    assert "https://huggingface.co/me/mine/commit/0" in capsys.readouterr().out
    assert hub.repositories == {"me/mine": {"private": True, "exist_ok": True}}

    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r"([\d,]+) bytes  (\S+)", listed)}
    assert sizes == {name: len(content) for name, content in hub.files.items()}
    assert (
        hub.files["pytorch_lora_weights.safetensors"]
        == (finished / "export" / "pytorch_lora_weights.safetensors").read_bytes()
    )
    sheets = [name for name in hub.files if name.endswith(".png")]
    assert sheets == [f"samples/step_{step:08d}.png" for step in (0, 1, 2)]
    assert not [name for name in hub.files if "checkpoint" in name or "tensorboard" in name or name == "run.json"]

    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "diffusers"
    assert 'load_lora_weights("me/mine")' in card.text and "(samples/step_00000002.png)" in card.text
    assert re.search(r"\| held-out pairs \| step 0 \| step 2 \|", card.text) and "d of rejected images" in card.text
    assert "this command, and was started 2 times in all." in card.text and "```bash\npython " in card.text

    own = (finished / "export" / "README.md").read_text(encoding="utf-8")
    assert 'load_lora_weights("export")' in own and "(samples.png)" in own
    assert (finished / "export" / "samples.png").read_bytes() == hub.files[sheets[-1]]


def test_what_can_not_be_published_is_said(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output_dir: x\n")
    for arguments, message in (
        ([str(tmp_path), "me/mine"], "is no run of train_xdpo.py"),
        ([str(tmp_path / "run"), "me/mine"], "has no export/"),
        ([str(tmp_path / "run"), "mine"], "lacks its owner"),
        ([str(tmp_path / "run"), "me/a/b"], "Repo id must be"),
    ):
        assert PUBLISH([*arguments, "--go"], Hub()) == 1
        assert message in capsys.readouterr().err


def test_what_the_hub_objects_to_is_said_with_what_to_do(tmp_path, capsys):
    push = run_path("scripts/publish.py")["push"]
    with pytest.raises(ValueError, match=r"could not push to me/mine: no network\. Check .*hf auth login"):
        push({"README.md": b"card"}, "me/mine", is_public=True, api=Hub(RuntimeError("no network")))
