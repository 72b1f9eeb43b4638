"""For all tests: one thread, so that timings and rounding do not depend on the machine's load."""

import torch

torch.set_num_threads(1)
