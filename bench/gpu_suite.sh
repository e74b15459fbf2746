#!/usr/bin/env bash
# Everything worth knowing about a GPU machine in one command, most important first:
#
#     bench/gpu_suite.sh OUT [SECONDS]
#
# Environment, build, the probes that decide the kernels' design, PyTorch baselines, tests, tools.
# Needs no network. Writes OUT/results.json (after every part, so that a run that is cut off keeps
# what it had) and OUT/log.txt. Each part has its own time limit and the whole run one of SECONDS
# (default 540); a part that fails, a missing tool included, does not stop the rest. Exits 1 if any
# part was not ok. Set COMMIT where the tree is no git checkout.
set -u
out=${1:?usage: bench/gpu_suite.sh OUT [SECONDS]}
total=${2:-540}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
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

part environment 40 python3 bench/suite_environment.py
part build 90 python3 setup.py -q build_ext --inplace
part import-extension 20 python3 -c 'from contrec_fast import _C; print(_C.__file__)'
part compile-probes 120 bash bench/probes/compile.sh "$scratch"
probe clusters 20
probe barriers 30
probe dsmem 30
probe multicast 20
probe wgmma 30
probe elementwise 20
probe graph 30
probe copy 20
part torch-rates 40 python3 bench/torch_rates.py
part torch-sampler 70 python3 bench/torch_sampler.py
part torch-topk 60 python3 bench/torch_topk.py
part tests-gpu 60 python3 -m pytest -q -m gpu tests
part tests 220 python3 -m pytest -q -m "not gpu" tests
part tool-ncu 40 python3 bench/check_tools.py ncu "$scratch/tool_sample"
part tool-compute-sanitizer 40 python3 bench/check_tools.py compute-sanitizer "$scratch/tool_sample"
part tool-nsys 40 python3 bench/check_tools.py nsys "$scratch/tool_sample"
part torch-sampler-compile 120 python3 bench/torch_sampler.py --compile

python3 bench/suite_results.py table "$results" | tee -a "$out/log.txt"
exit "${PIPESTATUS[0]}"
