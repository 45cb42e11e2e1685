"""What a run minimises. `OBJECTIVES` is the table of them."""

from typing import Any

OBJECTIVES: dict[str, Any] = {}
