"""The callback inside libraries that we did not write."""

import importlib.util
from pathlib import Path

import torch

# Beside torch's CPU build a torchvision for CUDA cannot load its operators, nor be imported without these
# two, of which no training here makes use.
_found = importlib.util.find_spec("torchvision")
if _found is not None and _found.origin is not None:
    try:
        torch.ops.load_library(Path(_found.origin).parent / "_C.so")
    except OSError:
        for _name in ("nms", "qnms"):
            _arguments = "(Tensor dets, Tensor scores, float iou_threshold)"
            torch.library.define(f"torchvision::{_name}", f"{_arguments} -> Tensor")
