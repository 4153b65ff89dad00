"""Model card of a saved adapter: PEFT loads our tuners only after `import thawline.tuners`."""

from __future__ import annotations

__all__ = ["add_import_line"]

from pathlib import Path

IMPORT_LINE = "import thawline.tuners"

SECTION = f"""
## How to load

This adapter is of a type that PEFT learns from thawline (`pip install thawline`):

```python
{IMPORT_LINE}  # registers the tuner with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def add_import_line(folder: str | Path) -> None:
    """Add the import line to the model card of `folder`, which is created if missing."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else "# PEFT adapter\n"
    if IMPORT_LINE not in text:
        card.write_text(f"{text.rstrip()}\n{SECTION}", encoding="utf-8")
