"""What one trial does. Knows torch, transformers, peft, bitsandbytes and trl; never imports `sweep`."""
