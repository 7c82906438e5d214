"""GroupedLinear: a linear map of groups of channels."""

import math

import torch
from torch import nn


class GroupedLinear(nn.Module):
    """A linear map whose weight is block diagonal: group i of the inputs makes group i of the outputs.

    weight: (groups, out_features / groups, in_features / groups)
    bias: (out_features,) or None
    """

    def __init__(self, in_features, out_features, groups, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features // groups, in_features // groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        bound = math.sqrt(groups / in_features)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):  # (B, N, in) -> (B, N, out)
        groups, _, width = self.weight.shape
        tokens, weight = x.reshape(-1, groups, width).transpose(0, 1), self.weight.mT
        if self.bias is None:
            y = tokens @ weight
        else:  # added before the one rounding of half precision, as nn.Linear does
            y = torch.baddbmm(self.bias.view(groups, 1, -1), tokens, weight)
        return y.transpose(0, 1).unflatten(0, x.shape[:-1]).flatten(-2)
