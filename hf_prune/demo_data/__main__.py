"""`python -m hf_prune.demo_data`: which data sets and models are installed, with rows per class."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import DatasetDict

from hf_prune import demo_data

LOADERS: tuple[Callable[..., Any], ...] = (
    demo_data.load_movie_sentiment,
    demo_data.load_bbc_news,
    demo_data.load_sense_pairs,
    demo_data.load_fashion_mnist,
    demo_data.load_emoji,
    demo_data.minilm_path,
    demo_data.load_mobilenet_v2,
)


def describe(load: Callable[..., Any]) -> list[str]:
    """What the loader finds, or how to install what it misses, as lines."""
    try:
        found = load()
    except demo_data.MissingPackage as error:
        return str(error).splitlines()
    return rows_per_class(found) if isinstance(found, DatasetDict) else ["found"]


def rows_per_class(data: DatasetDict) -> list[str]:
    """One line a split."""
    names = data["train"].features["label"].names
    lines = []
    for split, part in data.items():
        counts = Counter(part["label"])
        classes = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(names))
        lines.append(f"{split}: {len(part)} rows ({classes})")
    return lines


if __name__ == "__main__":
    for load in LOADERS:
        print(f"{load.__name__}:", *describe(load), sep="\n  ")
