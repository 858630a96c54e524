"""Skip tests that need a device or assets this machine lacks, with the reason."""

import pytest
import torch

from lit_sparse import demo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a device or assets that this machine does not have, with the reason."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if not demo.cached():
        reasons["needs_demo"] = "needs the demo model and data: make assets"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
