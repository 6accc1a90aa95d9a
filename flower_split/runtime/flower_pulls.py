"""How soon Flower asks again for an object of a message that is still being sent.

A message is listed before its objects are all there. Whoever looks in between is told so, and Flower asks
again after a second, then two, and so on; there is no option for it. The first pause is made shorter,
and the later ones double as before; where a release of Flower has no such default, nothing changes.
"""

import importlib

_MODULE = "flwr.supercore.inflatable.inflatable_utils"
_FUNCTIONS = ("pull_objects", "pull_and_inflate_object_from_tree")  # each has a default of its own
_FIRST_PAUSE = "initial_backoff"
_SECONDS = 0.05


def pull_sooner(module: str = _MODULE) -> bool:
    """Shorten the first pause in this process; return whether all the functions that pull have one."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return False
    found = [getattr(getattr(loaded, name, None), "__kwdefaults__", None) for name in _FUNCTIONS]
    defaults = [named for named in found if named and _FIRST_PAUSE in named]
    for named in defaults:
        named[_FIRST_PAUSE] = min(named[_FIRST_PAUSE], _SECONDS)
    return len(defaults) == len(_FUNCTIONS)
