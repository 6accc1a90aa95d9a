"""For all tests: one CPU thread, because the models are tiny and sums must be repeatable."""

import torch

torch.set_num_threads(1)
