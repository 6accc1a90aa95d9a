#!/usr/bin/env bash
# Generate flower_split/proto/trunk_pb2.py and .pyi from the protocol; with --check, only compare with what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python -m grpc_tools.protoc -Iproto \
    --python_out="$out" --pyi_out="$out" \
    proto/flower_split/proto/trunk.proto
if [ "${1:-}" = "--check" ]; then
    for file in "$out"/flower_split/proto/*; do
        diff -u "flower_split/proto/$(basename "$file")" "$file" ||
            { echo "flower_split/proto is stale: run proto/generate.sh" >&2; exit 1; }
    done
    echo "flower_split/proto is up to date"
else
    cp "$out"/flower_split/proto/* flower_split/proto/
fi
