"""Optuna's CMA-ES without the pickle: the state that a trial keeps of it is read as numbers and nothing else.

Optuna keeps the optimiser pickled in the study, so that to go on with a study of somebody else's would run what they
put there.
"""

import io
import pickle
from typing import Any

from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial

from sweeper.errors import SpecError

# all that a pickled optimiser is made of
ALLOWED = frozenset(
    {
        ("cmaes._cma", "CMA"), ("cmaes._cmawm", "CMAwM"), ("cmaes._sepcma", "SepCMA"), ("numpy", "dtype"),
        ("numpy", "ndarray"), ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    }
)  # fmt: skip


class _Numbers(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of it")
        return super().find_class(module, name)


class PlainCmaEs(CmaEsSampler):
    """CMA-ES that takes up an optimiser kept in a study only where it is one."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """As Optuna's.

        Raises:
            SpecError: what the study keeps is no optimiser.
        """
        for trial in reversed(completed_trials):
            kept = {key: text for key, text in trial.system_attrs.items() if key.startswith(self._attr_key_optimizer)}
            if kept:
                try:
                    return _Numbers(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(kept)))).load()
                except Exception as error:  # a damaged pickle raises whatever its opcodes run into
                    raise SpecError(
                        f"the search's study keeps a state of CMA-ES that cannot be read ({error}): move it away, or "
                        "choose another hydra.sweeper.sampler"
                    ) from None
        return None
