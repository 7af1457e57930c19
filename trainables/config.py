"""The hyperparameters of one trial: typed, bounded, with units and documented defaults.

These are the names that a search space may use. Whatever a space does not name keeps the default given here.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ComputeDtype = Literal["bf16", "fp32"]
QuantType = Literal["nf4", "fp4"]


class QLoRAConfig(BaseModel):
    """One configuration of QLoRA fine-tuning (Dettmers et al. 2023, arXiv:2305.14314), frozen.

    A trial is a function of this object, the model, the data and the budget: equal configurations give equal
    loss curves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the two adapter matrices of every target module."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapter strength: the low-rank term is scaled by alpha / r (by alpha / sqrt(r) with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Probability that an input of the adapter is dropped while training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear` (every linear layer but the output head) or name endings."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA, arXiv:2312.03732)."""

    quant_type: QuantType = "nf4"
    """4-bit data type in which the frozen base is stored."""
    compute_dtype: ComputeDtype = "bf16"
    """Data type of activations and matrix products; adapter weights are fp32 always."""
    double_quant: bool = True
    """Quantise the quantisation constants too (saves about 0.4 bit per parameter)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of all optimiser steps over which the learning rate rises from 0; rounded up to whole steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: `cosine` and `linear` fall to 0 by the last step, `constant` stays."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`adamw` is torch's; `paged_adamw_8bit` is bitsandbytes' with 8-bit moments in paged memory, CUDA only."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapter weights."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of a step is scaled down to this L2 norm when it is larger."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows in one optimiser step."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that a step is cut into: saves memory, the gradient stays that of the whole batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds adapter initialisation, order of the data and dropout."""

    def micro_batch(self, halvings: int = 0) -> int:
        """Rows that go through the model at once; it is halved where memory ran out, which leaves `batch_size`."""
        return max(1, self.batch_size // self.accumulation >> halvings)

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


def by_memory(config: QLoRAConfig) -> tuple[int, ...]:
    """Sorts configurations by the memory that they take."""
    return (
        config.compute_dtype == "fp32",
        not config.gradient_checkpointing,
        config.micro_batch(),
        config.target_modules == "all-linear",
        config.r,
    )


class DataConfig(BaseModel):
    """Where the rows come from and how they are cut: the same for all trials of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    train: str
    """JSONL, CSV or Parquet file, saved `datasets` directory, or Hub id; prompt/completion, messages or text."""
    validation: Annotated[str, Field(min_length=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The same, or the fraction of `train` that is split off by seed."""
    test: Annotated[str, Field(min_length=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same; scored once, at the end, with the winner and the base, and never trained on nor searched with."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row; longer rows are cut off at the end."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the split when `validation` is a fraction."""
