"""Task files for lm-evaluation-harness and the prompts that they use."""
