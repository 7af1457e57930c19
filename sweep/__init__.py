"""Find the QLoRA configuration to train with: from space.yaml to the report. Imports no torch.

What the verbs of `python -m sweep` do, for notebooks and programs:

    from sweep import load, look, ranking, run

    outcome = run(load("space.yaml", ["search.trials=4"]))
    best = ranking(look("sweeps/pricer").entries)[0]
"""

import importlib
from typing import Any

_HOMES = {
    "load": "sweep.spec",
    "show_plan": "sweep.plan:show",
    "run": "sweep.runner",
    "look": "sweep.status",
    "records": "sweep.status",
    "ranking": "sweep.study",
    "rerun_spec": "sweep.status",
    "ask": "sweep.requests",
    "upload": "sweep.sync",
    "make_view": "sweep.workspace:make_for",
    "starter": "sweep.init",
    "take_home": "sweep.export",
    "write_report": "sweep.page:write",
    "SweepSpec": "sweep.spec",
    "Outcome": "sweep.runner",
    "Status": "sweep.status",
    "Ledger": "sweep.study",
    "Entry": "sweep.study",
    "Home": "sweep.export",
    "SpecError": "sweep.spec",
    "Refused": "sweep.validation",
    "Failed": "sweep.sync",
    "NoSweep": "sweep.status",
    "NotKept": "sweep.export",
    "DataError": "trainables.data",
}
"""Name -> module that has it, and what it is called there if not the same; imported when it is asked for, because most
bring seconds of imports along. No module here has such a name: importing it would put it in the place of the other."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, called = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), called or name)


def __dir__() -> list[str]:
    return __all__
