"""Names that settings may have and files do have, apart from what needs torch.

Importing torch takes seconds; a mistake on the command line should not wait for them.
"""

SCHEDULES = ("exp", "linear", "cosine", "sqrt")
PREDICTIONS = ("x0", "eps", "v")
METHODS = ("ddpm", "ddim", "dpm++")
DENOISERS = ("linear", "mlp", "adaln")
MAX_STEPS = 65536  # of a sampler; the noise has so many counters (`ops.noise`)

BASELINE_SETS = ("all", "quick", "none")  # what to compare with
CHECKPOINT = "checkpoint.safetensors"
