"""Fine-tuning recipes: scripts to run and to copy. See `finetune.py` and `evaluate.py`."""
