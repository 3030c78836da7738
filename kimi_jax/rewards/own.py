"""Functions of the user, by name: verifiers and components of the reward."""

import difflib
import functools
import importlib
from collections.abc import Callable


@functools.cache
def find_function(name: str) -> Callable:
    """The function "module:function". Raises ValueError that says what is wrong with the name."""
    module_name, colon, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, function)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"there is no {name!r} ({error}): give 'module:function' of a module that Python finds from where the run "
            "is started, or on PYTHONPATH"
        ) from error
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = "".join(f"; did you mean {module_name}:{key}?" for key in difflib.get_close_matches(function, own, n=1))
        raise ValueError(f"there is no {name!r} ({error}){near or ': give module:function'}") from error
    if not colon or not callable(found):
        raise ValueError(f"{name!r} is no function: give 'module:function'")
    return found
