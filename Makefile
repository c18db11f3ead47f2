# make demo    trains every stage at scale=tiny, exports, upscales and evaluates; the last line is the report's path.
#              VAE and TC decoder start from weights/tiny, the others from nothing. From there 60 steps of VAE and stage 3
#              and 50 of the decoder no longer lower the held-out loss: they show that training runs
# make test    the tests          make lint    format and lint          make soak    long campaigns
# make clean   removes the environment and the demo's run
#
# Options of `make demo`:
#   VIDEOS=dir       train on these videos (default: built-in procedural clips)
#   VAL_VIDEOS=dir   hold out these (default: every eighth of VIDEOS)
#   RUN=name         folder under runs/ (default: demo); give another name for other videos
# Everything is made once: the same command goes on where the last one stopped.

PYTHON     ?= python3
VIDEOS     ?=
VAL_VIDEOS ?=
RUN        ?= demo
# Square, so that clips of any shape fit.
EVAL_SIZE  ?= 192x192

# PyPI's torch for Linux brings gigabytes of CUDA; without a GPU the CPU build is added to choose from, and
# pip takes it when the index can be reached.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)

VENV = .venv
PY   = $(VENV)/bin/python
# --no-compile: most of torch's files are never imported; those that are get compiled then.
PIP  = $(PY) -m pip install --no-compile -c constraints.txt
OUT  = runs/$(RUN)
TRAIN = $(PY) -m train run=$(RUN) scale=tiny data.shards=$(OUT)/data

.PHONY: demo test lint soak clean

# One part of the demo: a heading, the commands (stop at the first that fails), a line in $(OUT)/seconds.txt.
define part
@printf '\n== %s\n' "$(1)"; begin=$$(date +%s); $(2) \
	&& printf '%6d %s\n' $$(($$(date +%s) - begin)) "$(1)" >> $(OUT)/seconds.txt
endef

demo: $(VENV)/ready
	@mkdir -p $(OUT) && : > $(OUT)/seconds.txt
	$(call part,data,$(PY) -m data build $(if $(VIDEOS),"$(VIDEOS)") $(if $(VAL_VIDEOS),--val "$(VAL_VIDEOS)") \
		--out $(OUT)/data && $(PY) -m eval prepare $(OUT)/data $(OUT)/eval-set --preset realbasicvsr --seed 0 \
		--clips 2 --frames 37 --size $(EVAL_SIZE) --short-side 192)
	$(call part,vae,$(TRAIN) stage=vae init=weights/tiny/vae steps=60 optim.lr=5e-5 expect=1.05)
	$(call part,stages 1 to 3,$(TRAIN) stage=1..3 scale.train.teacher.steps=360 \
		scale.train.one_step.lr=5e-5 scale.train.one_step.expect=1.15)
	$(call part,decoder,$(TRAIN) stage=decoder init=weights/tiny/decoder expect=1.05 \
		optim.lr=1e-5 stage.latents=student stage.vae_mse=0 stage.vae_lpips=0)
	$(call part,export and upscale,$(PY) -m flashvsr export $(OUT) && $(PY) -m flashvsr upscale \
		$(OUT)/eval-set/LQ/$$(ls $(OUT)/eval-set/LQ | head -n 1) $(OUT)/upscaled.mp4 --model $(OUT)/export)
	$(call part,eval,$(PY) -m eval --method bicubic=bicubic --method teacher=$(OUT)/stage1/export$(,)steps=4 \
		--method one-step+VAE=$(OUT)/export$(,)decoder=vae --method one-step+TC=$(OUT)/export$(,)decoder=tc \
		--data $(OUT)/eval-set --out $(OUT))

# One thread for each of two workers: torch's own threads would fight for the cores.
test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not demo"

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

soak: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: whatever comes later finds it installed and keeps it. What it needs comes with the rest, so that
# only torch itself is looked for in the second index. -qq: errors only.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: give another with PYTHON=..." >&2; exit 2; }
	@echo "== environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1)
	@echo "installing the rest"
	@$(PIP) -qq -e '.[train,metrics]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(PIP) -qq -e '.[train,metrics,app,dev]'
	@touch $@

# A comma inside an argument of $(call).
, := ,
