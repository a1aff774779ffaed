#!/usr/bin/env bash
# Tests, then the benchmark, on one GPU: benchmarks/device.sh [FOLDER]. Both end within eight minutes.
# What the machine lacks is installed from .wheels (or WHEELS), where benchmarks/device_wheels.sh has put it, without a
# network. DEVICE=cpu SMALL=1 tries it all out where there is no GPU. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/device} device=${DEVICE:-cuda} python=${PYTHON:-python3} wheels=${WHEELS:-.wheels}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export PEFT_DPS_TEST_DEVICE=$device CUBLAS_WORKSPACE_CONFIG=:4096:8 TOKENIZERS_PARALLELISM=false
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # plugins that happen to be there may not get on with xdist
status=0

# What tells most comes first, in case that the time is too short; warnings of other versions are no failures.
tests=(tests/contract/test_{,compact_}accelerators.py tests/unit/test_{on_device,golden}.py)
[ -n "${SMALL:-}" ] || tests+=(tests)
# shellcheck disable=SC2086 # TESTS are arguments
timeout -k 20 -s INT "${TEST_SECONDS:-210}" "$python" -m pytest -q -m device -p xdist -n "${WORKERS:-12}" --dist load \
    -W default --tb=short --durations=15 -p no:cacheprovider "${tests[@]}" ${TESTS:-} >"$out/tests.txt" 2>&1 || status=$?
tail -n 60 "$out/tests.txt"

sizes=()
[ -z "${SMALL:-}" ] || sizes=(--models decoder-toy --batch 2 --tokens 16 --stage-steps 3 --cycles 2)
timeout "${BENCHMARK_SECONDS:-230}" "$python" -m benchmarks.device --device "$device" --profile dps --seconds 190 \
    --out "$out/device_$device.json" ${sizes[@]+"${sizes[@]}"} 2>&1 | tee "$out/benchmark.txt" || status=$?
exit $status
