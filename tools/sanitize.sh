#!/usr/bin/env bash
# The kernels' tests under the address and undefined-behaviour sanitizers: tools/sanitize.sh PYTHON
# The instrumented module is built beside the normal one and put in front of a copy of the package.
set -euo pipefail
python=$1
cd "$(dirname "$0")/.."
python=$(realpath -s "$python")

"$python" -m pip install --quiet --disable-pip-version-check cmake ninja nanobind
cmake=$(dirname "$python")/cmake
"$cmake" -S . -B build/sanitize -G Ninja -DBAREFOOT_SANITIZE=address,undefined \
  -DCMAKE_MAKE_PROGRAM="$(dirname "$python")/ninja" -DPython_EXECUTABLE="$python" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >/dev/null
"$cmake" --build build/sanitize
rm -rf build/sanitize/package
mkdir -p build/sanitize/package
cp -r src/barefoot build/sanitize/package/
cp build/sanitize/_native*.so build/sanitize/package/barefoot/ops/

# Leaks are not looked for: the interpreter itself keeps memory until it ends.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
PYTHONPATH=build/sanitize/package exec "$python" -m pytest tests/ops
