"""A process of its own for what brings threads and settings of a whole process along, as torch does."""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType


def one_process(initializer: Callable[[], object]) -> ProcessPoolExecutor:
    """A pool of one new process, which calls `initializer` first.

    It does not import the main module of this one, as multiprocessing has it: a script without
    `if __name__ == "__main__"` would begin once more there.
    """
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=initializer)
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # of no file: there is nothing to import
    try:
        pool.submit(int)  # has it start
    finally:
        sys.modules["__main__"] = main
    return pool
