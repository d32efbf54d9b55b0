"""Makes `lm_eval --model bmojo` known to the command `lm_eval`, which has no plug-ins of its own.

Under that command torch is imported before the model's name is looked up, and torch calls `register` at the end of
its import (entry point `torch.backends`). As it does so in every process, this module stands outside of the package,
imports nothing of its own accord and, without lm_eval, does nothing.
"""

import sys
import warnings


def register() -> None:
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401, which lists its own models first
        from lm_eval.api.registry import model_registry

        if "bmojo" not in model_registry:
            model_registry.register("bmojo", target="bmojo.eval.harness:HarnessLM")  # imported when it is asked for
    except (ImportError, AttributeError, TypeError) as error:  # not to break `import torch`
        warnings.warn(f"this lm_eval can't be told of `--model bmojo` ({error}); 0.4.13 can", stacklevel=2)
