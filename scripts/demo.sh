#!/usr/bin/env bash
# From nothing to answers about a photo, a voice and a video, and to speech: make a tiny checkpoint, convert it, ask.
#
#   bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv plot

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
tokens="${DEMO_TOKENS:-24}"

echo "== A tiny Qwen3-Omni in the Hugging Face layout. ITS WEIGHTS ARE RANDOM: the answers will be nonsense."
python -m scripts.small checkpoint "$work/hf" --variant tiny

echo "== Convert it: python -m convert SRC DST"
python -m convert "$work/hf" "$work/checkpoint"

echo "== Ask about a photo (china.jpg) and a spoken sentence (debian_universal_os.flac)"
omni-jax generate --model "$work/checkpoint" --image tests/data/china.jpg --audio tests/data/debian_universal_os.flac \
    --text "What do you see, and what is being said?" --max-new-tokens "$tokens"

echo "== Ask about a video, with its sound (hello_with_speech.mp4)"
omni-jax generate --model "$work/checkpoint" --video tests/data/hello_with_speech.mp4 --use-audio-in-video \
    --text "What happens in this video?" --max-new-tokens "$tokens"

echo "== Let it speak (demo/answer.wav), and draw what it said (demo/answer.png)"
mkdir -p demo
omni-jax generate --model "$work/checkpoint" --text "Good morning! How are you?" --max-new-tokens "$tokens" \
    --speak demo/answer.wav --speaker chelsie --max-frames 60
python -m scripts.plot_speech --model "$work/checkpoint" --text "Good morning! How are you?" --speaker chelsie \
    --max-new-tokens "$tokens" --max-frames 60 --out demo/answer.png

echo "== Done. Text and sound are noise because the weights are random; the whole path from file to answer is real."
