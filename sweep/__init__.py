"""Find the QLoRA configuration to train with: from space.yaml to the report. Imports no torch."""
