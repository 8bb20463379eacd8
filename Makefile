# Each target makes the environment it needs: only git, make and Python >= 3.11 must be there.
SHELL := bash
PYTHON ?= python3
CORES ?= 2
DATASET ?= digits
SCALE ?= cpu
README ?= README.md
PAGE ?= nbs/index.ipynb
PART ?=
MINUTES ?=
SIZE ?= 16
TO ?=
FROM ?=
BIN := .venv/bin
SNAKEMAKE = OMP_NUM_THREADS=1 snakemake --profile none --workflow-profile none --force-use-threads --quiet progress host --snakefile workflow/Snakefile --cores $(CORES) --keep-going --keep-incomplete --ignore-incomplete --nolock --rerun-triggers mtime --config dataset=$(DATASET) scale=$(SCALE) $(PART)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PLATFORM_DIRS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# The interpreter of this environment runs the notebooks, and the settings below the runs, whatever a user has for other projects.
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
only = $(if $(filter $(1),$(MAKECMDGOALS)),$(if $(filter $(2),$(SCALE)),,$(error make $(1) SCALE=$(SCALE): what is published has scale $(2))))
$(call only,publish-weights,cpu or paper)
$(call only,figures,cpu or paper)

.PHONY: reproduce test stress mutants lab figures study bench oldest weights publish-weights plan pack unpack parameters readme clean $(if $(MOVED),$(BIN)/ready)
.DELETE_ON_ERROR:

reproduce: $(BIN)/ready  ## all runs of DATASET at SCALE, then the table and runs/DATASET-SCALE/report.html; with MINUTES=12 it stops in time, as figures, study and weights do
	@$(SNAKEMAKE) --forcerun report -- report

test: $(BIN)/ready  ## everything that CI checks
	$(BIN)/python -m pytest -q -rs -n 2 --maxschedchunk 1 tests

stress: $(BIN)/ready  ## every fault that the project must survive, at full length (make test tries a sample): data/reliability.csv
	@mkdir -p build && rm -f build/reliability.csv
	STRESS=build/reliability.csv $(BIN)/python -m pytest -q tests/test_2_pages.py tests/test_5_reliability.py tests/test_3_experiments.py::test_{workflow_is_interrupted_fails_in_part_resumes_and_reports,every_study_can_be_run}
	mv build/reliability.csv data/reliability.csv

mutants: $(BIN)/ready  ## every fault of tests/mutants.toml, put in and noticed by a test: data/mutants.csv; with FAULT="augment flip" some of them
	$(BIN)/python tests/mutants.py $(if $(FAULT),build/mutants.csv,data/mutants.csv) $(FAULT)

lab: $(BIN)/ready  ## the notebooks in JupyterLab
	$(BIN)/jupyter lab --allow-root --ip=127.0.0.1 --LabApp.default_url=/lab/tree/nbs/index.ipynb

figures: $(BIN)/ready  ## the same, and results and figures become the published ones; with PART="methods=normal seeds=0,1" a part of them
	@$(SNAKEMAKE) --forcerun report -- publish

study: $(BIN)/ready  ## a question of nbs/experiments/studies: make study STUDY=digits-lr writes data/results/digits-lr.csv
	@$(SNAKEMAKE) study=$(STUDY) -- study

bench: $(BIN)/ready build/bench/ready  ## speed beside other libraries, growth of cost: what data/results/bench-MACHINE.csv lacks; all takes about 30 minutes
	PYTHONPATH=build/bench $(BIN)/python -c "from vae_diffusion.benchmark import command; command.run_benchmark()"

build/bench/ready: $(BIN)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/bench pythae==0.1.2 torchmetrics==1.9.0 lightning-utilities==0.15.3
	touch $@

try = OMP_NUM_THREADS=1 VAE_DIFFUSION_RUNS=build/oldest/runs build/oldest/bin/papermill --log-level ERROR --no-progress-bar --stdout-file - -k python3 nbs/experiments/$(1).ipynb build/oldest/$(1).ipynb
oldest:  ## the pages and the experiments with the versions of requirements-oldest.txt, in build/oldest (6 GB): make oldest PYTHON=python3.12
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/pip install --quiet --disable-pip-version-check --no-cache-dir -r requirements-oldest.txt
	build/oldest/bin/pip install --quiet --disable-pip-version-check --no-cache-dir -c requirements-oldest.txt -e '.[experiments]'
	OMP_NUM_THREADS=1 build/oldest/bin/nbdev_test --n_workers 2 --do_print --skip_file_re '^reliability' # which is about the pinned packages
	$(call try,measure_gaps) -p method dmaapx
	$(call try,measure_diffusion) -p weights trained
	$(call try,report)

weights: $(BIN)/ready  ## trains the diffusion model of DATASET at SCALE, for parameters that say `weights: trained`
	@mkdir -p runs
	set -o pipefail; TQDM_MININTERVAL=10 OMP_NUM_THREADS=1 $(BIN)/papermill --log-output --no-progress-bar -k python3 nbs/experiments/train_diffusion.ipynb \
	  runs/train_diffusion.ipynb -f nbs/experiments/params/$(DATASET)-$(SCALE).yaml 2>&1 | grep -v "unknown parameter" \
	  || exit $$(grep -q '"ename": "Stopped"' runs/train_diffusion.ipynb && echo 75 || echo 1)

publish-weights: weights  ## the same, and it becomes data/weights/DATASET, the published one; at scale paper data/weights/DATASET-paper
	$(BIN)/python -c "from vae_diffusion.harness import builders, settings; builders.publish_weights(settings.load_params('$(DATASET)', '$(SCALE)'), '$(DATASET)$(if $(filter paper,$(SCALE)),-paper)')"

plan: $(BIN)/ready  ## the runs of make reproduce or, with STUDY=name, of make study, their minutes on this machine, and where the time goes
	@OMP_NUM_THREADS=1 $(BIN)/python -c "import sys; from vae_diffusion.core import errors; from vae_diffusion.harness import plan; errors.exit_on_error(plan.print_plan, *sys.argv[1:])" "$(DATASET)" "$(SCALE)" "$(STUDY)" "$(CORES)"

pack: $(BIN)/ready  ## what is needed to go on elsewhere with DATASET at SCALE, in pieces of SIZE=16 MiB at most; TO=folder writes it there
	@$(BIN)/python -c "import sys; from vae_diffusion.core import errors; from vae_diffusion.harness import packing; errors.exit_on_error(packing.pack_runs, *sys.argv[1:])" "$(DATASET)" "$(SCALE)" "$(SIZE)" "$(TO)"

unpack: $(BIN)/ready  ## takes up what make pack wrote elsewhere: make unpack FROM=folder
	@$(BIN)/python -c "import sys; from vae_diffusion.core import errors; from vae_diffusion.harness import packing; errors.exit_on_error(packing.unpack_runs, *sys.argv[1:])" "$(FROM)"

parameters: $(BIN)/ready  ## the parameters cells of the experiment notebooks, from their declaration in nbs/harness/00_parameters.ipynb
	$(BIN)/python -c "from vae_diffusion.harness import execution; execution.write_parameters_cells()"
	$(BIN)/nbdev_clean

readme: $(BIN)/ready  ## nbs/index.ipynb run again, and README.md from it
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --stdout nbs/index.ipynb > $(PAGE).new && mv $(PAGE).new $(PAGE)
	$(BIN)/nbdev_clean --fname $(PAGE)
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout --TagRemovePreprocessor.enabled True \
	  --TagRemovePreprocessor.remove_input_tags hide $(PAGE) | sed 's#](\.\./#](#g' | cat -s > $(README).new && mv $(README).new $(README)

clean:  ## removes the environment and all runs
	rm -rf .venv runs .snakemake build *.egg-info

$(BIN)/ready: requirements.lock requirements-torch.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or later is needed: make PYTHON=python3.11 ...')"
	@$(if $(MOVED),echo "This checkout was moved: its environment is made again")
	$(PYTHON) -m venv $(if $(MOVED),--clear) .venv
	@echo "Installing the pinned requirements into .venv (about 3 minutes)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
