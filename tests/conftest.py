"""Fixtures that the tests of several rooms share."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
torch.set_num_threads(1)  # the models are tiny; a second thread only waits, and waits badly on a busy machine


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights, tokenizers and datasets: SLUICE_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("SLUICE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "models" / "stories3M" / "config.json").is_file():
        pytest.skip(f"no real data at {folder} (set SLUICE_DATA)")
    return folder
