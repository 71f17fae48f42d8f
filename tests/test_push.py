"""`phi-lit export --push`: the hub's real client against a stand-in of the hub on loopback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub

from phi_lit.errors import UserError
from phi_lit.export.command import export

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the hub, with the client pointed at it and logged in."""
    from huggingface_hub import constants

    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    address = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield served
    served.close()


@pytest.fixture
def checkpoint(tiny_checkpoint_dir, tmp_path):
    return Path(shutil.copytree(tiny_checkpoint_dir, tmp_path / "phi1-test"))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def arrived(repo, branch="main"):
    files = dict(repo.branches[branch])
    assert files.pop(".gitattributes")
    return files


def test_every_byte_arrives_and_the_repository_is_private(hub, checkpoint, tmp_path, capsys):
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi", license="mit")
    repo = hub.repos["me/tiny-phi"]
    assert arrived(repo) == contents(tmp_path / "hub")
    assert repo.private
    assert repo.commits == ["Exported by phi-lit"]
    assert f"pushed to {hub.url}/me/tiny-phi/commit/1" in capsys.readouterr().out
    assert b'pipeline("text-generation", "me/tiny-phi")' in arrived(repo)["README.md"]


def test_transformers_loads_it_from_there_by_its_name(hub, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi", max_shard_size="300KB", private=False)
    assert not hub.repos["me/tiny-phi"].private
    options = {"cache_dir": tmp_path / "cache"}
    model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny-phi", **options)
    local = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    for name, value in local.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokenizer = transformers.AutoTokenizer.from_pretrained("me/tiny-phi", **options)
    assert tokenizer.eos_token_id == 256


def test_files_of_an_earlier_push_that_are_no_longer_there_are_removed(hub, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi", max_shard_size="300KB")
    assert "model.safetensors.index.json" in arrived(hub.repos["me/tiny-phi"])
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi")
    assert arrived(hub.repos["me/tiny-phi"]) == contents(tmp_path / "hub")
    assert len(hub.repos["me/tiny-phi"].commits) == 2


def test_a_branch_of_its_own_leaves_the_main_one_alone(hub, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi", revision="step-100")
    repo = hub.repos["me/tiny-phi"]
    assert arrived(repo, "step-100") == contents(tmp_path / "hub")
    assert arrived(repo) == {}


def test_after_a_broken_upload_only_what_is_missing_is_sent(hub, checkpoint, tmp_path):
    hub.fail_uploads = 1
    options = {"push": "me/tiny-phi", "max_shard_size": "300KB"}
    with pytest.raises(UserError, match=r"me/tiny-phi: the push failed: .*run the same command"):
        export(checkpoint, tmp_path / "hub", **options)
    assert (tmp_path / "hub" / "config.json").is_file()
    held = set(hub.objects)
    hub.requests.clear()
    export(checkpoint, tmp_path / "hub", **options)
    sent = {line.rpartition("/")[2] for line in hub.requests if line.startswith("PUT")}
    assert sent
    assert not sent & held
    assert arrived(hub.repos["me/tiny-phi"]) == contents(tmp_path / "hub")


def test_a_dry_run_lists_the_files_and_says_nothing_to_anybody(
    hub, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    export(checkpoint, tmp_path / "hub", push="me/tiny-phi", dry_run=True)
    out = capsys.readouterr().out
    files = contents(tmp_path / "hub")
    total = sum(map(len, files.values()))
    assert f"me/tiny-phi (main) would get {len(files)} files, {total:,} bytes" in out
    for name, content in files.items():
        assert any(line.split()[:2] == [name, f"{len(content):,}"] for line in out.splitlines())
    assert hub.requests == []
    assert hub.repos == {}


def refused(match, checkpoint, out_dir, **options):
    with pytest.raises(UserError, match=match) as caught:
        export(checkpoint, out_dir, **options)
    assert "\n" not in str(caught.value)


def test_who_may_not_push_is_told_before_anything_is_written(
    hub, checkpoint, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    out_dir = tmp_path / "hub"
    for name in ("tiny", "a/b/c", "me/-tiny", "me/tiny!", "/tiny", "me/"):
        refused("a model's id on the hub is owner/name", checkpoint, out_dir, push=name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("cannot push to .* at .*Nothing was written", checkpoint, out_dir, push="me/tiny-phi")
    monkeypatch.delenv("HF_TOKEN")
    refused("hf auth login", checkpoint, out_dir, push="me/tiny-phi")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    refused("cannot push to me/tiny-phi at", checkpoint, out_dir, push="me/tiny-phi")
    assert not out_dir.exists()


def test_a_name_of_somebody_else_is_told_with_the_hubs_own_words(hub, checkpoint, tmp_path):
    refused("others/tiny: the push failed: .*403", checkpoint, tmp_path / "hub", push="others/tiny")
    assert (tmp_path / "hub" / "config.json").is_file()


def test_from_the_command_line_with_the_environment_alone(run_python, checkpoint, tmp_path):
    """HF_ENDPOINT and HF_TOKEN as a user sets them, in a process of its own."""
    hub = Hub()
    environment = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = run_python(
        "-m", "phi_lit", "export", checkpoint, "--out_dir", tmp_path / "hub", "--dtype=bf16",
        "--push=me/tiny-phi", "--private=false", cwd=tmp_path, **environment,
    )  # fmt: skip
    hub.close()
    assert arrived(hub.repos["me/tiny-phi"]) == contents(tmp_path / "hub")
    assert f"pushed to {hub.url}/me/tiny-phi" in done.stdout
    assert json.loads(arrived(hub.repos["me/tiny-phi"])["config.json"])["dtype"] == "bfloat16"
