"""Push and pull through a loopback Hub with the real client: one commit, the saved bytes, and every fault by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from hub_server import HubServer, metadata_errors
from huggingface_hub import HfApi, ModelCard, constants
from narrow_models import logits, narrow_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments, ViTImageProcessorPil

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, PruneError, PruneTrainer
from hf_prune.checkpoint import push_folder
from hf_prune.checkpoint.encodings import ENCODINGS
from hf_prune.methods import magnitude
from hf_prune.report.card import GENERATED, About, write_card
from hf_prune.testing import tiny_text_model
from hf_prune.types import CheckpointError, Report

REPO = "someone/pruned"
REPORT = Report(
    "magnitude", MagnitudeConfig(final_sparsity=0.5).to_dict(), asdict(magnitude.PAPER), 0.5, {},
    {"dense": 20, "prunable": 10, "kept": 5},
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process's client is connected to, with a token and without waiting between retries."""
    with HubServer(part_bytes=20_000) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda _: None)
        yield server


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "film": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")


def saved(folder: Path, name: str = "bert", **options: Any) -> Path:
    hf_prune.save_pretrained(narrow_model(name)[0], folder, report=REPORT, **options)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(hub: HubServer, branch: str = "main") -> list[str]:
    """Messages after the Hub's own first commit."""
    return [commit.message for commit in hub.repos[REPO].branches[branch][1:]] if REPO in hub.repos else []


# What arrives


@pytest.mark.parametrize("encode", ["none", *ENCODINGS])
def test_pushed_bytes_are_the_saved_bytes_in_one_commit(hub: HubServer, encode: str, tmp_path: Path) -> None:
    model, _ = narrow_model("bert")
    hf_prune.push_to_hub(
        model, "pruned", report=REPORT, processing_class=tokenizer(), encode=encode, commit_message="First"
    )
    hf_prune.save_pretrained(model, tmp_path / "saved", REPORT, encode=encode, processing_class=tokenizer())
    arrived = hub.files(REPO)
    card = arrived.pop("README.md").decode()
    assert arrived == files_in(tmp_path / "saved")
    assert commits(hub) == ["First"] and hub.asked("POST", "/commit/") == 1
    assert f'from_pretrained("{REPO}")' in card and not metadata_errors(card)


def test_large_files_go_in_parts(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", encode="none")
    size = (folder / "model.safetensors").stat().st_size
    push_folder(folder, REPO)
    assert hub.asked("PUT", "/lfs-part/") == -(-size // hub.part_bytes) > 2
    assert hub.asked("POST", "/lfs-complete/") == 1 and hub.asked("PUT", "/lfs/") == 0


def test_the_same_push_again_makes_no_commit(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    first = push_folder(folder, REPO)
    assert push_folder(folder, REPO).oid == first.oid
    assert len(commits(hub)) == 1


def test_files_that_the_new_model_lacks_go_in_the_same_commit(hub: HubServer, tmp_path: Path) -> None:
    push_folder(saved(tmp_path / "a", encode="none", max_shard_size="40KB", standalone=True), REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    assert {"model.safetensors.index.json", "modeling_hf_prune.py"} < hub.files(REPO).keys()
    push_folder(saved(tmp_path / "b"), REPO)
    assert hub.files(REPO).keys() == {"config.json", "model.safetensors", "pruning.json", "README.md", "notes.txt"}
    assert len(commits(hub)) == 3


def test_a_revision_is_a_branch_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    push_folder(saved(tmp_path / "a"), REPO)
    before = hub.files(REPO)
    push_folder(saved(tmp_path / "b", "resnet"), REPO, revision="v2/wide", commit_message="Second")
    push_folder(saved(tmp_path / "c"), REPO, revision="v2/wide", commit_message="Third")
    assert hub.files(REPO) == before
    assert commits(hub, "v2/wide") == ["Second", "Third"]


def test_a_private_repository_is_not_there_for_strangers(hub: HubServer, tmp_path: Path) -> None:
    push_folder(saved(tmp_path / "a"), REPO, private=True)
    assert hub.repos[REPO].private
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(token=False).model_info(REPO)


def test_a_card_of_ones_own_is_kept(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    card = write_card(folder, About(name=REPO))
    push_folder(folder, REPO, about=About(license="mit"))
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"  # a generated one is made anew
    card.write_text(card.read_text().replace(GENERATED, "My own words."))
    push_folder(folder, REPO, about=About(license="mit"))
    assert hub.files(REPO)["README.md"] == card.read_bytes()


def test_pickles_logs_and_checkpoints_stay_here(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    for name in ("training_args.bin", "checkpoint-5/model.safetensors", "runs/events", ".secret", "optimizer.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    push_folder(folder, REPO)
    assert hub.files(REPO).keys() == {"config.json", "model.safetensors", "pruning.json", "README.md"}


# What can go wrong

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "401 at create": ({"method": "POST", "part": "/create", "status": 401}, "401 .*token is not valid; run `hf auth"),
    "403 at create": ({"method": "POST", "part": "/create", "status": 403}, "403 .*may not write there"),
    "404 at info": ({"method": "GET", "part": "/api/models/", "status": 404}, "404 .*no such repository or branch"),
    "409 at commit": ({"method": "POST", "part": "/commit/", "status": 409}, "409 .*meanwhile; push again"),
    "500 at commit": ({"method": "POST", "part": "/commit/", "status": 500}, "500 .*push again later"),
    "500 at every upload": ({"method": "PUT", "part": "/lfs", "status": 500}, "500 .*push again later"),
    "cut at create": ({"method": "POST", "part": "/create"}, "connection to .* broke .*push again"),
    "cut at every upload": ({"method": "PUT", "part": "/lfs"}, "connection to .* broke .*push again"),
    "cut at commit": ({"method": "POST", "part": "/commit/"}, "connection to .* broke .*push again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_sentence_and_nothing_is_visible(hub: HubServer, fault: str, tmp_path: Path) -> None:
    injected, sentence = FAULTS[fault]
    hub.fail(**injected)
    with pytest.raises(PruneError, match=sentence) as error:
        push_folder(saved(tmp_path / "saved", encode="none"), REPO)
    assert "\n" not in str(error.value) and "all of it is there, or nothing" in str(error.value)
    assert commits(hub) == [] and (REPO not in hub.repos or not hub.files(REPO))
    hub.faults.clear()
    push_folder(tmp_path / "saved", REPO)
    assert len(commits(hub)) == 1


RETRIED: dict[str, dict[str, Any]] = {
    "500, then retry": {"method": "PUT", "part": "/lfs", "status": 500, "times": 2},
    "503 at preupload, then retry": {"method": "POST", "part": "/preupload/", "status": 503, "times": 1},
    "connection cut mid-upload, then retry": {"method": "PUT", "part": "/lfs", "times": 1},
}


@pytest.mark.parametrize("fault", RETRIED)
def test_passing_fault_is_retried(hub: HubServer, fault: str, tmp_path: Path) -> None:
    hub.fail(**RETRIED[fault])
    push_folder(saved(tmp_path / "saved", encode="none"), REPO)
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "saved/model.safetensors").read_bytes()
    assert len(commits(hub)) == 1 and all(fault.times == 0 for fault in hub.faults)


def test_lost_answer_to_the_commit_is_not_committed_twice(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", times=1, done=True)
    folder = saved(tmp_path / "saved")
    with pytest.raises(PruneError, match="push again"):
        push_folder(folder, REPO)
    assert push_folder(folder, REPO).oid == hub.repos[REPO].branches["main"][-1].oid
    assert len(commits(hub)) == 1


def test_commit_of_someone_else_meanwhile_is_not_overwritten(hub: HubServer, tmp_path: Path) -> None:
    push_folder(saved(tmp_path / "a"), REPO)
    repo, commit = hub.repos[REPO], hub.add_commit
    answer = hub.fault_for

    def intrude(method: str, path: str) -> Any:
        if "/preupload/" in path:
            commit(repo, "main", "theirs", repo.branches["main"][-1].files)
        return answer(method, path)

    hub.fault_for = intrude  # type: ignore[method-assign]
    with pytest.raises(PruneError, match="412 .*someone else changed it meanwhile"):
        push_folder(saved(tmp_path / "b", "resnet"), REPO)
    assert commits(hub)[-1] == "theirs"


def test_without_a_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PruneError, match=r"without a Hugging Face token: run `hf auth login`, set HF_TOKEN, or pass"):
        hf_prune.push_to_hub(narrow_model("bert")[0], REPO, report=REPORT)
    assert hub.requests == []
    hf_prune.push_to_hub(narrow_model("bert")[0], REPO, report=REPORT, token=hub.token)
    assert len(commits(hub)) == 1


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PruneError, match=r"while HF_HUB_OFFLINE is set: unset it, or .* run `hf-prune push"):
        hf_prune.push_to_hub(narrow_model("bert")[0], REPO, report=REPORT)
    assert hub.requests == []


def test_nobody_answers(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PruneError, match=r"connection to http://127.0.0.1:9 broke"):
        push_folder(saved(tmp_path / "a"), REPO)


@pytest.mark.parametrize("repo", ["a/b/c", "no spaces", "someone-else/pruned"])
def test_wrong_names(hub: HubServer, repo: str, tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=repo):
        push_folder(saved(tmp_path / "a"), repo)
    assert hub.repos == {}


def test_damaged_folders_are_not_pushed(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    report = (folder / "pruning.json").read_text()
    changes = {
        "model.safetensors": (weights[:-100], CheckpointError, "no whole safetensors file"),
        "config.json": (config.replace('"gap8"', '"zip"').encode(), CheckpointError, "kind must be one of"),
        "pruning.json": (report.replace('"sparsity": 0.5', '"sparsity": "a"').encode(), CheckpointError, "sparsity"),
    }
    for name, (data, kind, message) in changes.items():
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(kind, match=message):
            push_folder(folder, REPO)
        (folder / name).unlink()
        with pytest.raises(PruneError, match=r"save_pretrained\(model, folder, report=report\)"):
            push_folder(folder, REPO)
        (folder / name).write_bytes(good)
    assert hub.requests == []
