"""How soon Flower asks again for an object of a message that is still being sent.

A message is listed before its objects are all there. Whoever looks in between is told so, and Flower asks
again after a second, then two, and so on; there is no option for it. The first pause is made shorter,
and the later ones double as before; where a release of Flower has no such default, nothing changes.
"""

import importlib

_MODULE = "flwr.supercore.inflatable.inflatable_utils"
_FUNCTION = "pull_objects"
_FIRST_PAUSE = "initial_backoff"
_SECONDS = 0.05


def pull_sooner(module: str = _MODULE) -> bool:
    """Shorten the first pause in this process; return whether there is one to shorten."""
    try:
        pull = getattr(importlib.import_module(module), _FUNCTION)
        before = pull.__kwdefaults__[_FIRST_PAUSE]
    except (ImportError, AttributeError, KeyError, TypeError):
        return False
    pull.__kwdefaults__[_FIRST_PAUSE] = min(before, _SECONDS)
    return True
