"""Import DeepSpeed and transformers without what they import for features that are not used here.

A training worker is a fresh process, so imports are most of its start-up. Of about 9 s of one core, DeepSpeed spends
1.8 s on MLflow (for its autotuner) and transformers 0.8 s on SciPy and scikit-learn (for detection losses and assisted
decoding). Both treat them as optional, so hiding them while the import runs is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

UNUSED = ("mlflow", "scipy", "sklearn")


@contextmanager
def without_modules(*names: str) -> Iterator[None]:
    """Inside it, importing one of `names` raises ModuleNotFoundError, unless it was imported before."""
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(
        dict.fromkeys(hidden)
    )  # None there is the import system's own way to say that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            if modules.get(name, name) is None:
                del modules[name]
