"""Image classification: grey clothes (Debian's dataset-fashion-mnist) and colour emoji (npm's emoji-datasource)."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.demo_data.locate import deb_files, npm_folder
from hf_prune.demo_data.splits import Row, normal, split_limit, to_dataset, to_dataset_dict

if TYPE_CHECKING:
    import numpy as np
    from datasets import DatasetDict
    from PIL.Image import Image as Picture

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
EMOJI_CLASSES = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]
FASHION_VALIDATION_ROWS = 5000


def load_fashion_mnist(limit: int | None = None) -> DatasetDict:
    """Fashion-MNIST, 28 x 28 grey. Columns: image, label.

    The published test images are `test`, the last 5,000 published training images `validation`. `limit` keeps the first
    rows of train, and a quarter of that number of the others.
    """
    from datasets import ClassLabel, DatasetDict, Features, Image
    from PIL.Image import fromarray

    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = deb_files("dataset-fashion-mnist", names)
    train_x, train_y, test_x, test_y = (read_idx(files[name]) for name in names)
    cut = len(train_x) - FASHION_VALIDATION_ROWS
    parts = {
        "train": (train_x[:cut], train_y[:cut]),
        "validation": (train_x[cut:], train_y[cut:]),
        "test": (test_x, test_y),
    }
    features = Features({"image": Image(), "label": ClassLabel(names=FASHION_CLASSES)})
    result = DatasetDict()
    for split, (x, y) in parts.items():
        count = split_limit(split, limit)
        columns = {"image": [_png(fromarray(image)) for image in x[:count]], "label": y[:count].tolist()}
        result[split] = to_dataset("fashion-mnist", split, columns, features)
    return result


def load_emoji(limit: int | None = None, vendors: Sequence[str] = ("google", "twitter")) -> DatasetDict:
    """Colour emoji drawings, 64 x 64 RGB on white, in the nine Unicode groups, without skin-tone variants.

    limit: rows of train to keep, and a quarter of that number of the others.
    Columns: image, label, vendor, name.
    All drawings of one emoji, whoever drew it and of whatever gender, share a split.
    """
    from datasets import ClassLabel, Features, Image, Value

    folders = {vendor: npm_folder(f"emoji-datasource-{vendor}", "16.0.0") for vendor in vendors}
    features = Features(
        {"image": Image(), "label": ClassLabel(names=EMOJI_CLASSES), "vendor": Value("string"), "name": Value("string")}
    )
    rows = (row for vendor, root in folders.items() for row in _drawings(root, vendor))
    return to_dataset_dict("emoji", rows, features, limit)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: two zero bytes, type, rank, big-endian shape, values."""
    import numpy as np

    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def ungendered(name: str) -> str:
    """The name of an emoji without the words that tell its gender."""
    return normal(re.sub(r"\b(man|men|woman|women|person|people|male|female)\b", " ", name))


def _drawings(root: Path, vendor: str) -> Iterator[Row]:
    for entry in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
        path = root / "img" / vendor / "64" / entry["image"]
        if entry["category"] not in EMOJI_CLASSES or not entry.get(f"has_img_{vendor}") or not path.is_file():
            continue
        name = (entry["name"] or entry["short_name"]).lower()
        columns = {
            "image": _png(_on_white(path)),
            "label": EMOJI_CLASSES.index(entry["category"]),
            "vendor": vendor,
            "name": name,
        }
        yield Row(f"{vendor}|{entry['unified']}", ungendered(name), columns)


def _on_white(path: Path) -> Picture:
    from PIL import Image

    drawing = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    return canvas.convert("RGB")


def _png(picture: Picture) -> dict[str, Any]:
    """As `datasets.Image` stores it; little compression, since it is written once and read at once."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
