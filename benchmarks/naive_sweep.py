"""A sweep as the documentation of the libraries shows it: what `benchmarks.whole_sweep` compares with.

A function trainable builds TRL's SFTTrainer on a model that transformers quantises while it loads; Ray runs one process
a trial, with its own OptunaSearch, ASHA and WandbLoggerCallback.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch


def train(config: dict[str, Any]) -> None:
    """One trial; what all trials have in common is in a file."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    work = json.loads(Path(os.environ["NAIVE_WORK"]).read_text())
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[work["compute_dtype"]]
    model = AutoModelForCausalLM.from_pretrained(
        work["model"],
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
    )
    # On CPUs with bf16 instructions bitsandbytes repacks a layer's weight when it first evaluates, and from then on no
    # gradient goes through that layer.
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    rows = load_dataset("json", data_files={"train": work["train"], "validation": work["validation"]})

    class Report(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **rest):  # type: ignore[no-untyped-def]
            tune.report({"eval_loss": metrics["eval_loss"], "step": state.global_step})

    cpu = not torch.cuda.is_available()
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir="trainer",
            max_steps=work["steps"],
            per_device_train_batch_size=work["batch_size"],
            per_device_eval_batch_size=8,
            learning_rate=config["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_length=work["max_length"],
            bf16=work["compute_dtype"] == "bf16",
            activation_checkpointing=False,
            eval_strategy="steps",
            eval_steps=work["steps"] // work["evaluations"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=cpu,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        peft_config=LoraConfig(
            r=config["r"],
            lora_alpha=2 * config["r"],
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Report()],
    )
    trainer.train()
    trainer.save_model("adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="JSON file that benchmarks.whole_sweep wrote")
    asked = parser.parse_args()
    work = json.loads(asked.work.read_text())
    os.environ["WANDB_MODE"] = "offline"
    os.environ["NAIVE_WORK"] = str(asked.work.absolute())
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    space = {
        "r": optuna.distributions.CategoricalDistribution([8, 16]),
        "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
    }
    found = tune.Tuner(
        tune.with_resources(train, {"cpu": work["cpus"], "gpu": work["gpus"]}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(space, metric="eval_loss", mode="min", points_to_evaluate=work["configs"]),
            scheduler=ASHAScheduler(
                metric="eval_loss", mode="min", max_t=work["evaluations"], grace_period=work["evaluations"]
            ),
            num_samples=len(work["configs"]),
        ),
        run_config=tune.RunConfig(
            name="naive",
            storage_path=str(asked.work.parent / "naive"),
            callbacks=[WandbLoggerCallback(project="naive", log_config=True)],
        ),
    ).fit()
    losses = [found[i].metrics["eval_loss"] for i in range(len(found))]
    print(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main()
