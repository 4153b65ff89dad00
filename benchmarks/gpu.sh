#!/usr/bin/env bash
# Every GPU test and GPU bench in one call on one CUDA card, in under ten minutes; JSON in $OUT (default
# benchmarks/results). Needs torch, transformers and peft; the tests pytest, the detector's parts pillow and
# scipy too. Generates its data; nothing to install, no network.
#
# A part gets a share of the time, and what those before it left of theirs; then it is stopped. The shares come
# to $BUDGET seconds, and the parts in the order in which they would be missed. Each bench writes its JSON after
# every case, so a stop loses the case at hand and no more.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-benchmarks/results} PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
BUDGET=${BUDGET:-590}
deadline=0
missed=()

# part PERCENT COMMAND…: run it, for at most its share of the budget and what is left over by then.
part() {
  local status
  deadline=$((deadline + $1 * BUDGET / 100))
  shift
  echo "== after $SECONDS s, until $deadline s: $*"
  timeout --foreground --signal=INT --kill-after=5 $((deadline > SECONDS ? deadline - SECONDS : 1)) "$@"
  status=$?
  if ((status == 124 || status == 137)); then missed+=("stopped: $*"); elif ((status)); then missed+=("failed: $*"); fi
}
bench() { part "$1" python3 -m "thawline.bench.$2" --device cuda "${@:3}"; }
study() { part "$1" python3 "benchmarks/$2.py" --device cuda "${@:3}"; }

part 8 python3 -m pytest -q -m gpu tests/gpu
bench 11 tuners --rounds 15 --case reference bf16-8b-proportions 8b-blocks --out "$OUT/tuners-gpu.json"
bench 4 tuners --rounds 15 --case nf4 int8 beside --out "$OUT/quantised-gpu.json"
bench 13 tuners --rounds 15 --case small-model resnet18 small-llama-memory resnet50 tinyllama --out "$OUT/complaints-gpu.json"
bench 11 tuners --rounds 15 --case skills-small skills-reference skills-linear skills-decoding --out "$OUT/mhr-gpu.json"
bench 5 tuners --rounds 15 --case vit convnet --out "$OUT/vision-cost-gpu.json"
bench 8 train_step --out "$OUT/train-step-gpu.json"
bench 4 sequence --rounds 5 --out "$OUT/sequence-gpu.json"
study 4 backbone --batch_size 8 --out "$OUT/backbone-gpu.json"
bench 14 detector --size atto femto pico n s m l x --batch 1 8 --dtype fp32 bf16 fp16 --calls 2 --threads 8 --out "$OUT/detector-gpu.json"
study 7 vision --seeds 1 --out "$OUT/vision-gpu.json"
bench 6 detector --size atto s --dtype bf16 --calls 5 --forms port eager compiled compiled_fused --out "$OUT/detector-compiled-gpu.json"
bench 5 detector --size atto s --forms port fused onnx tensorrt --out "$OUT/exports-gpu.json"

for part in "${missed[@]}"; do echo "$part"; done
exit $((${#missed[@]} > 0))
