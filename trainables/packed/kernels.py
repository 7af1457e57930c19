"""CUDA code of elementwise operations; torch compiles it when it is called first, with nothing but CUDA's libraries."""

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def kernel(code: str, results: int = 1) -> Callable[..., Any]:
    """The last function of `code` on every element of tensors that are broadcast; bf16 comes as fp32.

    With several results the function writes to references, its last arguments.
    """
    from torch.cuda import jiterator

    if results == 1:
        one: Callable[..., Any] = jiterator._create_jit_fn(code)
        return one
    several: Callable[..., Any] = jiterator._create_multi_output_jit_fn(code, results)
    return several
