#!/usr/bin/env bash
# The base optimizer on validation images of seeds 900 and 901, which neither tune nor report: what its learning rate and
# epochs were chosen from. Takes the data, by default fashion_mnist.
set -euo pipefail
for seed in 900 901; do
    for setting in "0.1 12" "0.2 12" "0.4 12" "0.2 24" "0.2 48"; do
        read -r lr epochs <<<"$setting"
        sam-masks train --data "${1:-fashion_mnist}" --n_train 1500 --n_val 2000 --model resnet_small --batch_size 64 \
            --mask none --lr "$lr" --epochs "$epochs" --seed "$seed" --quiet --out "results/base/$lr-$epochs-$seed"
    done
done
sam-masks runs results/base
