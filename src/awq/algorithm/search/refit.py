"""Group scales refitted by least squares with the codes fixed: rounding moved the weights, and the best scale."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import fair_matmul, fast_matmul, operand, product
from awq.algorithm.ranks import by_rows
from awq.algorithm.search.affine import Affine
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.loss import row_gains

_TOGETHER = 4  # groups in a product: fewer waste a GPU's launches, more a CPU's memory
_RIDGE = 1e-6  # relative; keeps the systems of all-zero groups solvable


def refit_scales(weight: Tensor, codes: Tensor, grid: Affine, gram: Tensor, loops: Loops = PLAIN_LOOPS) -> Affine:
    """The grid with the scales that minimize the output error of `codes` [out, in], row by row.

    A row keeps its old scales where the new ones, as float16 stores them, are not better. Zeros stay as they are.
    """

    with fast_matmul():
        fast = operand(gram)

    def refitted(part: slice) -> Tensor:
        return _refitted(weight[part], codes[part], grid.rows(part), gram, fast, loops)

    return replace(grid, scales=by_rows(weight, refitted, torch.empty_like(grid.scales)))


def _refitted(weight: Tensor, codes: Tensor, grid: Affine, gram: Tensor, fast: Tensor, loops: Loops) -> Tensor:
    before = grid.decode(codes).sub_(weight)
    steps = replace(grid, scales=torch.ones_like(grid.scales)).decode(codes)  # code - zero
    with fast_matmul():
        scales = (grid.scales + _change(steps, before, fast, grid.scales.shape[1], loops)).to(torch.float16).float()
    with fair_matmul():
        better = row_gains(before, replace(grid, scales=scales).decode(codes).sub_(weight), gram) > 0
    keep = better & (scales > 0).all(1)
    return torch.where(keep.unsqueeze(1), scales, grid.scales)


def _change(steps: Tensor, delta: Tensor, gram: Tensor, groups: int, loops: Loops = PLAIN_LOOPS) -> Tensor:
    """What the scales lack, by normal equations of every row: sum_h (u_g G u_h) t_h = -u_g G delta.

    u_g are the steps of group g, `delta` the error with the scales as they are. Asked for whole, with the weight on the
    right, the scales lost 1 to 50 % of the gain to products of bf16 (SmolLM2), and so 0.1 %.
    """
    out, size = steps.shape[0], steps.shape[1] // groups
    grouped = steps.view(out, groups, size)
    fast = operand(grouped)  # whole numbers: exact
    normal = steps.new_empty(out, groups, groups)
    for first in range(0, groups, _TOGETHER):  # the matrix is symmetric
        some = fast[:, first : first + _TOGETHER].transpose(0, 1)
        count = len(some)
        moments = gram[first * size : (first + count) * size, first * size :].view(count, size, -1)
        loops.group_dots(torch.bmm(some, moments).view(count, out, -1, size), fast, normal, first)
    right = product(delta, gram).view(out, groups, size).mul_(grouped).sum(-1).neg_()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(normal.dtype).tiny
    change: Tensor = torch.linalg.solve_ex(normal, right)[0]
    return change
