"""Lets torchvision be imported beside a CPU torch; Python runs this where PYTHONPATH names it.

torchvision's wheels want CUDA for their compiled operators and do without them but for these two,
which have to be known. They are for detecting objects; vLLM imports torchvision to resize images.
"""

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", SCHEMA)
