"""Every bad argument that one can think of ends in a sentence and a documented exit code, never in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_cli import cli
from tiny_files import save_image_model, save_pictures, save_reviews, save_text_model

BAD, USAGE = 1, 2

TRAIN = "train text -m {text} -d {reviews} -o {new}"
IMAGE = "train image -m {image} -d {pictures} -o {new}"
PRUNE = "prune -m {text} -o {new}"
MAGNITUDE = f"{PRUNE} --method magnitude"

# command -> exit code, and words of the sentence
CASES = {
    # no such thing
    "nonsense": (USAGE, "No such command"),
    "methods nonsense": (BAD, "there is no method 'nonsense'; known:"),
    "methods movment": (BAD, "did you mean 'movement'?"),
    "methods --nonsense": (USAGE, "No such option"),
    # methods and their options
    f"{PRUNE}": (USAGE, "name a method with --method"),
    f"{PRUNE} --method magnitud": (BAD, "did you mean 'magnitude'?"),
    f"{PRUNE} --method movement --final-sparsity 0.5": (BAD, "prunes while it trains"),
    f"{MAGNITUDE}": (BAD, "needs one goal of"),
    f"{MAGNITUDE} --final-sparsity": (USAGE, "--final-sparsity needs a value"),
    f"{MAGNITUDE} --final-sparsity half": (USAGE, "--final-sparsity takes NUMBER, got 'half'"),
    f"{MAGNITUDE} --final-sparsity 1.5": (BAD, "final_sparsity must be a number in [0, 1), got 1.5"),
    f"{MAGNITUDE} --final-sparsity nan": (BAD, "final_sparsity must be a number in [0, 1), got nan"),
    f"{MAGNITUDE} --final-sparsity -0.5": (BAD, "got -0.5"),
    f"{MAGNITUDE} --final-sparsity 0.5 --target-flops 0.5": (BAD, "a run has one goal"),
    f"{MAGNITUDE} --target-latency 2": (BAD, "target_latency must be a number in (0, 1], got 2"),
    f"{MAGNITUDE} --final-sparcity 0.5": (USAGE, "did you mean '--final-sparsity'?"),
    f"{MAGNITUDE} --final-sparsity 0.5 --scope galactic": (BAD, "scope must be"),
    f"{MAGNITUDE} --final-sparsity 0.5 --seed x": (USAGE, "--seed takes INTEGER, got 'x'"),
    f"{MAGNITUDE} --final-sparsity 0.5 --include nothing.*": (BAD, "matches none of the model's"),
    f"{MAGNITUDE} --final-sparsity 0.5 --score l7": (BAD, "score must be"),
    f"{MAGNITUDE} --final-sparsity 0.5 --encode zip": (BAD, "encode must be one of auto, none"),
    f"{MAGNITUDE} --final-sparsity 0.5 extra": (USAGE, "no such option: extra"),
    f"{MAGNITUDE} --target-params 0.0001": (BAD, ""),
    f"{TRAIN} --method magnitude --max-metric-drop 0.1 --normalised-groups=maybe": (USAGE, "takes true or false"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --block-shape 4": (USAGE, "--block-shape needs 2 values"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --block-shape 4 x": (USAGE, "takes INTEGER, got 'x'"),
    f"{TRAIN} --method movement --target-flops 0.5": (BAD, "needs final_sparsity"),
    # config files
    f"{PRUNE} --config {{none}}.json": (BAD, "--config: there is no file"),
    f"{PRUNE} --config {{reviews}}": (BAD, "cannot be read as JSON"),
    f"{PRUNE} --config {{list}}": (BAD, "must hold one JSON object, got a list"),
    f"{PRUNE} --config {{typo}}": (BAD, "did you mean 'final_sparsity'?"),
    f"{PRUNE} --config {{text}}": (BAD, "cannot be read as JSON"),
    # models
    "prune -m {none} -o {new} --method magnitude --final-sparsity 0.5": (BAD, "no model can be loaded from"),
    "prune -m no/such-model -o {new} --method magnitude --final-sparsity 0.5": (BAD, "no model can be loaded from"),
    "prune -m {empty} -o {new} --method magnitude --final-sparsity 0.5": (BAD, "no model can be loaded from"),
    "prune -m {torn} -o {new} --method magnitude --final-sparsity 0.5": (BAD, "the weights of"),
    "train text -m {none} -d {reviews} -o {new}": (BAD, "no model can be loaded from"),
    "train text -m {image} -d {reviews} -o {new}": (BAD, "which AutoModelForSequenceClassification does not take"),
    "train text -m {mute} -d {reviews} -o {new}": (BAD, "no tokenizer can be loaded from"),
    "train text -m demo:bart -d {reviews} -o {new}": (BAD, "there is no built-in model 'bart'"),
    "train image -m {text} -d {pictures} -o {new}": (BAD, "AutoModelForImageClassification"),
    "train image -m {bare} -d {pictures} -o {new}": (BAD, "pass --image-size"),
    # data
    "train text -m {text} -o {new}": (USAGE, "Missing option '--data'"),
    "train text -m {text} -d {none}.csv -o {new}": (BAD, "there is no file"),
    "train text -m {text} -d no/such-data -o {new}": (BAD, "data 'no/such-data' cannot be read"),
    "train text -m {text} -d {empty} -o {new}": (BAD, "cannot be read"),
    "train text -m {text} -d demo:fashion_mnist -o {new}": (BAD, "no built-in data 'fashion_mnist' for this task"),
    "train text -m {text} -d demo:movies -o {new}": (BAD, "no built-in data 'movies' for this task; known:"),
    "train text -m {text} -d {broken} -o {new}": (BAD, "cannot be read"),
    "train text -m {text} -d {notes} -o {new}": (BAD, "the data has no column label or labels or class"),
    "train text -m {text} -d {scores} -o {new}": (BAD, "labels must be classes"),
    "train text -m {text} -d {same} -o {new}": (BAD, "has 1 class"),
    "train text -m {text} -d {blank} -o {new}": (BAD, ""),
    f"{TRAIN} --label-column lable": (BAD, "did you mean 'label'?"),
    f"{TRAIN} --input-column txt": (BAD, "did you mean 'text'?"),
    f"{TRAIN} --eval-data {{none}}.csv": (BAD, "there is no file"),
    f"{TRAIN} --eval-data {{text}}": (BAD, "there is no file"),
    f"{TRAIN} --eval-data {{other}}": (BAD, "which no training row has"),
    f"{TRAIN} --eval-split dev": (BAD, "--eval-split"),
    f"{TRAIN} --rows 0": (USAGE, "--rows"),
    f"{TRAIN} --max-length x": (USAGE, "--max-length"),
    f"{IMAGE} --image-size 0": (USAGE, "--image-size"),
    f"{IMAGE} --input-column image --input-column label": (BAD, ""),
    "train image -m {image} -d {reviews} -o {new}": (BAD, "name it with --input-column"),
    "train audio -m {text} -d {reviews} -o {new}": (USAGE, "audio"),
    # training
    f"{TRAIN} --learning-rate fast": (USAGE, "invalid float value: 'fast'"),
    f"{TRAIN} --lerning-rate 1": (USAGE, "did you mean '--learning-rate'?"),
    f"{TRAIN} --optim magic": (USAGE, "invalid choice: 'magic'"),
    f"{TRAIN} --output-dir elsewhere": (USAGE, "leave --output-dir out"),
    f"{TRAIN} --metric bleurgh": (BAD, "metric 'bleurgh' is none of"),
    f"{TRAIN} --metric span_f1": (BAD, "needs a metric of class labels"),
    f"{TRAIN} --metric f1 --average sideways --max-steps 1": (BAD, "average must be one of"),
    f"{TRAIN} --eval-strategy steps --load-best-model-at-end --save-strategy epoch": (BAD, "save"),
    f"{TRAIN} --teacher self": (USAGE, "--teacher goes with a --method"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --distill-alpha 0.5": (USAGE, "need a --teacher"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --teacher {{none}}": (BAD, "no teacher can be loaded"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --teacher {{image}}": (BAD, ""),
    f"{TRAIN} --method movement --final-sparsity 0.5 --teacher self --distill-alpha 2": (BAD, "alpha must be"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --teacher self --distill-temperature 0": (BAD, "temperature"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --max-steps 1 --warmup-steps 1": (BAD, "warm-up takes"),
    f"{TRAIN} --method movement --final-sparsity 0.5 --begin 0.9 --end 0.1": (BAD, "begin must be below end"),
    # output folders
    f"{TRAIN} --resume": (BAD, "there is no checkpoint in"),
    f"{TRAIN} --resume --overwrite": (USAGE, "choose one"),
    "train text -m {text} -d {reviews} -o {text}": (BAD, "holds a run already"),
    "train text -m {text} -d {reviews} -o {reviews}": (BAD, "is a file"),
    "prune -m {text} -o {reviews} --method magnitude --final-sparsity 0.5": (BAD, ""),
    # what is there already
    "inspect {none}": (BAD, "no model can be loaded from"),
    "inspect {text} --sensitivity": (USAGE, "name them with --data"),
    "inspect {text} --diagnose": (USAGE, "--diagnose needs labelled rows"),
    "inspect {text} --sensitivity -d {pictures}": (BAD, ""),
    "inspect {text} --check --plans 0": (USAGE, "--plans"),
    "inspect {image} --sensitivity -d {reviews}": (BAD, "the model tells 3 classes apart"),
    "bench {none}": (BAD, "no model can be loaded from"),
    "bench {text} --length 5000": (BAD, "--length: the model reads at most 16 tokens, got 5000"),
    "bench {text} --form fast": (USAGE, "--form"),
    "bench {text} --threads 0": (USAGE, "--threads"),
    "bench {text} {text} --length 8 --rounds 2 --save": (BAD, "has no pruning.json"),
    "bench": (USAGE, "Missing argument"),
    "report {none}": (BAD, "has no pruning.json"),
    "report {text}": (BAD, "has no pruning.json"),
    "report {garbled}": (BAD, "pruning.json"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    made = {
        "text": save_text_model(folder / "text"),
        "image": save_image_model(folder / "image"),
        "bare": save_image_model(folder / "bare"),
        "mute": save_text_model(folder / "mute"),
        "torn": save_text_model(folder / "torn"),
        "reviews": save_reviews(folder / "reviews.csv"),
        "pictures": save_pictures(folder / "pictures"),
        "empty": str(folder / "empty"),
        "garbled": str(folder / "garbled"),
        "new": str(folder / "new"),
        "none": str(folder / "none"),
    }
    (folder / "bare" / "preprocessor_config.json").unlink()
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    (folder / "torn" / "model.safetensors").write_bytes(b"torn")
    (folder / "empty").mkdir()
    (folder / "garbled").mkdir()
    (folder / "garbled" / "pruning.json").write_text('{"method": 3}')
    texts = {
        "list": "[1]",
        "typo": json.dumps({"method": "magnitude", "final_sparcity": 0.5}),
        "broken": '{"text": "a", \n{',
        "notes": "text,note\na,b\nc,d\n",
        "scores": "text,label\na,0.5\nb,0.25\n",
        "same": "text,label\na,x\nb,x\n",
        "blank": "",
        "other": "text,label\na,ugly\nb,good\n",
    }
    endings = {"list": "json", "typo": "json", "broken": "json"}
    for name, text in texts.items():
        path = folder / f"{name}.{endings.get(name, 'csv')}"
        path.write_text(text)
        made[name] = str(path)
    return made


@pytest.mark.parametrize("command", CASES)
def test_bad_arguments_give_a_sentence(command: str, files: dict[str, str]) -> None:
    code, words = CASES[command]
    done = cli(*(word.format(**files) for word in command.split()), *(["--use-cpu"] * command.startswith("train ")))
    plain = " ".join(done.err.replace("│", " ").split())
    assert done.code == code, plain
    assert " ".join(words.split()) in plain
    assert done.out == ""  # and an exception that came through would have ended the test in `cli`
    if code == BAD:
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("hf-prune: ") and len(last.split()) >= 5, last
    assert not Path(files["new"]).joinpath("config.json").exists(), "nothing half-written is left"
