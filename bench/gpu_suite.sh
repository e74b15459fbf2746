#!/usr/bin/env bash
# Everything worth knowing about a GPU machine in one command, most important first:
#
#     bench/gpu_suite.sh OUT [SECONDS]
#
# Environment, the probes that decide the kernels' design, PyTorch baselines, build, GPU tests, the
# Triton kernels beside PyTorch and under a checker and a profiler, the engine with language models
# of real sizes, tools, the other tests.
# Needs no network. Writes OUT/results.json (after every part, so that a run that is cut off keeps
# what it had), OUT/log.txt and for the Triton kernels OUT/gpu-*.json and OUT/rows-*.json, which
# bench/dispatch_table.py merges into what `auto` chooses from. Each part has its own time limit and the whole run one of SECONDS
# (default 540); a part that fails, a missing tool included, does not stop the rest. Exits 1 if any
# part was not ok. Set COMMIT where the tree is no git checkout.
set -u
out=${1:?usage: bench/gpu_suite.sh OUT [SECONDS]}
total=${2:-540}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
# nvcc, and ncu beside it, where the toolkit installs itself
command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
results=$out/results.json
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
: >"$out/log.txt"

# part NAME SECONDS COMMAND...: runs the command within its limit and records how it went.
part() {
  local name=$1 limit=$2 status=124 begun left spent
  shift 2
  left=$((total - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$((left > 0 ? left : 0))
  echo "== $name (limit $limit s): $*" | tee -a "$out/log.txt"
  : >"$scratch/output"
  begun=${EPOCHREALTIME/[.,]/} # microseconds
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" "$@" >"$scratch/output" 2>&1 </dev/null
    status=$?
  fi
  spent=$(((${EPOCHREALTIME/[.,]/} - begun) / 1000))
  cat "$scratch/output" >>"$out/log.txt"
  python3 bench/suite_results.py add "$results" "$scratch/output" "$name" "$status" \
    "${spent}e-3" "$limit" "$@"
}

# probe NAME SECONDS: a compiled CUDA probe.
probe() { part "probe-$1" "$2" "$scratch/$1"; }

python3 bench/suite_results.py start "$results" || exit 2

part environment 60 python3 bench/suite_environment.py
part compile-probes 90 bash bench/probes/compile.sh "$scratch"
probe clusters 15
probe barriers 20
probe dsmem 25
probe wgmma 20
probe multicast 20
probe elementwise 15
probe graph 20
probe copy 20
part torch-rates 30 python3 bench/torch_rates.py
part torch-sampler 60 python3 bench/torch_sampler.py
part torch-topk 45 python3 bench/torch_topk.py
part build 60 python3 setup.py -q build_ext --inplace
part import-extension 30 python3 -c 'from contrec_fast import _C; print(_C.__file__)'
# Several processes where pytest-xdist is there: the tests mostly wait for Triton's compiler.
python3 -c 'import xdist' >/dev/null 2>&1 && workers='-n 8' || workers=
# What has a barrier across the grid, which can hang, comes later and by itself.
# shellcheck disable=SC2086 # two words or none
part tests-gpu 90 python3 -m pytest -q $workers -m gpu -k "not cooperative" tests
part triton-topk 90 python3 bench/gpu_topk.py --out "$out/gpu-topk.json" \
  --rows "$out/rows-topk.json" --dims 512 64 --ks 20 --batches 1 64 256 1024
part triton-sample 120 python3 bench/gpu_sample.py --out "$out/gpu-sample.json" \
  --rows "$out/rows-sample.json" --dims 512 64 --steps 200 3 --batches 1 64 4096 \
  --forms persistent persistent-pre step step-pre
part engine 150 python3 bench/gpu_engine.py --out "$out/gpu-engine.json"
part triton-training 120 python3 bench/gpu_training.py --out "$out/gpu-training.json" \
  --rows "$out/rows-training.json" --dtypes bf16 --mlp 512x4096 --adaln 1024x3x4096 \
  --cross-entropy 100000x64x1024 1000000x64x256 1000000x512x1024
part triton-training-fp32 60 python3 bench/gpu_training.py --out "$out/gpu-training-fp32.json" \
  --rows "$out/rows-training-fp32.json" --dtypes fp32 --operations cross-entropy \
  --cross-entropy 100000x64x1024 1000000x64x256 1000000x512x1024
part triton-cooperative 40 python3 bench/gpu_sample.py --out "$out/gpu-cooperative.json" \
  --rows "$out/rows-cooperative.json" --dims 512 --steps 200 3 --batches 1 64 \
  --forms cooperative-pre
part tests-cooperative 30 python3 -m pytest -q -m gpu -k cooperative tests
part triton-memcheck 90 python3 bench/triton_tools.py compute-sanitizer
part triton-ncu 60 python3 bench/triton_tools.py ncu
part engine-compiled 180 python3 bench/gpu_engine.py --out "$out/gpu-engine-compiled.json" \
  --models llama-3.2-1b --caches dynamic compiled --batches 256
part torch-sampler-compile 100 python3 bench/torch_sampler.py --compile
part tool-ncu 30 python3 bench/check_tools.py ncu "$scratch/tool_sample"
part tool-compute-sanitizer 30 python3 bench/check_tools.py compute-sanitizer "$scratch/tool_sample"
part tool-nsys 30 python3 bench/check_tools.py nsys "$scratch/tool_sample"
# As on a machine without a GPU.
# shellcheck disable=SC2086 # two words or none
part tests 240 env CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=2 \
  python3 -m pytest -q $workers -m "not gpu" tests

python3 bench/suite_results.py table "$results" | tee -a "$out/log.txt"
exit "${PIPESTATUS[0]}"
