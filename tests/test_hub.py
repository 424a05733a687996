"""Push and pull through a loopback Hub with the real client: one commit, the saved bytes, and every fault by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
from typer.testing import CliRunner

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, PruneError, PruneTrainer
from hf_prune.checkpoint import push_folder
from hf_prune.checkpoint.encodings import ENCODINGS
from hf_prune.cli import app
from hf_prune.methods import magnitude
from hf_prune.report.card import GENERATED, About, write_card
from hf_prune.tiny_models import tiny_text_model
from hf_prune.types import CheckpointError, Report

REPO = "someone/pruned"
REPORT = Report(
    "magnitude", MagnitudeConfig(final_sparsity=0.5).to_dict(), asdict(magnitude.PAPER), 0.5, {},
    {"dense": 20, "prunable": 10, "kept": 5},
)  # fmt: skip


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


# The server itself


def test_the_server_answers_as_a_hub_does(hub: HubServer, tmp_path: Path) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "someone" and not api.repo_exists(REPO)
    api.create_repo("pruned")
    for token, status in ((None, 409), ("wrong", 401)):
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as error:
            HfApi(token=token).create_repo(REPO)
        assert error.value.response.status_code == status
    folder = saved(tmp_path / "a")
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    api.create_tag(REPO, tag="v1")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json")
    assert [each.name for each in api.list_repo_refs(REPO).tags] == ["v1"] and api.repo_info(
        REPO, revision="v1"
    ).sha == first.oid
    assert {file.path: file.size for file in api.list_repo_tree(REPO, revision="v1")} == {
        ".gitattributes": 25, **{name: len(data) for name, data in files_in(folder).items()}
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"---\ntags: 1\n---\n", path_in_repo="README.md")
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        api.repo_info(REPO, revision="v2")


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
    left_out = ("training_args.bin", "checkpoint-5/model.safetensors", "runs/events", ".secret", "optimizer.pt")
    templates = "additional_chat_templates/tools.jinja"
    for name in (*left_out, templates):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    push_folder(folder, REPO)
    assert hub.files(REPO).keys() == {"config.json", "model.safetensors", "pruning.json", "README.md", templates}


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
    with pytest.raises(PruneError, match=r"412 .*someone else changed it meanwhile"):
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
        (folder / name).write_bytes(b"[")
        with pytest.raises(CheckpointError, match=r"cannot be read as JSON|no whole safetensors"):
            push_folder(folder, REPO)
        (folder / name).write_bytes(good)
    saved(folder, encode="none", max_shard_size="40KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002.*, which the folder lacks"):
        push_folder(folder, REPO)
    assert hub.requests == []


# From another process, by Hub id


def run_python(code: str, hub: HubServer, cwd: Path) -> str:
    """Standard output of a fresh process that knows nothing but the address of the Hub."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "home"),
        "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(Path(hf_prune.__file__).parent.parent),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_loads_by_id_and_revision(hub: HubServer, tmp_path: Path) -> None:
    """Text from a branch and image from main: bit-identical logits, in a pipeline too, and as a teacher."""
    (text, tokens), (image, pixels) = narrow_model("bert"), narrow_model("resnet")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    hf_prune.push_to_hub(text, REPO, report=REPORT, revision="v2", processing_class=tokenizer())
    hf_prune.push_to_hub(image, "someone/image", report=REPORT, processing_class=processor)
    torch.save([tokens, pixels, logits(text, tokens), logits(image, pixels)], tmp_path / "expected.pt")
    code = """
import torch, hf_prune
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline
from PIL import Image
from hf_prune.parts.distillation import load_teacher
tokens, pixels, text_logits, image_logits = torch.load("expected.pt")
text = AutoModelForSequenceClassification.from_pretrained("someone/pruned", revision="v2")
image = AutoModelForImageClassification.from_pretrained("someone/image")
teacher = load_teacher("someone/image", image)
with torch.no_grad():
    assert torch.equal(text(**tokens).logits, text_logits)
    assert torch.equal(image(**pixels).logits, image_logits)
    assert torch.equal(teacher(**pixels).logits, image_logits) and teacher is not image
    read = pipeline("text-classification", model="someone/pruned", revision="v2", top_k=None)
    ids = read.tokenizer("good film", return_tensors="pt")
    expected = text(**ids).logits.softmax(-1)[0].sort(descending=True).values
    assert torch.allclose(torch.tensor([each["score"] for each in read(["good film"])[0]]), expected)
seen = pipeline("image-classification", model="someone/image")(Image.new("RGB", (40, 40), (200, 30, 90)))
print("loaded", len(seen))
"""
    assert run_python(code, hub, tmp_path) == "loaded 2\n"
    assert hub.asked("GET", "/cdn/") >= 2


def test_without_hf_prune_it_fails_loudly_or_loads_standalone(hub: HubServer, tmp_path: Path) -> None:
    model, tokens = narrow_model("bert")
    hf_prune.push_to_hub(model, "narrow", report=REPORT, encode="none")
    for kind in ENCODINGS:
        hf_prune.push_to_hub(model, kind, report=REPORT, encode=kind)
    hf_prune.push_to_hub(model, "standalone", report=REPORT, standalone=True)
    torch.save([tokens, logits(model, tokens)], tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification as Auto
for name in {["narrow", *ENCODINGS, "standalone"]}:
    try:
        Auto.from_pretrained("someone/" + name)
    except RuntimeError as error:
        print(name, "mismatched" in str(error))
tokens, expected = torch.load("expected.pt")
model = Auto.from_pretrained("someone/standalone", trust_remote_code=True)
assert torch.equal(model(**tokens).logits, expected)
assert "hf_prune" not in sys.modules
"""
    out = run_python(code, hub, tmp_path).splitlines()
    assert out == [f"{name} True" for name in ["narrow", *ENCODINGS, "standalone"]]


# From the trainer and the command line


def rows(count: int = 16) -> Dataset:
    ids = torch.randint(0, 40, (count, 6), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def trainer(folder: Path, **settings: Any) -> PruneTrainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=8, hub_strategy="end", hub_model_id=REPO, **settings,
    )  # fmt: skip
    return PruneTrainer(
        model=tiny_text_model(), args=arguments, train_dataset=rows(), eval_dataset=rows(8),
        pruning=MovementConfig(final_sparsity=0.5), compute_metrics=lambda _: {"accuracy": 0.75},
        processing_class=tokenizer(),
    )  # fmt: skip


def test_training_ends_with_a_push(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun = trainer(tmp_path / "out", push_to_hub=True), []
    assert REPO in hub.repos and commits(hub) == []
    monkeypatch.setattr(run.callback_handler, "on_push_begin", lambda *_: begun.append(len(commits(hub))))
    run.train()
    arrived = hub.files(REPO)
    card = arrived.pop("README.md").decode()
    here, plots = files_in(tmp_path / "out"), {name for name in arrived if name.startswith("plots/")}
    assert {name: arrived[name] for name in arrived.keys() - plots} == {
        name: data for name, data in here.items() if name not in ("training_args.bin", "trainer_state.json")
    }
    assert {"plots/sparsity.png", "plots/curves.png"} <= plots and all(f"]({plot})" in card for plot in plots)
    assert {"config.json", "model.safetensors", "pruning.json", "tokenizer.json"} <= arrived.keys()
    assert "model-index" not in card and len(commits(hub)) == 1

    run.evaluate()
    run.push_to_hub(commit_message="With scores", dataset_tags="someone/rows", language="en", tags=["mine"])
    card = hub.files(REPO)["README.md"].decode()
    data = ModelCard(card).data
    assert begun == [0, 1]  # loggers are told before each push
    assert commits(hub) == ["Model save", "With scores"] and not metadata_errors(card)
    assert {result.metric_type: result.metric_value for result in data.eval_results}["accuracy"] == 0.75
    assert data.datasets == ["someone/rows"] and data.language == ["en"] and "mine" in data.tags


def test_push_in_the_background_and_without_matplotlib(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_prune.checkpoint.hub.find_spec", lambda _: None)
    run = trainer(tmp_path / "out")
    run.train()
    assert hub.requests == []
    future = run.push_to_hub(blocking=False)
    assert future.result(timeout=60).oid == hub.repos[REPO].branches["main"][-1].oid
    assert not any(name.startswith("plots/") for name in hub.files(REPO))


def test_failing_push_leaves_the_trained_model_here(hub: HubServer, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", push_to_hub=True)
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(PruneError, match=rf"The model is safe in '.*out'; `hf-prune push .*out {REPO}` pushes it"):
        run.train()
    assert (tmp_path / "out/pruning.json").is_file() and run.report is not None and commits(hub) == []


def test_nothing_is_pushed_before_the_end(hub: HubServer, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", push_to_hub=True)
    for call in (run.push_to_hub, run.create_model_card):
        with pytest.raises(PruneError, match=r"not finished.*after train"):
            call()
    run.save_model(str(tmp_path / "middle"))
    assert (tmp_path / "middle/pruning.json").is_file() and commits(hub) == []


def test_missing_token_is_said_before_training(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PruneError, match="without a Hugging Face token"):
        trainer(tmp_path / "out", push_to_hub=True)


def test_command_line(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    words = ["push", str(folder), "pruned", "--revision", "v2", "--base-model", "someone/dense", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["commit"] == hub.repos[REPO].branches["v2"][-1].oid
    assert ModelCard(hub.files(REPO, "v2")["README.md"].decode()).data.base_model == "someone/dense"
    hub.fail("POST", "/create", status=401)
    done = CliRunner().invoke(app, ["push", str(folder), "pruned"])
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.strip().count("\n") == 0
    assert "run `hf auth login` again" in done.stderr
    done = CliRunner().invoke(app, ["push", str(tmp_path / "nothing"), "pruned"])
    assert done.exit_code == 1 and "must hold config.json" in done.stderr


# The guide

GUIDE = Path(__file__).parent.parent / "docs/sharing.md"


def test_the_guide_runs_as_it_stands(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in their order; "me" is the user of the loopback Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    names: dict[str, Any] = {
        "model": tiny_text_model(), "dense": tiny_text_model(), "rows": rows(), "tokenizer": tokenizer(),
        "batch": {"input_ids": torch.zeros(2, 5, dtype=torch.long)},
    }  # fmt: skip
    blocks = re.findall(r"```(python|sh)\n(.*?)```", GUIDE.read_text().replace("me/", "someone/"), re.DOTALL)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, GUIDE.name, "exec"), names)
        else:
            done = CliRunner().invoke(app, block.split()[1:])
            assert block.startswith("hf-prune ") and done.exit_code == 0, done.output
    assert [language for language, _ in blocks] == ["python", "python", "sh", "python", "python"]
    assert hub.repos["someone/name"].private and len(hub.repos["someone/trained"].branches["main"]) == 3
    pushed = ModelCard(hub.files("someone/trained")["README.md"].decode()).data
    assert pushed.eval_results and pushed.license == "apache-2.0"
    assert names["model"].config._name_or_path == "someone/name"
    assert ModelCard((tmp_path / "out/README.md").read_text()).data.base_model == "someone/dense"
