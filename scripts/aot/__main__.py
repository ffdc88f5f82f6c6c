"""Read what the compiler makes of the model's programs, without a GPU.

python -m scripts.aot report --mesh expert=4      # compile them for H200s
python -m scripts.aot train --mesh fsdp=8         # the same of training steps
python -m scripts.aot plot found.json --out h200.png    # draw what report --json wrote
python -m scripts.aot hlo decode.hlo              # figures of an optimised HLO text
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro


def hlo(file: Annotated[Path, tyro.conf.Positional]) -> int:
    """Print kernels, launches, the largest new array and the collectives of a program.

    Args:
        file: an optimised HLO text, as `report --dump` writes it.
    """
    from scripts.aot.hlo import Module

    module = Module(file.read_text())
    size, op = module.largest()
    print(f"{module.kernels()} kernels, {module.launches()} launches, largest new array {size / 1e9:.3f} GB {op}")
    for kind, (count, sent) in module.collectives().items():
        print(f"{count} {kind}, {sent / 1e3:.1f} kB sent by one device")
    return 0


if __name__ == "__main__":
    # Before JAX is imported: programs are compiled for described GPUs, on a CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from scripts.aot.plot import plot
    from scripts.aot.report import report, train

    commands = {"report": report, "train": train, "plot": plot, "hlo": hlo}
    sys.exit(tyro.extras.subcommand_cli_from_dict(commands, prog="python -m scripts.aot", description=__doc__))
