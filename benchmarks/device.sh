#!/usr/bin/env bash
# Tests, then the benchmark, on one GPU: benchmarks/device.sh [FOLDER]. Both end within eight minutes.
# DEVICE=cpu SMALL=1 tries it out where there is none. PYTHON names the interpreter, which has what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/device} device=${DEVICE:-cuda} python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export PEFT_DPS_TEST_DEVICE=$device CUBLAS_WORKSPACE_CONFIG=:4096:8 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
status=0
timeout -s INT "${TEST_SECONDS:-230}" "$python" -m pytest -q -m device -n "${WORKERS:-8}" --dist worksteal ${TESTS:-} \
    2>&1 | tee "$out/tests.txt" || status=$?
case ${SMALL:-} in
'') sizes=() ;;
*) sizes=(--models decoder-toy --batch 2 --tokens 16 --stage-steps 3 --cycles 2) ;;
esac
timeout "${BENCHMARK_SECONDS:-240}" "$python" -m benchmarks.device --device "$device" --profile dps \
    --out "$out/device_$device.json" "${sizes[@]}" 2>&1 | tee "$out/benchmark.txt" || status=$?
exit $status
