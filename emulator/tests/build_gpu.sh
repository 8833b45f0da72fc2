#!/bin/sh
# Compiles the conformance programs for a GPU of sm_90a into target/emulator-gpu/: the same checks, and checksums to compare
# with those of run.sh. NVCC, or the PATH, says which compiler.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$root/target/emulator-gpu
nvcc=${NVCC:-nvcc}
mkdir -p "$out"
cd "$root"
# A toolkit from PyPI keeps its libraries in lib/, where nvcc does not look.
libraries=$(dirname "$(dirname "$(command -v "$nvcc")")")/lib
for name in attention cluster library mma_tile simt wgmma_tile wrappers; do
  sources=emulator/tests/$name.cpp
  case $name in attention | library) sources="$sources $(echo kernels/*/*.cu)" ;; esac
  echo "compile $name"
  # shellcheck disable=SC2086
  "$nvcc" -std=c++17 -O3 -Wno-deprecated-gpu-targets -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80 \
    -Ikernels -Ikernels/include -Iemulator/tests -Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas -L"$libraries" -cudadevrt none -x cu $sources -o "$out/$name"
done
