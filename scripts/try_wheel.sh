#!/usr/bin/env bash
# Build the wheel and use it away from the checkout: imports, help, a round trip of NF4, the doctor.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m build --wheel --outdir "$work" . >/dev/null
python3 -m venv "$work/venv"
constraint=()
command -v nvidia-smi >/dev/null || constraint=(--constraint "$PWD/constraints.txt")
"$work/venv/bin/pip" install --quiet "${constraint[@]}" "$work"/nybble-*.whl
cd "$work"
"$work/venv/bin/nybble" --help >/dev/null
"$work/venv/bin/nybble" doctor
"$work/venv/bin/python" -c "import nybble; print(nybble.__file__)"
