#!/usr/bin/env bash
# The paper's experiment, from raw text to table: PHA of 180M and its twin of attention alone on
# WikiText-103. It needs a network, GPUs and `pip install 'pha-lm[train,report,data]'`.
#   GPUS=8 bash scripts/wikitext103.sh
# Run it again after an interruption: what is finished is reused, and a stopped run continues.
set -euo pipefail
GPUS=${GPUS:-8} STORE=stores/wikitext103 OUT=runs/wikitext103
PHA=$OUT/pha TWIN=$OUT/attention-only

# A kernel that is wrong on this machine would make every figure below wrong.
pha doctor

# Tokens are written once, so that all runs read the same. docs/data.md has the counts to expect.
[ -e "$STORE" ] || pha prepare wikitext-103 --tokenizer gpt2 --out "$STORE"

# What a run takes, before it takes it.
pha train pha-180m.wikitext103 --data "$STORE" --dry-run

# One seed of both models: same tokens, same order, same batch on any number of GPUs.
torchrun --nproc_per_node="$GPUS" -m pha train pha-180m.wikitext103 --data "$STORE" --out "$PHA"
torchrun --nproc_per_node="$GPUS" -m pha train attention-only-180m.wikitext103 \
    --data "$STORE" --out "$TWIN"

# Training reports the paper's windows. A model that uses its context gains with the longer ones.
pha eval "$PHA" --data "$STORE" --protocol all --json > "$PHA/windows.json"
pha eval "$TWIN" --data "$STORE" --protocol all --json > "$TWIN/windows.json"

# Two perplexities do not say whether their difference is chance. The paired interval does.
pha compare "$PHA" "$TWIN" --data "$STORE" --out "$OUT/comparison"
pha report "$PHA" "$TWIN" --out "$OUT/report.html"

# It covers the text and not the seeds. Table 2 is a mean over five seeds, one GPU for each run.
pha study wikitext103 --scale paper --data "$STORE" --jobs "$GPUS"
