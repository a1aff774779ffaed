#!/usr/bin/env bash
# Downloads into .wheels (or WHEELS) what benchmarks/device.sh needs and a machine with torch, transformers and accelerate
# lacks: about 50 MB, in the versions of constraints.txt, for Linux on x86-64 and the Python that PYTHON_VERSION names.
set -euo pipefail
cd "$(dirname "$0")/.."
platforms=()
for each in manylinux_2_{17,24,28}_x86_64 manylinux2014_x86_64; do platforms+=(--platform "$each"); done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version \
    "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "${WHEELS:-.wheels}" -c constraints.txt peft zstandard bitsandbytes pytest
