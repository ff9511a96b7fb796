"""Lets a CUDA build of torchvision import beside a CPU build of torch.

The default registry has no CPU build of torchvision: on CPU torch its import fails with ``operator torchvision::nms
does not exist``, and with it open_clip and transformers. Nothing here calls those two operators, so declaring their
schemas is enough. The set-up copies this file into the environment with a ``.pth`` line that calls `install`: it acts
in every process (vLLM's engine and Ray's workers too), and only when somebody imports torchvision.
"""

import importlib.abc
import sys
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a torch Library undoes its definitions when it is collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG002
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)
            _kept.append(library)


def install() -> None:
    """Act before the first import of torchvision; a second call (a venv reads its .pth files twice) changes nothing."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
