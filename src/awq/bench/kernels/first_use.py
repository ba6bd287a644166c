"""`python -m awq.bench.kernels.first_use cuda:0`: seconds that a process's first use of a model's linears costs.

In a process of its own, since a kernel is compiled or loaded once in each; AWQ_CACHE says which compiled ones it finds.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from awq.bench.kernels.shapes import Setting, find_shapes
from awq.bench.kernels.weights import random_linear
from awq.linear import QuantLinear

_ROWS = (1, 8, 16, 32, 64, 128, 512, 2048)


def main(device: torch.device) -> None:
    settings = [Setting(shape, 128, torch.float16) for shape in find_shapes(["llama-2-7b"])]
    weights = [random_linear(setting, device)[0] for setting in settings]
    inputs = {k: torch.randn(max(_ROWS), k, device=device).half() for k in {s.shape.in_features for s in settings}}
    torch.cuda.synchronize(device)

    def use() -> float:
        start = time.perf_counter()
        for packed in weights:
            linear = QuantLinear(packed)
            linear.prepare(keep_packed=True)
            for rows in _ROWS:
                linear(inputs[packed.in_features][:rows])
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.cuda.device(device), torch.inference_mode():
        first, again = use(), use()
    json.dump({"first_s": first, "again_s": again, "extra_s": first - again}, sys.stdout)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
