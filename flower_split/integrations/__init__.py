"""Other people's training loops over a split model: transformers' Trainer, TRL's trainers."""
