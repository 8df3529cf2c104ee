# tileprobe: embed tiles once with DINOv3, then train classifiers on the cached vectors.
# `make help` lists the variables that a user sets; README.md explains each.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help help-all demo tile doctor extract train-head sweep finetune ladder evaluate predict report export info check test soak bench

VENV ?= .venv
PYTHON := $(if $(VENV),$(VENV)/bin/python,python3)
READY := $(if $(VENV),$(VENV)/.ready)
NNODES ?= 1
MAX_RESTARTS ?= 3

# The user's settings, in a file or in the environment. The commands read them for every option that no variable here sets.
SETTINGS := $(wildcard tileprobe.toml)$(filter TILEPROBE_%,$(.VARIABLES))
# If nothing is set and the user has not extracted anything yet, targets run on the demo's bucket and backbone.
DEMO := $(if $(TILES)$(CACHE)$(BACKBONE)$(wildcard cache/last)$(SETTINGS),,yes)
RUNS := $(if $(DEMO),runs/demo,runs)
CACHE_USED := $(if $(DEMO),cache/demo/train,$(CACHE))
SERVED := $(if $(DEMO),$(PYTHON) -m extract demo --)
# The demo's backbone is 235 times smaller than vitl16 and needs larger steps.
DEMO_FINETUNE := --lr 1e-3 --backbone-lr 3e-4

# With NODE_RANK, node 0 hosts the rendezvous and rank 0. Without it, or with NNODES=MIN:MAX, the host that RDZV names hosts the
# rendezvous, and the nodes that are present share out the ranks. The job's id must be unique, so it defaults to the address RDZV.
# Local rank 0 draws its progress on the terminal. The output of the other local ranks goes to files and, line by line, to the terminal.
ELASTIC = $(if $(NODE_RANK),$(findstring :,$(NNODES)),yes)
NODES = $(if $(filter file,$(origin NNODES)),$(error RDZV is set and NNODES is not: set NNODES to the number of nodes, on every node)) \
	--nnodes=$(NNODES) --rdzv-endpoint=$(RDZV) --rdzv-id=$(or $(RDZV_ID),$(RDZV)) \
	$(if $(ELASTIC),--rdzv-backend=c10d $(if $(NODE_RANK),--rdzv-conf=is_host=$(if $(filter 0,$(NODE_RANK)),1,0)), \
		--rdzv-backend=static --node-rank=$(NODE_RANK)) \
	$(if $(findstring :,$(NNODES)),--max-restarts=$(MAX_RESTARTS)) \
	--log-dir='$(or $(LOGS),runs/logs)' --tee=1:3,2:3,3:3,4:3,5:3,6:3,7:3
LAUNCH = $(PYTHON) -m extract.launch $(if $(NPROC),--nproc-per-node=$(NPROC)) $(if $(RDZV),$(NODES),--standalone)
TRAIN = $(if $(CACHE_USED),--cache '$(CACHE_USED)') $(if $(BACKBONE),--backbone '$(BACKBONE)') \
	$(if $(VAL_CACHE),--val-cache '$(VAL_CACHE)') $(if $(TEST_CACHE),--test-cache '$(TEST_CACHE)') $(ARGS)
EXTRACT = $(if $(DEMO),--tiles demo://train --backbone demo) $(if $(TILES),--tiles '$(TILES)') \
	$(if $(BACKBONE),--backbone '$(BACKBONE)') $(if $(CACHE_USED),--cache '$(CACHE_USED)') \
	$(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE))
# The run's directory: RUN if it is set, else the demo's, else the command's default.
PLACE = $(if $(or $(RUN),$(DEMO)),--run-dir '$(or $(RUN),$(RUNS)/$(1))')
TARGET = $(call PLACE,head) $(if $(TILES),--tiles '$(TILES)',$(if $(CACHE),--cache '$(CACHE)')) $(ARGS)

help: ## list the main targets
	@echo "tileprobe: embed tiles once with DINOv3, train classifiers on the cached vectors"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | grep -v '## (more)' | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'
	@echo "variables: TILES BACKBONE IMAGE_SIZE CACHE VAL_CACHE TEST_CACHE RUN INPUT OUT UNFREEZE LIMIT NPROC VENV ARGS (see README.md)"

help-all: ## (more) list every target, and the options of every command
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (\(more\) )?(.*)/  make \1|\3/' | column -t -s '|'
	@for command in "extract tile" "extract doctor" "extract run" "train head" "train sweep" "train finetune" "train ladder" "train evaluate" "train predict" "train report" "train export" "train triage" \
		"cache_schema info" "cache_schema verify" "cache_schema diff" "cache_schema gc"; do \
		echo; $(PYTHON) -m $$command --help; done

demo: $(READY) ## run the whole pipeline on a generated bucket: no account, no GPU
	@$(PYTHON) -m extract demo -- $(PYTHON) -m train demo --tiles demo:// -- $(DEMO_FINETUNE)

tile: $(READY) ## cut raw xView into tiles: IMAGES=train_images LABELS=xView_train.geojson OUT=gs://bucket/prefix
	@$(PYTHON) -m extract tile --images '$(IMAGES)' --labels '$(LABELS)' --out '$(OUT)' $(ARGS)

doctor: $(READY) ## check in seconds whether TILES can be extracted, and estimate the cost [BACKBONE IMAGE_SIZE CACHE NPROC]
	@$(SERVED) $(PYTHON) -m extract doctor $(EXTRACT) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

extract: $(READY) ## embed every tile under TILES=gs://bucket/prefix once [BACKBONE=vitl16 IMAGE_SIZE=512 LIMIT=500 NPROC=8]
	@$(SERVED) $(LAUNCH) -m extract run $(EXTRACT) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)

train-head: $(READY) ## train the head on cached vectors [CACHE VAL_CACHE TEST_CACHE]
	@$(LAUNCH) -m train head $(call PLACE,head) $(TRAIN)

sweep: $(READY) ## train heads of 64 settings together, rank them, keep the best [CACHE VAL_CACHE TEST_CACHE]
	@$(if $(NPROC),$(LAUNCH),$(PYTHON)) -m train sweep $(call PLACE,sweep) $(TRAIN)

finetune: $(READY) ## train the last UNFREEZE=3 layers on streamed tiles, starting from the cached head
	@$(SERVED) $(LAUNCH) -m train finetune $(call PLACE,finetune) $(if $(UNFREEZE),--unfreeze $(UNFREEZE)) \
		$(if $(DEMO),$(DEMO_FINETUNE)) $(TRAIN)

ladder: $(READY) ## compare nearest neighbours, heads, and 1, 3, 6, all layers on one split, in one table
	@$(if $(RDZV),$(error a ladder runs on one machine: leave RDZV and NNODES unset))
	@$(SERVED) $(PYTHON) -m train ladder $(call PLACE,ladder) $(if $(NPROC),--nproc $(NPROC)) \
		$(if $(DEMO),--finetune-options '$(DEMO_FINETUNE)') $(TRAIN)

predict: $(READY) ## predict TILES, or INPUT='a.png dir scene.tif', with RUN=runs/head [OUT=predictions.geojson]
	@$(if $(INPUT),,$(SERVED)) $(LAUNCH) -m train predict $(TARGET) $(if $(OUT),--out '$(OUT)') $(INPUT)

evaluate: $(READY) ## score RUN on labelled TILES or a CACHE
	@$(SERVED) $(LAUNCH) -m train evaluate $(TARGET)

report: $(READY) ## write report.html and a model card for RUN=runs/head, with thumbnails [ARGS=--no-images]
	@$(SERVED) $(PYTHON) -m train report --run-dir '$(or $(RUN),$(RUNS)/head)' $(ARGS)

export: $(READY) ## export RUN=runs/finetune: a checkpoint for transformers (and BACKBONE), the head, ONNX
	@$(PYTHON) -m train export $(call PLACE,finetune) $(ARGS)

info: $(READY) ## (more) describe CACHE
	@$(PYTHON) -m cache_schema info '$(or $(CACHE_USED),$(shell cat cache/last 2>/dev/null))'

check: $(READY) ## (more) check lint, format, types and import contracts
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

test: $(READY) ## run the tests
	@$(PYTHON) -m pytest tests --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(READY) ## (more) inject kills, network faults and odd bytes by the thousand; results go to runs/soak.json
	@$(PYTHON) -m tests.faults.soak $(ARGS)

bench: $(READY) ## (more) measure against the script that this project replaces [AREA=extract]
	@$(PYTHON) -m tests.benchmarks $(if $(AREA),--area '$(AREA)') $(ARGS)

$(VENV)/.ready: constraints.txt pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
