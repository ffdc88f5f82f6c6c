#!/usr/bin/env bash
# From nothing to right answers: nano, the small trained model of the package, hears, reads, sees and watches.
#
#   bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv plot

python -m scripts.demo --out demo
