"""Write the small model without quantization, for a run in bf16.

python accuracy/dequantize.py CHECKPOINT DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "demo"))
import tiny_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path, help="which must not exist yet")
    args = parser.parse_args()
    print(tiny_checkpoint.write_dequantized(args.checkpoint, args.directory))
