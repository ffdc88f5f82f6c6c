"""Small random checkpoints, drafters and tokenizers, in the layouts that are published.

python -m scripts.small checkpoint DIR --variant tiny
python -m scripts.small drafter DIR --variant tiny --kind dflash
python -m scripts.small tokenizer DIR --variant tiny
"""
