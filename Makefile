# make demo: set up and run the main job.   make test: set up and run all the checks.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo digits results faces numbers faces_results benchmark compare test lint types pytest bitwise science file_sizes kills fuzz weights clean

help:
	@echo "make demo     set up, give faces glasses and hats, certify the result (about 4 minutes)"
	@echo "make digits   the same on digits, short and with a long recipe (about 45 minutes)"
	@echo "make test     set up and run all checks (lint, types, layers, tests, wheel)"
	@echo "make results  write the table and the picture of README.md from runs/demo and runs/faces_full"
	@echo "make faces    draw the data set of faces again; needs node (about 6 minutes)"
	@echo "make faces_results  the demo, its long recipe and the UNet, into docs/faces (over an hour)"
	@echo "make benchmark  every agent on the closed-form tasks with five seeds, into report/"
	@echo "make compare    tune every agent on digits, then three seeds, into docs/digits (hours)"
	@echo "make bitwise BASE=COMMIT  whether runs are still those of a commit, bit for bit (5 minutes)"
	@echo "make numbers  a control that is a number, trained and drawn over what was asked for (a minute)"
	@echo "make science  every agent against exact answers, into docs/exact.md, and slow tests (half an hour)"
	@echo "make file_sizes  PPO on JPEG sizes of a small Stable Diffusion, three seeds (half an hour)"
	@echo "make kills    kill every command a hundred times; results must not change (15 minutes)"
	@echo "make integrations  other libraries' PPO, three seeds each, into docs/integrations.md (15 minutes)"
	@echo "make fuzz     500 random commands and 200 hostile files; each is had or refused (20 minutes)"
	@echo "make weights  make the shipped prior and classifiers again"

setup: $(INSTALLED)

# torch first and by itself, so that its version decides which build the others see.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/ctrl-rl train experiment=demo

digits: $(INSTALLED)
	$(BIN)/ctrl-rl train experiment=demo_digits
	$(BIN)/ctrl-rl train experiment=digits_full
	$(BIN)/python docs/results.py docs/digits/demo.md docs/digits/demo runs/demo_digits runs/digits_full

results: $(INSTALLED)
	$(BIN)/python docs/results.py README.md docs/demo runs/demo runs/faces_full

faces: $(INSTALLED)
	$(BIN)/python docs/faces/make.py ctrl_rl/assets/faces/data

# Fewer updates than the demo's, as each differentiates the reward's gradient, or a second UNet.
GUIDED := guidance=reward trainer.updates=160
UNET := trainer.updates=110 trainer.learning_rate.embedding=1e-2
FINE_TUNED := policy=fine_tuned $(UNET) trainer.learning_rate.network=2e-4
LOW_RANK := policy=low_rank policy.targets=[conv1,conv2] $(UNET) trainer.learning_rate.network=1e-3
numbers: $(INSTALLED)
	$(BIN)/ctrl-rl train env=gaussian_mean run.name=gaussian_mean run.overwrite=true
	cp runs/gaussian_mean/asked.png docs/gaussian_mean.png

faces_results: demo
	$(BIN)/ctrl-rl train experiment=faces_full
	$(BIN)/ctrl-rl train experiment=demo run.name=demo_guided $(GUIDED)
	$(BIN)/ctrl-rl train experiment=demo run.name=demo_guidance_alone $(GUIDED) \
		trainer.learning_rate.network=1e-9
	$(BIN)/ctrl-rl train experiment=demo run.name=demo_fine_tuned $(FINE_TUNED)
	$(BIN)/ctrl-rl train experiment=demo run.name=demo_fine_tuned_guided $(FINE_TUNED) guidance=reward
	$(BIN)/ctrl-rl train experiment=demo run.name=demo_low_rank_guided $(LOW_RANK) guidance=reward
	$(MAKE) results
	$(BIN)/python docs/faces/alone.py runs/demo docs/faces/README.md
	$(BIN)/python docs/faces/policies.py docs/faces/README.md runs/demo runs/demo_guided \
		runs/demo_guidance_alone runs/demo_fine_tuned runs/demo_fine_tuned_guided \
		runs/demo_low_rank_guided
	$(BIN)/ctrl-rl sample run=runs/demo control.glasses=yes control.hat=yes n=8 \
		"strengths=[0,0.5,1,1.5,2]" out=runs/strength
	cp runs/strength/*.png docs/faces/strength.png

benchmark: $(INSTALLED)
	$(BIN)/ctrl-rl benchmark launcher=joblib

# Every agent on digits with the demo's policy, steps and budget; rates and batch are tuned alike.
DIGITS := policy=side_network trainer.learning_rate.network=1e-2 \
	kernel.timesteps=[999,859,768,687,610,530,441,339,212,47]
configs/settings/digits.yaml: | $(INSTALLED)
	$(BIN)/python docs/tune.py digits $(DIGITS) -- launcher=joblib

compare: $(INSTALLED) configs/settings/digits.yaml
	$(BIN)/ctrl-rl benchmark tasks=[digits] seeds=[100,101,102] denoiser_calls=380000 settings=digits \
		"overrides=['evaluation.prior_samples=4096','evaluation.policy_samples=128','evaluation.exact_samples=128']" \
		root=runs/compare out=docs/digits launcher=joblib
	$(BIN)/python docs/result_rows.py docs/digits/results.csv

test: lint types pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not science" -n auto --dist worksteal --durations=10

weights: $(INSTALLED)
	$(BIN)/ctrl-rl pretrain prior=digits out=ctrl_rl/assets/digits/prior
	$(BIN)/ctrl-rl classifier classifier=digits out=ctrl_rl/assets/digits/classifier
	$(BIN)/ctrl-rl classifier classifier=digits_heldout out=ctrl_rl/assets/digits/heldout
	$(BIN)/ctrl-rl pretrain prior=faces out=ctrl_rl/assets/faces/prior
	for control in glasses hat; do \
		$(BIN)/ctrl-rl classifier classifier=faces dataset=faces dataset.control=$$control \
			out=ctrl_rl/assets/faces/$$control && \
		$(BIN)/ctrl-rl classifier classifier=faces_heldout dataset=faces dataset.control=$$control \
			out=ctrl_rl/assets/faces/$${control}_heldout || exit 1; \
	done
	$(BIN)/python docs/faces/card.py ctrl_rl/assets/faces/prior

BASE ?= HEAD
bitwise: $(INSTALLED)
	$(BIN)/python tests/bitwise.py $(BASE)

science: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto -k "optimum_is_reached or floor_is_reached or mixture2d_gap" \
		--exact-report docs/exact.md tests/agents/test_exact.py
	$(BIN)/python -m pytest -q -m science tests/learning tests/integrations

kills: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py 100

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_overrides.py 500
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_files.py 200

file_sizes: $(INSTALLED)
	$(BIN)/python docs/file_sizes.py docs/pipelines.md

integrations: $(INSTALLED)
	$(BIN)/python docs/integrations/results.py docs/integrations.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
