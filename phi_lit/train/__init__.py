"""Training: one loop behind `litgpt pretrain` and `litgpt finetune_full`."""
