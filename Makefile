# Every target sets up what it needs, from nothing but python3, a C++ compiler and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*.*)
RESULTS ?= benchmarks/results/cpu.json
OUT ?= build/gpu
MINUTES ?= 8.5
TRITON ?= 3.6.0
ISAS ?= portable avx2 avx512
TARGETS ?= aarch64-linux-gnu aarch64-macos x86_64-linux-gnu
FAMILIES ?=
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: demo test acceptance kernels sanitize cross bench bench-cpu bench-families bench-pretrain bench-tasks gpu gpu-dry lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/bert-fast demo

# One thread in each of the two processes: more would wait for cores that the others have.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# transformers' own tests of models, with its models as they are and swapped: what passes must go on passing.
# FAMILIES="bert mpnet" for some of the eight.
acceptance: $(VENV)/acceptance.stamp
	$(BIN)/python tests/acceptance/run.py $(FAMILIES)

# Compiles every kernel for every target, with another release of Triton than `make test` does.
kernels: $(VENV)/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/triton-$(TRITON) triton==$(TRITON)
	BERT_FAST_ALL_TARGETS=1 PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(TRITON) $(BIN)/python -m pytest -s tests/test_compile.py

# The C++ kernels' tests, on a build that stops at reads and writes out of bounds and at undefined behaviour, under
# each instruction set; ISAS="portable avx2" where the machine lacks one. So built, LayerNorm adds up one value after
# another, not lane by lane, and has no longer the accuracy that two of its tests ask for.
sanitize: $(VENV)/test.stamp
	$(PIP) pybind11 setuptools
	BERT_FAST_COMPILE_ARGS="-g -O1 $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet \
		build --build-base build/sanitized --build-lib build/sanitized/lib
	for isa in $(ISAS); do \
		BERT_FAST_ISA=$$isa ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -q -p no:cacheprovider --capture=sys -o pythonpath=build/sanitized/lib \
		-m "not gpu" -k "not triton-cpu and not torch-cpu and not (layer_norm and at_most_twice_torchs)" \
		$(patsubst %,tests/test_%.py,attention layer_norm gelu linear masking engine int8 bfloat16) || exit 1; \
	done

# Compiles the C++ module with Clang for other machines: NEON on Linux and macOS, and x86-64 besides GCC's.
cross: $(VENV)/test.stamp
	$(PIP) ziglang pybind11
	mkdir -p build/cross
	for target in $(TARGETS); do for source in $(wildcard csrc/*.cpp csrc/cpu/*.cpp); do \
		echo "$$target $$source"; \
		$(BIN)/python -m ziglang c++ -target $$target -std=c++17 -O3 -fno-math-errno -fno-trapping-math -fopenmp-simd \
		-Wall -Wextra -Werror -fPIC $$($(BIN)/python -m pybind11 --includes) -c $$source -o build/cross/module.o || exit 1; \
	done; done

# Measures on this machine; RESULTS=... keeps the figures elsewhere.
bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=$(RESULTS) -q
	$(BIN)/python -m benchmarks.table $(RESULTS)

# Whole encoders, a process each, against torch.compile, ONNX Runtime, OpenVINO, CTranslate2 and sentence-transformers, hours on two cores;
# ARGS="--only NAME" for some rows, ARGS="--stsb FILE" for the accuracy of int8, ARGS=--dry to see that everything runs.
bench-cpu: RESULTS = benchmarks/results/cpu-peers.json
bench-cpu: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.cpu --out $(RESULTS) $(ARGS)

# A model of each family, swapped against unswapped, ten minutes on two cores; ARGS="--only BERT MPNet" for some,
# ARGS="--out FILE" to keep the figures elsewhere than in benchmarks/results/cpu-families.json.
bench-families: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.families $(ARGS)

# Pretraining of a tiny model beside transformers' Trainer on the same packs, half an hour on two cores; TEXT="files and
# folders of text", such as articles of an encyclopedia, a blank line between documents.
bench-pretrain: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.pretrain --text $(TEXT) $(ARGS)

# Every task fine-tuned and used beside plain transformers, on reduced data, a quarter of an hour on two
# cores; DATA=folder, see benchmarks/tasks.py. ARGS="--seeds 1 2 3" for three; ARGS=--full for all of the data, hours for
# the plain side.
bench-tasks: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.tasks --data $(DATA) $(ARGS)

# On a machine with a GPU, with the python3 that has torch and triton for it; nothing is fetched. The tests, then every
# target of speed against its peers; ARGS="--only NAME" for some, ARGS="--tune KERNEL" for launch sizes.
gpu:
	mkdir -p $(OUT)
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) $(ARGS)

# The same cases, tiny, without a GPU.
gpu-dry: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.gpu --dry --out $(OUT)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info bert_fast/*.so

# One environment; each stamp says that the extras of its name are in it, and that the extension is up to date.
$(VENV)/%.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
