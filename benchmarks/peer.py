"""The reference implementation, from the user's checkout of state-spaces/s4."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any


def load(checkout: Path, module: str) -> Any:
    """Imports a module of the checkout, without its optional extensions.

    It imports pytorch_lightning for one decorator, and uses a GPU library if that is installed; both are replaced, so
    that its pure torch code runs.
    """
    if not (checkout / "models" / "s4" / "s4.py").is_file():
        sys.exit(f"{checkout} holds no models/s4/s4.py; give a checkout of state-spaces/s4.")
    utilities = types.ModuleType("pytorch_lightning.utilities")
    utilities.rank_zero_only = lambda f: f  # type: ignore[attr-defined]
    sys.modules.setdefault("pytorch_lightning", types.ModuleType("pytorch_lightning"))
    sys.modules.setdefault("pytorch_lightning.utilities", utilities)
    sys.modules["pykeops"] = None  # type: ignore[assignment]
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(
            f"the reference needs the package {error.name}, which is not installed; install it, or leave --peer out."
        )
    finally:
        logging.disable(logging.NOTSET)
