"""Values of annotation files: ids, numbers, sizes and flags, as numbers or as text.

Tools write the same value in several ways: an id as 3, 3.0 or "3", a flag as 0, false or "0". Each function
returns one form for all of them and refuses what is none, in words that follow the name of the field.
"""

from __future__ import annotations

__all__ = ["to_flag", "to_id", "to_number", "to_size", "to_text"]

import math
import re

FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}


def to_id(value: object) -> int | str:
    """Return an id: 3 for 3, 3.0 and "3"; other text ("a7", "007") as it is. Raises: ValueError."""
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text.split(".")[0]) if re.fullmatch(r"-?(0|[1-9]\d*)(\.0+)?", text) else text
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    raise ValueError(f"must be an integer or a name, got {value!r}")


def to_number(value: object) -> float:
    """Return a finite number, given as such or as text. Raises: ValueError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a number, got {value!r}")
    return number


def to_size(width: object, height: object) -> tuple[int, int] | None:
    """Return (width, height) in pixels; None where either is absent, empty or 0. Raises: ValueError."""
    sides = [0.0 if value in (None, "") else to_number(value) for value in (width, height)]
    if any(side < 0 or not side.is_integer() for side in sides):
        raise ValueError(f"must be whole numbers of pixels, got {width!r} and {height!r}")
    return (int(sides[0]), int(sides[1])) if all(sides) else None


def to_flag(value: object) -> bool:
    """Return a flag, given as 0 or 1, false or true, number or text; absent: False. Raises: ValueError."""
    text = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if text not in FLAGS:
        raise ValueError(f"must be 0 or 1, got {value!r}")
    return FLAGS[text]


def to_text(value: object) -> str:
    """Return a name, given as text or a number, without outer spaces. Raises: ValueError: if it is none."""
    is_name = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not is_name or not str(value).strip():
        raise ValueError(f"must be text, got {value!r}")
    return str(value).strip()
