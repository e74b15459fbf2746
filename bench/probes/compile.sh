#!/usr/bin/env bash
# Compiles every probe beside this script: compile.sh FOLDER [JOBS]
# Exits non-zero if one does not compile; the others are still there then.
set -u
folder=${1:?usage: compile.sh FOLDER [JOBS]}
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
command -v nvcc >/dev/null || { echo "nvcc: not found on PATH" >&2; exit 1; }
printf '%s\n' *.cu | sed 's/\.cu$//' | xargs -P "${2:-$(nproc)}" -I{} \
  nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o "$folder/{}" {}.cu
