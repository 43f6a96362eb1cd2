#!/usr/bin/env bash
# Packs the program with what a first run and `gpu-check` need, for a machine that has PyTorch 2.11 and no compiler.
# Nothing in it knows where it was built: no rpath, no paths in messages.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "bundle: $*" >&2; exit 1; }

largest=$((60 * 1024 * 1024))
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=child-tuning-$version-linux-x86_64
export LIBTORCH=${LIBTORCH:-$PWD/.venv/libtorch}
cargo_home=${CARGO_HOME:-$HOME/.cargo}

# A build of its own, so that the working build keeps its rpath and is not compiled again.
export CHILD_TUNING_BUNDLE=1 CARGO_TARGET_DIR=target/bundle
maps=("$PWD=." "$cargo_home=cargo" "$LIBTORCH=libtorch" "$(realpath "$LIBTORCH")=libtorch")
RUSTFLAGS=$(printf -- '--remap-path-prefix=%s ' "${maps[@]}")
CXXFLAGS=$(printf -- '-ffile-prefix-map=%s ' "${maps[@]}")
export RUSTFLAGS CXXFLAGS
cargo build --release --locked --quiet

folder=target/bundle/$name
rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/models" "$folder/benches" "$folder/scripts"
cp target/bundle/release/child-tuning "$folder/bin/"
strip --strip-all "$folder/bin/child-tuning"
cp scripts/launcher.sh "$folder/child-tuning"
cp scripts/bundle_README.md "$folder/README.md"
cp LICENSE "$folder/" 2>/dev/null || true
cp -r experiments "$folder/"
cp -r data "$folder/"
cp -r tests/fixtures/bert_pair "$folder/models/tiny"
rm "$folder/models/tiny/reference.safetensors" "$folder/models/tiny/examples.json"
# What gpu-check compares with, where python3 has transformers.
cp benches/peer.py benches/rte_lengths.txt "$folder/benches/"
cp scripts/released_optimizer.py "$folder/scripts/"

if readelf -d "$folder/bin/child-tuning" | grep -qE 'R(UN)?PATH'; then stop "the program has an rpath"; fi
for path in "$PWD" "$cargo_home" "$(realpath "$LIBTORCH")"; do
    if grep -qF "$path" "$folder/bin/child-tuning"; then stop "the program still names $path"; fi
done

# The same content gives the same bytes.
archive=target/bundle/$name.tar.gz
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime='2026-01-01 00:00Z' \
    -C target/bundle -cf - "$name" | gzip -9n > "$archive"
size=$(stat -c %s "$archive")
[ "$size" -le "$largest" ] || stop "$archive has $size bytes, more than $largest"
echo "$archive ($((size / 1024)) KiB)"
