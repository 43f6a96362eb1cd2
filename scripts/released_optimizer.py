"""Loads the authors' released optimizer, as the package modelscope carries it.

Importing `modelscope` pulls in a hub client and much else; the optimizer is one file that needs torch, numpy and
a logger. So that file is loaded alone, with a stand-in for the module that gives the logger.
"""

import importlib.util
import logging
import pathlib
import sys
import types

VERSION = "1.40.2"
FILE = "trainers/optimizer/child_tuning_adamw_optimizer.py"


def load():
    """Returns the released module, with `ChildTuningAdamW` and `calculate_fisher`.

    Raises SystemExit with the mend when the package is missing.
    """
    package = importlib.util.find_spec("modelscope")
    if package is None:
        raise SystemExit(f"modelscope is missing: run `pip install --no-deps modelscope=={VERSION}`")
    path = pathlib.Path(package.origin).parent / FILE

    logger = types.ModuleType("modelscope.utils.logger")
    logger.get_logger = lambda: logging.getLogger("modelscope")
    stand_ins = {
        "modelscope": types.ModuleType("modelscope"),
        "modelscope.utils": types.ModuleType("modelscope.utils"),
        "modelscope.utils.logger": logger,
    }
    replaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location("released_child_tuning", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, original in replaced.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
    return module
