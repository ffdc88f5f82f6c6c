"""Write a small random checkpoint, a drafter for one, or a tokenizer. Weights are random: replies are noise."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from scripts.small.configs import Variant

Dtype = Literal["float32", "bfloat16"]
Directory = Annotated[Path, tyro.conf.Positional]


def checkpoint(
    directory: Directory,
    variant: Variant = "tiny",
    seed: int = 0,
    dtype: Dtype = "float32",
    shards: int = 2,
    tokenizer: Path | None = None,
) -> None:
    """Write a Qwen3-Omni checkpoint in the Hugging Face layout.

    Args:
        directory: where to write it.
        variant: its sizes.
        seed: of the random weights.
        dtype: of the weights.
        shards: number of safetensors files.
        tokenizer: a tokenizer.json to use instead of the variant's own.
    """
    from scripts.small.checkpoint import make_checkpoint

    path = make_checkpoint(directory, variant, seed, dtype, shards, tokenizer)
    print(f"{variant} checkpoint with random weights in {path}")


def drafter(
    directory: Directory,
    variant: Literal["tiny", "small", "odd"] = "tiny",
    kind: Literal["dflash", "eagle3"] = "dflash",
    seed: int = 0,
    dtype: Dtype = "float32",
) -> None:
    """Write a drafter in its published layout.

    Args:
        directory: where to write it.
        variant: the checkpoint that it drafts for.
        kind: DFlash, which drafts blocks, or EAGLE-3, which drafts chains and trees.
        seed: of the random weights.
        dtype: of the weights.
    """
    from scripts.small.drafter import make_drafter

    path = make_drafter(directory, variant, kind, seed, dtype)
    print(f"{kind} drafter for {variant!r} with random weights in {path}")


def tokenizer(directory: Directory, variant: Variant = "tiny", public: bool = False) -> None:
    """Write a tokenizer and its chat template.

    Args:
        directory: where to write them.
        variant: the checkpoint that they belong to.
        public: write the files of the public checkpoint (vocab.json, merges.txt) instead of tokenizer.json.
    """
    from scripts.small.tokenizer import build_tokenizer, publish, write_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, build_tokenizer(variant))
    if public:
        publish(directory)
    print(f"tokenizer of {variant!r} in {directory}")


if __name__ == "__main__":
    commands = {"checkpoint": checkpoint, "drafter": drafter, "tokenizer": tokenizer}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m scripts.small", description=__doc__)
