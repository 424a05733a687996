"""Sentence pairs from WordNet 3.0 (Debian's wordnet-base): does this definition fit the word in this sentence?"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_prune.demo_data.locate import deb_files
from hf_prune.demo_data.splits import Row, shuffled, split_of, to_dataset_dict

if TYPE_CHECKING:
    from datasets import DatasetDict

FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
# A wrong definition comes from the same circle: (lemma, part of speech) -> which circle its usages belong to.
CIRCLES: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "other_word": lambda lemma, pos: (split_of(lemma), pos),
    "other_sense": lambda lemma, pos: (lemma, pos),
}


@dataclass(frozen=True)
class Sense:
    """One meaning of a word, with the usage examples that the dictionary gives (of any word of the synset)."""

    lemma: str
    pos: str
    synset: str
    definition: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class _Usage:
    """A sense together with the one example in which its word stands."""

    lemma: str
    synset: str
    definition: str
    example: str


def load_sense_pairs(limit: int | None = None, negatives: str = "other_word") -> DatasetDict:
    """Sentence pairs: "word: usage example" and a definition, which fits (yes) or does not (no).

    limit: rows of train to keep, and a quarter of that number of the others.
    negatives: where a wrong definition comes from, "other_word" (of the same part of speech) or "other_sense" of the
    same word (much harder).
    Columns: sentence1, sentence2, word, label (no, yes). The word stands only in sentence1 and each definition is used
    about as often for "yes" as for "no", so neither sentence alone gives the answer. No word is in two splits.
    """
    from datasets import ClassLabel, Features, Value

    if negatives not in CIRCLES:
        raise ValueError(f"negatives must be one of {sorted(CIRCLES)}, got {negatives!r}.")
    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "word": Value("string"),
            "label": ClassLabel(names=["no", "yes"]),
        }
    )
    senses = _senses(deb_files("wordnet-base", FILES.values()))
    return to_dataset_dict("word-senses", _pairs(_circles(senses, CIRCLES[negatives])), features, limit)


def regular_forms(lemma: str) -> re.Pattern[str]:
    """Matches a word and its regular inflections: run, runs, running, but not runt."""
    forms = [re.escape(lemma) + r"(?:s|es|'s|d|ed|ing|r|er|st|est|ly)?"]
    if lemma.endswith("e"):
        forms.append(re.escape(lemma[:-1]) + "ing")
    if lemma.endswith("y"):
        forms.append(re.escape(lemma[:-1]) + "i(?:es|ed|er|est)")
    if lemma[-1] in "bdglmnprt":
        forms.append(re.escape(lemma + lemma[-1]) + "(?:ed|ing|er|est)")
    return re.compile(r"\b(?:" + "|".join(forms) + r")\b", re.IGNORECASE)


def _senses(files: dict[str, Path]) -> dict[tuple[str, str], list[Sense]]:
    """(lemma, part of speech) -> its senses, in the dictionary's order."""
    senses: dict[tuple[str, str], list[Sense]] = defaultdict(list)
    for pos, name in FILES.items():
        with open(files[name], encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("  "):  # the licence
                    continue
                for sense in _parse(line, pos):
                    senses[sense.lemma, pos].append(sense)
    return senses


def _parse(line: str, pos: str) -> Iterator[Sense]:
    """The synset of one line (`wndb(5WN)`: offset, file, type, word count in hex, words ... | gloss), per word."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    definition = gloss.split('"', 1)[0].strip().rstrip(";:").strip()
    examples = tuple(example.strip() for example in re.findall(r'"([^"]+)"', gloss))
    for i in range(int(fields[3], 16)):
        lemma = fields[4 + 2 * i].split("(")[0].lower()
        yield Sense(lemma, pos, pos + fields[0], definition, examples)


def _circles(
    senses: dict[tuple[str, str], list[Sense]], circle_of: Callable[[str, str], tuple[str, str]]
) -> list[list[_Usage]]:
    """The usages of every word that has two or more, by circle, each circle in its fixed shuffled order."""
    circles: dict[tuple[str, str], list[_Usage]] = defaultdict(list)
    used: set[tuple[str, str]] = set()
    for (lemma, pos), entries in sorted(senses.items()):
        if "_" in lemma or len(lemma) < 2:
            continue
        usages = _usages(entries, used)
        if len(usages) >= 2:
            used.update((usage.synset, usage.example) for usage in usages)
            circles[circle_of(lemma, pos)].extend(usages)
    return [sorted(members, key=lambda u: shuffled(u.lemma + u.synset)) for _, members in sorted(circles.items())]


def _usages(entries: list[Sense], used: set[tuple[str, str]]) -> list[_Usage]:
    """Each sense of one word with its first example of three words or more that has the word and is not yet used."""
    told = [sense for sense in entries if sense.definition and sense.examples]
    if len(told) < 2:  # most words: spares compiling their pattern
        return []
    pattern = regular_forms(told[0].lemma)
    usages = []
    for sense in told:
        fitting = (
            example
            for example in sense.examples
            if (sense.synset, example) not in used and len(example.split()) >= 3 and pattern.search(example)
        )
        if example := next(fitting, None):
            usages.append(_Usage(sense.lemma, sense.synset, sense.definition, example))
    return usages


def _pairs(circles: list[list[_Usage]]) -> Iterator[Row]:
    for members in circles:
        for i, usage in enumerate(members):
            wrong = _next_wrong(members, i)
            for label, definition in ((1, usage.definition), (0, wrong.definition)):
                columns = {
                    "sentence1": f"{usage.lemma}: {usage.example}",
                    "sentence2": definition,
                    "word": usage.lemma,
                    "label": label,
                }
                yield Row(f"{usage.lemma}|{usage.synset}|{label}", usage.lemma, columns)


def _next_wrong(circle: list[_Usage], i: int) -> _Usage:
    """The next usage around the circle that is of another word; in a circle of one word, simply the next."""
    later = (circle[(i + step) % len(circle)] for step in range(1, len(circle)))
    following = circle[(i + 1) % len(circle)]
    return next((usage for usage in later if usage.lemma != circle[i].lemma), following)
