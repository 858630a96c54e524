"""Draw random weights of a config.json on the GPU: `python -m benchmarks.weights CONFIG.json FOLDER`.

Takes seconds, where one CPU thread takes minutes. A folder that is there already is kept.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def draw(source: Path, folder: Path) -> None:
    """Write the model's bf16 weights to `folder`; only a finished one has this name."""
    if (folder / "config.json").is_file():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    model.save_pretrained(part, max_shard_size="4GB")
    part.rename(folder)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
