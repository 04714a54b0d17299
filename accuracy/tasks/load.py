"""Where lm-eval finds the questions, whatever its working directory is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def questions(skill: str, **_: Any) -> DatasetDict:
    """The questions of a skill, as lm-eval's `custom_dataset`; it passes the model's arguments too."""
    lines = Path(__file__).with_name(f"{skill}.jsonl").read_text().splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))
