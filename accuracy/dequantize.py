"""Write the small model without quantization, for a run in bf16.

python accuracy/dequantize.py CHECKPOINT DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "demo"))
import tiny_checkpoint

if __name__ == "__main__":
    print(tiny_checkpoint.write_dequantized(Path(sys.argv[1]), Path(sys.argv[2])))
