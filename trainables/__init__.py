"""What one trial does. Knows torch, transformers, peft, bitsandbytes and trl; never imports `sweep`."""

import logging

# Where it is imported on a CPU that has AVX512-BF16, it warns that it lacks a kernel, which nothing here would call.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
