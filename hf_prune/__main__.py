"""`python -m hf_prune`: the command line, so that `accelerate launch -m hf_prune train text ...` works."""

from hf_prune.cli import main

main()
