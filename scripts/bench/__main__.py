"""Measure text, speech, drafting, training, drafters, evaluation with speech, loading, scaling or a server.

python -m scripts.bench text --shape medium --against hf            # beside transformers
python -m scripts.bench text --shape medium --beside ../other       # beside another checkout of this project
python -m scripts.bench reading --shape medium                      # decoding beside the speed of memory
python -m scripts.bench rounding                                    # experts in eight bits beside exact ones
python -m scripts.bench speech --batch 8 --against hf
python -m scripts.bench drafting --new 129
python -m scripts.bench train --shape medium --against hf
python -m scripts.bench drafters --model ckpt --drafter dflash --drafter oracle:0.3 --prompts question.jsonl
python -m scripts.bench spoken --model ckpt                         # evaluate in slots beside one at a time
python -m scripts.bench loading --shape large
python -m scripts.bench scaling
python -m scripts.bench serve --model ckpt --prompts question.jsonl  # or --url of a server that runs
"""

import sys

import tyro

from omni_jax.errors import OmniError
from scripts.bench import compare
from scripts.bench.options import Delays, Drafters, Loading, Rounding, Scaling, Serve, Speech, Spoken, Text, Train

# What runs JAX is imported by the subcommand that needs it: measured processes start from settings of their own.


def text(options: Text) -> None:
    """Measure text: prefill, time to the first token, decoding."""
    import scripts.bench.text as module

    compare.report(module, options)


def reading(options: Text) -> None:
    """Measure how near decoding comes to the speed at which memory is read."""
    from scripts.bench.reading import report

    report(options)


def rounding(options: Rounding) -> None:
    """Measure how far rounded experts are from exact ones, at the widths of the public model."""
    from scripts.bench.rounding import report

    report(options)


def speech(options: Speech) -> None:
    """Measure speech: Talker, vocoder, time to the first audio, a whole spoken reply."""
    import scripts.bench.speech as module

    compare.report(module, options)


def drafting(options: Text) -> None:
    """Measure the drafting loop itself, with an oracle whose drafts are all right."""
    import scripts.bench.drafting as module

    compare.report(module, options)


def train(options: Train) -> None:
    """Measure training: a step of full fine-tuning."""
    import scripts.bench.train as module

    compare.report(module, options)


def drafters(options: Drafters) -> None:
    """Compare drafters on prompts: acceptance, cost, speed-up."""
    from scripts.bench.drafters import report

    report(options)


def spoken(options: Spoken) -> None:
    """Measure evaluation with speech, in slots beside one at a time."""
    from scripts.bench.spoken import report

    report(options)


def loading(options: Loading) -> None:
    """Measure the memory that a host needs while it loads a checkpoint onto a mesh."""
    from scripts.bench.loading import report

    report(options)


def scaling(options: Scaling) -> None:
    """Measure decoding on meshes of more and more devices, with a fixed batch and with one that grows."""
    from scripts.bench.scaling import report

    report(options)


def serve(options: Serve) -> None:
    """Measure a server as its clients see it: latencies, throughput, speech, accepted drafts."""
    from scripts.bench.serving import report

    report(options)


def delays(options: Delays) -> None:
    """Measure a server's delays: of streams while a long prompt is read, and of a conversation's second turn."""
    from scripts.bench.delays import report

    report(options)


def main() -> None:
    """Run the subcommand of the command line."""
    commands = {
        f.__name__: f
        for f in (text, reading, rounding, speech, drafting, train, drafters, spoken, loading, scaling, serve, delays)
    }
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction)
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m scripts.bench", description=__doc__, config=flags
        )
    except OmniError as error:
        sys.exit(f"scripts.bench: {error}")


if __name__ == "__main__":
    main()
