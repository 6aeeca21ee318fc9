"""pytest plugin: lets PyPI's torchvision be imported beside a CPU build of torch.

Its compiled half wants CUDA's libraries, and its Python half registers a fake for operators that
this half would have defined. Defined here, without a kernel; resizing pictures never calls them.
For tests alone: `make test-extras` names it.
"""

import torch

if torch.version.cuda is None:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
