#!/usr/bin/env bash
# The two heads of docs/training.md, from preference pairs to held-out figures and the tables of choices, in heads/. The
# choices alone take two hours on 2 cores; every step goes on where it was stopped.
set -euo pipefail
export HF_HUB_OFFLINE=1
BIN=${BIN:-.venv/bin}
base=$("$BIN/python" -c "from hf_recontrol import embedded_model; print(embedded_model())")
mkdir -p heads
[ -f heads/reward-model/figures.json ] || "$BIN/python" benchmarks/reward_model.py --pairs "$PAIRS" --output heads/reward-model
"$BIN/recontrol" rollout -m "$base" --prompts heads/reward-model/prompts-train.jsonl --limit 1600 -o heads/rollouts \
    --num-samples 2 --max-new-tokens 48 --temperature 0.9 --batch-size 32 --part-size 128 --dtype float32 --keep-states
for reward in vader preference; do
    # The rollouts are the same for both rewards; only their labels differ.
    [ -d "heads/$reward/rollouts" ] || { mkdir -p "heads/$reward" && cp -r heads/rollouts "heads/$reward/copy" \
        && mv "heads/$reward/copy" "heads/$reward/rollouts"; }
    spec=hf_recontrol:vader
    [ "$reward" = vader ] || spec=heads/reward-model
    "$BIN/recontrol" label "heads/$reward/rollouts" --reward "$spec"
    "$BIN/recontrol" states "heads/$reward/rollouts" -m "$base" -o "heads/$reward/states/lm_head" --dtype float32
    "$BIN/recontrol" train "heads/$reward/states/lm_head" -o "heads/$reward/head" --head-sizes 512 --advantage-sizes 256 \
        --advantage-patience 5 --no-critic --gae-lambda 0 --no-token-bias
    "$BIN/python" benchmarks/ablations.py --rollouts "heads/$reward/rollouts" --states "heads/$reward/states" \
        --output "heads/$reward/ablations.json"
done
