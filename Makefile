# Each target makes the environment it needs: only git, make and Python >= 3.11 must be there.
SHELL := bash
PYTHON ?= python3
CORES ?= 2
DATASET ?= digits
SCALE ?= cpu
README ?= README.md
INDEX ?= nbs/index.ipynb
PART ?=
MINUTES ?=
SIZE ?= 16
TO ?=
FROM ?=
SITE ?= build/site
BIN := .venv/bin
# As `snakemake --profile workflow/profiles/local`, which would announce itself at each call.
SNAKEMAKE = OMP_NUM_THREADS=1 snakemake --profile none --workflow-profile none \
  $(shell sed -En 's/[][,]//g; s/^([a-z-]+): (true)?(.*)/--\1 \3/p' workflow/profiles/local/config.yaml) \
  --snakefile workflow/Snakefile --cores $(CORES) --config dataset=$(DATASET) scale=$(SCALE) $(PART)
PAPERMILL = papermill --log-level ERROR --no-progress-bar -k python3
PIP_INSTALL = pip install --quiet --no-compile --disable-pip-version-check
# $(call python,MODULE,FUNCTION) ARGUMENT... calls a function of the harness; an error of the project is one line.
python = OMP_NUM_THREADS=1 $(BIN)/python -c "import sys; from vae_diffusion.core import errors; \
  from vae_diffusion.harness import $(1); errors.exit_on_error($(1).$(2), *sys.argv[1:])"
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PLATFORM_DIRS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# Whatever a user has for other projects, the interpreter of this environment runs the notebooks, and the settings below
# the runs.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH SNAKEMAKE_PROFILE
# An environment names its place. One that is a link belongs to another checkout, and is left as it is.
MOVED := $(shell test ! -e $(BIN)/ready -o -L .venv || grep -qF "$(CURDIR)/$(BIN)/" $(BIN)/pip || echo moved)

ifeq ($(shell [[ "$(CORES)" =~ ^[1-9][0-9]*$$ ]] && echo a number),)
$(error CORES=$(CORES): give the number of runs at once, 1 or more)
endif
ifneq ($(MINUTES),)
ifeq ($(shell [[ "$(MINUTES)" =~ ^[0-9]*[.]?[0-9]+$$ && "$(MINUTES)" =~ [1-9] ]] && echo a number),)
$(error MINUTES=$(MINUTES): give the minutes after which to stop, such as 12)
endif
export VAE_DIFFUSION_UNTIL := $(shell awk 'BEGIN {printf "%.1f", '$$(date +%s)' + 60*$(MINUTES)}')
endif
refuse_scale = $(if $(filter $(2),$(SCALE)),,$(error make $(1) SCALE=$(SCALE): what is published has scale $(2)))
only = $(if $(filter $(1),$(MAKECMDGOALS)),$(call refuse_scale,$(1),$(2)))
$(call only,publish-weights,cpu or paper)
$(call only,figures,cpu or paper)
$(call only,publish-vaes,cpu)

.PHONY: reproduce test stress mutants lab figures study bench oldest weights publish-weights \
  publish-vaes plan pack unpack parameters page tidy readme site clean $(if $(MOVED),$(BIN)/ready)
.DELETE_ON_ERROR:

# All runs of DATASET at SCALE, then the table and runs/DATASET-SCALE/report.html. With MINUTES=12 it stops in time, as
# do figures, study and weights.
reproduce: $(BIN)/ready
	@$(SNAKEMAKE) --forcerun report -- report

# Everything that CI checks; in a browser too, where there is Chromium.
test: $(BIN)/ready build/site-tools/ready build/parquet/ready \
  $(if $(shell command -v chromium),build/browser/ready)
	$(BIN)/python -m pytest -q -rs -n 2 --maxschedchunk 1 tests

# Every fault that the project must survive, at full length (make test tries a sample): data/reliability.csv.
stress: $(BIN)/ready build/launch/ready
	@mkdir -p build && rm -f build/reliability.csv
	STRESS=build/reliability.csv $(BIN)/python -m pytest -q tests/test_2_pages.py tests/test_5_reliability.py \
	  tests/test_3_experiments.py::test_workflow_is_interrupted_fails_in_part_resumes_and_reports \
	  tests/test_3_experiments.py::test_every_study_can_be_run \
	  tests/test_3_experiments.py::test_what_studies_run_comes_to_an_end \
	  tests/test_processes.py::test_the_command_for_several_gpus
	mv build/reliability.csv data/reliability.csv

# Puts in each fault of tests/mutants.toml, which a test must notice: data/mutants.csv. With FAULT="augment flip" some.
mutants: $(BIN)/ready
	$(BIN)/python tests/mutants.py $(if $(FAULT),build/mutants.csv,data/mutants.csv) $(FAULT)

# The notebooks in JupyterLab, with the threads of `make reproduce`. It opens the tour.
lab: $(BIN)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=workflow $(BIN)/jupyter lab --allow-root --ip=127.0.0.1 \
	  --ServerApp.contents_manager_class=lab.Contents --LabApp.default_url=/lab/tree/nbs/tour.ipynb

# As reproduce, and results and figures become the published ones; with PART="methods=normal seeds=0,1" a part of them.
figures: $(BIN)/ready
	@$(SNAKEMAKE) --forcerun report -- publish

# A question of nbs/experiments/studies: make study STUDY=digits-lr writes data/results/digits-lr.csv.
study: $(BIN)/ready
	@$(SNAKEMAKE) study=$(STUDY) -- study

# Speed beside other libraries, and growth of cost. Measures what data/results/bench-MACHINE.csv lacks; everything takes
# about 30 minutes.
bench: $(BIN)/ready build/bench/ready
	PYTHONPATH=build/bench $(BIN)/python -c "from vae_diffusion.benchmark import command; command.run_benchmark()"

build/bench/ready: $(BIN)/ready
	$(BIN)/$(PIP_INSTALL) --no-deps --target build/bench pythae==0.1.2 torchmetrics==1.9.0 lightning-utilities==0.15.3
	touch $@

# Starts a training on several GPUs, in tests/test_processes.py.
build/launch/ready: $(BIN)/ready
	$(BIN)/$(PIP_INSTALL) --no-deps --target build/launch accelerate==1.15.0
	touch $@

# Drives the Chromium of this machine, in tests/test_browser.py (150 MB). make test makes it where there is a Chromium.
build/browser/ready: $(BIN)/ready
	$(BIN)/$(PIP_INSTALL) --no-deps --target build/browser playwright==1.65.2 pyee==13.0.1
	touch $@

# Reads what a bank writes for others, in tests/test_parquet.py (180 MB).
build/parquet/ready: $(BIN)/ready
	$(BIN)/$(PIP_INSTALL) --no-deps --target build/parquet pyarrow==26.0.1 datasets==5.2.0 dill==0.4.1 \
	  multiprocess==0.70.19 xxhash==4.1.0
	touch $@

try = OMP_NUM_THREADS=1 VAE_DIFFUSION_RUNS=build/oldest/runs build/oldest/bin/$(PAPERMILL) --stdout-file - \
  nbs/experiments/$(1).ipynb build/oldest/$(1).ipynb
# The pages and the experiments with the versions of requirements-oldest.txt, in build/oldest (6 GB):
# make oldest PYTHON=python3.12. The page `reliability` is left out: it is about the pinned packages.
oldest:
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/$(PIP_INSTALL) --no-cache-dir -r requirements-oldest.txt
	build/oldest/bin/$(PIP_INSTALL) --no-cache-dir -c requirements-oldest.txt -e '.[experiments,play,parquet,soap]'
	OMP_NUM_THREADS=1 build/oldest/bin/nbdev_test --n_workers 2 --do_print --skip_file_re '^reliability'
	$(call try,measure_gaps) -p scale smoke -p method dmaapx
	$(call try,measure_diffusion) -p scale smoke -p weights trained
	$(call try,report) -p scale smoke

# Trains the diffusion model of DATASET at SCALE, for parameters that say `weights: trained`.
weights: $(BIN)/ready
	@mkdir -p runs
	TQDM_MININTERVAL=10 OMP_NUM_THREADS=1 $(BIN)/$(PAPERMILL) --stdout-file - --stderr-file - \
	  nbs/experiments/train_diffusion.ipynb runs/train_diffusion.ipynb \
	  -f nbs/experiments/params/$(DATASET)-$(SCALE).yaml \
	  || exit $$(grep -q '"ename": "Stopped"' runs/train_diffusion.ipynb && echo 75 || echo 1)

PUBLISHED = $(DATASET)$(if $(filter paper,$(SCALE)),-paper)
# As weights, and the model becomes the published one, data/weights/DATASET; at scale paper data/weights/DATASET-paper.
publish-weights: weights
	$(BIN)/python -c "from vae_diffusion.harness import builders, settings; \
	  builders.publish_weights(settings.load_params('$(DATASET)', '$(SCALE)'), '$(PUBLISHED)')"

# Trains what is missing of the VAEs that nbs/play.ipynb shows, and publishes them: data/weights/vae-digits
publish-vaes: $(BIN)/ready
	@$(call python,builders,publish_vaes) "$(DATASET)"

# The runs of make reproduce or, with STUDY=name, of make study, their minutes on this machine, and where the time goes.
plan: $(BIN)/ready
	@$(call python,plan,print_plan) "$(DATASET)" "$(SCALE)" "$(STUDY)" "$(CORES)"

# Packs what is needed to resume DATASET at SCALE elsewhere, in pieces of at most SIZE=16 MiB, into TO=folder.
pack: $(BIN)/ready
	@$(call python,packing,pack_runs) "$(DATASET)" "$(SCALE)" "$(SIZE)" "$(TO)"

# Unpacks what make pack wrote elsewhere: make unpack FROM=folder
unpack: $(BIN)/ready
	@$(call python,packing,unpack_runs) "$(FROM)"

# Writes the parameters cells of the experiment notebooks from their declaration in nbs/harness/00_parameters.ipynb.
parameters: $(BIN)/ready
	$(BIN)/python -c "from vae_diffusion.harness import execution; execution.write_parameters_cells()"
	$(BIN)/nbdev_clean

# Runs a page again and stores its outputs: make page PAGE=nbs/play.ipynb
page: $(BIN)/ready
	@$(call python,execution,run_page) "$(PAGE)"
	$(BIN)/nbdev_clean --fname $(PAGE)

# Links every page to the one before and the one after it, and collapses cells that only import or only check.
tidy: $(BIN)/ready
	$(BIN)/python workflow/tidy.py

# Runs nbs/index.ipynb again and makes README.md of it.
readme: $(BIN)/ready
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --stdout nbs/index.ipynb > $(INDEX).new
	mv $(INDEX).new $(INDEX)
	$(BIN)/nbdev_clean --fname $(INDEX)
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout --TagRemovePreprocessor.enabled True \
	  --TagRemovePreprocessor.remove_input_tags hide $(INDEX) | sed 's#](\.\./#](#g' | cat -s > $(README).new
	mv $(README).new $(README)

# The pages as they are stored, the reference of the library and a search, as static files: build/site/index.html.
site: $(BIN)/ready build/site-tools/ready
	rm -rf $(SITE) $(SITE)-sources && mkdir -p $(SITE)-sources
	PYTHONPATH=build/site-tools $(BIN)/python -m sphinx -q -E -W --keep-going -j $(CORES) -c workflow/site \
	  -d $(SITE)-sources/.doctrees $(SITE)-sources $(SITE)

build/site-tools/ready: workflow/site/requirements.txt $(BIN)/ready
	$(BIN)/$(PIP_INSTALL) --no-deps --require-hashes --upgrade --target build/site-tools -r $<
	touch $@

# Removes the environment and all runs.
clean:
	rm -rf .venv runs .snakemake build *.egg-info

# Kernels get a configuration that keeps them silent unless there is an error: papermill's command has no option for it.
$(BIN)/ready: requirements.lock requirements-torch.txt workflow/ipython_kernel_config.json
	$(PYTHON) -c "import sys; \
	  sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or later is needed: make PYTHON=python3.11 ...')"
	@$(if $(MOVED),echo "This checkout was moved: making its environment again")
	$(PYTHON) -m venv $(if $(MOVED),--clear) .venv
	@echo "Installing the pinned requirements into .venv (1 to 3 minutes)"
	$(BIN)/$(PIP_INSTALL) --no-deps --require-hashes -r requirements.lock
	$(BIN)/$(PIP_INSTALL) -r requirements-torch.txt
	$(BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	mkdir -p .venv/etc/ipython && cp workflow/ipython_kernel_config.json .venv/etc/ipython
	touch $@
