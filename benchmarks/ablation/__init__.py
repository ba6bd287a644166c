"""What each step of quantization is worth: one model, many variants, each with its paired error to the float model.

    python -m benchmarks.ablation run MODEL --prose TEXT --code TEXT --calibrate-prose TEXT --calibrate-code TEXT
    python -m benchmarks.ablation table benchmarks/results/ablation-MODEL.csv --docs docs/accuracy.md

Run from the root of a checkout. A row that is in the CSV already is not measured again.
"""
