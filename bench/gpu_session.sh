#!/usr/bin/env bash
# Everything there is to run on a CUDA machine that has torch and nvcc but perhaps no network.
#
#   bench/gpu_session.sh -o FOLDER [-w WHEELS] [STEP...]
#
# Steps, in this order if none is named:
#   install     packages that torch does not bring, from the folder WHEELS, into build/gpu-site
#   build       the extension, in place
#   flashinfer  compile FlashInfer's decode kernels, so that no benchmark waits for it
#   tests       the tests parametrised with cuda
#   smoke       small cases of each kernel, compared with the CPU kernels
#   memcheck, racecheck, synccheck, initcheck    the same under compute-sanitizer
#   quick       bench/hit_curve.py --quick
#   stages      bench/stages.py
#   curve       bench/hit_curve.py, the whole sweep, or what CURVE_OPTIONS leaves of it
#   authors     bench/hit_curve.py --authors
#   profile     ncu: bytes, bandwidth and stalls of each kernel
# Each has a time limit; one that fails does not stop the others. FOLDER receives a log for each step, tables,
# CSV, JSON and pictures. What is installed and built stays in the working tree for the next call.
set -u
all=(install build smoke tests memcheck racecheck synccheck initcheck flashinfer quick stages curve authors profile)
cd "$(dirname "$0")/.."
root=$PWD
out= wheels=
while getopts "o:w:" option; do
  case $option in
    o) out=$OPTARG ;;
    w) wheels=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ -n "$out" ] || { echo "usage: bench/gpu_session.sh -o FOLDER [-w WHEELS] [STEP...]" >&2; exit 2; }
[ $# -gt 0 ] || set -- "${all[@]}"
mkdir -p "$out" build && out=$(cd "$out" && pwd)

python=${PYTHON:-python3}
site=$root/build/gpu-site
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
for toolkit in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-* "$(dirname "$(dirname "$(command -v nvcc)")")"; do
  [ -x "$toolkit/bin/nvcc" ] && export CUDA_HOME=$toolkit && break
done
# What this GPU is, e.g. 9.0, as architecture-specific code for Hopper: 9.0a.
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)
[ "$capability" != 9.0 ] || capability=9.0a
[ -z "$capability" ] || export TORCH_CUDA_ARCH_LIST=$capability FLASHINFER_CUDA_ARCH_LIST=$capability
export FLASHINFER_WORKSPACE_BASE=$root/build/flashinfer MAX_JOBS=${MAX_JOBS:-$(nproc)}
# FlashInfer links with -lcuda and -lcudart. A machine may have the driver's library under its full name only,
# and the runtime's only within torch.
mkdir -p build/gpu-lib
driver=$(ldconfig -p 2> /dev/null | awk '/libcuda\.so\.1 / { print $NF; exit }')
[ -z "$driver" ] || ln -sf "$driver" build/gpu-lib/libcuda.so
runtime=$("$python" - 2> /dev/null << 'EOF'
import pathlib, torch
for path in sorted(pathlib.Path(torch.__file__).parents[1].glob("nvidia/**/libcudart.so.*")):
    print(path)
    break
EOF
)
[ -z "$runtime" ] || ln -sf "$runtime" build/gpu-lib/libcudart.so
export LIBRARY_PATH=$root/build/gpu-lib${LIBRARY_PATH:+:$LIBRARY_PATH}

install() {
  [ -n "$wheels" ] || { echo "no folder of wheels given (-w)"; return 1; }
  # --no-deps: FlashInfer and cuDNN's frontend name packages (CUTLASS DSL, cuda-tile, NVSHMEM) that decode does not use.
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
    --target "$site" --find-links "$wheels" \
    flashinfer-python apache-tvm-ffi nvidia-cudnn-frontend nvidia-ml-py einops tabulate click requests urllib3 idna \
    certifi charset-normalizer packaging tqdm filelock typing-extensions ninja pytest iniconfig pluggy pygments \
    hypothesis sortedcontainers
}

build() {
  "$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 || { tail -30 "$out/build.log"; return 1; }
  "$python" -m mac_attn.info
  # Registers that did not fit: worth a look in any kernel.
  grep -B2 -E "[1-9][0-9]* bytes spill" "$out/build.log" | grep -E "Compiling|spill" || echo "no spills"
}

flashinfer() {
  "$python" bench/flashinfer_decode.py
}

tests() {
  "$python" -m pytest -q -p no:cacheprovider -k "cuda and not serving_cuda_kernels" tests
}

smoke() {
  "$python" bench/sanitize_case.py
}

sanitize() {
  local sanitizer log=$out/sanitize_$1.log
  sanitizer=$(command -v compute-sanitizer || ls "$CUDA_HOME"/bin/compute-sanitizer 2> /dev/null)
  [ -n "$sanitizer" ] || { echo "compute-sanitizer is not on this machine"; return 1; }
  # Without torch's allocator in between, an access beyond a tensor is one beyond an allocation.
  if PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
    "$python" bench/sanitize_case.py > "$log" 2>&1; then
    echo "$1: clean, $(grep -c agrees "$log") cases"
  else
    grep "=========" "$log" | head -40
    tail -3 "$log"
    return 1
  fi
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }
initcheck() { sanitize initcheck; }

quick() {
  "$python" bench/hit_curve.py --quick --json "$out/quick.json" --csv "$out/quick.csv" --png "$out"
}

stages() {
  "$python" bench/stages.py --json "$out/stages.json"
}

curve() {
  # shellcheck disable=SC2086  # options, several words
  "$python" bench/hit_curve.py ${CURVE_OPTIONS:-} --json "$out/curve.json" --csv "$out/curve.csv" --png "$out"
}

authors() {
  "$python" bench/hit_curve.py --authors --json "$out/authors.json" --csv "$out/authors.csv"
}

profile() {
  local ncu batch
  ncu=$(command -v ncu || ls "$CUDA_HOME"/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2> /dev/null | tail -1)
  [ -n "$ncu" ] || { echo "ncu is not on this machine"; return 1; }
  for batch in 1 16; do
    "$ncu" --profile-from-start off -k 'regex:match_kernel|amend_kernel|complete_kernel' \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats --section Occupancy \
      --section LaunchStats --section SchedulerStats --export "$out/ncu_batch_$batch" --force-overwrite \
      "$python" bench/one_step.py --batch $batch --context 126976 || return 1
    "$ncu" --import "$out/ncu_batch_$batch.ncu-rep" --page details > "$out/ncu_batch_$batch.txt"
    "$ncu" --import "$out/ncu_batch_$batch.ncu-rep" --page raw --csv > "$out/ncu_batch_$batch.csv"
    grep -E "_kernel|Duration|DRAM Throughput|Memory Throughput" "$out/ncu_batch_$batch.txt"
  done
}

declare -A limit=([install]=120 [build]=400 [smoke]=120 [tests]=500 [memcheck]=240 [racecheck]=240 [synccheck]=240
  [initcheck]=240 [flashinfer]=400 [quick]=180 [stages]=240 [curve]=580 [authors]=240 [profile]=300)
export python wheels site out root
export -f "${all[@]}" sanitize
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2> /dev/null
failed=
for step in "$@"; do
  [ -n "${limit[$step]:-}" ] || { echo "no such step: $step" >&2; failed+=" $step"; continue; }
  echo "=== $step ($(date -u +%H:%M:%S), at most ${limit[$step]} s)"
  timeout -k 10 "${limit[$step]}" bash -c "$step" 2>&1 | tee "$out/$step.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "=== $step: FAILED ($status)"
    failed+=" $step"
  fi
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
